"""Bugs put into production and mirror alike, as where the description that both were written from is misunderstood.

The two sides then agree, and only the figures that the reference itself computed tell.
"""

import functools
import importlib
import math
from collections.abc import Callable

import numpy as np
import paddle
from PIL import ImageDraw

from fixmatch import ema
from fixmatch import step as algorithm
from fixmatch.data.augment import randaugment
from fixmatch.models import layers
from parity.mirror import randaugment as pillow
from parity.plants import data
from parity.plants.plant import Patch, Plant


def _alike(patch: Patch, module: str, path: str, change: Callable) -> None:
    """Replaces fixmatch.MODULE.PATH and parity.mirror.MODULE.PATH by change(what is there)."""
    for package in ("fixmatch", "parity.mirror"):
        *owners, attribute = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(f"{package}.{module}"))
        patch(owner, attribute, change(getattr(owner, attribute)))


# Network


def bn_momentum_inverted(patch):
    _alike(patch, "step", "build_model", lambda right: lambda **shape: right(
        **{**shape, "bn_momentum": 1 - shape["bn_momentum"]}))


def bn_epsilon(patch):
    _alike(patch, "models.layers", "BN_EPSILON", lambda right: 1e-3)


def relu(patch):
    _alike(patch, "models.wideresnet", "ACTIVATION", lambda right: ("leaky_relu", 0.0))


def slope(patch):
    _alike(patch, "models.wideresnet", "ACTIVATION", lambda right: ("leaky_relu", 0.01))


def resnext_leaky_relu(patch):
    _alike(patch, "models.resnext", "ACTIVATION", lambda right: ("leaky_relu", 0.1))


def activate_before_residual(patch):
    _alike(patch, "models.wideresnet", "BasicBlock.__init__", lambda right: lambda self, *shape: right(
        self, *shape[:-1], activate_before_residual=True))


def stride_on_conv2(patch):
    def change(right):
        def changed(self, *args):
            right(self, *args)
            self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride
        return changed

    _alike(patch, "models.wideresnet", "BasicBlock.__init__", change)


def max_pool(patch):
    _alike(patch, "models.wideresnet", "global_average_pool", lambda right: lambda x: x.amax(
        [1, 2] if isinstance(x, paddle.Tensor) and layers.on_kernels(x) else [2, 3]))


# Loss and batch


def _loss(patch: Patch, change: Callable) -> None:
    _alike(patch, "step", "fixmatch_loss", change)


def threshold_exclusive(patch):
    _alike(patch, "losses", "pseudo_label", lambda right: lambda logits, threshold, temperature: right(
        logits, float(np.nextafter(threshold, 1.0)), temperature))


def temperature_ignored(patch):
    _alike(patch, "losses", "pseudo_label", lambda right: lambda logits, threshold, temperature: right(
        logits, threshold, 1.0))


def lambda_u_ignored(patch):
    _loss(patch, lambda right: lambda x, t, w, s, threshold, temperature, lambda_u, *pseudo: right(
        x, t, w, s, threshold, temperature, 1.0, *pseudo))


def masked_mean(patch):
    def change(right):
        def changed(x, t, w, s, threshold, temperature, lambda_u, *pseudo):
            found = right(x, t, w, s, threshold, temperature, lambda_u, *pseudo)
            loss_u = found.loss_u * len(found.mask) / found.mask.sum().clip(min=1)
            return found._replace(loss_u=loss_u, loss=found.loss_x + lambda_u * loss_u)
        return changed

    _loss(patch, change)


def weak_and_strong_swapped(patch):
    _loss(patch, lambda right: lambda x, t, w, s, threshold, temperature, lambda_u, *pseudo: right(
        x, t, s, w, threshold, temperature, lambda_u))


# Optimizer and schedule


def no_nesterov(patch):
    _alike(patch, "step", "TwoGroupSGD", lambda right: lambda model, lr, momentum, decay, nesterov, *rest: right(
        model, lr, momentum, decay, False, *rest))


def weight_decay_on_bn(patch):
    _alike(patch, "optimizer", "decays", lambda right: lambda name: "bias" not in name)


def weight_decay_halved(patch):
    _alike(patch, "step", "TwoGroupSGD", lambda right: lambda model, lr, momentum, decay, *rest: right(
        model, lr, momentum, decay / 2, *rest))


def _schedule(patch: Patch, change: Callable) -> None:
    _alike(patch, "schedule", "cosine_7_16", change)


def cosine_1_2(patch):
    _schedule(patch, lambda right: lambda step, total, warmup=0: right(step, total, warmup) if step < warmup else
              math.cos(math.pi / 2 * (step - warmup) / max(1, total - warmup)))


def lr_off_by_one(patch):
    _schedule(patch, lambda right: lambda step, total, warmup=0: right(step + 1, total, warmup))


def warmup_in_epochs(patch):
    _schedule(patch, lambda right: lambda step, total, warmup=0: right(step, total, warmup * 1024))


# Average


def ema_buffers_averaged(patch):
    def change(right):
        def changed(self):
            before = {name: buffer.clone() for name, buffer in self.average.named_buffers()}
            right(self)
            for name, buffer in self.average.named_buffers():
                if not name.endswith("num_batches_tracked"):
                    buffer.copy_(before[name] * self.decay + buffer * (1 - self.decay), False)
        return changed

    _alike(patch, "ema", "EMA.update", change)


def ema_before_step(patch):
    def change(right):
        def changed(state, loss):
            state.ema.update()
            state.ema.update = lambda: None
            right(state, loss)
            del state.ema.update
        return changed

    _alike(patch, "step", "update", change)


def ema_decay(patch):
    _alike(patch, "step", "EMA", lambda right: lambda *args: right(*args[:-1], 0.99))


def ema_starts_elsewhere(patch):
    init = ema.EMA.__init__

    def changed(self, model, decay):
        init(self, model, decay)
        for parameter in self.average.parameters():
            parameter.scale_(1.5)

    patch(ema.EMA, "__init__", changed)


def left_in_eval_mode(patch):
    build_state = algorithm.build_state

    def changed(*args):
        state = build_state(*args)
        state.model.eval()
        return state

    patch(algorithm, "build_state", changed)


# Views


def _operations(patch: Patch, wanted: str, magnitude: Callable = lambda v: v, turned: bool = False) -> None:
    """Operations at another magnitude, or with the other sign, in the kernels' table and in Pillow's functions."""
    right = randaugment.reference_effect
    patch(randaugment, "reference_effect", lambda name, v, sign, *size: right(
        name, magnitude(v), -sign if turned else sign, *size) if name.startswith(wanted) else right(
        name, v, sign, *size))

    def changed(function):
        if not function.__name__.replace("_", "").startswith(wanted.lower()):
            return function
        return lambda img, v, negated: function(img, magnitude(v), negated != turned)

    patch(pillow, "OPS", tuple(map(changed, pillow.OPS)))


def translate_range(patch):
    _operations(patch, "Translate", lambda v: v + 3)


def brightness_range(patch):
    _operations(patch, "Brightness", lambda v: v + 1)


def solarize_from_the_other_end(patch):
    _operations(patch, "Solarize", lambda v: 10 - v)


def rotate_clockwise(patch):
    _operations(patch, "Rotate", turned=True)


def cutout_exclusive(patch):
    data.exclusive_cutout(patch)

    def changed(img, centre):
        side = min(img.size) // 2
        x0, y0 = (int(max(0, c * length - side / 2)) for c, length in zip(centre, img.size, strict=True))
        img = img.copy()
        ImageDraw.Draw(img).rectangle((x0, y0, x0 + side - 1, y0 + side - 1), pillow.GREY)
        return img

    patch(pillow, "cutout", changed)


def cutout_black(patch):
    data.black_cutout(patch)
    patch(pillow, "GREY", (0, 0, 0))


PLANTS = [
    Plant("both-bn-momentum-inverted", "reference", "the share of the new value taken for that of the old one",
          bn_momentum_inverted),
    Plant("both-bn-epsilon-1e-3", "operators", "the official code's epsilon", bn_epsilon),
    Plant("both-relu", "reference", "ReLU for LeakyReLU", relu),
    Plant("both-slope-0.01", "reference", "LeakyReLU's default slope", slope),
    Plant("both-resnext-leaky-relu", "reference", "a ResNeXt without Mish", resnext_leaky_relu),
    Plant("both-activate-before-residual-everywhere", "reference", "all stages' shortcuts see the activated input",
          activate_before_residual),
    Plant("both-stride-on-conv2", "reference", "the second convolution of a block halves the resolution",
          stride_on_conv2),
    Plant("both-max-pool", "operators", "global maximum instead of average", max_pool),
    Plant("both-threshold-exclusive", "reference", "> for >=", threshold_exclusive),
    Plant("both-temperature-ignored", "reference", "probabilities at a temperature of 1", temperature_ignored),
    Plant("both-lambda-u-ignored", "reference", "the unsupervised term at a weight of 1", lambda_u_ignored),
    Plant("both-masked-mean", "reference", "mean over the confident images only", masked_mean),
    Plant("both-weak-and-strong-swapped", "reference", "pseudo-labels from the strong views", weak_and_strong_swapped),
    Plant("both-no-nesterov", "reference", "plain momentum", no_nesterov),
    Plant("both-weight-decay-on-bn", "reference", "only names with 'bias' are left out", weight_decay_on_bn),
    Plant("both-weight-decay-halved", "reference", "the coefficient of a penalty of w^2 / 2 taken for one of w^2",
          weight_decay_halved),
    Plant("both-cosine-1-2", "reference", "half a cosine, down to 0", cosine_1_2),
    Plant("both-lr-off-by-one", "reference", "the factor of the next step", lr_off_by_one),
    Plant("both-warmup-in-epochs", "reference", "warm-up steps counted as epochs of 1024", warmup_in_epochs),
    Plant("both-ema-buffers-averaged", "reference", "running statistics averaged like weights", ema_buffers_averaged),
    Plant("both-ema-before-step", "reference", "the average lags one step behind", ema_before_step),
    Plant("both-ema-decay-0.99", "ema", "an average that moves ten times faster", ema_decay),
    Plant("ema-starts-elsewhere", "ema", "the average starts elsewhere; in production alone",
          ema_starts_elsewhere),
    Plant("network-left-in-eval-mode", "train", "training on running statistics; production alone",
          left_in_eval_mode),
    Plant("both-translate-range", "reference", "translations of three magnitudes more", translate_range),
    Plant("both-brightness-range", "reference", "one magnitude more of brightness", brightness_range),
    Plant("both-solarize-from-the-other-end", "reference", "a high magnitude solarizes little",
          solarize_from_the_other_end),
    Plant("both-rotate-clockwise", "reference", "a positive angle turns clockwise", rotate_clockwise),
    Plant("both-cutout-exclusive", "data", "the far edge of the box left out", cutout_exclusive),
    Plant("both-cutout-black", "augment", "black instead of grey", cutout_black),
]
