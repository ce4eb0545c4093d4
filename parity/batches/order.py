"""Which images are shown when: the split, passes, ranks, and that a batch is a function of seed, rank and step."""

from collections.abc import Iterator

import numpy as np

from fixmatch.data.loader import EXPAND_STEPS
from parity.batches.contents import exact
from parity.compare import Row, compare_tensor


def split(found, labels: np.ndarray, per_class: np.ndarray | None, include_labeled: bool, whole: bool) -> Iterator[Row]:
    """The split against the configuration.

    Args:
        found: the Split.
        labels: int64 [D] of all images.
        per_class: int64 [K], how many labels each class is to have; None where a file or the data set says which.
        whole: whether every image is in the split; a split file may leave some out.
    """
    known = labels[found.labeled]
    yield exact("split/labeled images are distinct and of a known class",
                len(np.unique(found.labeled)) == len(found.labeled) > 0 and (known >= 0).all(),
                f"{len(found.labeled)} labeled images, {len(np.unique(found.labeled))} of them distinct")
    if per_class is not None:
        yield compare_tensor("split/labels a class", np.bincount(known, minlength=len(per_class)), per_class)
    shared = np.isin(found.labeled, found.unlabeled)
    wanted = "" if include_labeled else "not "
    yield exact(f"split/labeled images are {wanted}unlabeled too",
                shared.all() if include_labeled else not shared.any(),
                f"{shared.sum()} of {len(shared)} labeled images are also unlabeled")
    if whole:
        everything = np.arange(len(labels))
        yield compare_tensor("split/unlabeled", np.sort(found.unlabeled),
                             everything if include_labeled else np.setdiff1d(everything, found.labeled))


def coverage(tensor: str, shown: np.ndarray, items: np.ndarray, least: int, block: int) -> Row:
    """One pass over `items`, repeated to at least `least` of them and cut to whole blocks, shows each equally often.

    Args:
        shown: int64, everything that all ranks show in the pass.
        block: images that all ranks show in one step.
    """
    repeats = -(-max(least, block) // len(items))
    size = repeats * len(items) // block * block
    values, counts = np.unique(shown, return_counts=True)
    strange, often = int((~np.isin(values, items)).sum()), int((counts > repeats).sum())
    return exact(tensor, len(shown) == size and not strange and not often,
                 f"{len(shown)} images shown instead of {size}; {often} of them more than {repeats} times, "
                 f"{len(items) - len(np.intersect1d(values, items))} never, {strange} from outside")


def passes(streams: dict, labeled: np.ndarray, unlabeled: np.ndarray, batch: int, mu: int) -> Iterator[Row]:
    """A pass of both streams, by the indices they give.

    Args:
        streams: {"labeled" or "unlabeled": the Stream of each rank}.
    """
    for name, items, size, least in (("labeled", labeled, batch, batch * EXPAND_STEPS), ("unlabeled", unlabeled,
                                                                                        batch * mu, 1)):
        ranks = streams.get(name)
        if not ranks:
            continue
        block = size * len(ranks)
        steps = -(-max(least * len(ranks), block) // len(items)) * len(items) // block
        shown = np.stack([[stream.indices(step) for stream in ranks] for step in range(2 * steps)])
        what = "once" if name == "unlabeled" and len(items) >= block else "equally often"
        for number, one in enumerate(np.split(shown, 2)):
            yield coverage(f"order/{name} images {what} in pass {number}", one.ravel(), items, least * len(ranks),
                           block)
        yield from shuffled(name, *np.split(shown.reshape(2, -1), 2), items)


def shuffled(name: str, first: np.ndarray, second: np.ndarray, items: np.ndarray) -> Iterator[Row]:
    """Two passes have orders of their own, and neither is that of the items.

    Equal places are Poisson(rate) in number for independent orders, with rate = places * (share of equal pairs); ten
    deviations above are less than 1e-9 likely for every rate.
    """
    for what, one, other in (("is shuffled", first, np.resize(items, first.shape)), ("is drawn anew", first, second)):
        equal = int((one == other).sum())
        rate = first.size / len(items)
        yield exact(f"order/{name} {what} each pass", len(items) == 1 or equal <= rate + 10 * np.sqrt(rate) + 5,
                    f"{equal} of {first.size} places of a pass hold the same image in both")


def same(tensor: str, one, other) -> Row:
    """Whether two batches are equal."""
    different = [name for name, a, b in zip(one._fields, one, other, strict=True) if not _equal(a, b)]
    return exact(tensor, not different, f"{', '.join(different)} differ")


def _equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else np.array_equal(a, b)
