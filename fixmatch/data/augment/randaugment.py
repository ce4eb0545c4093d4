"""RandAugment and Cutout as FixMatch uses them, on a batch of uint8 images, byte for byte Pillow's.

Drawing and applying are separate: `draw` makes a Plan from random numbers, `apply` follows it, and
parity/mirror/randaugment.py follows the same Plan with Pillow itself. In between, `lower` turns the Plan into what
fixmatch/data/augment/pixels.py understands. Other recipes are in fixmatch/data/augment/recipes.py.

Source: RandAugmentMC and CutoutAbs in dataset/randaugment.py of kekmodel/FixMatch-pytorch.
N images, n operations an image.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from fixmatch.data.augment import pixels

OPS = (
    "AutoContrast",
    "Brightness",
    "Color",
    "Contrast",
    "Equalize",
    "Identity",
    "Posterize",
    "Rotate",
    "Sharpness",
    "ShearX",
    "ShearY",
    "Solarize",
    "TranslateX",
    "TranslateY",
)
MAX_MAGNITUDE = 10


class Plan(NamedTuple):
    """What happens to each of N images. Image axis first: `take` gives the plan of a part of the batch."""

    op: np.ndarray  # int64 [N, n], index into OPS, in the order of application
    magnitude: np.ndarray  # int64 [N, n], 1..m-1
    applied: np.ndarray  # bool [N, n], whether the operation is applied at all
    negated: np.ndarray  # bool [N, n], the sign of Rotate, Shear and Translate
    cutout: np.ndarray  # float64 [N, 2], Cutout's centre (x, y) as a fraction of width and height, [0, 1)

    def take(self, part):
        """The plan of images[part], for a slice, mask or array of indices."""
        return type(self)(*(field[part] for field in self))

    def render(self, images, index, flip, corner, out=None):
        """Strong views: pixels.render, with the operations and the Cutout of this plan."""
        return pixels.render(images, index, flip, corner, *lower(self, *images.shape[1:3]), out)


class Lowered(NamedTuple):
    """What the kernels do to each of N images; see pixels.render."""

    code: np.ndarray  # int64 [N, n]
    param: np.ndarray  # float64 [N, n, 6]
    box: np.ndarray  # int64 [N, 4]


def draw(rng, n_images, n=2, m=10):
    """Random Plan: n operations an image, with replacement, at magnitudes 1..m-1, each applied with probability 1/2.

    Args:
        rng: numpy.random.Generator.
        m: 2..10; the reference's default is 10.
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
    """Follow a plan, this recipe's or another's: uint8 [N, H, W, 3] -> new uint8 [N, H, W, 3]."""
    return plan.render(images, np.arange(len(images)), *pixels.no_motion(len(images)))


def lower(plan, height, width):
    """Plan -> Lowered for images of this size."""
    code, param = table(height, width)
    code = np.where(plan.applied, code[plan.op], pixels.IDENTITY)
    param = param[plan.op, plan.magnitude, plan.negated.astype(np.int64)]
    return Lowered(code, param, cutout_box(plan.cutout, height, width))


def cutout_box(centre, height, width):
    """CutoutAbs: a box half as wide as the image's shorter side, clamped at its borders.

    The far corner is counted from the clamped near one, and PIL's rectangle includes it: unless cut off at the far
    border, the box is one pixel larger than its nominal side, 17 x 17 on a 32 x 32 image.

    Args:
        centre: float64 [N, 2], (x, y) as a fraction of width and height.

    Returns:
        int64 [N, 4], (top, left, bottom, right), bottom and right exclusive.
    """
    size = np.array([width, height])
    side = min(height, width) // 2
    first = np.maximum(0, centre * size - side / 2).astype(np.int64)
    last = np.minimum(size, first + side)
    stop = np.minimum(size, last + 1)
    return np.concatenate([first[:, ::-1], stop[:, ::-1]], axis=1)


@functools.lru_cache
def table(height, width):
    """The operations as the kernels take them; see `tabulate`."""
    return tabulate(reference_effect, height, width)


def tabulate(effect, height, width):
    """Kernel code of each operation, int64 [14], and its parameters by magnitude and sign, float64 [14, 11, 2, 6]."""
    code = np.empty(len(OPS), np.int64)
    param = np.zeros((len(OPS), MAX_MAGNITUDE + 1, 2, 6))
    for op, name in enumerate(OPS):
        for magnitude in range(MAX_MAGNITUDE + 1):
            for negated in (0, 1):
                code[op], values = effect(name, magnitude, -1 if negated else 1, height, width)
                param[op, magnitude, negated, : len(values)] = values
    return code, param


def reference_effect(name, magnitude, sign, height, width):
    """One operation at one magnitude: kernel code and parameters. The ranges are those of fixmatch_augment_pool."""
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


def operation(name, value, height, width):
    """Kernel code and parameters of an operation of OPS, byte for byte what Pillow does with this argument.

    Args:
        value: the factor of an enhancement, the bits that Posterize keeps, degrees, the slope of a shear, the threshold
            of Solarize, the pixels of a translation; fractions wherever Pillow takes them. Not used by the others.
    """
    match name:
        case "AutoContrast":
            return pixels.AUTOCONTRAST, ()
        case "Brightness":
            return pixels.BRIGHTNESS, (value,)
        case "Color":
            return pixels.COLOR, (value,)
        case "Contrast":
            return pixels.CONTRAST, (value,)
        case "Equalize":
            return pixels.EQUALIZE, ()
        case "Identity":
            return pixels.IDENTITY, ()
        case "Posterize":
            return pixels.POSTERIZE, (256 - 2 ** (8 - value),)
        case "Rotate":
            return pixels.AFFINE, rotation(value, height, width)
        case "Sharpness":
            return pixels.SHARPNESS, (value,)
        case "ShearX":
            return pixels.AFFINE, fixed_point(1, value, 0, 0, 1, 0)
        case "ShearY":
            return pixels.AFFINE, fixed_point(1, 0, 0, value, 1, 0)
        case "Solarize":
            return pixels.SOLARIZE, (math.ceil(value),)
        case "TranslateX":
            return pixels.AFFINE, fixed_point(1, 0, nearest(value), 0, 1, 0)
        case "TranslateY":
            return pixels.AFFINE, fixed_point(1, 0, 0, 0, 1, nearest(value))


def rotation(degrees, height, width):
    """Fixed-point coefficients of a rotation about the centre, counter-clockwise (PIL.Image.Image.rotate)."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return fixed_point(cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)


def fixed_point(a0, a1, a2, a3, a4, a5):
    """Affine coefficients in 16.16 fixed point, moved to pixel centres (affine_fixed in Pillow's Geometry.c).

    The source of pixel (x, y) is (a0*x + a1*y + a2, a3*x + a4*y + a5). Pillow takes another path where a1 = a3 = 0; for
    translations by whole pixels, the only such case here, the result is the same.
    """
    a2 += a0 * 0.5 + a1 * 0.5
    a5 += a3 * 0.5 + a4 * 0.5
    return tuple(math.floor(a * 65536.0 + 0.5) for a in (a0, a1, a2, a3, a4, a5))


def nearest(pixels):
    """The whole pixels that Pillow's nearest-neighbour translation by `pixels` comes to."""
    return math.floor(pixels + 0.5)
