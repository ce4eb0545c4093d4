"""Bugs in float16 training: how the loss scale is adapted and kept, and what an overflow leaves alone."""

from functools import partial

import paddle

from fixmatch import optimizer, scaler
from fixmatch import step as algorithm
from fixmatch.scaler import LossScaler
from parity.plants.plant import Patch, Plant


def _skip_ignored(patch: Patch) -> None:
    right = optimizer.TwoGroupSGD.step
    patch(optimizer.TwoGroupSGD, "step", lambda self, skip=None: right(self))


def _taken_back(patch: Patch, change) -> None:
    """After an overflow only change(copies of the weights, copies of the momentum) is put back."""
    right = optimizer.TwoGroupSGD._take_back

    def changed(self, skip, before):
        now = self._copies()
        right(self, skip, [kept | taken for kept, taken in zip(now, change(*before), strict=True)])

    patch(optimizer.TwoGroupSGD, "_take_back", changed)


def _decayed(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if optimizer.decays(name)}


def _unscaled(patch: Patch, change) -> None:
    """An `unscale` that does right, and then change(scaler, parameters, overflowed)."""
    right = LossScaler.unscale

    def changed(self, parameters):
        parameters = list(parameters)
        overflowed = right(self, parameters)
        with paddle.no_grad():
            change(self, parameters, overflowed)
        return overflowed

    patch(LossScaler, "unscale", changed)


def _grow(self, parameters, overflowed) -> None:
    if overflowed:
        self._scale.scale_(4.0)


def _never_shrink(self, parameters, overflowed) -> None:
    if overflowed:
        self._scale.scale_(2.0)


def _scale_left_in(self, parameters, overflowed) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.scale_(2.0)


def _count_goes_on(self, parameters, overflowed) -> None:
    if overflowed:
        self._good_steps.fill_(1)


def _not_restored(patch: Patch, *names: str) -> None:
    right = LossScaler.load_state
    patch(LossScaler, "load_state", lambda self, state: right(
        self, {name: self.state()[name] if name in names else value for name, value in state.items()}))


def _waits(patch: Patch, part: str, method: str) -> None:
    """An overflow holds a part of the state back, too."""
    right = algorithm.update

    def changed(state, loss):
        unscale = state.scaler.unscale if state.scaler else None
        owner = getattr(state, part)

        def noted(parameters):
            overflowed = unscale(parameters)
            if overflowed:
                setattr(owner, method, lambda: None)
            return overflowed

        if unscale:
            state.scaler.unscale = noted
        right(state, loss)
        if unscale:
            del state.scaler.unscale
        vars(owner).pop(method, None)

    patch(algorithm, "update", changed)


PLANTS = [plant._replace(settings=("train.amp=float16",)) for plant in (  # which alone has a loss scale
    Plant("scaler-overflow-still-steps", "scaler", "an overflow does not skip the step", _skip_ignored),
    Plant("scaler-overflow-skips-one-group", "scaler", "an overflow skips the decayed group alone",
          partial(_taken_back, change=lambda weights, momentum: (_decayed(weights), _decayed(momentum)))),
    Plant("scaler-overflow-moves-momentum", "scaler", "an overflow keeps the weights, but not the momentum",
          partial(_taken_back, change=lambda weights, momentum: (weights, {}))),
    Plant("scaler-overflow-holds-the-schedule", "scaler", "the schedule waits where the reference's goes on",
          partial(_waits, part="scheduler", method="step")),
    Plant("scaler-overflow-holds-the-average", "scaler", "the average waits where the reference's goes on",
          partial(_waits, part="ema", method="update")),
    Plant("scaler-grows-on-overflow", "scaler", "the scale is doubled after an overflow",
          partial(_unscaled, change=_grow)),
    Plant("scaler-never-shrinks", "scaler", "the scale stays after an overflow",
          partial(_unscaled, change=_never_shrink)),
    Plant("scaler-counts-over-an-overflow", "scaler", "the step that overflowed counts as a good one",
          partial(_unscaled, change=_count_goes_on)),
    Plant("scaler-gradients-twice-as-large", "scaler", "gradients are divided by half the scale",
          partial(_unscaled, change=_scale_left_in)),
    Plant("scaler-grows-every-1000", "scaler", "the scale grows after 1000 good steps",
          lambda patch: patch(scaler, "GROWS_AFTER", 1000)),
    Plant("scaler-unbounded", "scaler", "the scale grows beyond 2**24",
          lambda patch: patch(scaler, "LARGEST", 2.0**60)),
    Plant("scaler-starts-lower", "scaler", "the scale starts at 2**15",
          lambda patch: patch(scaler, "INITIAL", 2.0**15)),
    Plant("scaler-scale-not-restored", "scaler", "a resumed run starts from the first scale again",
          lambda patch: _not_restored(patch, "scale")),
    Plant("scaler-count-not-restored", "scaler", "a resumed run counts good steps from 0",
          lambda patch: _not_restored(patch, "good_steps")),
)]
