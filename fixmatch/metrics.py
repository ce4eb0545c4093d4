"""What is measured of a step: a row of numbers that stays on the device until it is shown, and averages of rows.

So a step does not wait for the host. Losses are means over images, the mask rate is a fraction, accuracies are percent.
"""

import math

import numpy as np
import paddle

from fixmatch import distributed
from fixmatch.normalize import to_device

# Of one step: losses, and fractions of the unlabeled images: confident, of known class, rightly pseudo-labeled, both
# rightly and confidently.
COLUMNS = ("loss", "loss_x", "loss_u", "mask", "known", "right", "confident_right")


class NonFinite(ArithmeticError):
    """A loss or a weight became NaN or infinite; the message is one line."""


def row_of(losses, batch):
    """The losses and pseudo-label counts of a step as one small tensor on the device: float [7], in COLUMNS' order."""
    with paddle.no_grad():
        mask = losses.mask
        if mask.size:
            targets = to_device(batch.targets_u)
            right = (losses.pseudo_labels == targets).astype(mask.dtype)
            known = (targets >= 0).astype(mask.dtype)
            parts = [mask, known, right, right * mask]
        else:
            parts = [paddle.zeros([1], dtype=losses.loss.dtype)] * 4
        fractions = paddle.stack(parts).mean(axis=1)
        return paddle.concat([paddle.stack([losses.loss, losses.loss_x, losses.loss_u]).detach(), fractions])


class Window:
    """The rows of the steps since the last line of the log, each the mean over the ranks.

    Args:
        keeps: whether rows are kept for averages; without it they are only checked to be finite.
        supervised: whether there are no unlabeled images, of which nothing is said then.
    """

    def __init__(self, keeps: bool = True, supervised: bool = False):
        self.keeps, self.supervised = keeps, supervised
        self.pending: list[tuple[int, paddle.Tensor]] = []  # rows still on the device
        self.rows: list[np.ndarray] = []

    def add(self, step: int, losses, batch) -> None:
        self.pending.append((step, row_of(losses, batch)))

    def flush(self) -> None:
        """Fetches the rows of all steps so far, of all ranks, which have to call this after the same steps.

        Raises NonFinite on every rank at the first loss of any rank that is not a number.
        """
        if not self.pending:
            return
        ranks, steps = distributed.world_size(), [step for step, _ in self.pending]
        fetched = distributed.gather(paddle.stack([row for _, row in self.pending]).numpy())
        by_rank = fetched.reshape(ranks, len(steps), len(COLUMNS))
        self.pending.clear()
        for step, rows in zip(steps, by_rank.swapaxes(0, 1), strict=True):
            for rank, row in enumerate(rows):
                for name, value in zip(COLUMNS[:3], row[:3].tolist(), strict=True):
                    if not math.isfinite(value):
                        raise NonFinite(f"{name} is {value} at step {step}{f' on rank {rank}' if ranks > 1 else ''}")
        if self.keeps:
            self.rows.extend(by_rank.mean(axis=0))

    def averages(self) -> dict[str, float | None]:
        """Means over the rows; impurity is the percentage of wrong labels among the confident ones.

        Pseudo-labels are judged where the classes of all unlabeled images are known: those of a few of them, which are
        often the labeled ones, would tell nothing of the others.
        """
        mean = dict(zip(COLUMNS, np.mean(self.rows, axis=0, dtype=np.float64).tolist(), strict=True))
        known, right, confident_right = (mean.pop(name) for name in COLUMNS[4:])
        if self.supervised:
            return {"loss": mean["loss"], "loss_x": mean["loss_x"]}
        if known == 1:
            mean["pseudo_label_accuracy"] = 100 * right
            mean["impurity"] = 100 * (1 - confident_right / mean["mask"]) if mean["mask"] else None
        return mean

    def clear(self) -> None:
        self.rows.clear()


def commonest_class(losses) -> dict[str, float | int | None]:
    """The class that most confident pseudo-labels of a step have, and its share of them, 0..1; None without any."""
    counts = np.bincount(losses.pseudo_labels.numpy()[losses.mask.numpy() > 0])
    if not counts.size:
        return {"top_class": None, "top_class_share": None}
    return {"top_class": int(counts.argmax()), "top_class_share": float(counts.max() / counts.sum())}


def as_json(value):
    """`value` with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
