"""Bugs in the average of the weights, and in when it is taken."""

from functools import partial

import paddle

from fixmatch import ema
from fixmatch import step as algorithm
from parity.plants import model
from parity.plants.plant import Patch, Plant


@paddle.no_grad()
def _update(average_of: ema.EMA, decay: float, buffers: str) -> None:
    for average, live in average_of.parameters:
        average.scale_(decay).add_(live * (1.0 - decay))
    for average, live in average_of.buffers:
        if buffers == "copied":
            average.copy_(live, False)
        elif buffers == "averaged":
            average.scale_(decay).add_(live * (1.0 - decay))


def _buffers(patch: Patch, treated: str) -> None:
    """Running statistics that are "skipped" or "averaged"."""
    patch(ema.EMA, "update", lambda self: _update(self, self.decay, treated))


def _smaller_decay(patch: Patch) -> None:
    patch(ema.EMA, "update", lambda self: _update(self, self.decay * 0.99, "copied"))


def _warm_up(patch: Patch) -> None:
    def changed(self):
        self.count = getattr(self, "count", 0) + 1
        _update(self, min(self.decay, (1 + self.count) / (10 + self.count)), "copied")

    patch(ema.EMA, "update", changed)


def _average_before_step(patch: Patch) -> None:
    def changed(state, loss):
        loss.backward()
        state.ema.update()
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.clear_grad()

    patch(algorithm, "update", changed)


def _inverted_momentum_and_averaged_buffers(patch: Patch) -> None:
    model.bn_momentum_inverted(patch)
    _buffers(patch, "averaged")


PLANTS = [
    Plant("ema-buffers-skipped", "ema", "running statistics of the average never move",
          partial(_buffers, treated="skipped")),
    Plant("ema-buffers-averaged", "ema", "running statistics averaged like weights",
          partial(_buffers, treated="averaged")),
    Plant("ema-decay", "ema", "0.99 of the decay", _smaller_decay),
    Plant("ema-warmup", "ema", "decay min(d, (1 + t) / (10 + t))", _warm_up),
    Plant("ema-before-step", "ema", "the average lags one step behind", _average_before_step),
    Plant("bn-momentum-inverted-and-ema-buffers-averaged", "operators",
          "two bugs that cancel in the averaged statistics", _inverted_momentum_and_averaged_buffers),
]
