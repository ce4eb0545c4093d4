"""The user's own images: folders named after classes, or CSV files that name images and their classes.

    ROOT/labeled/CLASS/...   images of a known class, at any depth below CLASS
    ROOT/unlabeled/...       images of no known class, at any depth; may be missing
    ROOT/test/CLASS/...      images of a known class to measure the accuracy on

    ROOT/train.csv           columns path and label; where the label is empty, the class is not known
    ROOT/test.csv            the same, with a label on every line

The images are decoded (decode.py) and memory-mapped (cache.py). What else is held takes 85 MB for a million files while
they are decoded, and 65 MB after that; for a CSV file of a million lines, 250 MB while it is read.
"""

import array
import csv
import functools
import hashlib
import itertools
import os
import pathlib
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fixmatch.data.dataset import DataError, Dataset, Source, shown
from fixmatch.data.sources.cache import Writer, cached_images
from fixmatch.data.sources.decode import DECODER_VERSION, EXTENSIONS, common_size, decoding

_SHOWN = 10  # broken files that are named


def load_folder(root: str, image_size: int | None, max_broken: int) -> Source:
    """Reads ROOT/labeled, unlabeled and test. Classes are the sorted names of labeled's subfolders.

    The training images are the labeled ones, class by class, then the unlabeled ones (label -1), each sorted by path.
    Files whose extension is no image's are passed over, as is everything hidden (.DS_Store, .ipynb_checkpoints). Links
    are followed, but each folder is entered once; one that leads nowhere counts as a broken image.

    Args:
        root: the folder that holds the three.
        image_size: side of the square that images are made into, in pixels. None: the size that all images have, if
            it is one and both its sides have 8 pixels or more; else a square with the median of their shorter sides,
            from 8 to 224.
        max_broken: as many image files may be unreadable; they are named and left out.

    Raises:
        DataError: folders are missing, a class has no readable image, labeled/ and test/ do not fit each other, too
            many broken images, or no room for the decoded ones.
    """
    return _load("folder", _scan_folder(pathlib.Path(root)), image_size, max_broken)


def load_csv(root: str, image_size: int | None, max_broken: int) -> Source:
    """Reads ROOT/train.csv and ROOT/test.csv; or ROOT is itself the training CSV, with test.csv beside it.

    UTF-8, comma-separated, the first line naming the columns; columns other than path and label are passed over. Paths
    start from the folder of the CSV file, and may lead out of it. Classes are the sorted labels of the training file,
    without spaces around them. Order, sizes and broken images as for `load_folder`.

    Raises:
        DataError: as for `load_folder`, naming file and line: a file that is not there, a missing column, a label in
            test.csv that is empty or that no training image has, a path that is given two labels, or that is both a
        labeled training image and a test image.
    """
    place = pathlib.Path(root)
    train = place if place.is_file() else place / "train.csv"
    name = "csv" if train.name == "train.csv" else f"csv-{hashlib.sha256(os.fsencode(train.name)).hexdigest()[:8]}"
    return _load(name, _scan_csv(train), image_size, max_broken)


class _Files:
    """Paths and labels, in half the memory of a list of strings, and a fingerprint of the files themselves."""

    def __init__(self):
        self._paths, self._ends, self._labels = bytearray(), array.array("q", [0]), array.array("q")
        self._digest = hashlib.sha256()

    def add(self, path: str, label: int, status: os.stat_result | None) -> None:
        """`status` is None for a link that leads nowhere. The mode counts because it decides who may read the file."""
        name = os.fsencode(path)
        self._paths += name
        self._ends.append(len(self._paths))
        self._labels.append(label)
        facts = (status.st_size, status.st_mtime_ns, status.st_mode) if status else ()
        self._digest.update(name + b"\0" + repr(facts).encode())

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[self._ends[index]:self._ends[index + 1]]))

    def labels(self) -> np.ndarray:
        """int64 [N]"""
        return np.array(self._labels, dtype=np.int64)

    def fingerprint(self, *settings) -> str:
        digest = self._digest.copy()
        digest.update(repr(settings).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Listing:
    """What was found, before any image is opened: the labeled files, the unlabeled ones, those of the test set.

    A sequence of paths that can be opened.
    """

    root: pathlib.Path  # where paths start
    files: _Files
    num_train: int
    classes: tuple[str, ...]
    where: tuple[str, str]  # of the labeled images and of the test images, for messages

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        """The path of an image."""
        return os.path.join(self.root, self.files[index])

    def kept(self, broken=()) -> tuple[np.ndarray, np.ndarray]:
        """Indices of training and of test images without the `broken` ones, int64."""
        kept = np.delete(np.arange(len(self)), np.array(broken, np.int64))
        return np.split(kept, [np.searchsorted(kept, self.num_train)])

    def labels(self, broken=()) -> tuple[np.ndarray, np.ndarray]:
        """Of training and test images without the `broken` ones. Raises DataError if that leaves a gap."""
        train, test = (self.files.labels()[indices] for indices in self.kept(broken))
        counts = np.bincount(train[train >= 0], minlength=len(self.classes))
        if not counts.all():
            name = self.classes[int(np.argmin(counts))]
            raise DataError(f"{self.where[0]}: class {shown(name)} has no labeled image that can be read "
                            f"({' '.join(EXTENSIONS)}); add one, or remove the class")
        if not len(test):
            raise DataError(f"{self.where[1]}: no test image that can be read; put images of each class there, since "
                            "the accuracy is measured on them")
        return train, test


# --- from files to a listing


def _scan_folder(root: pathlib.Path) -> _Listing:
    if not (root / "labeled").is_dir():
        raise DataError(f"{root / 'labeled'}: no such folder; data.root needs labeled/CLASS/ and test/CLASS/ with "
                        "images, and unlabeled/ if there are any")
    files, label_of = _Files(), {name: label for label, name in enumerate(_class_folders(root, "labeled"))}
    if not label_of:
        raise DataError(f"{root / 'labeled'}: has no folders; make one for each class, with its images inside")
    for name, label in label_of.items():
        _add_below(files, root, f"labeled/{name}", label)
    if (root / "unlabeled").is_dir():
        _add_below(files, root, "unlabeled", -1)
    num_train = len(files)
    for name in _class_folders(root, "test") if (root / "test").is_dir() else ():
        if name not in label_of:
            raise DataError(f"{shown(str(root / 'test' / name))}: labeled/ has no class of this name; add labeled "
                            "images of it, or remove it from test/")
        _add_below(files, root, f"test/{name}", label_of[name])
    classes = tuple(os.fsencode(name).decode("utf-8", "backslashreplace") for name in label_of)  # can be printed
    return _Listing(root, files, num_train, classes, (str(root / "labeled"), str(root / "test")))


def _class_folders(root: pathlib.Path, split: str) -> Iterator[str]:
    for name in _names(root / split):
        path = root / split / name
        if path.is_dir():
            yield name
        elif name.lower().endswith(EXTENSIONS):
            raise DataError(f"{shown(str(path))}: lies beside the class folders; move it into one of them")
        elif not path.exists():  # perhaps a class on a disk that is not mounted
            raise DataError(f"{shown(str(path))}: a link that leads nowhere; mend or remove it")


def _names(folder: str | pathlib.Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "__MACOSX")
    except OSError as error:
        raise DataError(f"{shown(str(folder))}: cannot be read: {error.strerror}") from None


def _add_below(files: _Files, root: pathlib.Path, start: str, label: int) -> None:
    """Adds the image files below root/start, at any depth, sorted by the parts of their paths."""
    entered = {_identity(os.stat(root / folder)) for folder in ("", start.split("/")[0], start)}
    pending = [(start, iter(_names(root / start)))]
    while pending:
        folder, names = pending[-1]
        name = next(names, None)
        if name is None:
            pending.pop()
            continue
        path = f"{folder}/{name}"
        try:
            status = os.stat(os.path.join(root, path))
        except OSError:  # a link that leads nowhere, or in a circle
            status = None
        if status and stat.S_ISDIR(status.st_mode):
            if _identity(status) not in entered:  # else a link to where we are, or to what was read already
                entered.add(_identity(status))
                pending.append((path, iter(_names(root / path))))
        elif status is None and "." not in name:  # perhaps a folder on a disk that is not mounted: not to be missed
            files.add(path, label, None)
        elif name.lower().endswith(EXTENSIONS) and (status is None or stat.S_ISREG(status.st_mode)):
            files.add(path, label, status)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _scan_csv(train: pathlib.Path) -> _Listing:
    root, test = train.parent, train.with_name("test.csv")
    rows = sorted(_rows(train), key=lambda row: (not row[1], row))
    for before, row in itertools.pairwise(rows):
        if before[0] == row[0] and before[1] and row[1] not in ("", before[1]):
            raise DataError(f"{train}: line {row[2]}: {shown(row[0])} has the label {shown(row[1])}, but "
                            f"{shown(before[1])} in line {before[2]}")
    classes = tuple(sorted({label for _, label, _ in rows} - {""}))
    if not classes:
        raise DataError(f"{train}: no line has a label; at least one image of each class needs one")
    files, label_of = _Files(), {"": -1} | {name: label for label, name in enumerate(classes)}
    for path, label, line in rows:
        files.add(path, label_of[label], _status(train, path, line))
    tests = sorted(_rows(test))
    line_of = {path: line for path, _, line in tests}
    for path, label, line in rows:
        if label and path in line_of:
            raise DataError(f"{test}: line {line_of[path]}: {shown(path)} is a labeled training image, too, in line "
                            f"{line} of {train.name}; an image that was learned by heart measures nothing")
    for path, label, line in tests:
        if not label or label not in label_of:
            said = f"no image in {train.name} has the label {shown(label)}" if label else "the label is empty"
            raise DataError(f"{test}: line {line}: {said}; a test image needs the label of a class that is trained")
        files.add(path, label_of[label], _status(test, path, line))
    return _Listing(root, files, len(rows), classes, (str(train), str(test)))


def _status(file: pathlib.Path, path: str, line: int) -> os.stat_result:
    try:
        status = os.stat(os.path.join(file.parent, path))
        if stat.S_ISREG(status.st_mode):
            return status
        reason = "not a file"
    except OSError as error:
        reason = error.strerror
    raise DataError(f"{file}: line {line}: {shown(path)}: {reason}; paths start from {file.parent}")


def _rows(file: pathlib.Path) -> Iterator[tuple[str, str, int]]:
    """(path, label, line) of every row. Raises DataError."""
    try:
        with open(file, "rb") as lines:
            yield from _parse(file, csv.reader(_decoded(file, lines), strict=True))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; data.root needs train.csv and test.csv, each with "
                        "the columns path,label") from None


def _parse(file: pathlib.Path, reader) -> Iterator[tuple[str, str, int]]:
    try:
        header = [name.strip() for name in next(reader, [])]
        if missing := {"path", "label"} - set(header):
            raise DataError(f"{file}: line 1: no column {' and no column '.join(sorted(missing))}; it must name the "
                            "columns: path,label")
        path_at, label_at, labels = header.index("path"), header.index("label"), {}
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(f"{file}: line {reader.line_num}: {len(row)} fields, but the first line names "
                                f"{len(header)}; put a text with a comma in it between quotes")
            path, label = row[path_at], row[label_at].strip()
            if not path or "\0" in path:
                raise DataError(f"{file}: line {reader.line_num}: {'no file has such a name' if path else 'no path'}")
            yield path, labels.setdefault(label, label), reader.line_num  # one string a class, not one a row
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: not CSV: {error}") from None


def _decoded(file: pathlib.Path, lines) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{file}: line {number}: not UTF-8; save the file as UTF-8") from None


# --- from a listing to images


def _load(name: str, listing: _Listing, image_size: int | None, max_broken: int) -> Source:
    listing.labels()  # raises at once what could be known after hours of decoding, too
    images, facts = cached_images(
        listing.root, f"{name}-{image_size or 'auto'}",
        listing.files.fingerprint(DECODER_VERSION, listing.num_train, image_size),
        functools.partial(_decode_all, listing, image_size, max_broken))
    broken = facts["broken"]
    _refuse(listing, broken, max_broken)
    for index, reason in broken[:_SHOWN]:
        print(f"{shown(listing[index])}: left out: {reason}")
    if len(broken) > _SHOWN:
        print(f"{listing.root}: {len(broken) - _SHOWN} more broken images left out")
    left_out = [index for index, _ in broken]
    train, test = listing.labels(left_out)
    paths = tuple(shown(listing.files[index]) for index in listing.kept(left_out)[1])
    return Source(name.split("-")[0], listing.classes, Dataset(images[:len(train)], train),
                  Dataset(images[len(train):], test), tuple(facts["mean"]), tuple(facts["std"]), flip=True,
                  test_paths=paths)


def _refuse(listing: _Listing, broken: list[list], max_broken: int) -> None:
    if len(broken) > max_broken:
        index, reason = broken[0]
        raise DataError(f"{listing.root}: more than {max_broken} broken images, the first of them "
                        f"{shown(listing.files[index])} ({reason}); remove them, or raise data.max_broken")


def _decode_all(listing: _Listing, image_size: int | None, max_broken: int, writer: Writer) -> dict:
    """Writes every image that can be read; returns mean, std and what is broken: [[index, reason], ...]."""
    started, cut, broken = time.monotonic(), listing.num_train, []
    height, width = (image_size, image_size) if image_size else common_size(listing, listing.root)
    writer.begin(height, width, len(listing))
    with decoding(listing, cut, height, width, listing.root) as results:
        for part, (images, bad) in results:
            writer.append(images, counted=part.stop <= cut)
            broken += bad
            _refuse(listing, broken, max_broken)
    print(f"{listing.root}: {writer.shape[0]:,} images decoded in {time.monotonic() - started:.0f} s", flush=True)
    return {**writer.statistics(), "broken": broken}
