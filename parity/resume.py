"""Stage `resume`: a run that is twice stopped by a signal and resumed ends bit for bit as one that was never stopped.

What its evaluations find is set, since few steps teach nothing: the first after one resume beats the best before it,
and the first after the other does not.
"""

import contextlib
import dataclasses
import json
import pathlib
import signal
from collections.abc import Iterable, Iterator
from unittest import mock

import numpy as np

from fixmatch import checkpoint, run, trainer
from fixmatch.config import Config
from fixmatch.data.dataset import Source
from fixmatch.scratch import scratch_folder
from parity.case import Case
from parity.compare import Row, exact
from parity.small_run import short_config, small_source, training_on

STEPS, STOPPED_AFTER = 6, (3, 5)  # evaluations are after steps 2, 4 and 6
TOP1 = (30.0, 60.0, 50.0)  # percent, of the evaluations


class _Stop:
    """Stands in the place of a recorder, and sends the run the signal that a scheduler would after `steps` steps."""

    def __init__(self, steps: int):
        self.count, self.steps, self.done = 0, steps, False

    def before(self, *_) -> None:
        pass

    def after(self, *_) -> None:
        self.count += 1
        if self.count == self.steps:
            self.done = True
            signal.raise_signal(signal.SIGTERM)


def rows(case: Case) -> Iterator[Row]:
    """Rows of the comparison, in the order in which a fault would show."""
    source = small_source(case)
    with scratch_folder() as folder:
        whole, stopped = (folder / name for name in ("whole", "stopped"))
        config = short_config(case, whole, STEPS)
        runtime = dataclasses.replace(config.runtime, deterministic=True)  # else a GPU may sum in another order
        config = dataclasses.replace(config, runtime=runtime)
        with training_on(source), _finding(TOP1):
            run.train(config)
        yield exact("stopped/steps", np.array(_stop_and_resume(config, source, stopped)), np.array(STOPPED_AFTER))
        yield from _logged_rows(whole, stopped)
        best = [checkpoint.load(folder / "checkpoints/best").manifest.step for folder in (stopped, whole)]
        yield exact("best/step", *map(np.array, best))
        for which in ("latest", "best"):
            yield from _checkpoint_rows(which, whole, stopped)


@contextlib.contextmanager
def _finding(top1: Iterable[float]) -> Iterator[None]:
    """Evaluations of a run find these top-1 percents, for the raw and the averaged weights alike."""
    right, coming = trainer.evaluate, iter([percent for percent in top1 for _ in ("raw", "ema")])
    with mock.patch.object(trainer, "evaluate", lambda *args: dataclasses.replace(right(*args), top1=next(coming))):
        yield


def _stop_and_resume(config: Config, source: Source, folder: pathlib.Path) -> list[int]:
    """Returns the steps that the checkpoints were from; -1 where the signal was not obeyed."""
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))
    found, before = [], 0
    with training_on(source), _finding(TOP1):
        for step in STOPPED_AFTER:
            try:
                run.train(config, resume=before > 0, recorder=_Stop(step - before))
                return [*found, -1]
            except run.Interrupted:
                found.append(checkpoint.load(folder / "checkpoints/latest").manifest.step)
            before = step
        run.train(config, resume=True)
    return found


def _logged_rows(whole: pathlib.Path, stopped: pathlib.Path) -> Iterator[Row]:
    """Every step and evaluation was logged once, with the same figures."""
    expected, found = (_lines(folder) for folder in (whole, stopped))
    steps = [[line["step"] for line in lines] for lines in (found, expected)]
    yield exact("logged/steps", *map(np.array, steps))
    for one, other in zip(found, expected, strict=False):  # a line that is missing has failed the row above
        where = f"logged {other['kind']} {other['step']}"
        for name in ("lr", "loss", "loss_x", "loss_u", "mask") if other["kind"] == "train" else ():
            if name in other:  # of unlabeled images nothing is logged where there are none
                yield exact(f"{where}/{name}", np.array(one.get(name)), np.array(other[name]))
        for name in ("raw", "ema") if other["kind"] == "eval" else ():
            for figure in ("top1", "loss"):
                yield exact(f"{where}/{name} {figure}", np.array(one[name][figure]), np.array(other[name][figure]))


def _lines(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _checkpoint_rows(which: str, whole: pathlib.Path, stopped: pathlib.Path) -> Iterator[Row]:
    expected, found = (checkpoint.load(folder / "checkpoints" / which) for folder in (whole, stopped))
    for part in ("momentum", "model", "ema", "thresholds", "augment"):
        theirs, ours = expected.part(part), found.part(part)
        for name in sorted(theirs.keys() | ours.keys()):
            yield exact(f"{which} {part}/{name}", ours.get(name), theirs.get(name))
    for name in ("step", "evaluated_step", "history", "split_sha256", "world_size", "scaler"):
        same = getattr(found.manifest, name) == getattr(expected.manifest, name)
        yield exact(f"{which} manifest/{name}", np.array(same), np.array(True))
