"""Bugs in the optimizer and in the schedule of its learning rate."""

from collections.abc import Callable
from functools import partial

import numpy as np
import paddle

from fixmatch import optimizer, schedule
from fixmatch import step as algorithm
from parity.plants.plant import Patch, Plant

_EPOCH = 1024  # steps


def _settings(patch: Patch, **changes) -> None:
    """A TwoGroupSGD that is built with some settings changed: to a value, or by a function of the right one."""
    right = optimizer.TwoGroupSGD
    names = ("momentum", "weight_decay", "nesterov", "clip_grad_norm")

    def changed(model, learning_rate, *args):
        settings = dict(zip(names, args, strict=True))
        for name, change in changes.items():
            settings[name] = change(settings[name]) if callable(change) else change
        return right(model, learning_rate, **settings)

    patch(algorithm, "TwoGroupSGD", changed)


def _decayed_group(patch: Patch, decays: Callable[[str], bool]) -> None:
    patch(optimizer, "decays", decays)


def _groups_by_param_name(patch: Patch) -> None:
    init = optimizer.TwoGroupSGD.__init__

    def changed(self, model, *args, **kwargs):
        names = {name: p.name for name, p in model.named_parameters()}
        right = optimizer.decays
        optimizer.decays = lambda name: right(names[name])
        try:
            init(self, model, *args, **kwargs)
        finally:
            optimizer.decays = right

    patch(optimizer.TwoGroupSGD, "__init__", changed)


def _decoupled_decay(patch: Patch) -> None:
    _settings(patch, weight_decay=0.0)
    step = optimizer.TwoGroupSGD.step

    def changed(self, *args):
        with paddle.no_grad():
            for name, p in self.parameters.items():
                if optimizer.decays(name):
                    p.scale_(1 - self.optimizers[0].get_lr() * 5e-4)
        step(self, *args)

    patch(optimizer.TwoGroupSGD, "step", changed)


def _gradients_not_cleared(patch: Patch) -> None:
    patch(optimizer.TwoGroupSGD, "clear_grad", lambda self: None)


def _gradients_cleared_to_zero(patch: Patch) -> None:
    patch(optimizer.TwoGroupSGD, "clear_grad", lambda self: [o.clear_grad(set_to_zero=True) for o in self.optimizers])
    step = optimizer.TwoGroupSGD.step

    def changed(self, *args):
        for p in self.parameters.values():
            if p.grad is None:
                (p * 0.0).sum().backward()
        step(self, *args)

    patch(optimizer.TwoGroupSGD, "step", changed)


def _scheduler_before_optimizer(patch: Patch) -> None:
    def changed(state, loss):
        loss.backward()
        state.scheduler.step()
        state.optimizer.step()
        state.ema.update()
        state.optimizer.clear_grad()

    patch(algorithm, "update", changed)


def _scheduler_stepped_twice(patch: Patch) -> None:
    update = algorithm.update

    def changed(state, loss):
        update(state, loss)
        state.scheduler.step()

    patch(algorithm, "update", changed)


def _factor(patch: Patch, change: Callable) -> None:
    """A learning rate with the factor change(right factor, step, total steps, warm-up steps)."""
    right = schedule.cosine_7_16
    patch(schedule, "cosine_7_16", lambda step, total, warmup=0: change(right, step, total, warmup))


def _half_cosine(right, step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return right(step, total, warmup)
    return float(np.cos(np.pi / 2 * (step - warmup) / max(1, total - warmup)))


def _full_cosine(right, step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return right(step, total, warmup)
    return float((1 + np.cos(np.pi * (step - warmup) / max(1, total - warmup))) / 2)


PLANTS = [
    Plant("no-nesterov", "optimizer", "plain momentum", partial(_settings, nesterov=False)),
    Plant("momentum-0.95", "optimizer", "another momentum coefficient", partial(_settings, momentum=0.95)),
    Plant("weight-decay-doubled", "optimizer", "twice the coefficient",
          partial(_settings, weight_decay=lambda w: 2 * w)),
    Plant("weight-decay-on-all", "optimizer", "one group for everything",
          partial(_decayed_group, decays=lambda name: True)),
    Plant("weight-decay-on-none", "optimizer", "no decay at all", partial(_decayed_group, decays=lambda name: False)),
    Plant("weight-decay-on-bn", "optimizer", "only names with 'bias' are left out",
          partial(_decayed_group, decays=lambda name: "bias" not in name)),
    Plant("weight-decay-by-param-name", "optimizer",
          "groups filtered by Paddle's own names, such as batch_norm2d_0.w_0", _groups_by_param_name),
    Plant("weight-decay-decoupled", "optimizer", "weights shrunk beside the update, as in AdamW", _decoupled_decay),
    Plant("gradient-clipping", "optimizer", "gradients clipped by their norm", partial(_settings, clip_grad_norm=0.1)),
    Plant("gradients-not-cleared", "optimizer", "gradients of all steps add up", _gradients_not_cleared),
    Plant("gradients-cleared-to-zero", "optimizer",
          "parameters without a gradient get one of zero, and with it momentum", _gradients_cleared_to_zero),
    Plant("lr-off-by-one", "optimizer", "the scheduler is stepped before the optimizer", _scheduler_before_optimizer),
    Plant("lr-stepped-twice", "optimizer", "once for each of the two optimizers", _scheduler_stepped_twice),
    Plant("lr-per-epoch", "schedule", "the cosine moves every 1024 steps only",
          partial(_factor, change=lambda right, step, *rest: right(step // _EPOCH * _EPOCH, *rest))),
    Plant("cosine-1-2", "schedule", "half a cosine, down to 0", partial(_factor, change=_half_cosine)),
    Plant("cosine-full", "schedule", "(1 + cos(pi t / T)) / 2, the common schedule",
          partial(_factor, change=_full_cosine)),
    Plant("warmup-in-epochs", "schedule", "warm-up steps counted as epochs of 1024",
          partial(_factor, change=lambda right, step, total, warmup: right(step, total, warmup * _EPOCH))),
    Plant("lr-constant", "schedule", "no schedule", partial(_factor, change=lambda *_: 1.0)),
]
