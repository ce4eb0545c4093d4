"""RandAugment and Cutout as FixMatch uses them, on a batch of uint8 images, byte for byte Pillow's.

Drawing and applying are separate: `draw` makes a Plan from random numbers, and `apply` follows it. So does
parity/mirror/randaugment.py, with Pillow itself, which is how the two are compared. Here the Plan is first turned into
the codes and parameters of fixmatch/data/augment/pixels.py. Other recipes stand in fixmatch/data/augment/recipes.py.

Source: RandAugmentMC and CutoutAbs in dataset/randaugment.py of kekmodel/FixMatch-pytorch.
N images of H x W pixels, n operations an image.
"""

import functools
from typing import NamedTuple

import numpy as np

from fixmatch.data.augment import pixels
from fixmatch.data.augment.operations import OPS, operation

MAX_MAGNITUDE = 10


class Plan(NamedTuple):
    """What is done to each of N images. Every field has the image axis first, so that a plan can be cut by images."""

    op: np.ndarray  # int64 [N, n], indices into OPS, in the order of application
    magnitude: np.ndarray  # int64 [N, n], 1..m-1
    applied: np.ndarray  # bool [N, n], whether the operation is applied at all
    negated: np.ndarray  # bool [N, n], the sign of Rotate, Shear and Translate
    cutout: np.ndarray  # float64 [N, 2], Cutout's centre (x, y) as a fraction of width and height, [0, 1)

    def take(self, part):
        """The plan of images[part], where `part` is a slice, a mask or an array of indices."""
        return type(self)(*(field[part] for field in self))

    def render(self, images, index, flip, corner):
        """Strong views, uint8 [N, H, W, 3]: pixels.render with the operations and the Cutout of this plan."""
        return pixels.render(images, index, flip, corner, *pixel_operations(self, *images.shape[1:3]))


class RandAugment:
    """The policy of the reference: two operations an image, at magnitudes 1..9, each applied every other time."""

    def draw(self, rng, n_images):
        """A random Plan for `n_images` images."""
        return draw(rng, n_images)


def draw(rng, n_images, n=2, m=10):
    """A random Plan: n operations an image, with replacement, at magnitudes 1..m-1, each applied with probability 1/2.

    Args:
        rng: the numpy.random.Generator that all of the plan's random numbers come from.
        n_images: N.
        n: how many operations an image gets; the reference has 2.
        m: 2..10, one above the largest magnitude; the reference has 10.
    """
    shape = (n_images, n)
    return Plan(
        op=rng.integers(len(OPS), size=shape),
        magnitude=rng.integers(1, m, size=shape),
        applied=rng.random(shape) < 0.5,
        negated=rng.random(shape) < 0.5,
        cutout=rng.random((n_images, 2)),
    )


def apply(images, plan):
    """Follows a plan of any recipe, without flip or crop: uint8 [N, H, W, 3] -> new uint8 [N, H, W, 3]."""
    return plan.render(images, np.arange(len(images)), *pixels.no_motion(len(images)))


def pixel_operations(plan, height, width):
    """The (code, param, box) that pixels.render takes, for a Plan of N images of this size."""
    code, param = table(height, width)
    code = np.where(plan.applied, code[plan.op], pixels.IDENTITY)
    param = param[plan.op, plan.magnitude, plan.negated.astype(np.int64)]
    return code, param, cutout_box(plan.cutout, height, width)


def cutout_box(centre, height, width):
    """The boxes of CutoutAbs, each half as wide as the image's shorter side and clamped at the image's borders.

    The far corner is counted from the clamped near one, and PIL's rectangle includes it: unless the far border cuts it
    off, the box is one pixel larger than its nominal side, 17 x 17 on a 32 x 32 image.

    Args:
        centre: float64 [N, 2], (x, y) as a fraction of width and height.

    Returns:
        int64 [N, 4], (top, left, bottom, right), of which bottom and right are exclusive.
    """
    size = np.array([width, height])
    side = min(height, width) // 2
    first = np.maximum(0, centre * size - side / 2).astype(np.int64)
    last = np.minimum(size, first + side)
    stop = np.minimum(size, last + 1)
    return np.concatenate([first[:, ::-1], stop[:, ::-1]], axis=1)


@functools.lru_cache
def table(height, width):
    """The reference's operations on images of this size, as `tabulate` gives them."""
    return tabulate(reference_effect, height, width)


def tabulate(effect, height, width):
    """Evaluates a recipe once for every operation, magnitude and sign.

    Args:
        effect: the recipe, a function (name, magnitude, sign, height, width) -> (kernel code, parameters).

    Returns:
        (code, int64 [14], of each operation; param, float64 [14, 11, 2, 6], by operation, magnitude and sign)
    """
    code = np.empty(len(OPS), np.int64)
    param = np.zeros((len(OPS), MAX_MAGNITUDE + 1, 2, 6))
    for op, name in enumerate(OPS):
        for magnitude in range(MAX_MAGNITUDE + 1):
            for negated in (0, 1):
                code[op], values = effect(name, magnitude, -1 if negated else 1, height, width)
                param[op, magnitude, negated, : len(values)] = values
    return code, param


def reference_effect(name, magnitude, sign, height, width):
    """Kernel code and parameters of one operation at one magnitude, with the ranges of fixmatch_augment_pool."""
    shear = sign * magnitude * 0.3 / MAX_MAGNITUDE
    match name:
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            value = magnitude * 0.9 / MAX_MAGNITUDE + 0.05
        case "Posterize":
            value = int(magnitude * 4 / MAX_MAGNITUDE) + 4
        case "Rotate":
            value = sign * int(magnitude * 30 / MAX_MAGNITUDE)
        case "ShearX" | "ShearY":
            value = shear
        case "Solarize":
            value = 256 - int(magnitude * 256 / MAX_MAGNITUDE)
        case "TranslateX":
            value = int(shear * width)
        case "TranslateY":
            value = int(shear * height)
        case _:
            value = None
    return operation(name, value, height, width)
