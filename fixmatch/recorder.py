"""Writes down the first steps of a training exactly as they happen, so that they can be computed again elsewhere.

The recorder only watches: it copies what the loop, the step and the optimizer were given and left behind. A recording
is a folder: facts.json, and a safetensors file for the start and for each step. parity/recording.py recomputes it.
"""

import json
import pathlib

import numpy as np
import paddle

from fixmatch.arrays import safetensors
from fixmatch.runtime import arithmetic
from fixmatch.step import TrainState

STEPS = 3  # so many that momentum, schedule and average have all moved


class Recorder:
    """Records the first `steps` steps from where a trainer stands.

    Args:
        folder: of the recording; it is made.
        steps: how many.
    """

    def __init__(self, folder: pathlib.Path, steps: int = STEPS):
        self.folder, self.steps = folder, steps
        self.facts: list[dict] = []  # one dict a step
        self._gradients: dict[str, np.ndarray] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def done(self) -> bool:
        return len(self.facts) == self.steps

    def before(self, state: TrainState, batch, step: int, lr: float) -> None:
        """Called just before the step that follows `step` finished ones, with what it will be given."""
        if not self.facts:
            self._keep("start", state.tensors(), {})
        self._batch = batch
        self._fact = {"step": step, "lr": lr, "arithmetic": arithmetic(state.amp), "training": {
            "model": state.model.training, "average": state.ema.average.training}}
        self._update = state.optimizer.step

        def update(skip=None, *args):
            self._fact["skipped"] = skip is not None and bool(skip)
            self._gradients = {name: parameter.grad.numpy() for name, parameter in state.model.named_parameters()
                               if parameter.grad is not None}
            return self._update(skip, *args)

        state.optimizer.step = update

    def after(self, state: TrainState, losses) -> None:
        """Called just after that step with what it returned."""
        del state.optimizer.step  # the method of the class shows again
        batch = {f"batch/{name}": a for name, a in self._batch._asdict().items() if isinstance(a, np.ndarray)}
        found = {f"losses/{name}": t.detach().numpy() for name, t in losses._asdict().items()}
        gradients = {f"gradient/{name}": a for name, a in self._gradients.items()}
        self._gradients = {}
        self.facts.append(self._fact)
        self._keep(f"step-{len(self.facts) - 1}", state.tensors(), {**batch, **found, **gradients})

    def _keep(self, name: str, state: dict[str, paddle.Tensor], given: dict[str, np.ndarray]) -> None:
        """Writes "start", or a step whose facts have just been noted: the state, and what the step was given and gave.
        """
        self._write(name, {**given, **state})
        (self.folder / "facts.json").write_text(json.dumps(self.facts), encoding="utf-8")

    def _write(self, name: str, arrays: dict) -> None:
        with open(self.folder / f"{name}.safetensors", "wb") as file:
            file.writelines(safetensors(arrays))
