"""Small folders of images, in the layouts that the sources `folder` and `csv` read, and what is found in them."""

import pathlib

import numpy as np
from PIL import Image

from fixmatch.data.sources.folder.load import load_csv, load_folder

RAMP = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)  # no two pixels alike, no symmetry
COMPLETE = [".json", ".lock", ".npy"]  # the files of a finished cache
TRAIN = "path,label\na.png,cat\nb.png,dog\nu.png,\n"
TEST = "path,label\nt.png,dog\n"


def save(path: pathlib.Path, pixels=RAMP, **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    image.save(path, **options)
    return path


def bytes_of(path: pathlib.Path, pixels=RAMP, **options) -> bytes:
    """The bytes of an image saved at `path`, which is removed."""
    blob = save(path, pixels, **options).read_bytes()
    path.unlink()
    return blob


def solid(value: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def make_root(root: pathlib.Path) -> pathlib.Path:
    """cat 10 and 11, dog 20; one unlabeled image, 30; test: cat 40, dog 50. The numbers are their grey levels."""
    for name, value in (("labeled/cat/a", 10), ("labeled/cat/b", 11), ("labeled/dog/a", 20), ("unlabeled/u", 30),
                        ("test/cat/a", 40), ("test/dog/a", 50)):
        save(root / f"{name}.png", solid(value))
    return root


def make_csv(root: pathlib.Path, train: str | bytes | None = TRAIN, test: str | bytes | None = TEST) -> pathlib.Path:
    """Images a 10, b 20, u 30, t 40, sub/c,d 50, v 60, and the two files; None leaves a file out."""
    for name, value in (("a", 10), ("b", 20), ("u", 30), ("t", 40), ("sub/c,d", 50), ("v", 60)):
        save(root / f"{name}.png", solid(value))
    for name, text in (("train.csv", train), ("test.csv", test)):
        if text is not None:
            (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def read(root, image_size=8, max_broken=0):
    return load_folder(str(root), image_size, max_broken)


def read_csv(root, max_broken=0):
    return load_csv(str(root), 8, max_broken)


def levels(data) -> list[int]:
    """The grey level of each image, at its corner."""
    return data.images[:, 0, 0, 0].tolist()


def cache_files(root) -> list[str]:
    """The extensions of what lies in the cache."""
    return sorted(path.suffix for path in (root / ".fixmatch-cache").iterdir())
