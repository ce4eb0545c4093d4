"""metrics.jsonl of a run: a line for each stretch of steps, {"kind": "train", ...}, and for each evaluation, "eval".

Everything else that shows a run's course, such as VisualDL's curves, can be made from it again.
"""

import errno
import json
import os
import pathlib
from collections.abc import Iterator

from fixmatch.files import replacing
from fixmatch.log import LOGGER

_LONGEST = 2**20  # bytes of a line that is read back; one has about 500


class MetricsFile:
    """The file at `path`, of which a resumed run keeps the lines up to the step that it goes on from.

    Args:
        path: in the run folder.
        step: finished steps; later lines are dropped, since they are written again.
        evaluated_step: the last evaluation that is kept.
    """

    def __init__(self, path: pathlib.Path, step: int = 0, evaluated_step: int = 0):
        self.path = path
        self._folder = _identity(path.parent)
        drop_later_lines(path, step, evaluated_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed in close()

    def write(self, line: dict) -> None:
        """Adds a line, which must hold no NaN, and flushes it to the system."""
        self.check_place()
        print(json.dumps(line, allow_nan=False), file=self._file, flush=True)

    def check_place(self) -> None:
        """Raises OSError where the run folder was moved or removed; a file that was deleted alone is begun anew."""
        if _identity(self.path.parent) != self._folder:
            raise OSError(errno.ENOENT, "the run folder was moved or removed while the run trained; --resume goes on "
                                        "from its last checkpoint, with run.dir set to where it is", self.path.parent)
        here = os.fstat(self._file.fileno())
        if _identity(self.path) != (here.st_dev, here.st_ino):
            LOGGER.info(f"{self.path}: was deleted or replaced while the run trained; its lines so far are lost, and "
                        "the next ones follow in a new file")
            self._file.close()
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115, closed in close()

    def close(self) -> None:
        self._file.close()


def read(path: pathlib.Path) -> Iterator[tuple[bytes, dict]]:
    """The whole lines that are right, one by one: as they stand, and what they hold.

    What is no line of this file is passed over: a torn last one, or what a damaged disk put there.
    """
    with open(path, "rb") as lines:
        for line in iter(lambda: lines.readline(_LONGEST), b""):
            try:
                content = json.loads(line)
                if line.endswith(b"\n") and content["kind"] in ("train", "eval") and type(content["step"]) is int:
                    yield line, content
            except (ValueError, KeyError, TypeError, RecursionError):
                continue


def drop_later_lines(path: pathlib.Path, step: int, evaluated_step: int) -> None:
    """Keeps the lines of steps up to `step`, and of evaluations up to `evaluated_step`."""
    if path.exists():
        last = {"train": step, "eval": evaluated_step}
        with replacing(path) as kept:
            kept.writelines(line for line, content in read(path) if content["step"] <= last[content["kind"]])


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
    """What tells a file or folder from another one that takes its name; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
