"""SVHN, the cropped digits, from its official MATLAB files (Netzer et al. 2011, "Reading Digits in Natural Images").

scipy.io.loadmat reads a file only after its MD5 has shown that it is the official one. For files of unknown origin
loadmat is no reader: one wrong byte in a type code ends the process with a segmentation fault (scipy 1.17; scipy's pull
request 25349).
"""

import pathlib

import numpy as np
import scipy.io

from fixmatch.data.dataset import DataError, Dataset, Source
from fixmatch.data.sources.download import fetch, md5_of

_HOST = "https://ufldl.stanford.edu/housenumbers/"  # torchvision and TensorFlow Datasets say http
_TRAIN, _TEST, _EXTRA = "train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"
_MD5 = {_TRAIN: "e26dedcc434d2e4c54c9b2d4a06d8373", _TEST: "eb5a983be6a315427106f1b164d9cef3",
        _EXTRA: "a93ce644f1a588dc4d68dda5feec44a7"}

# These are of all pixels of train_32x32.mat, also where the extra images are used. They were not computed here: others
# who did so publish 0.4376821, 0.4437697, 0.47280442 and 0.19803012, 0.20101562, 0.19703614. TorchSSL divides by
# 0.1751, 0.1771, 0.1744.
_MEAN, _STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)

_BATCH = 1024  # images that are transposed at once


def load_svhn(root: str, allow_download: bool = True, extra: bool = False) -> Source:
    """Reads SVHN's files from `root` or root/svhn; downloads into root/svhn what is in neither.

    Images are uint8 [73257, 32, 32, 3] and [26032, 32, 32, 3]. With `extra`, the 531,131 further images follow the
    training images. Reading holds all images in memory once, 0.3 GB; with `extra`, it holds the training images twice
    while the two parts are joined, 3.8 GB. Digits are not mirrored.

    Raises:
        DataError: a file is missing and not to be downloaded, cannot be read, or is not the official one.
    """
    names = (_TRAIN, _TEST, _EXTRA)[:3 if extra else 2]
    train, test, *more = [_read(_locate(pathlib.Path(root), name, allow_download)) for name in names]
    for part in more:
        train = Dataset(np.concatenate([train.images, part.images]), np.concatenate([train.labels, part.labels]))
    return Source("svhn", tuple("0123456789"), train, test, _MEAN, _STD, flip=False)


def _locate(root: pathlib.Path, name: str, allow_download: bool) -> pathlib.Path:
    """Where the file of this name is, or after its download will be. Raises DataError."""
    for place in (root / name, root / "svhn" / name):
        if place.is_file():
            return place
    if not allow_download:
        raise DataError(f"{root}: has no {name}, and data.download is false; put the official file there, or set "
                        "data.root to the folder that has it")
    return fetch(_HOST + name, root / "svhn" / name, _MD5[name], name)  # the files' names do not say whose they are


def _read(path: pathlib.Path) -> Dataset:
    """The images and labels of an official file. Raises DataError for any other file, which is not parsed."""
    try:
        found = md5_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if found != _MD5[path.name]:
        raise DataError(f"{path}: not the official file of SVHN, or damaged: its MD5 is {found}, expected "
                        f"{_MD5[path.name]}; delete it and have it downloaded again, or put the official file there")
    content = scipy.io.loadmat(path, variable_names=["X", "y"])
    planes = content["X"].T  # uint8 [N, 3, W, H], C-contiguous, as MATLAB stores [H, W, 3, N] column by column
    images = planes.reshape(-1, 32, 32, 3)  # shares its memory: each image is transposed in its own 3,072 bytes
    for start in range(0, len(images), _BATCH):
        batch = slice(start, start + _BATCH)
        images[batch] = planes[batch].transpose(0, 3, 2, 1).copy()
    return Dataset(images, content["y"][:, 0].astype(np.int64) % 10)  # 10 stands for the digit 0
