"""Known bugs for the stages `reference` and `config`.

Those of `reference` are put into production and mirror alike, so that the two agree, as where the description that
both were written from is misunderstood. Those of `config` are slips in recipes and in what a run gets from its data.
"""

import dataclasses
import fnmatch
import functools
import importlib
import math
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import ImageDraw

from fixmatch import config as configuration
from fixmatch import ema
from fixmatch import step as algorithm
from fixmatch.data.augment import randaugment
from fixmatch.data.sources import cifar
from parity import plants
from parity.mirror import randaugment as pillow
from parity.plants import Patch, Plant

PLANTS: dict[str, Plant] = {}


def plant(name: str, stage: str, what: str):
    def register(put_in):
        PLANTS[name] = Plant(name, stage, what, put_in)
        return put_in
    return register


both = functools.partial(plant, stage="reference")


def _alike(patch: Patch, module: str, path: str, change: Callable) -> None:
    """Replaces fixmatch.MODULE.PATH and parity.mirror.MODULE.PATH by change(what is there)."""
    for package in ("fixmatch", "parity.mirror"):
        *owners, attribute = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(f"{package}.{module}"))
        patch(owner, attribute, change(getattr(owner, attribute)))


# Network


@both("both-bn-momentum-inverted", what="the share of the new value taken for that of the old one")
def bn_momentum_inverted(patch):
    _alike(patch, "step", "build_model", lambda right: lambda **shape: right(
        **{**shape, "bn_momentum": 1 - shape["bn_momentum"]}))


@both("both-bn-epsilon-1e-3", what="the official code's epsilon")
def bn_epsilon(patch):
    _alike(patch, "models.layers", "BN_EPSILON", lambda right: 1e-3)


@both("both-relu", what="ReLU for LeakyReLU")
def relu(patch):
    _alike(patch, "models.wideresnet", "ACTIVATION", lambda right: ("leaky_relu", 0.0))


@both("both-slope-0.01", what="LeakyReLU's default slope")
def slope(patch):
    _alike(patch, "models.wideresnet", "ACTIVATION", lambda right: ("leaky_relu", 0.01))


@both("both-resnext-leaky-relu", what="a ResNeXt without Mish")
def resnext_leaky_relu(patch):
    _alike(patch, "models.resnext", "ACTIVATION", lambda right: ("leaky_relu", 0.1))


@both("both-activate-before-residual-everywhere", what="all stages' shortcuts see the activated input")
def activate_before_residual(patch):
    _alike(patch, "models.wideresnet", "BasicBlock.__init__", lambda right: lambda self, i, o, stride, activate: right(
        self, i, o, stride, True))


@both("both-stride-on-conv2", what="the second convolution of a block halves the resolution")
def stride_on_conv2(patch):
    def change(right):
        def changed(self, *args):
            right(self, *args)
            self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride
        return changed

    _alike(patch, "models.wideresnet", "BasicBlock.__init__", change)


@both("both-max-pool", what="global maximum instead of average")
def max_pool(patch):
    _alike(patch, "models.wideresnet", "global_average_pool", lambda right: lambda x: x.amax([2, 3]))


# Loss and batch


def _loss(patch: Patch, change: Callable) -> None:
    _alike(patch, "step", "fixmatch_loss", change)


@both("both-threshold-exclusive", what="> for >=")
def threshold_exclusive(patch):
    _alike(patch, "losses", "pseudo_label", lambda right: lambda logits, threshold, temperature: right(
        logits, float(np.nextafter(threshold, 1.0)), temperature))


@both("both-temperature-ignored", what="probabilities at a temperature of 1")
def temperature_ignored(patch):
    _alike(patch, "losses", "pseudo_label", lambda right: lambda logits, threshold, temperature: right(
        logits, threshold, 1.0))


@both("both-lambda-u-ignored", what="the unsupervised term at a weight of 1")
def lambda_u_ignored(patch):
    _loss(patch, lambda right: lambda x, t, w, s, threshold, temperature, lambda_u: right(
        x, t, w, s, threshold, temperature, 1.0))


@both("both-masked-mean", what="mean over the confident images only")
def masked_mean(patch):
    def change(right):
        def changed(x, t, w, s, threshold, temperature, lambda_u):
            found = right(x, t, w, s, threshold, temperature, lambda_u)
            loss_u = found.loss_u * len(found.mask) / found.mask.sum()
            return found._replace(loss_u=loss_u, loss=found.loss_x + lambda_u * loss_u)
        return changed

    _loss(patch, change)


@both("both-weak-and-strong-swapped", what="pseudo-labels from the strong views")
def weak_and_strong_swapped(patch):
    _loss(patch, lambda right: lambda x, t, w, s, *rest: right(x, t, s, w, *rest))


# Optimizer and schedule


@both("both-no-nesterov", what="plain momentum")
def no_nesterov(patch):
    _alike(patch, "step", "TwoGroupSGD", lambda right: lambda model, lr, momentum, decay, nesterov, *rest: right(
        model, lr, momentum, decay, False, *rest))


@both("both-weight-decay-on-bn", what="only names with 'bias' are left out")
def weight_decay_on_bn(patch):
    _alike(patch, "optimizer", "decays", lambda right: lambda name: "bias" not in name)


@both("both-weight-decay-halved", what="the coefficient of a penalty of w^2 / 2 taken for one of w^2")
def weight_decay_halved(patch):
    _alike(patch, "step", "TwoGroupSGD", lambda right: lambda model, lr, momentum, decay, *rest: right(
        model, lr, momentum, decay / 2, *rest))


def _schedule(patch: Patch, change: Callable) -> None:
    _alike(patch, "schedule", "cosine_7_16", change)


@both("both-cosine-1-2", what="half a cosine, down to 0")
def cosine_1_2(patch):
    _schedule(patch, lambda right: lambda step, total, warmup=0: right(step, total, warmup) if step < warmup else
              math.cos(math.pi / 2 * (step - warmup) / max(1, total - warmup)))


@both("both-lr-off-by-one", what="the factor of the next step")
def lr_off_by_one(patch):
    _schedule(patch, lambda right: lambda step, total, warmup=0: right(step + 1, total, warmup))


@both("both-warmup-in-epochs", what="warm-up steps counted as epochs of 1024")
def warmup_in_epochs(patch):
    _schedule(patch, lambda right: lambda step, total, warmup=0: right(step, total, warmup * 1024))


# Average


@both("both-ema-buffers-averaged", what="running statistics averaged like weights")
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


@both("both-ema-before-step", what="the average lags one step behind")
def ema_before_step(patch):
    def change(right):
        def changed(state, loss):
            state.ema.update()
            state.ema.update = lambda: None
            right(state, loss)
            del state.ema.update
        return changed

    _alike(patch, "step", "update", change)


@both("both-ema-decay-0.99", what="an average that moves ten times faster")
def ema_decay(patch):
    _alike(patch, "step", "EMA", lambda right: lambda *args: right(*args[:-1], 0.99))


@both("ema-starts-elsewhere", what="an average that does not start from the network's weights; production alone")
def ema_starts_elsewhere(patch):
    init = ema.EMA.__init__

    def changed(self, model, average, decay):
        average.set_state_dict = lambda state: None
        init(self, model, average, decay)
        del average.set_state_dict

    patch(ema.EMA, "__init__", changed)


@both("network-left-in-eval-mode", what="training on running statistics; production alone")
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


@both("both-translate-range", what="translations of three magnitudes more")
def translate_range(patch):
    _operations(patch, "Translate", lambda v: v + 3)


@both("both-brightness-range", what="one magnitude more of brightness")
def brightness_range(patch):
    _operations(patch, "Brightness", lambda v: v + 1)


@both("both-solarize-from-the-other-end", what="a high magnitude solarizes little")
def solarize_from_the_other_end(patch):
    _operations(patch, "Solarize", lambda v: 10 - v)


@both("both-rotate-clockwise", what="a positive angle turns clockwise")
def rotate_clockwise(patch):
    _operations(patch, "Rotate", turned=True)


@both("both-cutout-exclusive", what="the far edge of the box left out")
def cutout_exclusive(patch):
    plants.PLANTS["cutout-exclusive"].put_in(patch)

    def changed(img, centre):
        side = min(img.size) // 2
        x0, y0 = (int(max(0, c * length - side / 2)) for c, length in zip(centre, img.size, strict=True))
        img = img.copy()
        ImageDraw.Draw(img).rectangle((x0, y0, x0 + side - 1, y0 + side - 1), pillow.GREY)
        return img

    patch(pillow, "cutout", changed)


@both("both-cutout-black", what="black instead of grey")
def cutout_black(patch):
    plants.PLANTS["cutout-colour"].put_in(patch)
    patch(pillow, "GREY", (0, 0, 0))


# Recipes


slip = functools.partial(plant, stage="config")


def _recipes(patch: Patch, pattern: str, *settings: str) -> None:
    """Recipes whose names match say something else."""
    right = configuration.load_config
    patch(configuration, "load_config", lambda path, overrides=(): right(path, [
        *(settings if fnmatch.fnmatchcase(pathlib.Path(path).stem, pattern) else ()), *overrides]))


_SLIPS = {
    "cifar100-weight-decay": ("cifar100_2500*", "CIFAR-10's weight decay", "optim.weight_decay=5e-4"),
    "cifar10-weight-decay": ("cifar10_*", "CIFAR-100's weight decay", "optim.weight_decay=1e-3"),
    "mu-4": ("cifar10_250", "fewer unlabeled images", "train.mu=4"),
    "threshold-0.9": ("*", "a lower threshold", "ssl.threshold=0.9"),
    "wrn-28-2-on-cifar100": ("cifar100_400", "CIFAR-10's network", "model.width=2"),
    "resnext-8x64-on-cifar10": ("cifar10_40_resnext", "CIFAR-100's ResNeXt", "model.depth=29", "model.width=64",
                                "model.cardinality=8"),
    "warmup-on": ("cifar10_40", "a warm-up of 1024 steps", "optim.warmup_steps=1024"),
    "ema-0.99": ("cifar100_*", "the average of a short run", "ema.decay=0.99"),
    "ema-0.9999": ("cifar10_4000", "a slower average", "ema.decay=0.9999"),
    "labels-of-another-recipe": ("cifar10_4000", "400 labels in the file of 4,000", "data.num_labeled=400"),
    "labeled-left-out": ("cifar100_10000", "unlabeled images without the labeled", "data.include_labeled=false"),
    "strong-google": ("cifar10_*", "the official code's RandAugment", "augment.strong=google"),
    "bn-momentum-0.9": ("cifar10_250", "Paddle's default", "model.bn_momentum=0.9"),
    "nesterov-off": ("cifar100_400_resnext", "plain momentum", "optim.nesterov=false"),
    "half-the-steps": ("*_resnext", "2^19 steps", "train.total_steps=524288"),
    "batch-128": ("cifar10_40", "twice the batch", "train.batch_size=128"),
    "evaluation-every-1000": ("cifar10_4000", "another evaluation interval", "train.eval_every=1000"),
    "cifar10-in-a-cifar100-recipe": ("cifar100_400", "the wrong data set", "data.name=cifar10"),
}
for _name, (_pattern, _what, *_settings) in _SLIPS.items():
    slip(f"recipe-{_name}", what=_what)(functools.partial(lambda patch, pattern, settings: _recipes(
        patch, pattern, *settings), pattern=_pattern, settings=_settings))


@slip("statistics-swapped", what="CIFAR-10 normalized as CIFAR-100 and the reverse")
def statistics_swapped(patch):
    ten, hundred = (cifar._LAYOUTS[name] for name in ("cifar10", "cifar100"))
    patch(cifar, "_LAYOUTS", {"cifar10": dataclasses.replace(ten, mean=hundred.mean, std=hundred.std),
                              "cifar100": dataclasses.replace(hundred, mean=ten.mean, std=ten.std)})


@slip("statistics-cifar100-as-cifar10", what="CIFAR-100 normalized as CIFAR-10")
def statistics_of_cifar10(patch):
    ten, hundred = (cifar._LAYOUTS[name] for name in ("cifar10", "cifar100"))
    patch(cifar, "_LAYOUTS", {"cifar10": ten, "cifar100": dataclasses.replace(hundred, mean=ten.mean, std=ten.std)})


@slip("flip-off-by-the-data-set", what="CIFAR's reader says that its images are not to be mirrored")
def flip_off(patch):
    right = cifar.load_cifar
    patch(cifar, "load_cifar", lambda *args: dataclasses.replace(right(*args), flip=False))
