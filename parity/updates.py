"""What a recorded step made of its gradients: momentum, weights and average, computed again by the mirror in float64.

Tensor by tensor, each in a network of its own, so that a large network is in memory once.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from fixmatch.config import Config
from parity.compare import Row, near
from parity.mirror.ema import EMA
from parity.mirror.optimizer import TwoGroupSGD, decays
from parity.weights import as_torch

# Updates are computed in float32 whatever the run's arithmetic is: ten times the worst of clean runs.
GATE = 1e-2  # of what a step adds to a weight, which float32 keeps with some 3 digits
MOMENTUM_GATE = 1e-5
AVERAGE_GATE = 4e-6


@torch.no_grad()
def rows(label: str, config: Config, lr: float, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray],
         skipped: bool) -> Iterator[Row]:
    """Rows of one step: of each parameter its momentum and its weights, then of each tensor its average.

    Args:
        label: of the step.
        config: of the run.
        lr: the learning rate of the step.
        before, after: what was recorded.
        skipped: whether gradients had overflowed: then momentum and weights are to stay what they were.
    """
    gradients, weights, average = (as_torch(after, part) for part in ("gradient", "model", "ema"))
    old_weights, old_average = as_torch(before, "model"), as_torch(before, "ema")
    momentum, old_momentum = (as_torch(arrays, "momentum") if config.optim.momentum > 0 else {}
                              for arrays in (after, before))
    norms = _norms(gradients) if config.train.clip_grad_norm else {}
    parameters = [name for name in old_weights if not _is_buffer(name)]
    for name in parameters:
        alone = _alone(name, old_weights[name])
        parameter, = alone.parameters()
        optim = config.optim
        optimizer = TwoGroupSGD(alone, lr, optim.momentum, optim.weight_decay, optim.nesterov)
        if name in old_momentum:
            optimizer.state[parameter]["momentum_buffer"] = _tensor(old_momentum[name])
        if name in gradients:
            parameter.grad = _tensor(gradients[name])
            if norms:
                torch.nn.utils.clip_grads_with_norm_(parameter, config.train.clip_grad_norm, norms[name])
        if not skipped:
            optimizer.step()
        expected = optimizer.momentum_buffers().get(name)
        if skipped and expected is None and name in momentum:  # that the step had made and has taken back to 0
            expected = torch.zeros_like(parameter)
        if name in momentum or (expected is not None and optim.momentum > 0):
            yield near(f"{label} momentum/{name}", momentum.get(name), None if expected is None else expected.numpy(),
                       MOMENTUM_GATE)
        expected = parameter.grad = None
        optimizer.state.clear()
        old = _tensor(old_weights[name]).numpy()
        rounding = 2 * np.finfo(np.float32).eps * max(float(old.max()), -float(old.min()))
        expected = parameter.detach().numpy()
        expected -= old
        yield near(f"{label} weights/{name}", np.subtract(weights[name], old, out=old), expected, GATE,
                   floor=rounding / GATE)
    for name in (n for n in momentum if n not in parameters):
        yield near(f"{label} momentum/{name}", momentum[name], None, MOMENTUM_GATE)
    for name in old_weights:
        alone = _alone(name, old_average[name])
        ema = EMA(alone, config.ema.decay)
        tensor, = alone.state_dict().values()
        tensor.copy_(torch.from_numpy(weights[name]))  # the average follows the weights as they were recorded
        ema.update()
        expected, = ema.average.state_dict().values()
        yield near(f"{label} ema/{name}", average.get(name), expected.numpy(), AVERAGE_GATE)


def _is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def _alone(name: str, array: np.ndarray) -> torch.nn.Module:
    """A network of this one parameter or buffer, in float64."""
    *path, last = name.split(".")
    network = module = torch.nn.Module()
    for part in path:
        module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    if _is_buffer(name):
        module.register_buffer(last, _tensor(array))
    else:
        module.register_parameter(last, torch.nn.Parameter(_tensor(array)))
    return network


def _norms(gradients: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """By parameter: the norm of the gradients of its group, which is clipped as one."""
    norms = {}
    for decayed in (True, False):
        names = [name for name in gradients if decays(name) == decayed]
        each = [torch.linalg.vector_norm(_tensor(gradients[name])) for name in names]
        norms |= dict.fromkeys(names, torch.linalg.vector_norm(torch.stack(each))) if each else {}
    return norms


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).double()
