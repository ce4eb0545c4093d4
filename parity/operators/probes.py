"""One layer call on drawn numbers: through the production code in the run's precision, and in float64.

A probe's batch repeats `distinct` images, so that the float64 side computes those few and still knows every element of
every tensor of a batch of any size: image n is image n modulo `distinct`, and sums count each so often.

Sums are kept from cancelling, since rounding is judged against the result: inputs and upstream gradients have a mean of
0.5, and batch norm's upstream gradient follows its input. Legend: N images, H W rows and columns, C channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import paddle

from fixmatch.models import layers
from parity.operators import truth
from parity.operators.calls import Call
from parity.operators.judge import Pair

BN_EPSILON = 1e-5
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
    amp: bool
    rng: np.random.Generator

    @property
    def name(self) -> str:
        size = "" if self.call.kind == "linear" else f"x{self.size[0]}x{self.size[1]}"
        return f"{self.call.label}, {self.batch}{size}"

    def pairs(self) -> Iterator[Pair]:
        run = {"conv2d": self._conv2d, "batch norm": self._batch_norm, "add": self._add, "average pool": self._pool,
               "linear": self._linear, "layout": self._layout}[self.call.kind]
        yield from run()

    def _noise(self, *shape, mean: float = 0.0) -> np.ndarray:
        """Uniform, of variance 1: four times faster to draw than normal numbers."""
        return (self.rng.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(np.sqrt(12)) + np.float32(mean)

    def _images(self, channels: int, mean: float = 0.0) -> np.ndarray:
        return self._noise(self.distinct, *self.size, channels, mean=mean)

    @property
    def _counts(self) -> np.ndarray:
        return np.bincount(np.arange(self.batch) % self.distinct).astype(np.float64)

    def _tensor(self, images: np.ndarray):
        """The whole batch of them, in the layout that the network has here."""
        batch = paddle.to_tensor(images[np.arange(self.batch) % self.distinct])
        return batch if images.ndim == 2 or layers.on_kernels(batch) else batch.transpose([0, 3, 1, 2]).contiguous()

    def _leaf(self, images: np.ndarray):
        """An input of which the gradient is wanted; or, where the network wants none, what it makes of its images."""
        if not self.call.input_gradient:
            batch = images[np.arange(self.batch) % self.distinct]
            return layers.to_kernel_layout(paddle.to_tensor(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))))
        tensor = self._tensor(images)
        tensor.stop_gradient = False
        return tensor

    def _backward(self, output, grad: np.ndarray) -> None:
        """Raises ValueError where the output has not the shape that it must have."""
        grad = self._tensor(grad).astype(output.dtype)
        if output.shape != grad.shape:
            raise ValueError(f"output of shape {output.shape}, must be {grad.shape}")
        output.backward(grad)

    def _forward(self, *inputs):
        with paddle.amp.auto_cast(enable=self.amp):
            return self.call.run(*inputs)

    def _compared(self, ours: dict, expected: dict, suffix: str = "", units: dict | None = None) -> Iterator[Pair]:
        """Pairs in the order of `ours`, whose tensors are read only now, after the backward pass.

        units: [C] by which a tensor is divided on both sides, so that a channel of small values counts as the others.
        """
        for name, tensor in ours.items():
            of_images = name in ("output", "input gradient") or name.startswith("gradient of")
            array = None if tensor is None else _images_of(tensor) if of_images else tensor.numpy()
            # In train mode all that a batch norm gives depends on sums over the batch.
            is_sum = name in ("weight gradient", "bias gradient") or suffix == " in train mode"
            terms = self.batch * self.size[0] * self.size[1] if is_sum else 1
            unit = (units or {}).get(name)
            if unit is None or array is None:
                yield Pair(name + suffix, array, expected[name], of_images, terms)
            else:
                yield Pair(name + suffix, array / unit, expected[name] / unit, of_images, terms)

    def _conv2d(self) -> Iterator[Pair]:
        call, layer = self.call, self.call.run
        x, weight = self._images(call.channels, 0.5), self._noise(*layer.weight.shape)
        weight /= np.float32(np.sqrt(weight[0].size))
        layer.weight.set_value(weight)
        leaf = self._leaf(x)
        layer.eval()
        with paddle.no_grad():
            in_eval_mode = self._forward(leaf) if "eval" in self.modes else None
        layer.train()
        output = self._forward(leaf)
        size = tuple((side - 1) // call.stride + 1 for side in self.size)
        grad = self._noise(self.distinct, *size, call.outputs, mean=0.5)
        expected = truth.conv2d(_double(x), _double(weight), _double(grad), self._counts, call.stride, call.groups)
        self._backward(output, grad)
        if in_eval_mode is not None:
            yield from self._compared({"output": in_eval_mode}, expected, " in eval mode")
        yield from self._compared(_with_gradients(output, leaf, layer), expected)

    def _batch_norm(self) -> Iterator[Pair]:
        channels = self.call.channels
        spread = np.exp(self.rng.uniform(np.log(0.02), 0, channels)).astype(np.float32)  # small: epsilon counts
        noise, centre = self._images(channels), spread * self._noise(channels)
        x = centre + spread * noise
        weight, bias = self.rng.uniform(0.5, 1.5, channels).astype(np.float32), np.float32(0.3) * self._noise(channels)
        self.call.run.weight.set_value(weight)
        self.call.run.bias.set_value(bias)
        of_batch = truth.batch_statistics(_double(x), self._counts)
        for mode in self.modes:
            # The old running statistics are as large as what one update adds, so that both show.
            share = 1 - self.momentum if mode == "train" else 1.0
            old = [(share * value).astype(np.float32)
                   for value in (centre + 0.3 * spread, spread**2 * self.rng.uniform(0.5, 2, channels))]
            used = of_batch if mode == "train" else [_double(statistic) for statistic in old]
            norm = truth.BatchNorm(_double(x), *used, _double(weight), _double(bias), BN_EPSILON, self.call.activation)
            grad = self._away_from_kink(np.float32(0.3) + np.float32(0.5) * noise + self._noise(*x.shape), norm.z)
            expected = norm.results(_double(grad), self._counts, through_statistics=mode == "train")
            expected |= self._expected_statistics(of_batch, [_double(statistic) for statistic in old], mode)
            share = share or 1.0
            units = {"batch mean": spread, "running mean": share * spread, "batch variance": spread**2,
                     "running variance": share * spread**2, "input gradient": 1 / spread}
            yield from self._compared(self._run_batch_norm(x, old, grad, mode), expected, f" in {mode} mode", units)

    def _expected_statistics(self, of_batch, old, mode: str) -> dict:
        """The running variance averages the unbiased batch variance; in eval mode nothing changes."""
        values = self.batch * self.size[0] * self.size[1]
        mean, variance = of_batch
        names, fresh = ("running mean", "running variance"), (mean, variance * (values / max(values - 1, 1)))
        new = old if mode == "eval" else [self.momentum * was + (1 - self.momentum) * one
                                          for was, one in zip(old, fresh, strict=True)]
        return {"batch mean": mean, "batch variance": variance} | dict(zip(names, new, strict=True))

    def _run_batch_norm(self, x, old, grad, mode: str) -> dict:
        layer, given = self.call.run, {}
        getattr(layer, mode)()
        for buffer, value in zip((layer._mean, layer._variance), old, strict=True):
            buffer.set_value(value)
        update = layer._update_running_statistics

        def watched(mean, variance, count):
            given.update({"batch mean": mean, "batch variance": variance})
            update(mean, variance, count)

        layer._update_running_statistics = watched
        try:
            leaf = self._leaf(x)
            output = self._forward(leaf)
        finally:
            del layer._update_running_statistics
        self._backward(output, grad)
        found = _with_gradients(output, leaf, layer)
        statistics = given | {"running mean": layer._mean, "running variance": layer._variance}
        return {"output": found.pop("output"), **statistics, **found}

    def _add(self) -> Iterator[Pair]:
        x, y, more = (self._images(self.call.channels) for _ in range(3))
        z = _double(x) + _double(y)
        grad = self._away_from_kink(self._images(self.call.channels, 0.5), z)
        expected = truth.add(_double(x), _double(y), _double(grad), self.call.activation)
        one, other = self._leaf(x), self._leaf(y)
        summand = one * 1.0  # is used twice, as a block's input is: what arrives for it must not reach the other
        with paddle.amp.auto_cast(enable=self.amp):
            output = self.call.run(summand, other, *([] if self.call.activation is None else [self.call.activation]))
        paddle.autograd.backward([output, summand * 1.0], [self._tensor(grad).astype(output.dtype), self._tensor(more)])
        of_both = expected.pop("gradient of each input")
        expected |= {"gradient of the first input": of_both + _double(more), "gradient of the second input": of_both}
        yield from self._compared({"output": output, "gradient of the first input": one.grad,
                                   "gradient of the second input": other.grad}, expected)

    def _pool(self) -> Iterator[Pair]:
        x, grad = self._images(self.call.channels, 0.5), self._noise(self.distinct, self.call.channels)
        leaf = self._leaf(x)
        output = self._forward(leaf)
        self._backward(output, grad)
        yield from self._compared({"output": output, "input gradient": leaf.grad},
                                  truth.average_pool(_double(x), _double(grad)))

    def _linear(self) -> Iterator[Pair]:
        layer = self.call.run
        x, grad = (self._noise(self.distinct, size, mean=0.5) for size in (self.call.channels, self.call.outputs))
        weight, bias = (self._noise(*tensor.shape) for tensor in (layer.weight, layer.bias))
        layer.weight.set_value(weight)
        layer.bias.set_value(bias)
        leaf = self._leaf(x)
        output = self._forward(leaf)
        self._backward(output, grad)
        yield from self._compared(_with_gradients(output, leaf, layer),
                                  truth.linear(_double(x), _double(weight), _double(bias), _double(grad), self._counts))

    def _layout(self) -> Iterator[Pair]:
        images = self._images(self.call.channels)
        batch = paddle.to_tensor(images[np.arange(self.batch) % self.distinct].transpose(0, 3, 1, 2).copy())
        yield from self._compared({"output": self.call.run(batch)}, {"output": _double(images)})

    def _away_from_kink(self, grad, z) -> np.ndarray:
        return np.where(np.abs(z) < _KINK, np.float32(0), grad) if isinstance(self.call.activation, tuple) else grad


def _with_gradients(output, leaf, layer) -> dict:
    """The output and all gradients, which are taken away from the parameters."""
    found = {"output": output}
    if not leaf.stop_gradient:
        found["input gradient"] = leaf.grad
    for name, parameter in layer.named_parameters():
        found[f"{name} gradient"] = parameter.grad.clone() if parameter.grad is not None else None
        parameter.clear_gradient(False)
    return found


def _images_of(tensor) -> np.ndarray:
    """[N, H, W, C] whatever the layout in memory, or [N, C], in float32."""
    array = tensor.detach().astype("float32").numpy()
    return array if tensor.ndim != 4 or layers.on_kernels(tensor) else array.transpose(0, 2, 3, 1)


def _double(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)
