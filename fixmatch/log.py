"""Where what a run says goes: to the terminal, and to train.log once there is a run folder.

Everything is said through the logger "fixmatch" of the logging module, so that the data sources, the trainer and a
user's own notebook share one place. What is said with `extra={"behind_bar": True}` is for train.log alone, because a
progress bar shows the same.
"""

import contextlib
import errno
import logging
import logging.handlers
import os
import pathlib
import sys
from collections.abc import Iterator

from tqdm import tqdm

LOGGER = logging.getLogger("fixmatch")
_REMEMBERED = 10_000  # records said before there is a run folder


def printable(text: str) -> str:
    """`text` on one line, with an escape such as \\n for what cannot be printed: names in data may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def discard(stream) -> None:
    """Sends what is still to be written to `stream` nowhere, because its reader has left: Python would complain."""
    with contextlib.suppress(OSError, ValueError):  # of a stream that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Lines(logging.Formatter):
    """Escapes what cannot be printed, but for the ends of lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


class _Terminal(logging.Handler):
    """Prints to standard output without tearing a progress bar. Its reader may leave: train.log has it all."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "behind_bar", False):
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # such as a full disk that it is redirected to
                raise
            discard(sys.stdout)


class _File(logging.FileHandler):
    """Raises when the disk is full, where logging's own handler would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


class RunLog:
    """What was said in this run so far; `open` puts it into a file, and all that follows."""

    def __init__(self):
        self._memory = logging.handlers.MemoryHandler(_REMEMBERED, flushLevel=logging.CRITICAL + 1)
        self._file: _File | None = None
        LOGGER.addHandler(self._memory)

    def open(self, path: pathlib.Path) -> None:
        self._file = _File(path, encoding="utf-8")
        self._file.setFormatter(_Lines())
        self._memory.setTarget(self._file)
        LOGGER.removeHandler(self._memory)
        self._memory.flush()
        LOGGER.addHandler(self._file)

    def close(self) -> None:
        for handler in (self._memory, self._file):
            if handler is not None:
                LOGGER.removeHandler(handler)
                handler.close()


@contextlib.contextmanager
def shown(quiet: bool = False) -> Iterator[None]:
    """Shows what is said on the terminal for the length of a with block; nothing of it with `quiet`."""
    terminal, level = _Terminal(), LOGGER.level
    terminal.setFormatter(_Lines())
    if not quiet:
        LOGGER.addHandler(terminal)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(terminal)
        LOGGER.setLevel(level)
