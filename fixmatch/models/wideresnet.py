"""WideResNet (Zagoruyko & Komodakis 2016) as FixMatch uses it: LeakyReLU, slow batch statistics, no dropout.

Reference: kekmodel/FixMatch-pytorch, models/wideresnet.py. Shapes: N images, C channels, K classes.
"""

from paddle import nn

from fixmatch.models.layers import BatchNorm2D, Conv2D, add, global_average_pool, to_kernel_layout, xavier_linear

ACTIVATION = ("leaky_relu", 0.1)


class BasicBlock(nn.Layer):
    """Pre-activation residual block: bn1, conv1, bn2, conv2, plus the input or its 1x1 projection.

    `activate_before_residual`: the shortcut, too, sees the activated input (the network's first block). In the first
    blocks of the later stages both paths see the raw input, and bn1's output is unused while its running statistics are
    still updated. That is the reference's behaviour, and so it is kept.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, bn_momentum: float,
                 activate_before_residual: bool):
        super().__init__()
        self.bn1 = BatchNorm2D(in_channels, ACTIVATION, bn_momentum)
        self.conv1 = Conv2D(in_channels, out_channels, 3, stride)
        self.bn2 = BatchNorm2D(out_channels, ACTIVATION, bn_momentum)
        self.conv2 = Conv2D(out_channels, out_channels, 3)
        self.equal_in_out = in_channels == out_channels
        self.convShortcut = None if self.equal_in_out else Conv2D(in_channels, out_channels, 1, stride)
        self.activate_before_residual = activate_before_residual
        self.bn1.idle = not (self.equal_in_out or activate_before_residual)

    def forward(self, x):  # [N, C_in, H, W] -> [N, C_out, H / stride, W / stride]
        activated = self.bn1(x)
        if not self.equal_in_out and self.activate_before_residual:
            x = activated
        out = self.conv1(activated if self.equal_in_out else x)
        out = self.conv2(self.bn2(out))
        return add(out, x if self.equal_in_out else self.convShortcut(x))


class NetworkBlock(nn.Layer):
    """A stage: `num_blocks` residual blocks, the first of which changes the width and the resolution."""

    def __init__(self, num_blocks: int, in_channels: int, out_channels: int, stride: int, bn_momentum: float,
                 activate_before_residual: bool):
        super().__init__()
        self.layer = nn.Sequential(*(
            BasicBlock(in_channels if i == 0 else out_channels, out_channels, stride if i == 0 else 1,
                       bn_momentum, activate_before_residual)
            for i in range(num_blocks)))

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Layer):
    """WRN-depth-widen_factor: images [N, 3, H, W] -> logits [N, K]. 28-2 with K = 10 has 1,467,610 parameters."""

    def __init__(self, num_classes: int, depth: int, widen_factor: int, bn_momentum: float):
        super().__init__()
        channels = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        num_blocks = (depth - 4) // 6
        self.conv1 = Conv2D(3, channels[0], 3)
        self.block1 = NetworkBlock(num_blocks, channels[0], channels[1], 1, bn_momentum, activate_before_residual=True)
        self.block2 = NetworkBlock(num_blocks, channels[1], channels[2], 2, bn_momentum, activate_before_residual=False)
        self.block3 = NetworkBlock(num_blocks, channels[2], channels[3], 2, bn_momentum, activate_before_residual=False)
        self.bn1 = BatchNorm2D(channels[3], ACTIVATION, bn_momentum)
        self.fc = xavier_linear(channels[3], num_classes)

    def forward(self, x):
        out = self.conv1(to_kernel_layout(x))  # [N, 16, H, W]
        out = self.block1(out)  # [N, 16k, H, W]
        out = self.block2(out)  # [N, 32k, H/2, W/2]
        out = self.block3(out)  # [N, 64k, H/4, W/4]
        out = global_average_pool(self.bn1(out))  # [N, 64k]
        return self.fc(out)  # [N, K]
