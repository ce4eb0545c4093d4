"""Bugs in how a run goes on from its checkpoint, which no run that is never stopped can show."""

import dataclasses
from functools import partial

import numpy as np

from fixmatch import checkpoint, metrics_file, optimizer, trainer
from fixmatch.data.loader import Loader
from parity.plants.plant import Patch, Plant


def _restored(patch: Patch, change) -> None:
    """A trainer that is restored rightly, and then changed by change(trainer, saved)."""
    right = trainer.Trainer.restore

    def changed(self, saved):
        right(self, saved)
        change(self, saved)

    patch(trainer.Trainer, "restore", changed)


def _part_left_out(patch: Patch, part: str) -> None:
    """Restoring with the fresh weights of one part in place of those that were saved."""
    right = trainer.Trainer.restore

    def changed(self, saved):
        model = {"model": self.state.model, "ema": self.state.ema.average}[part]
        fresh = {n: t.numpy().copy() for n, t in model.state_dict().items()}
        right(self, saved)
        checkpoint.load_weights(model, fresh)

    patch(trainer.Trainer, "restore", changed)


def _statistics_left_out(patch: Patch) -> None:
    right = trainer.Trainer.restore

    def changed(self, saved):
        fresh = [b.numpy().copy() for b in self.state.model.buffers()]
        right(self, saved)
        for buffer, array in zip(self.state.model.buffers(), fresh, strict=True):
            buffer.set_value(array)

    patch(trainer.Trainer, "restore", changed)


def _average_from_the_raw_weights(patch: Patch) -> None:
    _restored(patch, lambda self, saved: checkpoint.load_weights(self.state.ema.average, saved.part("model")))


def _no_momentum(patch: Patch) -> None:
    patch(optimizer.TwoGroupSGD, "load_state", lambda self, state: None)


def _momentum_of_one_group(patch: Patch) -> None:
    right = optimizer.TwoGroupSGD.load_state
    patch(optimizer.TwoGroupSGD, "load_state", lambda self, state: right(
        self, {n: t for n, t in state.items() if optimizer.decays(n)}))


def _schedule_anew(patch: Patch) -> None:
    _restored(patch, lambda self, saved: self.state.scheduler.step(0))


def _schedule_one_behind(patch: Patch) -> None:
    _restored(patch, lambda self, saved: self.state.scheduler.step(self.step - 1))


def _step_once_more(patch: Patch) -> None:
    def change(self, saved):
        self.step -= 1

    _restored(patch, change)


def _batches_anew(patch: Patch) -> None:
    right = Loader.batches
    patch(Loader, "batches", lambda self, first, last: right(self, 0, last - first))


def _reseeded_by_the_step(patch: Patch) -> None:
    def change(self, saved):
        self.loader.seed += self.step

    _restored(patch, change)


def _history_forgotten(patch: Patch) -> None:
    def change(self, saved):
        self.history = {"raw": [], "ema": []}

    _restored(patch, change)


def _best_forgotten(patch: Patch) -> None:
    def change(self, saved):
        self.best = -1.0

    _restored(patch, change)


def _best_never_beaten(patch: Patch) -> None:
    def change(self, saved):
        self.best = 100.0

    _restored(patch, change)


def _log_not_cut(patch: Patch) -> None:
    patch(metrics_file, "drop_later_lines", lambda path, *_: None)


def _log_begun_anew(patch: Patch) -> None:
    patch(metrics_file, "drop_later_lines", lambda path, *_: path.write_text("") if path.exists() else None)


def _weights_rounded(patch: Patch) -> None:
    right = checkpoint.load

    def changed(folder):
        saved = right(folder)
        arrays = {n: a.astype(np.float16).astype(a.dtype) if n.startswith("model/") else a
                  for n, a in saved.arrays.items()}
        return dataclasses.replace(saved, arrays=arrays)

    patch(checkpoint, "load", changed)


PLANTS = [
    Plant("resume-weights-fresh", "resume", "weights are not restored", partial(_part_left_out, part="model")),
    Plant("resume-average-fresh", "resume", "the average is not restored", partial(_part_left_out, part="ema")),
    Plant("resume-average-from-raw", "resume", "the average restarts from the raw weights",
          _average_from_the_raw_weights),
    Plant("resume-statistics-fresh", "resume", "running statistics are not restored", _statistics_left_out),
    Plant("resume-no-momentum", "resume", "momentum is not restored", _no_momentum),
    Plant("resume-momentum-of-one-group", "resume", "momentum of the undecayed group is not restored",
          _momentum_of_one_group),
    Plant("resume-schedule-anew", "resume", "the learning rate starts again", _schedule_anew),
    Plant("resume-schedule-one-behind", "resume", "the learning rate is one step behind", _schedule_one_behind),
    Plant("resume-one-step-again", "resume", "the last step is done a second time", _step_once_more),
    Plant("resume-batches-anew", "data", "the data start again from the first batch", _batches_anew),
    Plant("resume-reseeded", "resume", "other random draws after a resume", _reseeded_by_the_step),
    Plant("resume-history-forgotten", "resume", "earlier evaluations are forgotten", _history_forgotten),
    Plant("resume-best-forgotten", "resume", "the best so far is forgotten", _best_forgotten),
    Plant("resume-best-never-beaten", "resume", "no later checkpoint becomes the best", _best_never_beaten),
    Plant("resume-log-begun-anew", "resume", "metrics.jsonl is emptied", _log_begun_anew),
    Plant("resume-weights-rounded", "run", "weights read in half precision", _weights_rounded),
]
