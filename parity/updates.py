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
    gradients = as_torch(after, "gradient")
    old_momentum, momentum = (as_torch(arrays, "momentum") if config.optim.momentum > 0 else {}
                              for arrays in (before, after))
    old_weights, weights = (as_torch(arrays, "model") for arrays in (before, after))
    norms = _norms(gradients) if config.train.clip_grad_norm else {}
    parameters = [name for name in old_weights if not _is_buffer(name)]
    for name in parameters:
        old, gradient = old_weights[name], gradients.get(name)
        moved, velocity = _moved(name, old, old_momentum.get(name), None if skipped else gradient, config,
                                 lr, norms.get(name))
        if skipped and velocity is None and name in momentum:  # that the step had made and has taken back to 0
            velocity = np.zeros_like(moved)
        if name in momentum or velocity is not None:
            yield near(f"{label} momentum/{name}", momentum.get(name), velocity, MOMENTUM_GATE)
        velocity = gradient = None  # so that fewer arrays of this size are in memory
        old = old.astype(np.float64)
        rounding = 2 * np.finfo(np.float32).eps * max(float(old.max()), -float(old.min()))
        yield near(f"{label} weights/{name}", np.subtract(weights[name], old, out=old), moved, GATE,
                   floor=rounding / GATE)
    for name in (n for n in momentum if n not in parameters):
        yield near(f"{label} momentum/{name}", momentum[name], None, MOMENTUM_GATE)
    old_average, average = (as_torch(arrays, "ema") for arrays in (before, after))
    for name in old_weights:  # the average follows the weights as they were recorded
        yield near(f"{label} ema/{name}", average.get(name),
                   _averaged(name, old_average[name], weights[name], config.ema.decay), AVERAGE_GATE)


def _moved(name: str, weights: np.ndarray, velocity: np.ndarray | None, gradient: np.ndarray | None, config: Config,
           lr: float, norm: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray | None]:
    """What the mirror's optimizer adds to one parameter, and its momentum after that, None where it has none.

    Args:
        norm: of the gradients of the parameter's group, where they are clipped.
    """
    alone, optim = _alone(name, weights), config.optim
    parameter, = alone.parameters()
    optimizer = TwoGroupSGD(alone, lr, optim.momentum, optim.weight_decay, optim.nesterov)
    if velocity is not None:
        optimizer.state[parameter]["momentum_buffer"] = _tensor(velocity)
    if gradient is not None:
        parameter.grad = _tensor(gradient)
        if norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameter, config.train.clip_grad_norm, norm)
        optimizer.step()
    after = optimizer.momentum_buffers().get(name)
    return parameter.detach().sub_(_tensor(weights)).numpy(), None if after is None else after.numpy()


def _averaged(name: str, old: np.ndarray, weights: np.ndarray, decay: float) -> np.ndarray:
    """What the mirror's average makes of one tensor, in a network of one layer, since it is copied."""
    alone = _alone(name.rpartition(".")[2], old)
    ema = EMA(alone, decay)
    tensor, = alone.state_dict().values()
    tensor.copy_(torch.from_numpy(weights))
    ema.update()
    average, = ema.average.state_dict().values()
    return average.numpy()


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
