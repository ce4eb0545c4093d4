"""Evaluation on every test image. Accuracies are percent, 0..100. N images, K classes."""

import contextlib
import csv
import io
import json
import pathlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle

from fixmatch import distributed
from fixmatch.data.dataset import Dataset
from fixmatch.files import write_atomic
from fixmatch.losses import cross_entropy
from fixmatch.normalize import to_device


@dataclass(frozen=True)
class Scores:
    top1: float  # percent
    top5: float  # percent; of the K largest where K < 5
    loss: float  # mean cross-entropy
    per_class: list[float | None]  # [K] percent; None where the test set has no image of the class
    confusion: list[list[int]]  # [K][K] counts, row: true class, column: predicted class

    def to_dict(self) -> dict:
        return dict(vars(self))


METRICS = ("top1", "top5", "loss")  # the figures of Scores that are one number


class Evaluations:
    """evaluation.json: {"last": {"step", "raw", "ema"}, "best": ...}, all figures of these two evaluations of a run.

    Args:
        path: of the file.
        step: of the last evaluation that a resumed run knows of; what is there of later ones is left out.
    """

    def __init__(self, path: pathlib.Path, step: int = 0):
        self.path, self.kept = path, {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found = json.loads(path.read_text(encoding="utf-8"))  # where it cannot be read, it is made anew
            self.kept = {which: found[which] for which in ("last", "best")
                         if found.get(which) and found[which]["step"] <= step}

    def add(self, evaluation: dict, is_best: bool) -> None:
        """Keeps an evaluation as the last, and as the best if it is."""
        self.kept = {"last": evaluation, "best": evaluation if is_best else self.kept.get("best")}
        write_atomic(self.path, json.dumps(self.kept, separators=(",", ":")) + "\n")


def evaluate(model, normalize, data: Dataset, batch_size: int) -> Scores:
    """Scores `model` on all of `data`, the last partial batch included.

    Ranks that train together share the batches of one process among them, and all return its scores: their `model` must
    hold the same weights and running statistics.
    """
    ranks, batches = distributed.world_size(), -(-len(data) // batch_size)
    share = -(-batches // ranks) * batch_size  # images a rank; behind the last image nothing counts
    first = min(distributed.rank() * share if ranks > 1 else 0, (batches - 1) * batch_size)
    mine = slice(first, first + share)
    logits, losses = predict(model, normalize, Dataset(data.images[mine], data.labels[mine]), batch_size)
    found = np.column_stack([logits, losses])
    found = distributed.gather(np.pad(found, ((0, share - len(found)), (0, 0))))[:len(data)]
    return score(found[:, :-1], data.labels, found[:, -1])


@paddle.no_grad()
def predict(model, normalize, data: Dataset, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs `model` in eval mode over all of `data`, and leaves its mode as it was.

    Returns:
        Logits float32 [N, K] and their cross-entropies with the labels, float32 [N].
    """
    was_training = model.training
    model.eval()
    logits, losses = [], []
    for start in range(0, len(data), batch_size):
        batch_logits = model(normalize(data.images[start:start + batch_size]))  # [n, K]
        targets = to_device(data.labels[start:start + batch_size])
        losses.append(cross_entropy(batch_logits, targets).numpy())
        logits.append(batch_logits.numpy())
    if was_training:
        model.train()
    return np.concatenate(logits), np.concatenate(losses)


def score(logits: np.ndarray, labels: np.ndarray, losses: np.ndarray) -> Scores:
    """Scores logits [N, K] against labels int64 [N]; `losses` [N] are averaged.

    Of equal logits the first class ranks first, as in argmax. A row with NaN in it counts as wrong.
    """
    num_classes = logits.shape[1]
    order = _ranking(logits)
    hits = (order == labels[:, None]) & np.isfinite(logits).all(axis=1, keepdims=True)
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (labels, order[:, 0]), 1)
    right, seen = hits[:, 0], np.bincount(labels, minlength=num_classes)
    right_by_class = np.bincount(labels[right], minlength=num_classes)
    return Scores(
        top1=100.0 * float(right.mean()), top5=100.0 * float(hits[:, :5].any(axis=1).mean()),
        loss=float(losses.mean(dtype=np.float64)),
        per_class=[100.0 * int(r) / int(n) if n else None for r, n in zip(right_by_class, seen, strict=True)],
        confusion=confusion.tolist())


def predictions_csv(images: Sequence, logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    """A line for each image: which it is, its class, the class predicted, and the softmax probability of that one.

    Args:
        images: N paths or indices.
        logits: float [N, K].
        labels: int64 [N].
        classes: K names.
    """
    predicted, confidence = likeliest(logits)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "label", "predicted", "confidence"))
    for image, label, best, share in zip(images, labels, predicted, confidence, strict=True):
        writer.writerow((image, classes[label], classes[best], f"{share:.6f}"))
    return text.getvalue()


def likeliest(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of the likeliest classes, int64 [N], and its softmax probability, float64 [N], of logits [N, K]."""
    predicted = _ranking(logits)[:, 0]
    largest = np.take_along_axis(logits, predicted[:, None], axis=1).astype(np.float64)  # [N, 1]
    return predicted, 1 / np.exp(logits - largest).sum(axis=1)


def _ranking(logits: np.ndarray) -> np.ndarray:
    """Classes [N, K], the likeliest first; of equal logits the first class."""
    return np.argsort(-logits, axis=1, kind="stable")


def summarize(history: list[float]) -> dict:
    """What of a run's evaluations to report, each under its own name: top-1 percents, oldest first."""
    last20 = history[-20:]
    return {"last": history[-1], "best": max(history), "mean_last_20": statistics.fmean(last20),
            "median_last_20": statistics.median(last20)}
