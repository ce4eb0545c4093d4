"""The production Loader under a run's own settings, on probe images.

What the run has is kept: image size (up to 96 pixels), classes, B, mu, strong recipe, whether images may be mirrored,
labels a class and include_labeled. Only the images are other ones, and no more than a few steps a pass.
B labeled images a step, M = mu * B unlabeled ones.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fixmatch.config import Config
from fixmatch.data.dataset import Dataset
from fixmatch.data.loader import Loader
from fixmatch.data.split import Split, draw_split
from parity.batches import contents, draws, order, probes
from parity.batches.watch import Drawn, drawn_only, watched
from parity.case import Case
from parity.compare import Row

_SIZES = {"digits": 8, "stl10": 96}  # pixels; folder and csv: data.image_size; else 32
_NOT_MIRRORED = ("digits", "svhn")
_DRAWS, _FEW_DRAWS = 100_000, 20_000
_STEPS, _FEW_STEPS = 10_000, 2_000  # at most, however small the batches
_PICTURES, _FEW_PICTURES = 448, 96  # views of each kind and batch that are compared with Pillow's


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
                      world_size, strong=self.strong, ahead=_STEPS)


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

    Args:
        thorough: 10^5 draws of strong views instead of 2 * 10^4, and more of the pictures.
    """
    run = probe(case.config, case.num_classes, case.seed)
    before = run.data.images.copy()
    try:
        shown = yield from _shapes_and_labels(run)
        yield from _order(run, shown)
        yield from _pictures(run, _PICTURES if thorough else _FEW_PICTURES, 3 if thorough else 1)
        yield from draws_of(run, *((_DRAWS, _STEPS) if thorough else (_FEW_DRAWS, _FEW_STEPS)))
    except _Stop:
        return
    yield contents.exact("data/images are as they were", np.array_equal(before, run.data.images),
                         "the Loader wrote to the data set")


class _Stop(Exception):
    """A batch of another shape: nothing after it could be compared."""


def _all(found: Iterator[Row]) -> Iterator[Row]:
    """The rows of `found`, and then an end if one of them failed."""
    failed = False
    for row in found:
        failed |= not row.passed
        yield row
    if failed:
        raise _Stop


def _shapes_and_labels(run: Probe) -> Iterator[Row]:
    """Of two passes of one rank; returns what their weak views show, as {"x" or "u": [Read of each step]}."""
    loader = run.loader()
    steps = 2 * loader.unlabeled.steps_per_pass if run.mu else 2
    shown, counted = {"x": [], "u": []}, (run.batch, run.batch * run.mu, run.data.images.shape[1:3], run.strong)
    for step in range(steps):
        batch, drawn = watched(loader, step)
        if step == 0:
            yield from _all(contents.shapes(batch, drawn, *counted))
        shown["x"].append((batch.targets_x, probes.read(batch.x, run.data)))
        shown["u"].append((batch.targets_u, probes.read(batch.u_w, run.data)))
    yield from order.split(run.split, run.data.labels, run.per_class, run.include_labeled, whole=True)
    for key, images in (("x", "labeled"), ("u", "unlabeled")):
        targets, read = ([np.concatenate(parts) for parts in zip(*columns, strict=True)] for columns in (
            [(t,) for t, _ in shown[key]], [r for _, r in shown[key]]))
        strange = int((read[0] < 0).sum())
        yield contents.exact(f"views/{images} views are flipped crops of images of the data", not strange,
                             f"{strange} of {len(read[0])} views show something else")
        yield contents.compare_tensor(f"labels/of {images} images", targets[0], read[1])
    return {key: np.stack([read.index for _, read in parts]) for key, parts in shown.items()}


def _order(run: Probe, shown: dict[str, np.ndarray]) -> Iterator[Row]:
    loader, steps = run.loader(), range(len(shown["x"]))
    for key, name in (("x", "labeled"), ("u", "unlabeled")):
        if stream := getattr(loader, name):
            yield contents.compare_tensor(f"order/{name} images shown", shown[key],
                                          np.stack([stream.indices(step) for step in steps]))
    for world_size in (1, 2):
        loaders = [run.loader(rank, world_size) for rank in range(world_size)]
        streams = {name: [one for loader in loaders if (one := getattr(loader, name))]
                   for name in ("labeled", "unlabeled")}
        for row in order.passes(streams, run.split.labeled, run.split.unlabeled, run.batch, run.mu):
            yield row._replace(tensor=row.tensor + (f", {world_size} ranks" if world_size > 1 else ""))
    yield order.same("order/a batch depends on seed, rank and step alone", run.loader().batch(3), loader.batch(3))
    with_threads = itertools.islice(run.loader().batches(1, 4), 3)
    for step, batch in enumerate(with_threads, start=1):
        yield order.same(f"order/batch {step} of those prepared ahead", batch, loader.batch(step))


def _pictures(run: Probe, views: int, steps: int) -> Iterator[Row]:
    """Against Pillow: batches of one rank, and one of the second of two."""
    for name, loader, step in [*(("", run.loader(), step) for step in range(steps)),
                               (", second of two ranks", run.loader(1, 2), 1)]:
        batch, drawn = watched(loader, step)
        unlabeled = loader.unlabeled.indices(step) if run.mu else np.empty(0, np.int64)
        for row in contents.pictures(batch, drawn, run.data.images, loader.labeled.indices(step), unlabeled, views):
            yield row._replace(tensor=f"{row.tensor} of step {step}{name}")


def draws_of(run: Probe, count: int, most_steps: int) -> Iterator[Row]:
    """The distribution of at least `count` strong views, or of `most_steps` steps."""
    steps = min(most_steps, -(-count // (run.batch * max(1, run.mu))))
    found = {name: drawn_only(loader, steps) for name, loader in (
        ("", run.loader()), ("rank", run.loader(0, 2)), ("other rank", run.loader(1, 2)),
        ("other seed", run.loader(seed=run.seed + 1)))}
    plans = {name: drawn for name, (_, drawn) in found.items()}
    if not run.flip:
        yield draws.never_flipped([plan for d in plans[""] for plan in d.labeled], "labeled")
        yield draws.never_flipped([w for d in plans[""] for plan in d.unlabeled for w in plan[:2]], "unlabeled")
    tests, columns = {}, {name: _columns(run, drawn) for name, drawn in plans.items()}
    for kind, fields in columns[""].items():
        labels = np.stack([getattr(batch, f"targets_{kind}") for batch in found[""][0]])
        tests |= draws.of_one_view(fields, labels, len(run.per_class)) | draws.of_neighbours(fields)
        tests |= draws.between("on the other rank", columns["rank"][kind], columns["other rank"][kind])
        tests |= draws.between("under the next seed", fields, columns["other seed"][kind])
    if run.mu:
        weak = {name: column for name, column in columns[""]["u"].items() if name.startswith("weak ")}
        tests |= draws.between("of the same batch", columns[""]["x"], weak)
    yield from draws.judged(tests)
    every = [b"".join(field.tobytes() for plan in d.labeled + d.unlabeled for field in _leaves(plan))
             for name in ("", "other rank", "other seed") for d in plans[name]]
    yield contents.exact("draws/no two batches alike", len(set(every)) == len(every) or not run.mu,
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
