"""Decoded images on disk: built once, then memory-mapped by every later run, at no cost in memory.

A cache called NAME is two files: NAME-FINGERPRINT.npy, an ordinary NumPy file with every image, and NAME.json, which
says what it was built from and what is known of it. They lie in ROOT/.fixmatch-cache/ or, where that cannot be written
to, in a folder of the user's own cache. The JSON file is put in place last, and a cache that does not fit its JSON file
is built anew. So a builder may be killed at any moment, and the next one clears up after it.

NAME.lock keeps two processes from building the same cache. The operating system lets go of it when its holder dies.
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator

import filelock
import numpy as np

from fixmatch.data.dataset import DataError, one_line
from fixmatch.data.sources.writer import Writer
from fixmatch.files import write_atomic

_FINGERPRINT_SHOWN = 16  # hex digits of a fingerprint that a file name has

_log = logging.getLogger(__name__)


def cached_images(root: pathlib.Path, name: str, fingerprint: str,
                  build: Callable[[Writer], dict]) -> tuple[np.ndarray, dict]:
    """The images that `build` wrote, now or in an earlier run, and the facts that it returned.

    Caches of the same root and name with another fingerprint are deleted once the new one is in place. Of processes
    that want the same cache one builds it, and the others wait.

    Args:
        root: the folder of the data set.
        name: of the cache, fit for a file name: the source and the settings that a user may switch between.
        fingerprint: the hex digest of everything that the images depend on.
        build: a function that writes the images and returns facts that JSON can hold.

    Returns:
        (uint8 [N, H, W, 3], read-only and memory-mapped; the facts)

    Raises:
        DataError: the disk is full, or there is no folder that can be written to; nothing is left then. What `build`
            raises is passed on.
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
    """The folders that the cache may lie in, in the order of preference."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()
    return root / ".fixmatch-cache", pathlib.Path(base) / "fixmatch-paddle" / "images" / path[:_FINGERPRINT_SHOWN]


def _array_path(place: pathlib.Path, name: str, fingerprint: str) -> pathlib.Path:
    return place / f"{name}-{fingerprint[:_FINGERPRINT_SHOWN]}.npy"


def _open(place: pathlib.Path, name: str, fingerprint: str) -> tuple[np.ndarray, dict] | None:
    """What a finished cache holds, or None if there is none, or one of other data, or a damaged one."""
    try:
        manifest = json.loads((place / f"{name}.json").read_bytes())
        images = np.lib.format.open_memmap(_array_path(place, name, fingerprint), mode="r")
        fits = manifest["fingerprint"] == fingerprint and manifest["shape"] == list(images.shape)
        return (images, manifest["facts"]) if fits and images.dtype == np.uint8 else None
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _locked(places: tuple[pathlib.Path, ...], name: str) -> Iterator[pathlib.Path]:
    """A context that gives the first of `places` that can be written to, held against other processes."""
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            lock = _acquired(place / f"{name}.lock")
        except (OSError, NotImplementedError) as error:  # read-only, another user's, or a file system without locks
            reason = getattr(error, "strerror", None) or one_line(error)
            continue
        with lock:
            yield place
        return
    raise DataError(f"{places[0]}: decoded images can be kept neither there nor in {places[1]} ({reason}); set "
                    "XDG_CACHE_HOME to a folder that can be written to")


def _acquired(path: pathlib.Path) -> contextlib.AbstractContextManager:
    """A context whose end releases the lock of `path`, which this process holds from now on."""
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        _log.info("%s: waiting for another process that is decoding the images", path.parent)
        return lock.acquire()


def _build(place: pathlib.Path, name: str, fingerprint: str, build: Callable[[Writer], dict]) -> None:
    """Builds the cache and deletes what is left of others. The caller holds the lock."""
    array, manifest, known = _array_path(place, name, fingerprint), place / f"{name}.json", glob.escape(name)
    for pattern in (f"{known}-*.tmp", f".{known}.json.*.tmp"):  # of builders that were killed, since they had the lock
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
            with contextlib.suppress(OSError):  # a stale cache costs nothing but disk space
                stale.unlink()
