"""The two networks of the reference, by name. Mirrors fixmatch/models/__init__.py."""

from parity.mirror.models.layers import BN_MOMENTUM, BatchNorm2d
from parity.mirror.models.resnext import ResNeXt
from parity.mirror.models.wideresnet import WideResNet


def build_model(arch: str, num_classes: int, *, depth: int = 28, width: int = 2, cardinality: int = 4,
                bn_momentum: float = BN_MOMENTUM):
    """A freshly initialised network, in Torch's default dtype; arguments as in fixmatch.models.build_model.

    `bn_momentum` is in Paddle's convention on both sides, so that one configuration builds both networks.
    """
    if arch == "wideresnet":
        model = WideResNet(num_classes, depth=depth, widen_factor=width)
    elif arch == "resnext":
        model = ResNeXt(num_classes, depth=depth, base_width=width, cardinality=cardinality)
    else:
        raise ValueError(f"model.arch must be wideresnet or resnext, got {arch!r}")
    for layer in model.modules():
        if isinstance(layer, BatchNorm2d):
            layer.momentum = 1.0 - bn_momentum
    return model
