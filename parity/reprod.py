"""The files of the paper-reproduction guide: .npy pairs and diff logs that reprod_log reads and writes.

They are no verdict: a mean difference below 1e-6 is asked of float32 numbers, which reversed batch-norm momentum and a
transposed array both pass. The verdict is the stages' own.
"""

import contextlib
import io
import logging
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from reprod_log import ReprodDiffHelper, ReprodLogger

from parity import classic

LOGS = {  # the pairs of a log are in <name>_paddle.npy and <name>_torch.npy
    "forward": "forward_diff.log", "metric": "metric_diff.log", "loss": "loss_diff.log",
    "backward_Alignment": "diff_backward_Alignment_model.txt", "bp_align": "bp_align_diff.log",
    "train_align": "train_align_diff.log",
}
THRESHOLD = 1e-6  # of the guide, on the mean difference


def write(folder: pathlib.Path, seeds: Iterable[int], parts=classic.PARTS) -> str:
    """Writes the .npy pairs and the log of every check that these parts belong to; returns a summary."""
    folder.mkdir(parents=True, exist_ok=True)
    loggers: dict[str, tuple[ReprodLogger, ReprodLogger]] = {}
    for part in parts:
        for log, name, *values in part(list(seeds)):
            for logger, value in zip(loggers.setdefault(log, (ReprodLogger(), ReprodLogger())), values, strict=True):
                logger.add(name, np.atleast_1d(value))
    said = []
    for log, (ours, theirs) in loggers.items():
        ours.save(str(folder / f"{log}_paddle.npy"))
        theirs.save(str(folder / f"{log}_torch.npy"))
        said.append(f"{log}: {_report(folder, log)}")
    return "\n".join([*said, f"written to {folder}; they are no verdict"])


def _report(folder: pathlib.Path, log: str) -> str:
    """Lets reprod_log compare a pair and write its log; returns the last line of it."""
    helper = ReprodDiffHelper()
    helper.compare_info(*(helper.load_info(str(folder / f"{log}_{side}.npy")) for side in ("torch", "paddle")))
    with _handlers_of_its_own():
        helper.report(path=str(folder / LOGS[log]), diff_threshold=THRESHOLD)
    return (folder / LOGS[log]).read_text().splitlines()[-1].split("INFO: ")[-1]


@contextlib.contextmanager
def _handlers_of_its_own() -> Iterator[None]:
    """Takes back what reprod_log does to the root logger: handlers that every later report would write to, too."""
    logger = logging.getLogger("root")
    handlers, level = logger.handlers, logger.level
    logger.handlers = []
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers = handlers
        logger.setLevel(level)
