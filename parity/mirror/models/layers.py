"""Convolution, batch norm with its activation, and the initial distributions. Mirrors fixmatch/models/layers.py.

Reference: kekmodel/FixMatch-pytorch, models/wideresnet.py and models/resnext.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from parity.mirror.precision import as_stored

BN_MOMENTUM = 0.999  # share of the old value, as on the other side; Torch itself takes the share of the new one, 0.001
BN_EPSILON = 1e-5
_SMALL_MAP = 16  # pixels


def global_average_pool(x):
    """-> [N, C]."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


class Conv2d(nn.Conv2d):
    """A convolution without bias, padded to keep the size at stride 1; kaiming normal, fan_out."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x):
        height, width = ((side - 1) // self.stride[0] + 1 for side in x.shape[2:])
        if x.dtype == torch.float64 and height * width <= _SMALL_MAP:
            return _conv2d_as_product(x, self.weight, self.stride[0], self.padding[0], self.groups)
        return super().forward(x)


def _conv2d_as_product(x, weight, stride: int, padding: int, groups: int):
    """The same convolution as one matrix product for the whole batch.

    In float64 Torch makes one for each image, and so reads all weights for each: of a large network on maps of a few
    pixels that takes four times as long.
    """
    images, _, height, width = x.shape
    outputs, _, kernel, _ = weight.shape
    height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
    columns = F.unfold(x, kernel, padding=padding, stride=stride)  # [N, C * kernel**2, pixels]
    columns = columns.reshape(images, groups, -1, height * width).permute(1, 2, 0, 3).flatten(2)
    product = torch.bmm(weight.reshape(groups, outputs // groups, -1), columns)  # [groups, O / groups, N * pixels]
    return product.reshape(outputs, images, height, width).transpose(0, 1)


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
