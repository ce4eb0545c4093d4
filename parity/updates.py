"""What a recorded step made of its gradients: momentum, weights and average, computed again by the mirror in float64.

Some tensors at a time, in a network of their own, so that a large network is in memory once.
"""

from collections.abc import Iterable, Iterator, Mapping

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
_AT_ONCE = 1 << 19  # elements of the tensors that are taken together, or one more tensor


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
    for old in _together(parameters, old_weights):
        given = {} if skipped else {name: gradients[name] for name in old if name in gradients}
        moved, velocities = _moved(old, {name: old_momentum[name] for name in old if name in old_momentum}, given,
                                   config, lr, norms)
        given = None  # so that fewer arrays of this size are in memory
        for name, was in old.items():
            velocity = velocities.pop(name, None)
            if skipped and velocity is None and name in momentum:  # that the step had made and has taken back to 0
                velocity = np.zeros_like(moved[name])
            if name in momentum or velocity is not None:
                yield near(f"{label} momentum/{name}", momentum.get(name), velocity, MOMENTUM_GATE)
            velocity, was = None, was.astype(np.float64)
            rounding = 2 * np.finfo(np.float32).eps * max(float(was.max()), -float(was.min()))
            yield near(f"{label} weights/{name}", np.subtract(weights[name], was, out=was), moved.pop(name), GATE,
                       floor=rounding / GATE)
    for name in (n for n in momentum if n not in parameters):
        yield near(f"{label} momentum/{name}", momentum[name], None, MOMENTUM_GATE)
    old_average, average = (as_torch(arrays, "ema") for arrays in (before, after))
    for old in _together(old_weights, old_average):
        expected = _averaged(old, weights, config.ema.decay)  # of the weights as they were recorded
        for name in old:
            yield near(f"{label} ema/{name}", average.get(name), expected.pop(name), AVERAGE_GATE)


def _together(names: Iterable[str], arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of these names, some at a time."""
    some: dict[str, np.ndarray] = {}
    for name in names:
        some[name] = arrays[name]
        if sum(array.size for array in some.values()) >= _AT_ONCE:
            yield some
            some = {}
    if some:
        yield some


def _moved(weights: dict[str, np.ndarray], velocities: dict[str, np.ndarray], gradients: dict[str, np.ndarray],
           config: Config, lr: float, norms: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
    """What the mirror's optimizer adds to parameters, and their momentum after that, of those that have one.

    Args:
        gradients: of the parameters that have one.
        norms: of each parameter's group, where gradients are clipped.
    """
    network, optim = _network(weights), config.optim
    optimizer = TwoGroupSGD(network, lr, optim.momentum, optim.weight_decay, optim.nesterov)
    for name, parameter in network.named_parameters():
        if name in velocities:
            optimizer.state[parameter]["momentum_buffer"] = _tensor(velocities[name])
        if name in gradients:
            parameter.grad = _tensor(gradients[name])
            if name in norms:
                torch.nn.utils.clip_grads_with_norm_(parameter, config.train.clip_grad_norm, norms[name])
    optimizer.step()
    moved = {name: parameter.detach().sub_(_tensor(weights[name])).numpy()
             for name, parameter in network.named_parameters()}
    return moved, {name: buffer.numpy() for name, buffer in optimizer.momentum_buffers().items()}


def _averaged(old: dict[str, np.ndarray], weights: Mapping[str, np.ndarray], decay: float) -> dict[str, np.ndarray]:
    """What the mirror's average makes of these tensors."""
    network = _network(old)
    ema = EMA(network, decay)
    for name, tensor in network.state_dict().items():
        tensor.copy_(torch.from_numpy(weights[name]))
    ema.update()
    return {name: tensor.numpy() for name, tensor in ema.average.state_dict().items()}


def _is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def _network(tensors: dict[str, np.ndarray]) -> torch.nn.Module:
    """A network of these parameters and buffers, in float64."""
    network = torch.nn.Module()
    for name, array in tensors.items():
        *path, last = name.split(".")
        module = network
        for part in path:
            if part not in module._modules:
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
