"""The classes of new images, by a trained network.

    classifier = fixmatch.load("runs/digits")
    found = classifier.predict(["a.png", "b.jpg"])
    found.names, found.confidence

Images are decoded, turned and scaled by the very functions that read the training images of data.name=folder and csv.
Shapes: N images, K classes.
"""

import contextlib
import itertools
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fixmatch.checkpoint import CheckpointError
from fixmatch.data.dataset import DataError, shown
from fixmatch.data.sources.folder.decode import decode_some, decoding, reason_of
from fixmatch.data.sources.folder.image import to_pixels
from fixmatch.inference import Facts, Run, open_model

_BATCH = 32  # images that go through the network at a time, as many as are decoded at a time
_DECODING = threading.Lock()  # decoding changes the process's filter of warnings, and puts it back


@dataclass(frozen=True)
class Predictions:
    """Of N images, in the order in which they were given."""

    labels: np.ndarray  # int64 [N], the likeliest class, 0..K-1
    probabilities: np.ndarray  # float32 [N, K], each row sums to 1
    names: tuple[str, ...]  # N names of the likeliest class

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def confidence(self) -> np.ndarray:
        """The probability of the likeliest class, float32 [N], 1/K..1."""
        return self.probabilities.max(axis=1)


class Classifier:
    """A trained network that takes images of any size. Its methods may be called from several threads."""

    def __init__(self, source: str, facts: Facts, run: Run):
        self.source, self.facts, self._run = source, facts, run

    @property
    def classes(self) -> tuple[str, ...]:
        """K names, in the order of the probabilities."""
        return self.facts.classes

    def predict(self, images) -> Predictions:
        """The classes of images.

        Args:
            images: one image or several: paths, PIL images, or arrays uint8 [H, W, 3] in RGB, also mixed; or one array
                uint8 [N, H, W, 3]. What is not of the network's image size is scaled and cropped to it as in training.

        Raises:
            DataError: an image that cannot be read, or is none of these.
            CheckpointError: the network gives no numbers.
        """
        images = _as_list(images)
        if all(isinstance(image, (str, os.PathLike)) for image in images):
            with contextlib.closing(self.stream([os.fspath(image) for image in images])) as stream:
                parts = [self._of_whole(images, *part) for part in stream]
        else:
            numbered = enumerate(images)
            parts = [self._probabilities(np.stack(pixels)) for pixels in iter(lambda: [
                _pixels(image, index, *self.facts.image_size) for index, image in itertools.islice(numbered, _BATCH)
            ], [])]
        probabilities = np.concatenate([np.empty((0, len(self.classes)), np.float32), *parts])
        labels = probabilities.argmax(axis=1).astype(np.int64)
        return Predictions(labels, probabilities, tuple(self.classes[label] for label in labels))

    def stream(self, paths: Sequence[str]) -> Iterator[tuple[range, np.ndarray, list[list]]]:
        """Decodes files, several at a time, and runs the network on them; in their order and in bounded memory.

        Other threads wait until it is used up or closed, so close it where that may not come to its end.

        Yields:
            A range of indices into `paths`; the probabilities float32 [n, K] of its images that can be read; and
            [[index, reason], ...] of those that cannot.
        """
        with _DECODING, decoding(paths, len(paths), *self.facts.image_size, pathlib.Path(self.source)) as parts:
            for part, (images, broken) in parts:
                yield part, self._probabilities(images), broken

    def _probabilities(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3] -> float32 [n, K]."""
        if not len(images):
            return np.empty((0, len(self.classes)), np.float32)
        probabilities = self._run(images)
        if not np.isfinite(probabilities).all():
            raise CheckpointError(f"{self.source}: gives NaN for an image: its weights are damaged")
        return probabilities

    @staticmethod
    def _of_whole(images, part: range, probabilities: np.ndarray, broken: list[list]) -> np.ndarray:
        """`probabilities`, if no image of the part is broken."""
        for index, reason in broken:
            raise DataError(f"{shown(os.fspath(images[index]))}: {reason}")
        return probabilities


def load(path: str | os.PathLike, which: str = "latest", weights: str | None = None) -> Classifier:
    """A classifier from a run, a checkpoint or an export, on Paddle's current device.

    Nothing outside is changed: neither Paddle's device nor its mode nor its random numbers.

    Args:
        path: a run folder, a checkpoint folder, the folder of an export for Paddle, or an .onnx file.
        which: "latest" or "best", of a run folder.
        weights: "ema", the average of the weights, which is what FixMatch reports, or "raw", the weights themselves.
            None is "ema" for a checkpoint, and what is inside for an export.

    Raises:
        CheckpointError: nothing of that kind, or damaged.
        ModuleNotFoundError: an .onnx file, where onnxruntime is not installed.
    """
    if which not in ("latest", "best") or weights not in (None, "ema", "raw"):
        raise ValueError(f"load: which is latest or best, weights is ema or raw; got {which!r}, {weights!r}")
    return Classifier(*open_model(pathlib.Path(path), which, weights))


def _as_list(images) -> list:
    if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim != 4):
        return [images]
    if not isinstance(images, Iterable):
        raise DataError(f"images: a {type(images).__name__}; give paths, PIL images or uint8 arrays [H, W, 3]")
    return list(images)


def _pixels(image, index: int, height: int, width: int) -> np.ndarray:
    """One image as the network takes it, uint8 [height, width, 3]; `index` names it in a DataError."""
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        pixels, broken = decode_some([path], height, width, range(1))
        if broken:
            raise DataError(f"{shown(path)}: {broken[0][1]}")
        return pixels[0]
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(f"image {index}: a {image.dtype} array of shape {list(image.shape)}; an array must be "
                            "uint8 [H, W, 3], RGB; for other kinds give PIL images")
        if image.shape[:2] == (height, width):
            return image
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"image {index}: a {type(image).__name__}; give a path, a PIL image or a uint8 array [H, W, 3]")
    try:
        return to_pixels(image, height, width)
    except Exception as error:  # a damaged image, or one of no known range, raises almost anything
        raise DataError(f"image {index}: {reason_of(error)}") from None
