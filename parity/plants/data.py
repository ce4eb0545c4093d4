"""Bugs in the data: its statistics and split, the weak and strong views, what is drawn for them."""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np

from fixmatch import inputs
from fixmatch.data import split
from fixmatch.data.augment import ctaugment, randaugment, views
from fixmatch.data.sources import cifar
from parity.plants.plant import Patch, Plant


def _cifar10_statistics(patch: Patch, **changes) -> None:
    layouts = cifar._LAYOUTS
    patch(cifar, "_LAYOUTS", {**layouts, "cifar10": dataclasses.replace(layouts["cifar10"], **changes)})


def _crop(patch: Patch, mode: str = "reflect", crop_first: bool = False) -> None:
    """Weak and strong views through numpy, with another padding or order."""
    def changed_weak(images, plan, index=None, out=None):
        picked = images if index is None else images[index]
        pad = views.padding(picked.shape[1])
        result = np.empty_like(picked)
        for i, image in enumerate(picked):
            flip = (lambda a: a[:, ::-1]) if plan.flip[i] else (lambda a: a)
            top, left = plan.offset[i]
            padded = np.pad(image if crop_first else flip(image), ((pad, pad), (pad, pad), (0, 0)), mode=mode)
            view = padded[top:top + image.shape[0], left:left + image.shape[1]]
            result[i] = flip(view) if crop_first else view
        return result

    def changed_strong(images, plan, index=None, out=None):
        return randaugment.apply(changed_weak(images, plan.strong, index), plan.strong_plan)

    patch(views, "weak", changed_weak)
    patch(views, "strong", changed_strong)


def _draw(patch: Patch, change: Callable) -> None:
    """A plan that is change(rng, right plan)."""
    right = randaugment.draw
    patch(randaugment, "draw", lambda rng, n, *args: change(rng, right(rng, n, *args)))


def _magnitudes_up_to_10(rng, plan):
    return plan._replace(magnitude=rng.integers(1, 11, plan.magnitude.shape))


def _all_applied(rng, plan):
    return plan._replace(applied=np.ones_like(plan.applied))


def _cutout_box(patch: Patch, change: Callable) -> None:
    """Cutout's boxes, [N, 4] of top, left, bottom, right, changed."""
    right = randaugment.cutout_box
    patch(randaugment, "cutout_box", lambda *args: change(right(*args)))


def _at_most(box: np.ndarray, side: int) -> np.ndarray:
    return np.concatenate([box[:, :2], np.minimum(box[:, 2:], box[:, :2] + side)], axis=1)


def exclusive_cutout(patch: Patch) -> None:
    _cutout_box(patch, partial(_at_most, side=16))


def black_cutout(patch: Patch) -> None:
    apply = randaugment.apply

    def changed(images, plan):
        result = apply(images, plan)
        boxes = randaugment.cutout_box(plan.cutout, *images.shape[1:3])
        for image, (top, left, bottom, right) in zip(result, boxes, strict=True):
            image[top:bottom, left:right] = 0
        return result

    patch(randaugment, "apply", changed)


def _magnitude_of(patch: Patch, operations: tuple[str, ...], change: Callable[[int], int]) -> None:
    """Operations whose names start with one of these, at another magnitude."""
    right = randaugment.reference_effect
    patch(randaugment, "reference_effect", lambda name, magnitude, *rest: right(
        name, change(magnitude) if name.startswith(operations) else magnitude, *rest))


def _vertical_by_width(patch: Patch) -> None:
    right = randaugment.reference_effect
    patch(randaugment, "reference_effect", lambda name, magnitude, sign, height, width: right(
        name, magnitude, sign, width if name == "TranslateY" else height, width))


def _split_over_all_images(patch: Patch) -> None:
    def changed(labels, num_classes, num_labeled, seed, *_):
        labeled = np.sort(np.random.default_rng(seed).choice(len(labels), num_labeled, replace=False))
        return split.Split(labeled, np.arange(len(labels)))

    patch(split, "draw_split", changed)


def _labeled_left_out(patch: Patch) -> None:
    right = split.draw_split
    patch(split, "draw_split", lambda labels, k, n, seed, *_: right(labels, k, n, seed, False))


def _chosen(patch: Patch, choose: Callable) -> None:
    """Labeled images as choose(rng, images of a class, how many)."""
    def changed(labels, num_classes, num_labeled, seed, include_labeled=True, *_):
        rng, counts = np.random.default_rng(seed), split._counts(labels, num_classes, num_labeled)
        labeled = [choose(rng, np.flatnonzero(labels == c), count) for c, count in enumerate(counts)]
        return split.choose_split(np.concatenate(labeled), len(labels), include_labeled)

    patch(split, "draw_split", changed)


def _split_seed_0_unset(patch: Patch) -> None:
    choose_split = inputs.choose_split

    def changed(config, source, recorded=None):
        data = dataclasses.replace(config.data, split_seed=config.data.split_seed or None)
        return choose_split(dataclasses.replace(config, data=data), source, recorded)

    patch(inputs, "choose_split", changed)


def _newest_rates(patch: Patch) -> None:
    patch(ctaugment.CTAugment, "policy", lambda self, step: ctaugment.Policy(self.history[max(self.history)]))


PLANTS = [
    Plant("wrong-mean", "config", "ImageNet's mean for CIFAR-10",
          partial(_cifar10_statistics, mean=(0.485, 0.456, 0.406))),
    Plant("wrong-std", "config", "the mean of the images' own deviations, a common mistake for CIFAR-10",
          partial(_cifar10_statistics, std=(0.2023, 0.1994, 0.2010))),
    Plant("zero-padding", "augment", "black instead of reflected borders", partial(_crop, mode="constant")),
    Plant("crop-before-flip", "augment", "another order of the weak view", partial(_crop, crop_first=True)),
    Plant("magnitude-up-to-10", "augment", "v drawn from 1..10", partial(_draw, change=_magnitudes_up_to_10)),
    Plant("always-applied", "augment", "no probability of 1/2 for each operation", partial(_draw, change=_all_applied)),
    Plant("cutout-side", "augment", "half the side", partial(_cutout_box, change=partial(_at_most, side=8))),
    Plant("cutout-exclusive", "augment", "the far edge of the box left out", exclusive_cutout),
    Plant("cutout-missing", "augment", "no Cutout", partial(_cutout_box, change=np.zeros_like)),
    Plant("cutout-colour", "augment", "black instead of grey", black_cutout),
    Plant("translate-range", "augment", "translations of up to 9 / 10 more",
          partial(_magnitude_of, operations=("Translate",), change=lambda v: v + 3)),
    Plant("translate-y-by-width", "augment", "vertical translations go by the width, which shows on oblong images",
          _vertical_by_width),
    Plant("rotate-range", "augment", "one magnitude more of rotation",
          partial(_magnitude_of, operations=("Rotate",), change=lambda v: v + 1)),
    Plant("solarize-range", "augment", "solarize counted from the other end",
          partial(_magnitude_of, operations=("Solarize",), change=lambda v: 10 - v)),
    Plant("enhancement-range", "augment", "brightness, contrast, colour and sharpness one magnitude up",
          partial(_magnitude_of, operations=("Brightness", "Color", "Contrast", "Sharpness"), change=lambda v: v + 1)),
    Plant("split-not-by-class", "augment", "labels drawn from all images at once", _split_over_all_images),
    Plant("labeled-removed-from-unlabeled", "augment", "unlabeled images without the labeled ones", _labeled_left_out),
    Plant("split-with-replacement", "augment", "an image may be drawn as a label twice",
          partial(_chosen, choose=lambda rng, images, count: rng.choice(images, count))),
    Plant("split-seed-0-unset", "data", "data.split_seed: 0 counts as none", _split_seed_0_unset),
    Plant("ctaugment-newest-rates", "data", "a batch draws from the rates of the moment at which it is made",
          _newest_rates, settings=("augment.strong=ctaugment",)),
    Plant("split-of-the-first-images", "augment", "the first images of each class are labeled under every seed",
          partial(_chosen, choose=lambda rng, images, count: images[:count])),
]
