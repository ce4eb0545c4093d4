"""The two networks of the reference, by name."""

from fixmatch.models.layers import BN_MOMENTUM
from fixmatch.models.resnext import ResNeXt
from fixmatch.models.wideresnet import WideResNet


def build_model(arch: str, num_classes: int, *, depth: int = 28, width: int = 2, cardinality: int = 4,
                bn_momentum: float = BN_MOMENTUM):
    """A freshly initialised network, in Paddle's default dtype.

    Args:
        arch: "wideresnet" or "resnext".
        num_classes: K, the size of the logits [N, K].
        depth: layers as the name counts them: WRN-28-2 and ResNeXt-28 have 28.
        width: the widen factor of a WideResNet (2 in WRN-28-2), the base width of a ResNeXt (4 in 4x4d).
        cardinality: groups of a ResNeXt (4 in 4x4d); a WideResNet has none.
        bn_momentum: share of the old running statistics, Paddle's convention: the reference's 0.999 is Torch's 0.001.

    Raises:
        ValueError: an unknown `arch`.
    """
    if arch == "wideresnet":
        return WideResNet(num_classes, depth, width, bn_momentum)
    if arch == "resnext":
        return ResNeXt(num_classes, depth, width, cardinality, bn_momentum)
    raise ValueError(f"model.arch must be wideresnet or resnext, got {arch!r}")


def idle_parameters(model) -> set[str]:
    """The names of the parameters that never get a gradient, since the network does not use their layer's output."""
    return {f"{prefix}.{name}" for prefix, layer in model.named_sublayers() if getattr(layer, "idle", False)
            for name, _ in layer.named_parameters()}
