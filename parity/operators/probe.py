"""One layer call with one batch: how its numbers are drawn, run through production and paired with the truth.

The batch repeats `distinct` images, so that the float64 side computes those few and still knows every element of every
tensor of a batch of any size: image n is image n modulo `distinct`, and sums count each so often. kinds.py says for
each kind of layer what is drawn and what must come out.

Legend: N images, H W rows and columns, C channels. Arrays are [N, H, W, C] or [N, C].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import paddle
from paddle.utils.dlpack import from_dlpack

from fixmatch.models import layers
from fixmatch.step import autocast
from parity.case import DRAWN
from parity.operators.calls import Call
from parity.operators.judge import Pair
from parity.weights import shared

# LeakyReLU's derivative jumps at 0. Where the truth is closer to it than this (a thousand times the rounding), the
# upstream gradient is 0, so that a rounded sign changes no result.
_KINK = 1e-3


@dataclass
class Probe:
    """A call with a batch of `batch` images, of which `distinct` differ, of `size` rows and columns."""

    call: Call
    batch: int
    size: tuple[int, int]
    distinct: int
    modes: tuple[str, ...]  # of train and eval
    momentum: float  # of batch norm's running statistics: share of the old value
    amp: str | None
    rng: np.random.Generator

    @property
    def name(self) -> str:
        size = "" if self.call.kind == "linear" else f"x{self.size[0]}x{self.size[1]}"
        return f"{self.call.label}, {self.batch}{size}"

    @property
    def counts(self) -> np.ndarray:
        """How often the batch has each distinct image."""
        return np.bincount(np.arange(self.batch) % self.distinct).astype(np.float64)

    def noise(self, *shape: int, mean: float = 0.0) -> np.ndarray:
        """Float32, uniform, of variance 1: four times faster to draw than normal numbers. Large arrays repeat them."""
        drawn, width = self.rng.random(min(math.prod(shape), DRAWN), dtype=np.float32), np.sqrt(12)
        return np.resize(drawn * np.float32(width) + np.float32(mean - width / 2), shape)

    def images(self, channels: int, mean: float = 0.0) -> np.ndarray:
        return self.noise(self.distinct, *self.size, channels, mean=mean)

    def whole(self, images: np.ndarray) -> np.ndarray:
        """The batch that repeats them."""
        return images[np.arange(self.batch) % self.distinct]

    def tensor(self, images: np.ndarray):
        """The batch in the layout that the network has here."""
        batch = _as_tensor(self.whole(images))
        return batch if images.ndim == 2 or layers.on_kernels(batch) else batch.transpose([0, 3, 1, 2]).contiguous()

    def leaf(self, images: np.ndarray):
        """An input of which the gradient is wanted; or, where the network wants none, what it makes of its images."""
        if not self.call.input_gradient:
            nchw = np.ascontiguousarray(self.whole(images).transpose(0, 3, 1, 2))
            return layers.to_kernel_layout(_as_tensor(nchw))
        tensor = self.tensor(images)
        tensor.stop_gradient = False
        return tensor

    def forward(self, *inputs):
        with autocast(self.amp):
            return self.call.run(*inputs)

    def backward(self, output, grad: np.ndarray) -> None:
        """Raises ValueError where the output has not the shape that it must have."""
        grad = self.tensor(grad).astype(output.dtype)
        if output.shape != grad.shape:
            raise ValueError(f"output of shape {list(output.shape)}, must be {list(grad.shape)}")
        output.backward(grad)

    def away_from_kink(self, grad: np.ndarray, z: np.ndarray) -> np.ndarray:
        """The upstream gradient, 0 where z, the activation's input, is near the kink of a LeakyReLU."""
        return np.where(np.abs(z) < _KINK, np.float32(0), grad) if isinstance(self.call.activation, tuple) else grad

    def pairs(self, ours: dict, expected: dict, suffix: str = "", units: dict | None = None) -> Iterator[Pair]:
        """Pairs in the order of `ours`, whose tensors are read only now, after the backward pass.

        units: [C] by which a tensor is divided on both sides, so that a channel of small values counts as the others.
        """
        for name, tensor in ours.items():
            of_images = name in ("output", "input gradient") or name.startswith("gradient of")
            array = None if tensor is None else _images_of(tensor) if of_images else shared(tensor)
            terms = self.batch * self.size[0] * self.size[1] if name in ("weight gradient", "bias gradient") else 1
            exact = expected[name]
            if array is not None and name in (units or {}):
                array, exact = array / units[name], exact / units[name]
            yield Pair(name + suffix, array, exact, of_images, terms)


def _as_tensor(array: np.ndarray):
    """On the current device; on a CPU it is the array's memory."""
    return from_dlpack(array) if paddle.device.get_device() == "cpu" else paddle.to_tensor(array)


def _images_of(tensor) -> np.ndarray:
    """[N, H, W, C] whatever the layout in memory, or [N, C], in float32."""
    array = shared(tensor.astype("float32"))
    return array if tensor.ndim != 4 or layers.on_kernels(tensor) else array.transpose(0, 2, 3, 1)
