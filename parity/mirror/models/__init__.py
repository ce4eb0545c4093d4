"""The two networks of the reference, by name. Mirrors fixmatch/models/__init__.py."""

from parity.mirror.models.layers import BN_MOMENTUM
from parity.mirror.models.resnext import ResNeXt, ResNeXtBottleneck
from parity.mirror.models.wideresnet import BasicBlock, WideResNet

BLOCKS = (BasicBlock, ResNeXtBottleneck)  # of which networks are put together


def build_model(arch: str, num_classes: int, *, depth: int = 28, width: int = 2, cardinality: int = 4,
                bn_momentum: float = BN_MOMENTUM):
    """A freshly initialised network, in Torch's default dtype; arguments as in fixmatch.models.build_model.

    `bn_momentum` is in Paddle's convention on both sides, so that one configuration builds both networks.
    """
    if arch == "wideresnet":
        return WideResNet(num_classes, depth, width, bn_momentum)
    if arch == "resnext":
        return ResNeXt(num_classes, depth, width, cardinality, bn_momentum)
    raise ValueError(f"model.arch must be wideresnet or resnext, got {arch!r}")
