"""SVHN, the cropped digits, from its official MATLAB files (Netzer et al. 2011, "Reading Digits in Natural Images").

MATLAB 5 files are read here, and nothing of them but two plain arrays. scipy.io.loadmat is no reader for files of
unknown origin: one wrong byte in a type code is a segmentation fault (scipy 1.17; scipy's pull request 25349).
Format: MathWorks, "MAT-File Format", Level 5. A file is a header and then variables; each is a run of parts, and each
part is a tag, a type and a size in bytes, and its content.
"""

import os
import pathlib
import struct
import zlib
from typing import BinaryIO

import numpy as np

from fixmatch.data.dataset import DataError, Dataset, Source
from fixmatch.data.sources.download import fetch, md5_of

# torchvision and TensorFlow Datasets say http.
_HOST = "https://ufldl.stanford.edu/housenumbers/"
_TRAIN, _TEST, _EXTRA = "train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"
_MD5 = {_TRAIN: "e26dedcc434d2e4c54c9b2d4a06d8373", _TEST: "eb5a983be6a315427106f1b164d9cef3",
        _EXTRA: "a93ce644f1a588dc4d68dda5feec44a7"}

# Of all pixels of train_32x32.mat, also where the extra images are used. Not computed here: others who did so publish
# 0.4376821, 0.4437697, 0.47280442 and 0.19803012, 0.20101562, 0.19703614.
# TorchSSL divides by 0.1751, 0.1771, 0.1744.
_MEAN, _STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)

_MOST_IMAGES = 1 << 20  # in a file; the largest official one has 531,131
_BATCH = 1024  # images that are transposed at once
_CHUNK = 1 << 18  # bytes that are inflated at once
_SMALL = 128  # bytes; flags, shape and name of an array take fewer

_MATRIX, _COMPRESSED, _PIXELS = 14, 15, 2  # types of a part
_UINT8, _NUMERIC = 9, range(6, 16)  # classes of an array
_STORED = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}


def load_svhn(root: str, allow_download: bool = True, extra: bool = False) -> Source:
    """Reads SVHN's files from `root` or root/svhn; downloads into root/svhn what is in neither.

    Images uint8 [73257, 32, 32, 3] and [26032, 32, 32, 3]; with `extra`, the 531,131 further images follow the training
    images. Reading takes twice the memory of the training images with `extra`, else once. Digits are not mirrored.

    Raises:
        DataError: a file is missing and not to be downloaded, or is damaged, hostile or not SVHN's.
    """
    places = [_locate(pathlib.Path(root), name, allow_download) for name in (_TRAIN, _TEST, _EXTRA)[:3 if extra else 2]]
    train, test, *more = [_read(place) for place in places]
    for place in places:
        if md5_of(place) != _MD5[place.name]:
            print(f"{place}: not the official file (its MD5 differs); read all the same")
    for part in more:
        train = Dataset(np.concatenate([train.images, part.images]), np.concatenate([train.labels, part.labels]))
    return Source("svhn", tuple("0123456789"), train, test, _MEAN, _STD, flip=False)


def _locate(root: pathlib.Path, name: str, allow_download: bool) -> pathlib.Path:
    for place in (root / name, root / "svhn" / name):
        if place.is_file():
            return place
    if not allow_download:
        raise DataError(f"{root}: has no {name}, and data.download is false; put the official file there, or set "
                        "data.root to the folder that has it")
    return fetch(_HOST + name, root / "svhn" / name, _MD5[name], name)  # the files' names do not say whose they are


def _read(path: pathlib.Path) -> Dataset:
    try:
        with open(path, "rb") as file:
            arrays = _read_arrays(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except zlib.error as error:
        raise DataError(f"{path}: damaged ({error}); delete it and download it again") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    for name in ("X", "y"):
        if name not in arrays:
            raise DataError(f"{path}: not an SVHN file: has no array {name}")
    images, labels = arrays["X"], arrays["y"]
    if len(images) != len(labels):
        raise DataError(f"{path}: not an SVHN file: has {len(images)} images, but {len(labels)} labels")
    wrong = np.flatnonzero(~np.isin(labels, range(1, 11)))
    if len(wrong):
        raise DataError(f"{path}: image {wrong[0]} has the label {labels[wrong[0]]}, expected 1..10, where 10 is the "
                        "digit 0")
    return Dataset(images, labels.astype(np.int64) % 10)


def _read_arrays(file: BinaryIO) -> dict[str, np.ndarray]:
    """X as uint8 [N, 32, 32, 3] and y as numbers [N], as far as the file has them. Errors do not name the file."""
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)
    header = file.read(128)
    if header[124:128] == b"\x00\x02IM":
        raise DataError("a MATLAB 7.3 file, but SVHN's are MATLAB 5 files; put the official file there")
    if header[124:128] != b"\x00\x01IM":  # the version, and letters that tell the byte order
        raise DataError("not a MATLAB 5 file (or a big-endian one); put the official file there")
    arrays = {}
    while len(arrays) < 2 and file.tell() < file_size:
        kind, size, _ = _Variable(file, 8, compressed=False).tag()
        end = file.tell() + size
        if end > file_size:
            raise _damaged("it ends too soon")
        variable = _Variable(file, size, kind == _COMPRESSED)
        if kind == _COMPRESSED:
            kind, _, _ = variable.tag()
        if kind != _MATRIX:
            raise _damaged(f"data of type {kind} where a variable begins")
        name, array_class, shape = _read_declaration(variable)
        if name in _READ and name not in arrays:
            arrays[name] = _READ[name](variable, array_class, shape)
            variable.check()
        file.seek(end)
    return arrays


def _damaged(what: str) -> DataError:
    return DataError(f"damaged: {what}; delete it and download it again")


class _Variable:
    """The bytes of one variable, in order, inflated if need be, and never more of them than were asked for."""

    def __init__(self, file: BinaryIO, size: int, compressed: bool):
        self.file, self.left = file, size  # bytes in the file
        self.inflater = zlib.decompressobj() if compressed else None

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        content = self._inflate(count) if self.inflater else self._stored(count)
        if len(content) < count:
            raise _damaged("it ends too soon")
        return content

    def tag(self) -> tuple[int, int, bytes | None]:
        """Type and size of the next part, and its content if that is within the tag, as up to 4 bytes are."""
        tag = self.read(8)
        kind, size = struct.unpack("<II", tag)
        if kind < 1 << 16:
            return kind, size, None
        kind, size = kind & 0xFFFF, kind >> 16
        if size > 4:
            raise _damaged(f"{size} bytes in a place of 4")
        return kind, size, tag[4:4 + size]

    def small_part(self) -> tuple[int, bytes]:
        """Type and content of the next part, padding skipped."""
        kind, size, content = self.tag()
        if content is None:
            if size > _SMALL:
                raise _damaged(f"{size} bytes of declaration")
            content = self.read(size + -size % 8)[:size]
        return kind, content

    def check(self) -> None:
        """Raises zlib.error if what was read has another checksum; that follows the last part and its padding."""
        if self.inflater:
            self._inflate(8)

    def _stored(self, count: int) -> bytes:
        content = self.file.read(min(count, self.left))
        self.left -= len(content)
        return content

    def _inflate(self, count: int) -> bytes:
        pieces, missing = [], count
        while missing and not self.inflater.eof:
            source = self.inflater.unconsumed_tail or self._stored(_CHUNK)
            piece = self.inflater.decompress(source, missing)
            if not source and not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)


def _read_declaration(variable: _Variable) -> tuple[str, int, tuple[int, ...]]:
    """Name, class and shape. A class with the bits of complex or logical arrays is another class."""
    (_, flags), (_, sizes), (_, name) = (variable.small_part() for _ in range(3))
    array_class = int.from_bytes(flags[:2], "little") & 0x0AFF
    return name.decode("latin1"), array_class, struct.unpack(f"<{len(sizes) // 4}i", sizes[:len(sizes) // 4 * 4])


def _read_images(variable: _Variable, array_class: int, shape: tuple[int, ...]) -> np.ndarray:
    kind, size, _ = variable.tag()
    if (array_class != _UINT8 or shape[:3] != (32, 32, 3) or len(shape) != 4 or not 0 < shape[3] <= _MOST_IMAGES
            or (kind, size) != (_PIXELS, 3072 * shape[3])):
        raise DataError(f"not an SVHN file: X is not a uint8 array of [32, 32, 3, 1..{_MOST_IMAGES}]")
    images = np.empty((shape[3], 32, 32, 3), np.uint8)
    for start in range(0, len(images), _BATCH):
        batch = images[start:start + _BATCH]
        columns = np.frombuffer(variable.read(batch.size), np.uint8).reshape(-1, 3, 32, 32)  # [n, C, W, H]
        batch[:] = columns.transpose(0, 3, 2, 1)  # [n, H, W, C]
    return images


def _read_labels(variable: _Variable, array_class: int, shape: tuple[int, ...]) -> np.ndarray:
    kind, size, content = variable.tag()
    if (array_class not in _NUMERIC or shape[1:] != (1,) or not 0 < shape[0] <= _MOST_IMAGES or kind not in _STORED
            or size != shape[0] * np.dtype(_STORED[kind]).itemsize):
        raise DataError(f"not an SVHN file: y is not a numeric array of [1..{_MOST_IMAGES}, 1]")
    return np.frombuffer(variable.read(size) if content is None else content, _STORED[kind])


_READ = {"X": _read_images, "y": _read_labels}
