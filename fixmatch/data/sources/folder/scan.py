"""Folders named after classes, read into a listing; and images of no known class, by files, folders and patterns."""

import collections
import glob
import logging
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator, Sequence

from fixmatch.data.dataset import DataError, shown
from fixmatch.data.sources.folder.image import CONVERT_HEIC, EXTENSIONS
from fixmatch.data.sources.folder.listing import Files, Listing

_LABELED, _TEST = ("labeled", "train"), ("test", "val", "valid", "validation")  # what these folders may be called
_KINDS_SHOWN = 6  # so many extensions of files that are passed over are named

_log = logging.getLogger(__name__)


def scan_folder(root: pathlib.Path) -> Listing:
    """Lists the images of root/labeled or root/train, of root/unlabeled, and of root/test or root/val.

    Says how many files are passed over since their extension is no image's.

    Raises:
        DataError: the labeled images' folder or those of its classes are not there, the test images' folder has another
            class, images lie beside the class folders, or a folder cannot be read.
    """
    labeled, test = _labeled_folder(root), _test_folder(root)
    files, passed_over = Files(), collections.Counter()
    label_of = {name: label for label, name in enumerate(_class_folders(root, labeled))}
    if not label_of:
        raise DataError(f"{root / labeled}: has no folders; make one for each class, with its images inside")
    for name, label in label_of.items():
        _add_below(files, passed_over, root, f"{labeled}/{name}", label)
    if (root / "unlabeled").is_dir():
        _add_below(files, passed_over, root, "unlabeled", -1)
    num_train = len(files)
    for name in _class_folders(root, test) if test else ():
        if name not in label_of:
            raise DataError(f"{shown(str(root / test / name))}: {labeled}/ has no class of this name; add labeled "
                            f"images of it, or remove it from {test}/")
        _add_below(files, passed_over, root, f"{test}/{name}", label_of[name])
    if passed_over:
        _log.info("%s: %s", root, describe_passed_over(passed_over))
    classes = tuple(os.fsencode(name).decode("utf-8", "backslashreplace") for name in label_of)  # can be printed
    return Listing(root, files, num_train, classes, (str(root / labeled), str(root / (test or "test"))), bool(test))


def _labeled_folder(root: pathlib.Path) -> str:
    """The name of the folder with the labeled images. Raises DataError, which says what a data set looks like."""
    found = _folders(root, _LABELED)
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{root}: {' and '.join(found)} both name the labeled images; keep one of them")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; data.root is the folder that holds the images")
    others = [shown(name) for name in _names(root) if (root / name).is_dir() and name not in ("unlabeled", *_TEST)]
    hint = f"; if {', '.join(others[:3])}{', ...' * (len(others) > 3)} are the classes, move them into labeled/"
    raise DataError(f"{root}: has neither labeled/ nor train/; it needs labeled/CLASS/ with images (or train/CLASS/), "
                    f"and may have unlabeled/ and test/CLASS/ (or val/CLASS/){hint if others else ''}")


def _test_folder(root: pathlib.Path) -> str | None:
    """The name of the folder with the test images, if there is one."""
    found = _folders(root, _TEST)
    if len(found) > 1:
        _log.info("%s: the accuracy is measured on %s/; not used: %s", root, found[0],
                  ", ".join(f"{name}/" for name in found[1:]))
    return found[0] if found else None


def _folders(root: pathlib.Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if (root / name).is_dir()]


def describe_passed_over(passed_over: collections.Counter) -> str:
    """How many files are not read, by their extensions."""
    kinds = [f"{count:,} {shown(kind)}" for kind, count in passed_over.most_common(_KINDS_SHOWN)]
    hint = f"; {CONVERT_HEIC}" if {".heic", ".heif"} & passed_over.keys() else ""
    what = "file that is no image" if passed_over.total() == 1 else "files that are no images"
    return (f"passed over {passed_over.total():,} {what} of a kind read here: {', '.join(kinds)}"
            f"{', ...' * (len(passed_over) > len(kinds))}{hint}")


def find_images(given: Iterable[str]) -> tuple[list[str], collections.Counter]:
    """The paths of all images that `given` means, each once, in this order; and what was passed over in folders.

    Args:
        given: files, whatever their extension; folders, of which every image at any depth is taken, sorted, as in
            `scan_folder`; and patterns of the glob module, such as "photos/**/*.jpg", of files and folders.

    Returns:
        The paths; and the number of files of each extension that no image read here has.

    Raises:
        DataError: one of them is not there, or holds no image.
    """
    found, passed_over = {}, collections.Counter()
    for text in given:
        matches, others = [text] if os.path.lexists(text) else _matches(text), collections.Counter()
        paths = [path for match in matches
                 for path in (_images_in(match, others) if os.path.isdir(match) else [match])]
        if not paths:
            why = f"; {describe_passed_over(others)}" if others else ""
            raise DataError(f"{shown(text)}: " + (f"no image in it ({' '.join(EXTENSIONS)}){why}" if matches
                                                  else "no such file or folder"))
        found |= dict.fromkeys(paths)
        passed_over += others
    return list(found), passed_over


def _matches(pattern: str) -> list[str]:
    """What `pattern` means, sorted, each file once: "**" follows a link that leads in a circle forty times."""
    found: dict[str, str] = {}
    for path in sorted(glob.glob(pattern, recursive=True), key=lambda path: (len(path), path)):
        found.setdefault(os.path.realpath(path), path)
    return sorted(found.values())


def _images_in(folder: str, passed_over: collections.Counter) -> list[str]:
    files = Files()
    _add_below(files, passed_over, pathlib.Path(folder), ".", -1)
    return [os.path.normpath(os.path.join(folder, files[index])) for index in range(len(files))]


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


def _add_below(files: Files, passed_over: collections.Counter, root: pathlib.Path, start: str, label: int) -> None:
    """Adds the image files below root/start, at any depth, sorted by the parts of their paths.

    Other files are counted in `passed_over` by their extension.
    """
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
        elif status and stat.S_ISREG(status.st_mode):
            passed_over[os.path.splitext(name)[1].lower() or "without an extension"] += 1


def _identity(status: os.stat_result) -> tuple[int, int]:
    """What two paths to one folder have in common."""
    return status.st_dev, status.st_ino
