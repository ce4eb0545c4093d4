"""Which images are shown when: the split, passes, ranks, and that a batch is a function of seed, rank and step."""

from collections.abc import Iterator

import numpy as np

from fixmatch.data.loader import EXPAND_STEPS, Batch, Stream
from parity.batches.contents import exact
from parity.compare import Row, compare_tensor

_PASSES = 3  # of each stream


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
    never = len(items) - len(np.intersect1d(values, items))
    return exact(tensor, len(shown) == size and not strange and not often,
                 f"{often} images more than {repeats} times, {never} of {len(items)} never, {strange} that should not "
                 f"be there" + (f"; {len(shown)} places instead of {size}" if len(shown) != size else ""))


def a_pass(ranks: list[Stream], which: int = 0) -> np.ndarray:
    """What all ranks' streams show in one pass, in the order of steps and ranks, int64 [places]."""
    steps = ranks[0].steps_per_pass
    return np.concatenate([stream.indices(step) for step in range(which * steps, (which + 1) * steps)
                           for stream in ranks])


def passes(name: str, ranks: list[Stream], items: np.ndarray, size: int) -> Iterator[Row]:
    """The first passes of a stream: whether each shows all its images, in an order of its own.

    Args:
        name: "labeled", whose images are repeated to last EXPAND_STEPS steps, or "unlabeled".
        ranks: the stream of each rank.
        items: int64, the images that it is to show.
        size: of a rank's batch.
    """
    block = size * len(ranks)
    least = block * EXPAND_STEPS if name == "labeled" else block
    orders = [a_pass(ranks, which) for which in range(_PASSES)]
    for which, shown in enumerate(orders):
        yield coverage(f"order/{name} images equally often in pass {which}", shown, items, least, block)
    yield unlike(f"order/{name} images shuffled", orders[0], np.resize(items, orders[0].shape))
    for which, shown in enumerate(orders[1:], start=1):
        yield unlike(f"order/{name} images in another order in pass {which} than in pass 0", orders[0], shown)


def unlike(tensor: str, one: np.ndarray, other: np.ndarray) -> Row:
    """Whether two orders of the same images are not the same, in the main.

    The number of places that hold the same image in both is about Poisson for independent orders, of a rate of places
    over images; one that is beyond the limit is less than 1e-9 likely at every rate.
    """
    equal, images = int((one == other).sum()), len(np.unique(one))
    rate = len(one) / images
    return exact(tensor, images == 1 or equal <= rate + 10 * np.sqrt(rate) + 5,
                 f"{equal} of {len(one)} places hold the same image in both")


def same(tensor: str, one: Batch, other: Batch) -> Row:
    """Whether two batches are equal."""
    def equal(a, b):
        return all(map(np.array_equal, a, b)) if isinstance(a, tuple) else np.array_equal(a, b)  # a plan is a tuple

    different = [name for name, a, b in zip(one._fields, one, other, strict=True) if not equal(a, b)]
    return exact(tensor, not different, f"{', '.join(different)} differ")
