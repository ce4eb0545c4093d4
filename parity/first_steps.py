"""The proof of a run that has started: its recorded first steps, on its own data, recomputed.

`python -m parity --recording FOLDER -c CONFIG --json FILE` runs beside the training. It reads the data set again,
takes the run's split, and says whether the batches are what they should be, whether the steps were trained on them,
and whether each step did what the mirror does.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import psutil

from fixmatch import inputs
from fixmatch.config import Config
from parity.batches import rows_of_run
from parity.case import Case
from parity.compare import Row
from parity.report import Report
from parity.stages import Stage, StageResult, run_stage, stages, too_large_to_rehearse

_LONG = 2000  # steps of a run that may wait at its end for what takes minutes


def prove(recording_folder: pathlib.Path, config: Config) -> Report:
    """Runs stage `data` on the run's own loader and, where Torch is installed, stage `run` on the recording.

    After it stage `run` as it is, if the self-check had no time for it with this network; and where the run's own
    batch was too large for the first, one step of that.
    """
    started = time.perf_counter()
    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)  # the training goes first
    recorded = _Recorded(recording_folder, config)
    results = [_run("data", "-", "uint8", recorded.batches)]
    if importlib.util.find_spec("torch") is None:
        return _report(results, started, "without Torch only their batches were computed again")
    results.append(_run("run", "train", "float32", recorded.steps))
    computed = any(" losses/" in row.tensor for row in results[-1].rows)
    if too_large_to_rehearse(case := Case(config, recorded.facts["num_classes"]), recorded.facts["device"]):
        results.append(run_stage(stages()["run"], case))
    if computed or not all(result.passed for result in results):
        return _report(results, started)
    why = "that takes more than half of the free memory"
    if not recorded.alone:
        why = "other ranks have a part of them"
    elif config.train.total_steps - recorded.first_step < _LONG:
        why = "that takes minutes, and the run is short"
    elif (result := _run("run", "train", "float32", recorded.large_batch)).rows:
        return _report([*results, result], started)
    return _report(results, started, f"of its own batches losses and gradients were not computed again: {why}")


class _Recorded:
    """The recording of a run's first steps, beside run.json, which says what else there is to know of the run."""

    def __init__(self, folder: pathlib.Path, config: Config):
        self.folder, self.config = folder, config
        self.facts = json.loads((folder.parent / "run.json").read_text(encoding="utf-8"))
        self.first_step, self.alone = self.facts["first_step"], self.facts["world_size"] == 1
        self.source = inputs.read_data(config)
        self.split = inputs.choose_split(config, self.source, pathlib.Path(self.facts["split"]))

    def batches(self) -> Iterator[Row]:
        """Rows of the run's loader."""
        world_size = self.facts["world_size"]
        loader = inputs.build_loader(self.config, self.source, self.split, 0, world_size)
        yield from rows_of_run(loader, self.source, self.split, self.config, self.first_step, world_size=world_size)

    def steps(self) -> Iterator[Row]:
        """Rows of the recorded batches, of the state before them, and of the steps."""
        from parity import dry_run, recording  # load Torch, which is not installed everywhere

        after = [recording.Arrays(path) for path in sorted(self.folder.glob("step-*.safetensors"))]
        yield from dry_run.batch_rows(self.config, self.source, self.split, after, self.first_step,
                                      self.facts["world_size"])
        yield from recording.restored_rows(self.facts["restored"], recording.Arrays(self.folder / "start.safetensors"))
        yield from recording.rows(self.folder, self._mirror(), forward=self.alone)

    def large_batch(self) -> Iterator[Row]:
        """Rows of one step whose batch was too large for `steps`; none where there is too little memory."""
        from parity import recording

        yield from recording.large_batch_rows(self.folder, self._mirror(), psutil.virtual_memory().available / 2)

    def _mirror(self):
        from parity.recording import Mirror

        return Mirror(self.config, *(self.facts[name] for name in ("num_classes", "mean", "std")))


def _run(name: str, mode: str, dtype: str, rows: Callable[[], Iterator[Row]]) -> StageResult:
    return run_stage(Stage(name, mode, dtype, lambda case: rows()), None)


def _report(results: list[StageResult], started: float, left_out: str = "") -> Report:
    aside = left_out and f"; {left_out}"
    return Report(results, time.perf_counter() - started, "the mirror in float64", "the first steps of this run", aside)
