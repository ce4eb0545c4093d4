"""Decoded images on disk: built once, then memory-mapped by every later run, at no cost in memory.

A cache called NAME is two files: NAME-FINGERPRINT.npy, an ordinary NumPy file with every image, and NAME.json, which
says what it was built from and what is known of it. They lie in ROOT/.fixmatch-cache/ or, where that cannot be written
to, in a folder of the user's own cache. The JSON file is put in place last, and whatever does not fit it is built anew:
so a builder may be killed at any moment, and the next one clears up after it.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import numpy as np

from fixmatch.data.dataset import DataError
from fixmatch.files import write_atomic

_FINGERPRINT_SHOWN = 16  # hex digits of it in a file name


class Writer:
    """Takes the images of a cache in their order, and counts the grey levels that mean and std are to be of."""

    def __init__(self, file):
        self._file, self._levels = file, np.zeros((3, 256), np.int64)
        self.shape = [0, 0, 0, 3]  # of the images so far

    def begin(self, height: int, width: int, most: int) -> None:
        """Fixes the size of the images, before the first of them. Raises OSError if `most` of them would not fit."""
        self.shape[1:3] = height, width
        needed, free = most * height * width * 3, shutil.disk_usage(self._file.name).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        self._write_header()

    def append(self, images: np.ndarray, counted: bool) -> None:
        """Adds uint8 [n, H, W, 3]; `counted` says whether they are among those that mean and std are of."""
        self._file.write(np.ascontiguousarray(images))
        self.shape[0] += len(images)
        if counted:
            for channel, levels in enumerate(self._levels):
                levels += np.bincount(images[..., channel].ravel(), minlength=256)

    def statistics(self) -> dict[str, list[float]]:
        """"mean" and "std" of the counted pixels in [0, 1], a channel: exact but for their last rounding.

        A std is at least 1/255, one grey level: a channel that is the same everywhere can still be divided by it.
        """
        mean, std = [], []
        for channel in self._levels.tolist():  # Python's integers, which do not overflow
            n = max(sum(channel), 1)
            total, squares = (sum(count * level**power for level, count in enumerate(channel)) for power in (1, 2))
            mean.append(total / n / 255)
            std.append(max((n * squares - total**2) ** 0.5 / n, 1) / 255)
        return {"mean": mean, "std": std}

    def finish(self) -> None:
        """Puts the number of images into the header and everything on the disk."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        """The same 128 bytes long for any number of images, as NumPy fills headers up to a multiple of 64."""
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": "|u1", "fortran_order": False, "shape": tuple(self.shape)})


def cached_images(root: pathlib.Path, name: str, fingerprint: str,
                  build: Callable[[Writer], dict]) -> tuple[np.ndarray, dict]:
    """The images that `build` wrote, now or in an earlier run, and the facts that it returned.

    Caches of the same root and name with another fingerprint are deleted once the new one is in place. Of processes
    that want the same cache one builds it, and the others wait.

    Args:
        root: the folder of the data set.
        name: of the cache, fit for a file name: the source and the settings that a user may switch between.
        fingerprint: hex digest of everything that the images depend on.
        build: writes them and returns facts that JSON can hold.

    Returns:
        (uint8 [N, H, W, 3], read-only and memory-mapped; the facts)

    Raises:
        DataError: a full disk, or no folder that can be written to; nothing is left then. Also what `build` raises.
    """
    places = _places(root)
    for place in places:
        if found := _open(place, name, fingerprint):
            return found
    with _locked(places, name) as place:
        if not _open(place, name, fingerprint):  # another process may have built it in the meantime
            _build(place, name, fingerprint, build)
        found = _open(place, name, fingerprint)
    if not found:
        raise DataError(f"{place}: the cache of decoded images changed while it was opened; start again")
    return found


def _places(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()
    return root / ".fixmatch-cache", pathlib.Path(base) / "fixmatch-paddle" / "images" / path[:_FINGERPRINT_SHOWN]


def _array_path(place: pathlib.Path, name: str, fingerprint: str) -> pathlib.Path:
    return place / f"{name}-{fingerprint[:_FINGERPRINT_SHOWN]}.npy"


def _open(place: pathlib.Path, name: str, fingerprint: str) -> tuple[np.ndarray, dict] | None:
    """What a finished cache holds; None where there is none, or one of other data, or a damaged one."""
    try:
        manifest = json.loads((place / f"{name}.json").read_bytes())
        images = np.lib.format.open_memmap(_array_path(place, name, fingerprint), mode="r")
        fits = manifest["fingerprint"] == fingerprint and manifest["shape"] == list(images.shape)
        return (images, manifest["facts"]) if fits and images.dtype == np.uint8 else None
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _locked(places: tuple[pathlib.Path, ...], name: str) -> Iterator[pathlib.Path]:
    """The first of `places` that can be written to, held against other processes."""
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            handle = _lock(place / f"{name}.lock")
        except OSError as error:  # read-only, another user's, or a file system without locks
            reason = error.strerror
            continue
        try:
            yield place
        finally:
            os.close(handle)
        return
    raise DataError(f"{places[0]}: decoded images can be kept neither there nor in {places[1]} ({reason}); set "
                    "XDG_CACHE_HOME to a folder that can be written to")


def _lock(path: pathlib.Path) -> int:
    """An open handle that holds the lock of `path` until it is closed."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path.parent}: waiting for another process that is decoding the images", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _build(place: pathlib.Path, name: str, fingerprint: str, build: Callable[[Writer], dict]) -> None:
    array, manifest, known = _array_path(place, name, fingerprint), place / f"{name}.json", glob.escape(name)
    for pattern in (f"{known}-*.tmp", f".{known}.json.*.tmp"):  # of builders that were killed: this one has the lock
        for leftover in place.glob(pattern):
            leftover.unlink()
    temporary = array.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            writer = Writer(file)
            facts = build(writer)
            writer.finish()
        os.replace(temporary, array)
        write_atomic(manifest, json.dumps({"fingerprint": fingerprint, "shape": writer.shape, "facts": facts}) + "\n")
    except BaseException as error:
        for path in (temporary, array):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(f"{array}: decoded images cannot be written: {error.strerror}; make room there") from None
        raise
    for stale in place.glob(f"{known}-{'?' * _FINGERPRINT_SHOWN}.npy"):
        if stale != array:
            with contextlib.suppress(OSError):  # costs nothing but disk space
                stale.unlink()
