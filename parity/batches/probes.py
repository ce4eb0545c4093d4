"""Images whose pixels say where they are, of which image and of which class, so that a weak view can be read.

Red is the pixel's column, green its row, blue one byte of the image's index or label, by turns of position. No image
is symmetric, and neither flip and crop nor swapped axes or channels can hide.
"""

from typing import NamedTuple

import numpy as np

from fixmatch.data.augment import views
from fixmatch.data.dataset import Dataset

_DIGITS = 5  # bytes in blue: three of the index, two of the label


class Read(NamedTuple):
    """What weak views show, N of them."""

    index: np.ndarray  # int64 [N], -1 where the view is no flipped crop of one image of the data
    label: np.ndarray  # int64 [N], likewise
    flip: np.ndarray  # bool [N]
    offset: np.ndarray  # int64 [N, 2], (top, left) in the padded image


def make(labels: np.ndarray, size: int) -> Dataset:
    """One image of size x size pixels, 8..256, for each of the labels (int64 [D], 0..65535)."""
    step = 255 // (size - 1)
    place = np.arange(size)
    index = np.arange(len(labels))
    digits = np.stack([index >> 16, index >> 8, index, labels >> 8, labels], axis=1) & 255  # [D, 5]
    images = np.empty((len(labels), size, size, 3), np.uint8)
    images[..., 0] = step * place
    images[..., 1] = step * place[:, None]
    images[..., 2] = digits[:, _digit(place[:, None], place)]
    return Dataset(images, labels)


def _digit(row, column):
    return (column + 2 * row) % _DIGITS


def read(shown: np.ndarray, data: Dataset) -> Read:
    """Reads weak views, uint8 [N, S, S, 3], of the images that `make` made."""
    size, step = data.images.shape[1], 255 // (data.images.shape[1] - 1)
    pad = views.padding(size)
    place = np.abs(np.arange(2 * pad + 1)[:, None] + np.arange(size) - pad)
    place = np.minimum(place, 2 * (size - 1) - place)  # [2 * pad + 1, S]: reflection, the border not repeated
    across = np.concatenate([place, size - 1 - place])  # the second half mirrored
    column, row = shown[:, 0, :, 0] // step, shown[:, :, 0, 1] // step  # [N, S]
    left, top = _position(column, across), _position(row, place)
    which = _digit(row[:, :1].astype(np.int64), column)  # [N, S], of the first row, which has all digits
    digits = [np.take_along_axis(shown[:, 0, :, 2], (which == d).argmax(axis=1)[:, None], axis=1)[:, 0].astype(np.int64)
              for d in range(_DIGITS)]
    index, label = digits[0] << 16 | digits[1] << 8 | digits[2], digits[3] << 8 | digits[4]
    possible = np.minimum(index, len(data) - 1)
    expected = data.images[possible[:, None, None], place[top][:, :, None], across[left][:, None, :]]
    good = (possible == index) & (expected == shown).all(axis=(1, 2, 3))
    return Read(np.where(good, index, -1), np.where(good, label, -1), left > 2 * pad,
                np.stack([top, left % (2 * pad + 1)], axis=1))


def _position(found: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which row of `known` each row of `found` is, int64 [N]; 0 where none."""
    return (found[:, None] == known).all(axis=2).argmax(axis=1)
