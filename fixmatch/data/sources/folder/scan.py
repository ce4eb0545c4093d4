"""Folders named after classes, read into a listing."""

import os
import pathlib
import stat
from collections.abc import Iterator

from fixmatch.data.dataset import DataError, shown
from fixmatch.data.sources.folder.image import EXTENSIONS
from fixmatch.data.sources.folder.listing import Files, Listing


def scan_folder(root: pathlib.Path) -> Listing:
    """Lists the images of root/labeled, root/unlabeled and root/test.

    Raises:
        DataError: root/labeled or the folders of its classes are not there, root/test has a class that labeled/ has
            not, images lie beside the class folders, or a folder cannot be read.
    """
    if not (root / "labeled").is_dir():
        raise DataError(f"{root / 'labeled'}: no such folder; data.root needs labeled/CLASS/ and test/CLASS/ with "
                        "images, and unlabeled/ if there are any")
    files, label_of = Files(), {name: label for label, name in enumerate(_class_folders(root, "labeled"))}
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
    return Listing(root, files, num_train, classes, (str(root / "labeled"), str(root / "test")))


def _class_folders(root: pathlib.Path, split: str) -> Iterator[str]:
    """Gives the names of the folders in root/split, sorted. Raises DataError for images and lost links beside them."""
    for name in _names(root / split):
        path = root / split / name
        if path.is_dir():
            yield name
        elif name.lower().endswith(EXTENSIONS):
            raise DataError(f"{shown(str(path))}: lies beside the class folders; move it into one of them")
        elif not path.exists():  # this may be a class on a disk that is not mounted
            raise DataError(f"{shown(str(path))}: a link that leads nowhere; mend or remove it")


def _names(folder: str | pathlib.Path) -> list[str]:
    """The sorted names of all that is in `folder` and not hidden. Raises DataError if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "__MACOSX")
    except OSError as error:
        raise DataError(f"{shown(str(folder))}: cannot be read: {error.strerror}") from None


def _add_below(files: Files, root: pathlib.Path, start: str, label: int) -> None:
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
            if _identity(status) not in entered:  # otherwise it is a link to where we are, or to what was read already
                entered.add(_identity(status))
                pending.append((path, iter(_names(root / path))))
        elif status is None and "." not in name:  # this may be a folder on a disk that is not mounted: it is reported
            files.add(path, label, None)
        elif name.lower().endswith(EXTENSIONS) and (status is None or stat.S_ISREG(status.st_mode)):
            files.add(path, label, status)


def _identity(status: os.stat_result) -> tuple[int, int]:
    """What two paths to one folder have in common."""
    return status.st_dev, status.st_ino
