"""State between the two frameworks, both ways, strict about names, shapes and dtypes.

The structured names agree but for batch norm's buffers (running_mean is _mean, running_var is _variance, and Paddle has
no num_batches_tracked). Linear weights are transposed: Torch [out, in], Paddle [in, out].
"""

from collections.abc import Iterable, Mapping

import numpy as np

from parity.compare import Reading

_BUFFERS = {"running_mean": "_mean", "running_var": "_variance"}
_NAMES = ("weight", "bias", *_BUFFERS, "num_batches_tracked")
_NDIMS = {"weight": (1, 2, 4), "bias": (1,), "running_mean": (1,), "running_var": (1,), "num_batches_tracked": (0,)}


def torch_to_paddle(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A Torch state dict, or any part of one (gradients, momentum buffers), under Paddle's names.

    Raises ValueError for a name that neither network has, or an array of another rank than its name implies.
    """
    converted = {}
    for name, array in state.items():
        prefix, last = _split(name)
        if last not in _NAMES:
            raise ValueError(f"{name}: not a parameter or buffer of these networks (known: {', '.join(_NAMES)})")
        _check_rank(name, array, last)
        if last != "num_batches_tracked":
            converted[prefix + _BUFFERS.get(last, last)] = _swap_linear(array)
    return converted


def paddle_to_torch(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse. Batch norms get a num_batches_tracked of 0, which Torch asks for but does not use here."""
    back = {ours: theirs for theirs, ours in _BUFFERS.items()}
    converted = {}
    for name, array in state.items():
        prefix, last = _split(name)
        last = back.get(last, last)
        if last not in _NAMES[:4]:
            raise ValueError(f"{name}: not a parameter or buffer of these networks")
        _check_rank(name, array, last)
        converted[prefix + last] = _swap_linear(array)
        if last == "running_var":
            converted[prefix + "num_batches_tracked"] = np.zeros([], dtype=np.int64)
    return converted


def named_as_torch(names: Iterable[str]) -> dict[str, str]:
    """{Torch's name: Paddle's name} of tensors."""
    back = {ours: theirs for theirs, ours in _BUFFERS.items()}
    return {prefix + back.get(last, last): name for name in names for prefix, last in (_split(name),)}


def part(arrays: Mapping[str, np.ndarray], prefix: str) -> Reading:
    """The recorded arrays below `prefix`, under the names that follow it."""
    names = [name[len(prefix) + 1:] for name in arrays if name.startswith(prefix + "/")]
    return Reading(names, lambda name: arrays[f"{prefix}/{name}"])


def as_torch(arrays: Mapping[str, np.ndarray], prefix: str) -> Reading:
    """The same under Torch's names and in its shapes."""
    ours = named_as_torch(part(arrays, prefix))
    return Reading(ours, lambda name: paddle_to_torch({ours[name]: arrays[f"{prefix}/{ours[name]}"]})[name])


def shared(tensor) -> np.ndarray:
    """The elements of a Paddle tensor; on the CPU they are not copied, so what it holds later is seen in them, too."""
    return np.from_dlpack(tensor.detach().cpu())


def _split(name: str) -> tuple[str, str]:
    prefix, dot, last = name.rpartition(".")
    return prefix + dot, last


def _check_rank(name: str, array: np.ndarray, last: str) -> None:
    if np.ndim(array) not in _NDIMS[last]:
        raise ValueError(f"{name}: has shape {np.shape(array)}, expected dimensions: {_NDIMS[last]}")


def _swap_linear(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T) if array.ndim == 2 else array
