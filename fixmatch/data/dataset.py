"""What every data source gives: images, labels, and what is known of them."""

from dataclasses import dataclass

import numpy as np


class DataError(ValueError):
    """Data that cannot be used; the message is one line that says what, where and what to do."""


def one_line(error: Exception) -> str:
    """What `error` says, or the name of its class, for a DataError."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(text: str) -> str:
    """`text`, or its repr where it could not be printed on one line."""
    return text if text.isprintable() else repr(text)


@dataclass(frozen=True)
class Dataset:
    images: np.ndarray  # uint8 [N, H, W, 3], C-contiguous; may be memory-mapped
    labels: np.ndarray  # int64 [N], 0..K-1, or -1 where the class is not known

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Source:
    """A data set as the trainer sees it: both splits, class names, and how its images may be treated."""

    name: str
    classes: tuple[str, ...]  # K names, in label order
    train: Dataset
    test: Dataset
    mean: tuple[float, float, float]  # of pixels in [0, 1], a channel
    std: tuple[float, float, float]
    flip: bool  # whether a mirrored image is still of its class
    folds: tuple[np.ndarray, ...] = ()  # int64 indices into train: the data set's own labeled subsets, where it has any
    test_paths: tuple[str, ...] = ()  # of the test images, from data.root on, where each one is a file
