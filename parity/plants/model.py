"""Bugs in the networks: batch norm, activation, blocks, pooling, fresh weights."""

from collections.abc import Callable
from functools import partial

import paddle
import paddle.nn.functional as F

from fixmatch.models import layers, resnext, wideresnet
from parity.plants.plant import Patch, Plant


def bn_momentum(patch: Patch, change: Callable[[float], float]) -> None:
    """Batch norm that updates its running statistics with another share of the old value."""
    update = layers.BatchNorm2D._update_running_statistics

    def changed(self, *args, **kwargs):
        right, self.momentum = self.momentum, change(self.momentum)
        update(self, *args, **kwargs)
        self.momentum = right

    patch(layers.BatchNorm2D, "_update_running_statistics", changed)


def _last_bn_of_other_momentum(patch: Patch) -> None:
    init = wideresnet.WideResNet.__init__

    def changed(self, *args):
        init(self, *args)
        self.bn1.momentum = 0.9

    patch(wideresnet.WideResNet, "__init__", changed)


def bn_momentum_inverted(patch: Patch) -> None:
    bn_momentum(patch, lambda m: 1 - m)


def _biased_running_variance(patch: Patch) -> None:
    update = layers.BatchNorm2D._update_running_statistics
    patch(layers.BatchNorm2D, "_update_running_statistics",
          lambda self, mean, variance, count: update(self, mean, variance * ((count - 1) / count), count))


def _bn_epsilon(patch: Patch, epsilon: float) -> None:
    patch(layers, "BN_EPSILON", epsilon)


def _activation_slope(patch: Patch, slope: float) -> None:
    patch(wideresnet, "ACTIVATION", ("leaky_relu", slope))
    patch(resnext, "ACTIVATION", ("leaky_relu", slope))


def _activate_before_residual(patch: Patch, everywhere: bool) -> None:
    init = wideresnet.BasicBlock.__init__

    def changed(self, in_channels, out_channels, stride, bn_momentum, activate_before_residual):
        init(self, in_channels, out_channels, stride, bn_momentum, everywhere)

    patch(wideresnet.BasicBlock, "__init__", changed)


def _pre_activated_conv1(patch: Patch) -> None:
    def changed(self, x):
        activated = self.bn1(x)
        if not self.equal_in_out and self.activate_before_residual:
            x = activated
        out = self.conv2(self.bn2(self.conv1(activated)))
        return out + (x if self.equal_in_out else self.convShortcut(x))

    patch(wideresnet.BasicBlock, "forward", changed)


def _stride_on_conv2(patch: Patch) -> None:
    init = wideresnet.BasicBlock.__init__

    def changed(self, *args):
        init(self, *args)
        self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride

    patch(wideresnet.BasicBlock, "__init__", changed)


def _no_final_bn(patch: Patch) -> None:
    init = wideresnet.WideResNet.__init__

    def changed(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.bn1.forward = lambda x: layers.activate(x, self.bn1.activation)

    patch(wideresnet.WideResNet, "__init__", changed)


def _max_pool(patch: Patch) -> None:
    patch(wideresnet, "global_average_pool", lambda x: x.max([1, 2] if layers.on_kernels(x) else [2, 3]))


def _dropout(patch: Patch) -> None:
    bn2_then_dropout = layers.BatchNorm2D.forward

    def changed(self, x):
        return F.dropout(bn2_then_dropout(self, x), 0.3, training=self.training)

    patch(layers.BatchNorm2D, "forward", changed)


def _half_size(x):
    """Means of 2x2 pixels, in either layout."""
    return F.avg_pool2d(x, 2, data_format="NHWC" if layers.on_kernels(x) else "NCHW")


def _pooled_shortcut(patch: Patch) -> None:
    init = wideresnet.BasicBlock.__init__

    def changed(self, *args):
        init(self, *args)
        if not self.equal_in_out and self.convShortcut.stride == 2:
            shortcut = self.convShortcut
            shortcut.stride = 1
            plain = shortcut.forward
            shortcut.forward = lambda x: _half_size(plain(x))

    patch(wideresnet.BasicBlock, "__init__", changed)


def _no_residual(patch: Patch) -> None:
    patch(wideresnet.BasicBlock, "forward", lambda self, x: self.conv2(self.bn2(self.conv1(self.bn1(x)))))


def _fresh_convolutions(patch: Patch, fill: Callable) -> None:
    """Convolutions whose fresh weights come from fill(weight)."""
    init = layers.Conv2D.__init__

    def changed(self, *args, **kwargs):
        init(self, *args, **kwargs)
        fill(self.weight)

    for module in (layers, wideresnet, resnext):
        patch(module.Conv2D, "__init__", changed)


def _kaiming_fan_in(weight) -> None:
    paddle.nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu")


def _narrow_uniform(weight) -> None:
    paddle.nn.init.uniform_(weight, -0.05, 0.05)


PLANTS = [
    Plant("bn-momentum-inverted", "operators", "the reference's 0.001 given to Paddle, as share of the old value",
          bn_momentum_inverted),
    Plant("bn-momentum-default", "operators", "Paddle's default of 0.9", partial(bn_momentum, change=lambda m: 0.9)),
    Plant("bn-momentum-of-the-last-forgotten", "operators", "the last batch norm keeps Paddle's default of 0.9",
          _last_bn_of_other_momentum),
    Plant("bn-running-variance-biased", "operators", "what Paddle's CPU kernel averages", _biased_running_variance),
    Plant("bn-epsilon-1e-3", "operators", "the official code's epsilon", partial(_bn_epsilon, epsilon=1e-3)),
    Plant("bn-epsilon-1e-6", "operators", "a smaller epsilon", partial(_bn_epsilon, epsilon=1e-6)),
    Plant("activation-slope-0.01", "forward", "LeakyReLU's default slope", partial(_activation_slope, slope=0.01)),
    Plant("activation-slope-0.2", "forward", "twice the slope", partial(_activation_slope, slope=0.2)),
    Plant("activation-relu", "forward", "ReLU", partial(_activation_slope, slope=0.0)),
    Plant("activate-before-residual-missing", "forward", "the first block's shortcut sees the raw input",
          partial(_activate_before_residual, everywhere=False)),
    Plant("activate-before-residual-everywhere", "forward", "all stages' shortcuts see the activated input",
          partial(_activate_before_residual, everywhere=True)),
    Plant("conv1-pre-activated", "forward", "the activated input feeds conv1 in every block, as in the official code",
          _pre_activated_conv1),
    Plant("stride-on-conv2", "forward", "the second convolution of a block halves the resolution", _stride_on_conv2),
    Plant("final-bn-missing", "forward", "no batch norm before the pooling", _no_final_bn),
    Plant("max-pool", "operators", "global maximum instead of average", _max_pool),
    Plant("dropout", "operators", "dropout between a block's convolutions", _dropout),
    Plant("shortcut-pooled", "operators", "the projection halves the resolution by pooling, not by its stride",
          _pooled_shortcut),
    Plant("residual-missing", "forward", "blocks without their shortcut", _no_residual),
    Plant("init-fan-in", "forward", "kaiming normal over fan_in, Paddle's default",
          partial(_fresh_convolutions, fill=_kaiming_fan_in)),
    Plant("init-uniform", "forward", "Paddle's own initial distribution of a convolution",
          partial(_fresh_convolutions, fill=_narrow_uniform)),
]
