"""Convolution, batch norm with its activation, and the initial distributions. Mirrors fixmatch/models/layers.py.

Reference: kekmodel/FixMatch-pytorch, models/wideresnet.py and models/resnext.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from parity.mirror.precision import as_stored

BN_MOMENTUM = 0.999  # share of the old value, as on the other side; Torch itself takes the share of the new one, 0.001
BN_EPSILON = 1e-5


def global_average_pool(x):
    """-> [N, C]."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


class Conv2d(nn.Conv2d):
    """A convolution without bias, padded to keep the size at stride 1; kaiming normal, fan_out."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="leaky_relu")


class BatchNorm2d(nn.BatchNorm2d):
    """Torch's own batch norm, then `activation`: None, "mish" or ("leaky_relu", slope)."""

    def __init__(self, channels: int, activation=None, momentum: float = BN_MOMENTUM):
        super().__init__(channels, eps=as_stored(BN_EPSILON), momentum=1.0 - momentum)
        self.activation = activation

    def forward(self, x):
        return activate(super().forward(x), self.activation)


def activate(x, activation):
    """`activation` as BatchNorm2d takes it, on x of any shape."""
    if activation is None:
        return x
    if activation == "mish":
        return F.mish(x)
    name, slope = activation
    return getattr(F, name)(x, slope)


def add(x, y, activation=None):
    """The sum of a residual connection, then `activation` as BatchNorm2D takes it."""
    return activate(x + y, activation)


def xavier_linear(in_features: int, num_classes: int) -> nn.Linear:
    """The classifier: weight xavier normal, bias 0. weight: [num_classes, in_features]."""
    linear = nn.Linear(in_features, num_classes)
    nn.init.xavier_normal_(linear.weight)
    with torch.no_grad():
        linear.bias.zero_()
    return linear
