"""The types that every data source gives: images with their labels, and what is known of them."""

import hashlib
from dataclasses import dataclass

import numpy as np

_BLOCK = 4096  # images that are hashed at a time


class DataError(ValueError):
    """Data that cannot be used. Its message is one line that says what is wrong, where, and what to do."""


def one_line(error: Exception) -> str:
    """The message of `error` on one line, as a DataError quotes it, or the name of its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(text: str) -> str:
    """`text` itself, or its repr where `text` could not be printed on one line."""
    return text if text.isprintable() else repr(text)


@dataclass(frozen=True)
class Dataset:
    """N images and their labels, 0..K-1 for K classes."""

    images: np.ndarray  # uint8 [N, H, W, 3], C-contiguous; may be memory-mapped
    labels: np.ndarray  # int64 [N], 0..K-1, or -1 where the class is not known

    def __len__(self) -> int:
        return len(self.images)

    def sha256(self) -> str:
        """Of all pixels and labels, by which a resumed run sees that its data are the same. About 1 GB a second."""
        digest = hashlib.sha256(repr(self.images.shape).encode() + self.labels.astype("<i8").tobytes())
        for start in range(0, len(self.images), _BLOCK):  # so that memory-mapped images need no memory
            digest.update(np.ascontiguousarray(self.images[start:start + _BLOCK]))
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """A data set as the trainer sees it: both splits, class names, and how its images may be treated."""

    name: str
    classes: tuple[str, ...]  # K names, in label order
    train: Dataset
    test: Dataset
    mean: tuple[float, float, float]  # of each channel, for pixels in [0, 1]
    std: tuple[float, float, float]  # likewise
    flip: bool  # whether a mirrored image is still of its class
    folds: tuple[np.ndarray, ...] = ()  # the labeled subsets that come with the data set, int64 indices into train
    test_paths: tuple[str, ...] = ()  # of the test images, from data.root on, if each one is a file
    held_out: bool = False  # whether the test images were taken from the user's own labeled ones
