"""Which layer calls a network makes at the size of the run: one forward pass of one image through it, watched.

What its convolutions compute is left out, since it takes half a second in a large network and only shapes count here.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import paddle
from paddle import nn

from fixmatch.models import build_model, layers
from parity.case import Case
from parity.subject import without_initial_values

# Side of the images in pixels, of the data sets that have one; of others, unless configured, this is not known here.
_IMAGE_SIZES = {"digits": 8, "cifar10": 32, "cifar100": 32, "svhn": 32, "stl10": 96}
_UNKNOWN_IMAGE_SIZE = 32


@dataclass(frozen=True)
class Call:
    """One layer call. Calls are distinct where kind, label, size, `input_gradient` or `settings` differ."""

    kind: str  # conv2d, batch norm, add, average pool, linear, layout, unknown
    label: str  # with channels, kernel, stride, groups, activation: "conv2d 3x3 16->32 stride 2"
    size: tuple[int, int]  # rows and columns of its input in the run; (1, 1) after pooling
    channels: int  # of its input
    input_gradient: bool  # whether the backward pass goes on below it; not below the images
    layer: str  # the first place in the network that makes it
    run: Callable  # the production layer or function itself
    activation: object = None
    outputs: int = 0  # channels of its output, where they differ from the input's
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    settings: tuple = ()  # of a batch norm: momentum and epsilon, which are to be the same for all

    @property
    def work(self) -> float:
        """Multiplications for each pixel of the input."""
        return self.channels * max(self.outputs, 1) * self.kernel**2 / self.groups / self.stride**2

    @property
    def weights(self) -> float:
        """Of a convolution or the classifier; 0 of other layers."""
        return self.channels * self.outputs * self.kernel**2 / self.groups

    @property
    def algorithm(self) -> tuple:
        """What calls have in common that differ in size only."""
        return self.kind, self.kernel, self.stride, self.groups > 1, self.activation


def image_size(case: Case) -> int:
    data = case.config.data
    return data.image_size or _IMAGE_SIZES.get(data.name, _UNKNOWN_IMAGE_SIZE)


def batch_size(case: Case) -> int:
    """Images of one forward pass: labeled, weak and strong ones."""
    train = case.config.train
    return train.batch_size * (1 if case.config.ssl.mode == "none" else 1 + 2 * train.mu)


def distinct_calls(case: Case) -> list[Call]:
    """In the order in which the network makes them. The layers are those of a fresh network on the current device."""
    with without_initial_values():
        model = build_model(num_classes=case.num_classes, **case.config.model.network())
    model.eval()  # one image, of which later layers of a small network see one pixel
    found: dict[tuple, Call] = {}

    def note(call: Call):
        found.setdefault((call.kind, call.label, call.size, call.input_gradient, call.settings), call)

    size = image_size(case)
    with _watched(model, note):
        model(paddle.zeros([1, 3, size, size]))
    return list(found.values())


@contextlib.contextmanager
def _watched(model, note: Callable[[Call], None]) -> Iterator[None]:
    """Calls `note` for each call of a leaf layer, and of the functions of models/layers.py that networks import."""
    module = sys.modules[type(model).__module__]
    leaves = [(name, layer) for name, layer in model.named_sublayers()
              if not layer.sublayers() and not isinstance(layer, nn.Sequential)]
    functions = {"to_kernel_layout": _layout, "add": _add, "global_average_pool": _pool}
    with contextlib.ExitStack() as watching:
        watching.enter_context(mock.patch.object(layers.Conv2D, "forward", _zeros))
        for name, layer in leaves:
            hook = layer.register_forward_pre_hook(functools.partial(_note_layer, note, name))
            watching.callback(hook.remove)
        for name, describe in functions.items():
            watched = _noting(note, getattr(module, name), describe)
            watching.enter_context(mock.patch.object(module, name, watched))
        yield


def _zeros(layer, x):
    """In the place of a convolution's output: zeros of its shape."""
    (rows, columns), _ = _size_and_channels(x)
    size, channels = [(side - 1) // layer.stride + 1 for side in (rows, columns)], layer.weight.shape[0]
    output = paddle.zeros([len(x), *size, channels] if layers.on_kernels(x) else [len(x), channels, *size])
    output.stop_gradient = x.stop_gradient and layer.weight.stop_gradient
    return output


def _noting(note, function, describe):
    def watched(x, *args):
        note(describe(function, x, *args))
        return function(x, *args)
    return watched


def _note_layer(note, name: str, layer, inputs):
    x, = inputs
    describe = {layers.Conv2D: _conv2d, layers.BatchNorm2D: _batch_norm, nn.Linear: _linear}.get(type(layer), _unknown)
    note(dataclasses.replace(describe(layer, x), layer=name))


def _size_and_channels(x) -> tuple[tuple[int, int], int]:
    if x.ndim == 2:
        return (1, 1), x.shape[1]
    if layers.on_kernels(x):
        return tuple(x.shape[1:3]), x.shape[3]
    return tuple(x.shape[2:]), x.shape[1]


def _call(kind: str, label: str, x, run, **more) -> Call:
    size, channels = _size_and_channels(x)
    return Call(kind, f"{kind} {label}".rstrip(), size, channels, not x.stop_gradient, "", run, **more)


def _conv2d(layer, x) -> Call:
    outputs, inputs_per_group, kernel, _ = layer.weight.shape
    label = f"{kernel}x{kernel} {inputs_per_group * layer.groups}->{outputs}"
    label += f" groups {layer.groups}" * (layer.groups > 1) + f" stride {layer.stride}" * (layer.stride > 1)
    return _call("conv2d", label, x, layer, outputs=outputs, kernel=kernel, stride=layer.stride, groups=layer.groups)


def _batch_norm(layer, x) -> Call:
    label = f"{layer.weight.shape[0]} {_name(layer.activation)}"
    return _call("batch norm", label, x, layer, activation=layer.activation, settings=(layer.momentum, layer.epsilon))


def _linear(layer, x) -> Call:
    inputs, outputs = layer.weight.shape
    return _call("linear", f"{inputs}->{outputs}", x, layer, outputs=outputs)


def _add(function, x, y, activation=None) -> Call:
    label = f"{_size_and_channels(x)[1]} {_name(activation)}"
    return dataclasses.replace(_call("add", label, x, function, activation=activation), layer="residual sum")


def _pool(function, x) -> Call:
    call = _call("average pool", str(_size_and_channels(x)[1]), x, function)
    return dataclasses.replace(call, layer="pooling before the classifier")


def _layout(function, x) -> Call:
    _, channels, *size = x.shape
    return Call("layout", f"layout {channels}", tuple(size), channels, False, "input of the network", function)


def _unknown(layer, x) -> Call:
    return Call("unknown", type(layer).__name__, (1, 1), 0, False, "", layer)


def _name(activation) -> str:
    return activation[0] if isinstance(activation, tuple) else activation or ""
