"""Slips in the packaged recipes, and in what a run gets from its data set."""

import dataclasses
import fnmatch
import pathlib
from functools import partial

from fixmatch import config as configuration
from fixmatch.data.sources import cifar
from parity.plants.plant import Patch, Plant


def _recipes(patch: Patch, pattern: str, settings: list[str]) -> None:
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


def statistics_swapped(patch):
    ten, hundred = (cifar._LAYOUTS[name] for name in ("cifar10", "cifar100"))
    patch(cifar, "_LAYOUTS", {"cifar10": dataclasses.replace(ten, mean=hundred.mean, std=hundred.std),
                              "cifar100": dataclasses.replace(hundred, mean=ten.mean, std=ten.std)})


def statistics_of_cifar10(patch):
    ten, hundred = (cifar._LAYOUTS[name] for name in ("cifar10", "cifar100"))
    patch(cifar, "_LAYOUTS", {"cifar10": ten, "cifar100": dataclasses.replace(hundred, mean=ten.mean, std=ten.std)})


def flip_off(patch):
    right = cifar.load_cifar
    patch(cifar, "load_cifar", lambda *args: dataclasses.replace(right(*args), flip=False))


PLANTS = [
    *(Plant(f"recipe-{name}", "config", what, partial(_recipes, pattern=pattern, settings=settings))
      for name, (pattern, what, *settings) in _SLIPS.items()),
    Plant("statistics-swapped", "config", "CIFAR-10 normalized as CIFAR-100 and the reverse", statistics_swapped),
    Plant("statistics-cifar100-as-cifar10", "config", "CIFAR-100 normalized as CIFAR-10", statistics_of_cifar10),
    Plant("flip-off-by-the-data-set", "config", "CIFAR's reader says that its images are not to be mirrored", flip_off),
]
