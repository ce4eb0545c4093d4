"""The production Loader under a run's own settings, on probe images.

What the run has is kept: image size (up to 96 pixels), classes, B, mu, strong recipe, whether images may be mirrored,
labels a class and include_labeled. Only the images are other ones, and no more than a few steps a pass.
B labeled images a step, M = mu * B unlabeled ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fixmatch.config import Config
from fixmatch.data.dataset import Dataset
from fixmatch.data.loader import Loader
from fixmatch.data.split import Split, draw_split
from parity.batches import contents, draws, order, probes
from parity.batches.contents import exact
from parity.batches.watch import Drawn, drawn_only, watched
from parity.case import Case
from parity.compare import Row, compare_tensor

_SIZES = {"digits": 8, "stl10": 96}  # pixels; folder and csv: data.image_size; else 32
_NOT_MIRRORED = ("digits", "svhn")
_DRAWS, _FEW_DRAWS = 100_000, 20_000
_STEPS, _FEW_STEPS = 10_000, 2_000  # at most, however small the batches
_FAR, _NOT_SO_FAR = 2**16, 2**12  # steps within which none is drawn like another
_PIXELS = 2**19  # of each kind of view and batch that are compared with Pillow's: 512 images of 32 x 32


@dataclass(frozen=True)
class Probe:
    """Settings of a run, with images and a split to go with them."""

    data: Dataset
    split: Split
    per_class: np.ndarray  # int64 [K], labels
    include_labeled: bool
    batch: int
    mu: int
    flip: bool
    strong: str
    seed: int

    def loader(self, rank: int = 0, world_size: int = 1, seed: int | None = None) -> Loader:
        """The production Loader; CTAugment draws from its first rates, since nobody tells it of probes."""
        return Loader(self.data, self.split, self.batch, self.mu, self.seed if seed is None else seed, self.flip, rank,
                      world_size, strong=self.strong, ahead=_FAR + _STEPS)


def probe(config: Config, classes: int, seed: int) -> Probe:
    """The Probe of a run. Its passes are of more than four steps, and never of a whole number of them."""
    mu = config.train.mu if config.ssl.mode == "fixmatch" else 0
    images = max(500, 6 * classes, 4 * config.train.batch_size * mu + config.train.batch_size * mu // 2)
    asked = config.data.labels_per_class or [config.data.num_labeled // classes] * classes
    per_class = np.clip(asked, 1, images // classes // 2)
    size = _SIZES.get(config.data.name, min(96, config.data.image_size or 32))
    labels = np.random.default_rng([seed, 8]).permutation(np.arange(images) % classes)
    split = draw_split(labels, classes, tuple(per_class.tolist()), seed, config.data.include_labeled)
    flip = config.augment.flip if config.augment.flip is not None else config.data.name not in _NOT_MIRRORED
    return Probe(probes.make(labels, size), split, per_class, config.data.include_labeled, config.train.batch_size, mu,
                 flip, config.augment.strong, seed)


def rows(case: Case, thorough: bool = True) -> Iterator[Row]:
    """Everything that can be said of the Loader under the settings of case.config, in the order of diagnosis.

    After a batch of the wrong shape nothing more is said, since nothing else could be compared.

    Args:
        thorough: 10^5 draws of strong views instead of 2 * 10^4, and more of the pictures.
    """
    run = probe(case.config, case.num_classes, case.seed)
    before = run.data.images.copy()
    batch, drawn = watched(run.loader(), 0)
    shapes = [*contents.shapes(batch, drawn, run.batch, run.batch * run.mu, run.data.images.shape[1:3], run.strong)]
    yield from shapes
    if not all(row.passed for row in shapes):
        return
    yield from order.split(run.split, run.data.labels, run.per_class, run.include_labeled, whole=True)
    yield from _shown(run)
    yield from _order(run)
    yield from _pictures(run, 3 if thorough else 1)
    yield from _draws(run, *((_DRAWS, _STEPS, _FAR) if thorough else (_FEW_DRAWS, _FEW_STEPS, _NOT_SO_FAR)))
    yield exact("data/images are as they were", np.array_equal(before, run.data.images),
                "the Loader wrote to the data set")


def _shown(run: Probe) -> Iterator[Row]:
    """Two passes over the unlabeled images, read from the pixels of x and the weak views alone."""
    loader = run.loader()
    steps = range(2 * loader.unlabeled.steps_per_pass if run.mu else 2)
    batches = [loader.batch(step) for step in steps]
    for name, views, targets in (("labeled", "x", "targets_x"), ("unlabeled", "u_w", "targets_u")):
        if not (stream := getattr(loader, name)):
            continue
        read = [probes.read(getattr(batch, views), run.data) for batch in batches]
        index, labels = np.concatenate([r.index for r in read]), np.concatenate([r.label for r in read])
        strange = int((index < 0).sum())
        yield exact(f"views/{name} views are flipped crops of images of the data", not strange,
                    f"{strange} of {len(index)} views show something else")
        yield compare_tensor(f"labels/of {name} images", np.concatenate([getattr(b, targets) for b in batches]), labels)
        yield compare_tensor(f"order/{name} images shown", index, np.concatenate([*map(stream.indices, steps)]))


def _order(run: Probe) -> Iterator[Row]:
    """Passes of one rank and of two, other seeds, and batches that are made again or ahead."""
    loader, other = run.loader(), run.loader(seed=run.seed + 1)
    for name, items, size in (("labeled", run.split.labeled, run.batch),
                              ("unlabeled", run.split.unlabeled, run.batch * run.mu)):
        if not size:
            continue
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
        for row in contents.pictures(batch, drawn, run.data.images, loader.labeled.indices(step), unlabeled, most):
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
    _, later = drawn_only(run.loader(), range(steps, far + steps, steps))
    every = [b"".join(field.tobytes() for plan in d.labeled + d.unlabeled for field in _leaves(plan))
             for d in (*plans[""], *later, *plans["other rank"], *plans["other seed"])]
    yield exact("draws/no two batches alike", len(set(every)) == len(every) or not run.mu,
                         f"{len(every) - len(set(every))} of {len(every)} batches are drawn like another")


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
