"""Folders for what a program needs while it runs. Those of a program that was killed are removed by the next one."""

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

from filelock import FileLock, Timeout

_PREFIX = "fixmatch-scratch-"
_SETTLED = 60  # seconds, after which a folder has been locked by whoever has made it


@contextlib.contextmanager
def scratch_folder() -> Iterator[pathlib.Path]:
    """A folder in the system's temporary one, for the time of a with block."""
    _remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name, contextlib.ExitStack() as held:
        folder = pathlib.Path(name)
        with contextlib.suppress(OSError, NotImplementedError):  # a disk without locks: nobody removes it early
            held.enter_context(FileLock(folder / ".lock", timeout=0))
        yield folder


def _remove_abandoned() -> None:
    """A lock ends with the last process that holds it, copies of the first one included."""
    for lock in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/.lock"):
        with contextlib.suppress(OSError, NotImplementedError, Timeout):  # another user's, being removed, or in use
            if time.time() - lock.stat().st_mtime > _SETTLED:
                with FileLock(lock, timeout=0):
                    shutil.rmtree(lock.parent, ignore_errors=True)
