"""The sums behind a report, as pure functions on arrays.

Accuracies are percent, confidences 0..1. N images, K classes.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BINS = 15  # of confidence, as calibration is usually reported (Guo et al., arXiv 1706.04599)


class Calibration(NamedTuple):
    """How often predictions of some confidence are right. Bin b holds confidences in (b / BINS, (b + 1) / BINS]."""

    count: np.ndarray  # int64 [BINS]
    confidence: np.ndarray  # float64 [BINS] mean of each bin, NaN where it is empty
    accuracy: np.ndarray  # float64 [BINS] share of right predictions, 0..1, NaN where it is empty
    ece: float  # expected calibration error: mean |confidence - accuracy| over the images, 0..1


def calibration(confidence: np.ndarray, right: np.ndarray) -> Calibration:
    """Of N predictions with `confidence`, float [N] in 0..1, that are right or not, bool [N]."""
    which = np.clip(np.ceil(confidence.astype(np.float64) * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(which, minlength=BINS)
    divisor = np.where(count, count, np.nan)
    mean = np.bincount(which, weights=confidence, minlength=BINS) / divisor
    accuracy = np.bincount(which, weights=right, minlength=BINS) / divisor
    gaps = np.nansum(count * np.abs(mean - accuracy)) if len(right) else math.nan
    return Calibration(count, mean, accuracy, float(gaps / len(right)) if len(right) else math.nan)


def confusion_matrix(label: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [K, K] counts, row: true class, column: predicted class."""
    flat = np.bincount(label * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


class ClassRow(NamedTuple):
    name: str
    images: int  # of this class
    recall: float | None  # percent of them that are recognised; None without images
    precision: float | None  # percent of the predictions of this class that are right; None without predictions
    taken_for: str  # the class that its wrong ones are mostly given; empty without wrong ones


def class_rows(confusion: np.ndarray, classes: Sequence[str]) -> list[ClassRow]:
    """A row for each class, the worst recall first; classes without images last."""
    rows = []
    for index, name in enumerate(classes):
        right, images, given = confusion[index, index], confusion[index].sum(), confusion[:, index].sum()
        others = confusion[index].copy()
        others[index] = 0
        rows.append(ClassRow(name, int(images), 100.0 * right / images if images else None,
                             100.0 * right / given if given else None,
                             classes[int(others.argmax())] if others.any() else ""))
    return sorted(rows, key=lambda row: math.inf if row.recall is None else row.recall)


def interval(percent: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval, in percent, of a share measured on n images (Wilson's)."""
    share, z = percent / 100, 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * max(0.0, centre - reach), 100 * min(1.0, centre + reach)


class Spread(NamedTuple):
    """Of runs that differ in their seed, as papers report it."""

    mean: float
    deviation: float | None  # standard deviation with n - 1; None for one run
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def thin(x: Sequence[float], y: Sequence[float | None], most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """A curve of at most `most` points: means of neighbours, without the points that have no value."""
    pairs = np.array([(a, b) for a, b in zip(x, y, strict=True) if b is not None], dtype=np.float64).reshape(-1, 2)
    if len(pairs) > most:
        pairs = np.array([part.mean(axis=0) for part in np.array_split(pairs, most)])
    return pairs[:, 0], pairs[:, 1]
