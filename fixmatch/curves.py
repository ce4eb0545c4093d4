"""Which numbers of metrics.jsonl VisualDL draws, and under which names; and the drawing.

Its page shows groups and the curves in them in the order in which they were first written. The first group answers what
one asks first: does it learn, are the pseudo-labels right, and is the data fast enough.
"""

import itertools
import math
import pathlib
from collections.abc import Iterable

import numpy as np

from fixmatch.config import Config, to_dict
from fixmatch.log import LOGGER

_TAGS = {  # tag in VisualDL: (kind of the line, keys from the line down to the number)
    "1_overview/ema_top1": ("eval", "ema", "top1"),
    "1_overview/pseudo_label_accuracy": ("train", "pseudo_label_accuracy"),
    "1_overview/mask": ("train", "mask"),
    "1_overview/data_wait": ("train", "data_wait"),
    "1_overview/images_per_second": ("train", "images_per_second"),
    "2_evaluation/ema_top1": ("eval", "ema", "top1"),
    "2_evaluation/raw_top1": ("eval", "raw", "top1"),
    "2_evaluation/ema_top5": ("eval", "ema", "top5"),
    "2_evaluation/raw_top5": ("eval", "raw", "top5"),
    "2_evaluation/ema_loss": ("eval", "ema", "loss"),
    "2_evaluation/raw_loss": ("eval", "raw", "loss"),
    "3_training/loss": ("train", "loss"),
    "3_training/loss_x": ("train", "loss_x"),
    "3_training/loss_u": ("train", "loss_u"),
    "3_training/lr": ("train", "lr"),
    "4_pseudo_labels/threshold": ("train", "threshold"),
    "4_pseudo_labels/impurity": ("train", "impurity"),
    "4_pseudo_labels/top_class_share": ("train", "top_class_share")}
_HISTOGRAM = "ssl/confidence"
BINS = np.linspace(0, 1, 21)  # of the confidences that a line counts
_FILE = "vdlrecords.run.log"
RESULTS = ("2_evaluation/ema_top1", "2_evaluation/raw_top1")  # what its table of hyper-parameters shows beside them


def late(num_classes: int) -> list[str]:
    """The tags of evaluations: written once without a value at the start, they stand before those of the first step."""
    return [tag for tag, (kind, *path) in _TAGS.items() if kind == "eval" and _tells(path, num_classes)]


def points(line: dict, num_classes: int) -> dict[str, float]:
    """{tag: value} of a line of metrics.jsonl; what the line does not have, or what tells nothing, is left out."""
    found = {}
    for tag, (kind, *path) in _TAGS.items():
        value = line if line["kind"] == kind and _tells(path, num_classes) else None
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (int, float)):
            found[tag] = value
    return found


def _tells(path: list[str], num_classes: int) -> bool:
    """Top-5 of five classes is always 100 %."""
    return path[-1] != "top5" or num_classes > 5


class Curves:
    """Draws lines of metrics.jsonl into `folder`, first those that there are. If it fails, the run goes on without it.

    VisualDL's server shows one file of a folder, the one whose name sorts last, and the file of a run that was killed
    may have steps in it that are done again. So a run has one file, which is made anew from all lines on a resume.

    Args:
        folder: what is in it of VisualDL is replaced.
        num_classes: K.
        lines: of metrics.jsonl so far, as read back.
    """

    def __init__(self, folder: pathlib.Path, num_classes: int, lines: Iterable[dict] = ()):
        self._writer, self._num_classes = None, num_classes
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*vdlrecords*"):
            old.unlink()
        lines = iter(lines)
        first = next(lines, None)
        self._guard(self._open, str(folder), _milliseconds(first) if first else None)
        for line in itertools.chain([first] if first else [], lines):
            self.draw(line)

    def _open(self, folder: str, when: int | None) -> None:
        from visualdl import LogWriter  # takes a second to import, so only where it is used

        self._writer = LogWriter(logdir=folder, file_name=_FILE)
        for tag in late(self._num_classes):
            self._writer.add_scalar(tag, math.nan, 0, when)  # its page leaves these out

    def draw(self, line: dict) -> None:
        """Draws a line of metrics.jsonl."""
        if self._writer is not None:
            self._guard(self._draw, line)

    def _draw(self, line: dict) -> None:
        step, when = line["step"], _milliseconds(line)
        for tag, value in points(line, self._num_classes).items():
            self._writer.add_scalar(tag, value, step, when)
        if line.get("confidence"):
            from visualdl.component.base_component import histogram

            self._writer._get_file_writer().add_record(
                histogram(_HISTOGRAM, line["confidence"], BINS, step, when))

    def add_run(self, config: Config, preview: np.ndarray) -> None:
        """Puts the preview picture, uint8 [H, W, 3], and the configuration as hyper-parameters beside the curves.

        VisualDL's table of these takes a dot in a name for a path and shows nothing, and a bool or None crashes it.
        """
        if self._writer is not None:
            self._guard(self._add_run, to_dict(config), preview)

    def _add_run(self, tree: dict, preview: np.ndarray) -> None:
        self._writer.add_image("views/original_weak_strong", preview, 0, dataformats="HWC")
        hparams = {f"{section}/{key}": value if type(value) in (float, str) or _fits_a_page(value) else str(value)
                   for section, keys in tree.items() for key, value in keys.items()}
        self._writer.add_hparams(hparams, list(RESULTS))

    def _guard(self, draw, *arguments) -> None:
        try:
            draw(*arguments)
        except OSError:  # of the system, which the run needs as well
            raise
        except Exception as error:
            self.close()
            LOGGER.info(f"VisualDL failed ({type(error).__name__}: {error}), so the run goes on without its curves; "
                        "metrics.jsonl has their figures, and --resume draws them again")

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def _milliseconds(line: dict) -> int:
    return round(1000 * line.get("time", 0))


def _fits_a_page(value) -> bool:
    """Whether VisualDL's records can hold this value as an integer."""
    return type(value) is int and abs(value) < 2**31
