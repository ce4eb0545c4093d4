"""The production Loader under a run's own settings, on images that say which they are."""

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np

from fixmatch import inputs
from fixmatch.data.augment import ctaugment
from fixmatch.data.split import draw_split
from parity.batches import contents, draws, order, probes
from parity.batches.contents import exact
from parity.batches.settings import Probe, probe
from parity.batches.watch import Drawn, drawn_only, watched
from parity.case import Case
from parity.compare import Row, compare_tensor
from parity.small_run import small_source

_DRAWS, _FEW_DRAWS = 100_000, 20_000
_STEPS, _FEW_STEPS = 10_000, 2_000  # at most, however small the batches
_APART, _FEW_APART = 2**16, 2**12  # how far apart steps are that are seen not to be drawn alike
_PIXELS = 2**19  # of each kind of view and batch that are compared with Pillow's: 512 images of 32 x 32


def rows(case: Case, thorough: bool = True) -> Iterator[Row]:
    """Everything that can be said of the Loader under the settings of case.config, in the order of diagnosis.

    After a batch of the wrong shape nothing more is said, since nothing else could be compared.

    Args:
        thorough: 10^5 draws of strong views instead of 2 * 10^4, and more of the pictures.
    """
    run = probe(case.config, case.num_classes, case.seed)
    before = zlib.crc32(run.data.images)
    batch, drawn = watched(run.loader(), 0)
    shapes = [*contents.shapes(batch, drawn, run.batch, run.batch * run.mu, run.data.images.shape[1:3], run.strong)]
    yield from shapes
    if not all(row.passed for row in shapes):
        return
    yield from order.split(run.split, run.data.labels, run.per_class, run.include_labeled, whole=True)
    yield from _split_seeds(case)
    yield from _shown(run)
    yield from _order(run)
    if run.strong == "ctaugment":
        yield from _rates(case.seed)
    yield from _pictures(run, 3 if thorough else 1)
    yield from _draws(run, *((_DRAWS, _STEPS, _APART) if thorough else (_FEW_DRAWS, _FEW_STEPS, _FEW_APART)))
    yield exact("data/images are as they were", before == zlib.crc32(run.data.images),
                "the Loader wrote to the data set")


def _split_seeds(case: Case) -> Iterator[Row]:
    """A split is that of data.split_seed, 0 included, and of run.seed where there is none."""
    source, classes, config = small_source(case), case.num_classes, case.config
    for split_seed, run_seed, seed in ((None, 3, 3), (0, 3, 0), (5, 3, 5)):
        data = dataclasses.replace(config.data, num_labeled=classes, labels_per_class=(), split_file="", fold=None,
                                   split_seed=split_seed)
        run = dataclasses.replace(config.run, seed=run_seed)
        found = inputs.choose_split(dataclasses.replace(config, data=data, run=run), source)
        expected = draw_split(source.train.labels, classes, classes, seed, data.include_labeled)
        yield compare_tensor(f"split/labeled images with data.split_seed {split_seed}", found.labeled, expected.labeled)


def _rates(seed: int) -> Iterator[Row]:
    """CTAugment's rates for a step are the same however early its batch is made."""
    rng, augment, early = np.random.default_rng(seed), ctaugment.CTAugment(lag=3), {}
    for finished in range(8):
        for step in range(finished, finished + augment.lag + 1):
            early.setdefault(step, augment.policy(step).rates.copy())
        yield compare_tensor(f"draws/rates of step {finished}", augment.policy(finished).rates, early[finished])
        plan = ctaugment.draw_probe(rng, 4)
        augment.update(finished + 1, plan.op, plan.level, rng.random(4))
    yield exact("draws/rates learn", not np.array_equal(early[0], early[finished]), "those of steps 0 and 7 are equal")


def _shown(run: Probe) -> Iterator[Row]:
    """Two passes over the unlabeled images, read from the pixels of x and the weak views alone."""
    loader = run.loader()
    steps = range(2 * loader.unlabeled.steps_per_pass if run.mu else 2)
    names = [name for name, _, _ in run.streams()]
    read, targets = {name: [] for name in names}, {name: [] for name in names}
    for batch in map(loader.batch, steps):
        for name, views, labels in zip(names, (batch.x, batch.u_w), (batch.targets_x, batch.targets_u), strict=False):
            read[name].append(probes.read(views, run.data))
            targets[name].append(labels)
    for name in names:
        index, labels = (np.concatenate([getattr(one, field) for one in read[name]]) for field in ("index", "label"))
        strange = int((index < 0).sum())
        yield exact(f"views/{name} views are flipped crops of images of the data", not strange,
                    f"{strange} of {len(index)} views show something else")
        yield compare_tensor(f"labels/of {name} images", np.concatenate(targets[name]), labels)
        yield compare_tensor(f"order/{name} images shown", index,
                             np.concatenate([*map(getattr(loader, name).indices, steps)]))


def _order(run: Probe) -> Iterator[Row]:
    """Passes of one rank and of two, other seeds, and batches that are made again or ahead."""
    loader, other = run.loader(), run.loader(seed=run.seed + 1)
    for name, items, size in run.streams():
        for world_size in (1, 2):
            ranks = [getattr(run.loader(rank, world_size), name) for rank in range(world_size)]
            for row in order.passes(name, ranks, items, size):
                yield row._replace(tensor=row.tensor + (", two ranks" if world_size > 1 else ""))
        yield order.unlike(f"order/{name} images in another order under another seed",
                           *(order.a_pass([getattr(one, name)]) for one in (loader, other)))
    yield order.same("order/a batch depends on seed, rank and step alone", run.loader().batch(3), loader.batch(3))
    for step, batch in enumerate(loader.batches(1, 4), start=1):
        yield order.same(f"order/batch {step} of those made ahead", batch, loader.batch(step))


def _pictures(run: Probe, steps: int) -> Iterator[Row]:
    """Against Pillow: batches of one rank, and one of the second of two."""
    most = _PIXELS // run.data.images.shape[1]**2
    for name, loader, step in [*(("", run.loader(), step) for step in range(steps)),
                               (", second of two ranks", run.loader(1, 2), 1)]:
        batch, drawn = watched(loader, step)
        unlabeled = loader.unlabeled.indices(step) if run.mu else np.empty(0, np.int64)
        for row in (contents.numbers(batch, unlabeled, loader.split.unlabeled), *contents.pictures(
                batch, drawn, run.data.images, loader.labeled.indices(step), unlabeled, most)):
            yield row._replace(tensor=f"{row.tensor} of step {step}{name}")


def _draws(run: Probe, count: int, most_steps: int, far: int) -> Iterator[Row]:
    """The distribution of at least `count` strong views, or of `most_steps` steps.

    That none of the first `far` steps is drawn like another is seen from the first few and every so many after them:
    between one of these and one of those lies each number of steps.
    """
    steps = min(most_steps, -(-count // (run.batch * max(1, run.mu))))
    found = {name: drawn_only(loader, range(steps)) for name, loader in (
        ("", run.loader()), ("first rank", run.loader(0, 2)), ("other rank", run.loader(1, 2)),
        ("other seed", run.loader(seed=run.seed + 1)))}
    plans = {name: drawn for name, (_, drawn) in found.items()}
    if not run.flip:
        yield draws.never_flipped([plan for d in plans[""] for plan in d.labeled], "labeled")
        yield draws.never_flipped([w for d in plans[""] for plan in d.unlabeled for w in plan[:2]], "unlabeled")
    if run.mu:
        _, later = drawn_only(run.loader(), range(steps, far + steps, steps))
        yield _unlike("draws/steps differ", [*plans[""], *later], [])
        yield _unlike("draws/ranks differ", plans["first rank"], plans["other rank"])
        yield _unlike("draws/seeds differ", plans[""], plans["other seed"])
    tests, columns = {}, {name: _columns(run, drawn) for name, drawn in plans.items()}
    for kind, fields in columns[""].items():
        labels = np.stack([getattr(batch, f"targets_{kind}") for batch in found[""][0]])
        tests |= draws.of_one_view(fields, labels, len(run.per_class)) | draws.of_neighbours(fields)
        tests |= draws.between("on the other rank", columns["first rank"][kind], columns["other rank"][kind])
        tests |= draws.between("under the next seed", fields, columns["other seed"][kind])
    if run.mu:
        weak = {name: column for name, column in columns[""]["u"].items() if name.startswith("weak ")}
        tests |= draws.between("of the same batch", columns[""]["x"], weak)
        tests |= draws.of_order(*(order.a_pass([one.unlabeled], which) for one, which in (
            (run.loader(), 0), (run.loader(), 1), (run.loader(seed=run.seed + 1), 0))))
    yield from draws.judged(tests)


def _unlike(tensor: str, some: list[Drawn], others: list[Drawn]) -> Row:
    """Whether no two batches are drawn alike, to the last bit; fractions among the numbers leave nothing to chance."""
    every = [b"".join(field.tobytes() for plan in drawn.labeled + drawn.unlabeled for field in _leaves(plan))
             for drawn in [*some, *others]]
    alike = len(every) - len(set(every))
    return exact(tensor, not alike, f"{alike} of {len(every)} batches are drawn exactly like another")


def _columns(run: Probe, drawn: list[Drawn]) -> dict[str, dict[str, draws.Column]]:
    """All columns of labeled ("x") and unlabeled ("u") views."""
    size = run.data.images.shape[1:3]
    labeled, unlabeled = ([plan for d in drawn for plan in getattr(d, name)] for name in ("labeled", "unlabeled"))
    found = {"x": draws.weak_columns(labeled, size, run.flip, "labeled")}
    if run.mu:
        found["u"] = (draws.weak_columns([p.weak for p in unlabeled], size, run.flip, "weak")
                      | draws.weak_columns([p.strong for p in unlabeled], size, run.flip, "strong")
                      | draws.strong_columns([p.strong_plan for p in unlabeled]))
    return found


def _leaves(plan):
    """All arrays of a plan of plans."""
    for part in plan:
        yield from _leaves(part) if isinstance(part, tuple) else (part,)
