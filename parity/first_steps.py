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
from collections.abc import Iterator

from fixmatch import inputs
from fixmatch.config import Config
from parity.batches import rows_of_run
from parity.case import Case
from parity.compare import Row
from parity.report import Report
from parity.stages import Stage, StageResult, run_stage, stages, too_large_to_rehearse


def prove(recording_folder: pathlib.Path, config: Config) -> Report:
    """Runs stage `data` on the run's own loader and, where Torch is installed, stage `run` on the recording.

    After it stage `run` as it is, if the self-check had no time for it with this network.
    """
    started = time.perf_counter()
    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)  # the training goes first
    facts = json.loads((recording_folder.parent / "run.json").read_text(encoding="utf-8"))
    source = inputs.read_data(config)
    split = inputs.choose_split(config, source, pathlib.Path(facts["split"]))
    first_step = facts["first_step"]
    loader = inputs.build_loader(config, source, split, 0, facts["world_size"])

    def batches() -> Iterator[Row]:
        yield from rows_of_run(loader, source, split, config, first_step)

    def steps() -> Iterator[Row]:
        from parity import dry_run, recording  # load Torch, which is not installed everywhere

        after = [recording.Arrays(path) for path in sorted(recording_folder.glob("step-*.safetensors"))]
        yield from dry_run.batch_rows(config, source, split, after, first_step, facts["world_size"])
        start = recording.Arrays(recording_folder / "start.safetensors")
        yield from recording.restored_rows(facts["restored"], start)
        yield from recording.rows(recording_folder, config, facts["num_classes"], facts["mean"], facts["std"],
                                  forward=facts["world_size"] == 1)

    has_torch = importlib.util.find_spec("torch") is not None
    chosen = [("data", "-", "uint8", batches), ("run", "train", "float32", steps)][:1 + has_torch]
    results = [run_stage(Stage(name, mode, dtype, lambda case, rows=rows: rows()), None)
               for name, mode, dtype, rows in chosen]
    if has_torch and too_large_to_rehearse(case := Case(config, facts["num_classes"]), facts["device"]):
        results.append(run_stage(stages()["run"], case))
    aside = _not_computed(results[1:], facts["world_size"])
    return Report(results, time.perf_counter() - started, "the mirror in float64", "the first steps of this run", aside)


def _not_computed(of_steps: list[StageResult], world_size: int) -> str:
    """What of the run's own steps was not computed again, for the verdict; `of_steps` is empty without Torch."""
    if not of_steps:
        return "; without Torch only their batches were computed again"
    if any(" losses/" in row.tensor for row in of_steps[0].rows) or not of_steps[0].passed:
        return ""
    why = "their activations take more than 2 GB" if world_size == 1 else "other ranks have a part of them"
    return f"; of its own batches losses and gradients were not computed again: {why}"
