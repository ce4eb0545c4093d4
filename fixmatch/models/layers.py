"""Convolution, batch norm with its activation, and the initial distributions that both networks share.

The networks are written once. Where the CPU kernels of fixmatch.kernels apply (float32 on a CPU they support),
activations lie in memory as NHWC and run through them; everywhere else as NCHW through Paddle's own operators. Only
`to_kernel_layout`, `global_average_pool` and the layers here know which.

Reference: kekmodel/FixMatch-pytorch, models/wideresnet.py and models/resnext.py.
"""

import functools

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from fixmatch import kernels

BN_MOMENTUM = 0.999  # share of the old value, Paddle's convention; the reference's 0.001 is Torch's, of the new value
BN_EPSILON = 1e-5
_cpu_kernels = "auto"


def set_cpu_kernels(setting: str) -> str:
    """Chooses "auto", "on" or "off" for all networks of this process; returns one line that says what will be used.

    Raises ValueError where they are "on" and cannot be used.
    """
    global _cpu_kernels
    usable, reason = (False, "stock operators: switched off") if setting == "off" else kernels.status()
    if setting == "on" and not usable:
        raise ValueError(f"runtime.cpu_kernels: on, but they cannot be used here: {reason}")
    _cpu_kernels = setting
    return reason


def on_kernels(x) -> bool:
    return (_cpu_kernels != "off" and x.dtype == paddle.float32 and paddle.in_dynamic_mode() and x.place.is_cpu_place()
            and kernels.status()[0])


def to_kernel_layout(images):
    """[N, C, H, W] -> the layout that the layers below run in."""
    return images.transpose([0, 2, 3, 1]) if on_kernels(images) else images


def global_average_pool(x):
    """-> [N, C], from either layout."""
    return kernels.global_average_pool(x) if on_kernels(x) else x.mean([2, 3])


class Conv2D(nn.Layer):
    """A convolution without bias, padded to keep the size at stride 1. weight: [C_out, C_in / groups, k, k].

    Initialised normal with variance 2 / fan_out (He et al. 2015, mode fan_out).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.stride, self.padding, self.groups = stride, kernel_size // 2, groups
        self.weight = self.create_parameter([out_channels, in_channels // groups, kernel_size, kernel_size])
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        conv2d = kernels.conv2d if on_kernels(x) else functools.partial(F.conv2d, bias=None)
        return conv2d(x, self.weight, stride=self.stride, padding=self.padding, groups=self.groups)


class BatchNorm2D(nn.Layer):
    """Batch norm over N, H, W, then `activation`: None, "mish" or ("leaky_relu", slope).

    `momentum` is the share of the old running statistics, 0..1, as in Paddle: Torch's 0.001 is 0.999 here.

    In train mode its running variance averages the *unbiased* batch variance, as Torch's does. Paddle's CPU kernel
    averages the biased one, and its GPU kernels differ by shape, so the running statistics are updated here, from the
    batch statistics that every kernel returns. They are buffers, never parameters, under paddle.nn.BatchNorm2D's names.
    """

    def __init__(self, channels: int, activation=None, momentum: float = BN_MOMENTUM):
        super().__init__()
        self.momentum, self.epsilon, self.activation = momentum, BN_EPSILON, activation
        self.weight = self.create_parameter([channels], default_initializer=nn.initializer.Constant(1.0))
        self.bias = self.create_parameter([channels], is_bias=True)
        self.register_buffer("_mean", paddle.zeros([channels], dtype=self.weight.dtype))
        self.register_buffer("_variance", paddle.ones([channels], dtype=self.weight.dtype))

    def forward(self, x):
        if self.training:
            y, mean, variance = batch_norm_train(x, self.weight, self.bias, self.epsilon, self.activation)
            self._update_running_statistics(mean, variance, count=x.size // mean.size)
            return y
        statistics = self._mean, self._variance, self.weight, self.bias
        if on_kernels(x):
            return kernels.batch_norm_inference(x, *statistics, self.epsilon, self.activation)
        return activate(F.batch_norm(x, *statistics, epsilon=self.epsilon), self.activation)

    @paddle.no_grad()
    def _update_running_statistics(self, mean, variance, count: int):
        """running = momentum * running + (1 - momentum) * batch, over `count` values a channel."""
        fresh = 1.0 - self.momentum
        self._mean.scale_(self.momentum).add_(mean * fresh)
        self._variance.scale_(self.momentum).add_(variance * (fresh * count / max(count - 1, 1)))


def batch_norm_train(x, weight, bias, epsilon: float, activation):
    """Normalises x by its own statistics and activates.

    Returns (y, mean [C], biased variance [C]); the statistics carry no gradient. Paddle's functional form hides them,
    so the stock path calls the operator below it, which returns the mean and 1 / sqrt(variance + float32(epsilon)).
    """
    if on_kernels(x):
        return kernels.batch_norm(x, weight, bias, epsilon, activation)
    scratch = paddle.zeros_like(weight), paddle.ones_like(weight)
    y, _, _, mean, inverse_std, _ = paddle._C_ops.batch_norm(x, *scratch, weight, bias, False, 0.9, epsilon, "NCHW",
                                                             False, False)
    return activate(y, activation), mean.detach(), inverse_std.detach() ** -2.0 - float(np.float32(epsilon))


def activate(x, activation):
    """`activation` as BatchNorm2D takes it, on x of any shape."""
    if activation is None:
        return x
    if activation == "mish":
        return F.mish(x)
    name, slope = activation
    if not paddle.in_dynamic_mode():
        # While a graph is traced for an export: Paddle 3.3 would store the slope as a double, but paddle.inference then
        # dies of a segmentation fault, and paddle2onnx writes another slope and reports success.
        return paddle.maximum(x, slope * x)
    return getattr(F, name)(x, slope)


def add(x, y, activation=None):
    """The sum of a residual connection, then `activation` as BatchNorm2D takes it."""
    return kernels.add(x, y, activation) if on_kernels(x) else activate(x + y, activation)


def xavier_linear(in_features: int, num_classes: int) -> nn.Linear:
    """The classifier: weight [in_features, num_classes] normal with variance 2 / (fan_in + fan_out), bias 0."""
    linear = nn.Linear(in_features, num_classes)
    nn.init.xavier_normal_(linear.weight)
    nn.init.constant_(linear.bias, 0.0)
    return linear
