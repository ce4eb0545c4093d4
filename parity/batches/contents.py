"""One batch: its shapes, its labels, and its views against Pillow's from what was drawn for it."""

from collections.abc import Callable, Iterator

import numpy as np

from fixmatch.data.augment import ctaugment, google, randaugment, torchssl
from fixmatch.data.loader import Batch, ProbedBatch
from parity.batches.watch import Drawn
from parity.compare import Row, compare_tensor
from parity.mirror import randaugment as pillow

PLANS = {"reference": randaugment.Plan, "google": google.GooglePlan, "torchssl": torchssl.TorchSSLPlan,
         "ctaugment": ctaugment.Plan}  # what each strong recipe draws


def exact(tensor: str, right: bool, why: str) -> Row:
    """A row for what has no array to show."""
    return Row(tensor, 0.0, 0.0, True) if right else Row(tensor, 1.0, 1.0, False, why)


def shapes(batch: Batch, drawn: Drawn, labeled: int, unlabeled: int, size: tuple, strong: str) -> Iterator[Row]:
    """Batch sizes and types as configured, one plan for each kind of image, and of the configured recipe."""
    counts = {"x": labeled, "targets_x": labeled, "u_w": unlabeled, "u_s": unlabeled, "targets_u": unlabeled,
              "probes": labeled}
    for name, count in counts.items():
        if name == "probes" and not isinstance(batch, ProbedBatch):
            continue
        array = getattr(batch, name)
        wanted = ((count,), "int64") if name.startswith("targets") else ((count, *size, 3), "uint8")
        found = (array.shape, array.dtype.name)
        yield exact(f"shapes/{name}", found == wanted, "{1} {0}, by the configuration {3} {2}".format(*found, *wanted))
    yield exact("shapes/plans of a batch", (len(drawn.labeled), len(drawn.unlabeled)) == (1, 1),
                f"{len(drawn.labeled)} plans drawn for the labeled images and {len(drawn.unlabeled)} for the unlabeled")
    if unlabeled:
        found = [type(plan.strong_plan) for plan in drawn.unlabeled]
        right = found == [PLANS[strong]] and isinstance(batch, ProbedBatch) == (strong == "ctaugment")
        yield exact("shapes/strong recipe", right, f"strong views follow {[kind.__qualname__ for kind in found]}, "
                    f"configured is {strong}")


def labels(batch: Batch, of_labeled: np.ndarray, of_unlabeled: np.ndarray) -> Iterator[Row]:
    """The targets of a batch against the labels of the images that it shows."""
    yield compare_tensor("labels/of labeled images", batch.targets_x, of_labeled)
    yield compare_tensor("labels/of unlabeled images", batch.targets_u, of_unlabeled)


def numbers(batch: Batch, unlabeled: np.ndarray, numbered: np.ndarray) -> Row:
    """Which of the unlabeled images the batch says that it shows.

    Args:
        unlabeled: int64 [M], the images that it shows, indices into the data set.
        numbered: int64 [N], all unlabeled images in the order of their numbers, likewise.
    """
    right = batch.index_u.shape == unlabeled.shape and np.array_equal(numbered[batch.index_u], unlabeled)
    return exact("labels/numbers of unlabeled images", right, "a policy would remember labels under other images")


def pictures(batch: Batch, drawn: Drawn, images: np.ndarray, labeled: np.ndarray, unlabeled: np.ndarray,
             most: int) -> Iterator[Row]:
    """The views of a batch, byte for byte: up to `most` of each kind, spread over the batch.

    Args:
        images: uint8 [D, H, W, 3], the whole data set; labeled and unlabeled: int64 [B] and [M], indices into it.
    """
    (plan,), (view_plan,) = drawn.labeled, drawn.unlabeled
    yield _views("views/x", batch.x, lambda at: pillow.weak(images[labeled[at]], plan.take(at)), most)
    if len(unlabeled):
        yield _views("views/weak", batch.u_w,
                     lambda at: pillow.weak(images[unlabeled[at]], view_plan.weak.take(at)), most)
        yield _views("views/strong", batch.u_s, lambda at: _strong(images[unlabeled[at]], view_plan.take(at)), most)
    if isinstance(batch, ProbedBatch):
        yield _views("views/probes", batch.probes,
                     lambda at: randaugment.apply(batch.x[at], batch.probe_plan.take(at)), most)


def _strong(images: np.ndarray, plan) -> np.ndarray:
    """By Pillow for the reference's recipe; by the plan's own renderer for the others, from Pillow's flip and crop."""
    if type(plan.strong_plan) is randaugment.Plan:
        return pillow.weak_and_strong(images, plan)[1]
    return randaugment.apply(pillow.weak(images, plan.strong), plan.strong_plan)


def _views(tensor: str, ours: np.ndarray, view: Callable[[np.ndarray], np.ndarray], most: int) -> Row:
    """A row that says how many views differ, and whether they are those of a neighbour in the batch.

    Args:
        view: the right views at some places of the batch, int64 [n] -> uint8 [n, H, W, 3].
    """
    at = np.unique([*range(0, len(ours), -(-len(ours) // most)), len(ours) - 1])
    row = compare_tensor(tensor, ours[at], view(at))
    if row.passed or row.ours.shape != row.reference.shape:
        return row
    different = (row.ours != row.reference).reshape(len(at), -1).any(axis=1)
    why = f"{different.sum()} of {len(at)} views are not those of the recorded plan"
    for shift, where in ((-1, "before"), (1, "after")):
        if np.array_equal(row.ours, view((at + shift) % len(ours))):
            why += f" but of the image one place {where}"
    return row._replace(why=why)
