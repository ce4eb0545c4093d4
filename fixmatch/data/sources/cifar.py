"""CIFAR-10 and CIFAR-100 from the official Python archive or its unpacked folder (Krizhevsky 2009).

The archives hold pickles, which can run any code when loaded. So they are read by an unpickler that admits NumPy arrays
and plain containers only (arrays_pickle.py), and straight from the archive, so that nothing is extracted.
"""

import logging
import pathlib
import tarfile
from dataclasses import dataclass

import numpy as np

from fixmatch.data.dataset import DataError, Dataset, Source, one_line
from fixmatch.data.sources.arrays_pickle import unpickle
from fixmatch.data.sources.download import TAR_ERRORS, locate, md5_of


@dataclass(frozen=True)
class _Layout:
    """How one of the two data sets is packed, and what is known of it."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels_key: str
    names_key: str
    num_classes: int
    md5: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_HOST = "https://www.cs.toronto.edu/~kriz/"
_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-python.tar.gz", "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",),
        "batches.meta", "labels", "label_names", 10, "c58f30108f718f92721af3b95e74349a",
        (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": _Layout(
        "cifar-100-python.tar.gz", "cifar-100-python", ("train",), ("test",), "meta", "fine_labels", "fine_label_names",
        100, "eb9058c3a382ffc7106e4002c42a8d85", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
_LARGEST_MEMBER = 1 << 29  # bytes of a file in the archive; the official ones are below 2**28

_log = logging.getLogger(__name__)


def load_cifar(name: str, root: str, allow_download: bool = True) -> Source:
    """Reads CIFAR from root/ARCHIVE, root/FOLDER, or from `root` itself if it is one of the two; else downloads it.

    The images are uint8 [50000, 32, 32, 3] and [10000, 32, 32, 3]. CIFAR-100 has its 100 fine labels.

    Raises:
        DataError: nothing is there and it is not to be downloaded, or a file is damaged, hostile or not CIFAR.
    """
    layout = _LAYOUTS[name]
    place = locate(pathlib.Path(root), name, layout.archive, layout.folder, layout.meta, _HOST, layout.md5,
                   allow_download)
    files = _read_folder(place, layout) if place.is_dir() else _read_archive(place, layout)
    train, test = (_join([_parse_batch(files[part], f"{place}: {part}", layout) for part in parts])
                   for parts in (layout.train, layout.test))
    classes = _parse_meta(files[layout.meta], f"{place}: {layout.meta}", layout)
    for part, data in (("training", train), ("test", test)):
        if not len(data):
            raise DataError(f"{place}: holds no {part} images")
    if place.suffix == ".gz" and md5_of(place) != layout.md5:
        _log.info("%s: not the official archive (its MD5 differs); read all the same", place)
    return Source(name, classes, train, test, layout.mean, layout.std, flip=True)


def statistics(name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel of "cifar10" or "cifar100", for pixels in [0, 1]."""
    return _LAYOUTS[name].mean, _LAYOUTS[name].std


def _read_folder(folder: pathlib.Path, layout: _Layout) -> dict[str, bytes]:
    """The content of each of CIFAR's files in an unpacked folder. Raises DataError."""
    try:
        return {name: (folder / name).read_bytes() for name in (*layout.train, *layout.test, layout.meta)}
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}; unpack the archive again") from None


def _read_archive(path: pathlib.Path, layout: _Layout) -> dict[str, bytes]:
    """The content of each of CIFAR's files in an archive. Raises DataError."""
    wanted = {f"{layout.folder}/{name}": name for name in (*layout.train, *layout.test, layout.meta)}
    files = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if member.name in wanted and member.isfile() and member.size <= _LARGEST_MEMBER:
                    files[wanted[member.name]] = archive.extractfile(member).read()
    except TAR_ERRORS as error:
        raise DataError(f"{path}: damaged or not a tar archive ({one_line(error)}); delete it and download it "
                        "again") from None
    missing = sorted(set(wanted.values()) - set(files))
    if missing:
        raise DataError(f"{path}: not the {layout.archive} archive: it has no {layout.folder}/{missing[0]}")
    return files


def _parse_batch(blob: bytes, where: str, layout: _Layout) -> Dataset:
    """The images and labels of one file. Raises DataError."""
    content = unpickle(blob, where)
    rows, labels = getattr(content.get("data"), "uint8", None), content.get(layout.labels_key)
    if rows is None or rows.ndim != 2 or rows.shape[1] != 3072:
        raise DataError(f"{where}: not a CIFAR file: 'data' is not a uint8 array of rows of 3072")
    if not isinstance(labels, list) or len(labels) != len(rows):
        raise DataError(f"{where}: not a CIFAR file: '{layout.labels_key}' is not a list of {len(rows)} labels")
    for i, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < layout.num_classes:
            shown = str(label) if type(label) is int and abs(label) < 1 << 63 else f"a {type(label).__name__}"
            raise DataError(f"{where}: image {i} has the label {shown}, expected 0..{layout.num_classes - 1}")
    images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Dataset(np.ascontiguousarray(images), np.array(labels, dtype=np.int64))


def _parse_meta(blob: bytes, where: str, layout: _Layout) -> tuple[str, ...]:
    """The names of the classes, in the order of the labels. Raises DataError."""
    names = unpickle(blob, where).get(layout.names_key)
    if not isinstance(names, list) or [type(n) for n in names] != [bytes] * layout.num_classes:
        raise DataError(f"{where}: not a CIFAR file: '{layout.names_key}' is not a list of {layout.num_classes} names")
    return tuple(n.decode("utf-8", "replace") for n in names)


def _join(parts: list[Dataset]) -> Dataset:
    return Dataset(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))
