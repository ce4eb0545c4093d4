"""ResNeXt for small images, with Mish after each batch norm. Mirrors fixmatch/models/resnext.py.

Reference: kekmodel/FixMatch-pytorch, models/resnext.py. Shapes: N images, K classes.
"""

from torch import nn

from parity.mirror.models.layers import BatchNorm2d, Conv2d, add, global_average_pool, xavier_linear

ACTIVATION = "mish"
WIDEN_FACTOR = 4


class ResNeXtBottleneck(nn.Module):
    """Reduce to D channels, convolve them in `cardinality` groups, expand; plus the input or its projection."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, cardinality: int, base_width: int,
                 bn_momentum: float):
        super().__init__()
        inner = cardinality * int(base_width * out_channels / (WIDEN_FACTOR * 64))
        self.conv_reduce = Conv2d(in_channels, inner, 1)
        self.bn_reduce = BatchNorm2d(inner, ACTIVATION, bn_momentum)
        self.conv_conv = Conv2d(inner, inner, 3, stride, groups=cardinality)
        self.bn = BatchNorm2d(inner, ACTIVATION, bn_momentum)
        self.conv_expand = Conv2d(inner, out_channels, 1)
        self.bn_expand = BatchNorm2d(out_channels, momentum=bn_momentum)
        self.shortcut = nn.Sequential()
        if in_channels != out_channels:
            self.shortcut.add_module("shortcut_conv", Conv2d(in_channels, out_channels, 1, stride))
            self.shortcut.add_module("shortcut_bn", BatchNorm2d(out_channels, momentum=bn_momentum))

    def forward(self, x):  # [N, C_in, H, W] -> [N, C_out, H / stride, W / stride]
        out = self.bn_reduce(self.conv_reduce(x))
        out = self.bn(self.conv_conv(out))
        out = self.bn_expand(self.conv_expand(out))
        return add(self.shortcut(x), out, ACTIVATION)


class ResNeXt(nn.Module):
    """Images [N, 3, H, W] -> logits [N, K]."""

    def __init__(self, num_classes: int, depth: int, base_width: int, cardinality: int, bn_momentum: float):
        super().__init__()
        channels = [64, 64 * WIDEN_FACTOR, 128 * WIDEN_FACTOR, 256 * WIDEN_FACTOR]
        num_blocks = (depth - 2) // 9
        self.conv_1_3x3 = Conv2d(3, 64, 3)
        self.bn_1 = BatchNorm2d(64, ACTIVATION, bn_momentum)
        for stage in (1, 2, 3):
            blocks = nn.Sequential()
            for i in range(num_blocks):
                first = i == 0
                blocks.add_module(f"stage_{stage}_bottleneck_{i}", ResNeXtBottleneck(
                    channels[stage - 1] if first else channels[stage], channels[stage],
                    2 if first and stage > 1 else 1, cardinality, base_width, bn_momentum))
            self.add_module(f"stage_{stage}", blocks)
        self.classifier = xavier_linear(channels[3], num_classes)

    def forward(self, x):
        out = self.bn_1(self.conv_1_3x3(x))  # [N, 64, H, W]
        out = self.stage_1(out)  # [N, 256, H, W]
        out = self.stage_2(out)  # [N, 512, H/2, W/2]
        out = self.stage_3(out)  # [N, 1024, H/4, W/4]
        return self.classifier(global_average_pool(out))  # [N, K]
