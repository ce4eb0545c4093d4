"""The folder of one run: made, locked against a second trainer, moved aside rather than overwritten."""

import itertools
import pathlib
import platform
import subprocess

from filelock import FileLock, Timeout

from fixmatch.config import ConfigError
from fixmatch.version import __version__, paddle_build

_MARKS = ((".lock",), ("config.yaml", "split.json"))  # a folder that has all of one of these was made by a run


class RunFolder:
    """Holds the lock of `path` until `close`.

    A fresh start where an earlier run lies moves that run to PATH.1 (or .2, ...). Raises ConfigError when another
    process trains there, or when the folder holds something else.
    """

    def __init__(self, path: pathlib.Path, resume: bool):
        self.path, self.moved_to = path, None
        self._lock = FileLock(path / ".lock", timeout=0)
        try:
            if path.exists() and not path.is_dir():
                raise ConfigError(f"run.dir: {path} is a file")
            if path.exists() and any(p.name != ".lock" for p in path.iterdir()):
                if not any(all((path / name).exists() for name in mark) for mark in _MARKS):
                    raise ConfigError(f"run.dir: {path} holds files that are no run's; choose another folder")
                self._acquire()
                if not resume:
                    self._move_aside()
            path.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            raise ConfigError(f"run.dir: {path} cannot be used: {error.strerror}") from None

    def close(self) -> None:
        self._lock.release(force=True)

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigError(f"run.dir: another process is training in {self.path}; choose another run.dir") from None

    def _move_aside(self) -> None:
        """Gives up the lock first, because Windows renames no folder in which a file is open."""
        self.close()
        aside = (self.path.with_name(f"{self.path.name}.{n}") for n in itertools.count(1))
        self.moved_to = next(p for p in aside if not p.exists())
        self.path.rename(self.moved_to)


def provenance() -> dict:
    """Versions, commit and machine, for result.json and checkpoints, and which build of Paddle."""
    import numpy
    import paddle

    return {"versions": {"fixmatch": __version__, "paddle": paddle.__version__, "numpy": numpy.__version__,
                         "python": platform.python_version()},
            "build": paddle_build(), "commit": _commit(), "platform": platform.platform(),
            "device": paddle.device.get_device()}


def _commit() -> str | None:
    """Of the checkout that this package runs from, marked -dirty if it was changed; None outside a checkout."""
    root = pathlib.Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40",  # noqa: S603, S607
                               "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
