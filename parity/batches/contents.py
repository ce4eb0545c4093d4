"""One batch: its shapes, its labels, and its views against Pillow's from what was drawn for it."""

from collections.abc import Iterator

import numpy as np

from fixmatch.data.augment import ctaugment, randaugment, recipes
from fixmatch.data.loader import Batch, ProbedBatch
from parity.batches.watch import Drawn
from parity.compare import Row, compare_tensor
from parity.mirror import randaugment as pillow

PLANS = {"reference": randaugment.Plan, "google": recipes.Google, "torchssl": recipes.TorchSSL,
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


def pictures(batch: Batch, drawn: Drawn, images: np.ndarray, labeled: np.ndarray, unlabeled: np.ndarray,
             first: int | None = None) -> Iterator[Row]:
    """All views of a batch, or the first few of each kind, byte for byte.

    Args:
        images: uint8 [D, H, W, 3], the whole data set; labeled and unlabeled: int64 [B] and [M], indices into it.
    """
    part, (plan,), (view_plan,) = slice(first), drawn.labeled, drawn.unlabeled
    plan, view_plan, labeled, unlabeled = plan.take(part), view_plan.take(part), labeled[part], unlabeled[part]
    yield _views("views/x", batch.x[part], pillow.weak(images[labeled], plan))
    if len(unlabeled):
        yield _views("views/weak", batch.u_w[part], pillow.weak(images[unlabeled], view_plan.weak))
        yield _views("views/strong", batch.u_s[part], _strong(images, unlabeled, view_plan))
    if isinstance(batch, ProbedBatch):
        probes = batch.probe_plan.take(part).render(batch.x, np.arange(len(labeled)), np.zeros(len(labeled), bool),
                                                    np.zeros((len(labeled), 2), np.int64))
        yield _views("views/probes", batch.probes[part], probes)


def _strong(images, index, plan) -> np.ndarray:
    """By Pillow for the reference's recipe; by the plan's own renderer for the others, from Pillow's flip and crop."""
    if type(plan.strong_plan) is randaugment.Plan:
        return pillow.weak_and_strong(images[index], plan)[1]
    return randaugment.apply(pillow.weak(images[index], plan.strong), plan.strong_plan)


def _views(tensor: str, ours: np.ndarray, expected: np.ndarray) -> Row:
    """A row that says how many views differ, and whether they are those of a neighbour."""
    row = compare_tensor(tensor, ours, expected)
    if row.passed or ours.shape != expected.shape:
        return row
    different = (ours != expected).reshape(len(ours), -1).any(axis=1)
    why = f"{different.sum()} of {len(ours)} views are not those of the recorded plan"
    for shift in (1, -1):
        if len(ours) > 2 and np.array_equal(ours[1:-1], np.roll(expected, shift, axis=0)[1:-1]):
            why += f"; they are those of the image {abs(shift)} place {'before' if shift > 0 else 'after'}"
    return row._replace(why=why)
