"""A picture of what the network is shown: images, their weak and their strong views."""

import io
import pathlib

import numpy as np
from PIL import Image

from fixmatch.data.augment import views
from fixmatch.data.augment.recipes import POLICIES
from fixmatch.data.dataset import Dataset
from fixmatch.files import write_atomic

_SIDE = 96  # pixels that an image is enlarged to, at least
_GAP = 2  # pixels of white around it


def preview(data: Dataset, flip: bool, seed: int, strong: str = "reference", count: int = 8) -> np.ndarray:
    """uint8 [3h, count * w, 3]: a row of images, a row of their weak and a row of their strong views.

    `strong` is the recipe of the last, a name in POLICIES; CTAugment is shown as it begins.
    """
    rng = np.random.default_rng([seed, 3])
    index = rng.choice(len(data), count, replace=len(data) < count)
    size = data.images.shape[1:3]
    weak, strong = views.weak_and_strong(data.images, index, views.draw(rng, count, size, flip, POLICIES[strong]()))
    scale = -(-_SIDE // max(size))
    tiles = np.stack([data.images[index], weak, strong]).repeat(scale, axis=2).repeat(scale, axis=3)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (_GAP, _GAP), (_GAP, _GAP), (0, 0)), constant_values=255)
    return np.concatenate([np.concatenate(list(row), axis=1) for row in tiles])


def save_png(picture: np.ndarray, path: pathlib.Path) -> None:
    blob = io.BytesIO()
    Image.fromarray(picture).save(blob, format="PNG")
    write_atomic(path, blob.getvalue())
