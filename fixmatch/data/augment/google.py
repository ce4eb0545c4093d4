"""RandAugment and Cutout of the official TensorFlow code, byte for byte what Pillow makes of them.

The plans are drawn as in the reference, but other things are done:

- Enhancements are by 0.1 + 0.18 v, which is 0.28..1.72, so that half of them strengthen. Posterize keeps 4..1 bits.
  Translations are of v pixels. Rotate, Shear and Solarize are the reference's.
- Images are RGBA. What a geometric operation brings in from outside is black but transparent, and what is transparent
  in the end becomes 0 of -1..1, mid-grey. AutoContrast, Equalize, Posterize and Solarize go through RGB, which makes it
  black for good.
- Cutout is 16 x 16 about a whole pixel, less at the border, and 0 of -1..1.

Where the official code has 127.5, a byte has 127, and the official rounding of floats between operations and tensors is
left out. Images smaller than 32 pixels, which the official code does not know, get translations and a Cutout in
proportion.

Source: google-research/fixmatch, third_party/auto_augment/augmentations.py and AugmentPoolRAMC in libml/augment.py, as
ablation/ab_fixmatch_ra.py runs them (--augment=d.d.rac). N images of H x W pixels, n operations an image.
"""

import functools

import numpy as np

from fixmatch.data.augment import pixels, randaugment
from fixmatch.data.augment.operations import operation
from fixmatch.data.augment.randaugment import MAX_MAGNITUDE

_GREY = 127
_THROUGH_RGB = (pixels.AUTOCONTRAST, pixels.EQUALIZE, pixels.POSTERIZE, pixels.SOLARIZE)


class GooglePlan(randaugment.Plan):
    """The reference's plan, followed as the official code would follow it."""

    __slots__ = ()

    def render(self, images, index, flip, corner):
        """Strong views, uint8 [N, H, W, 3], of the arguments that pixels.render takes."""
        height, width = images.shape[1:3]
        code, param = _table(height, width)
        code = np.where(self.applied, code[self.op], pixels.IDENTITY)
        param = param[self.op, self.magnitude, self.negated.astype(np.int64)]
        out = pixels.render(images, index, flip, corner, code, param, _cutout_box(self.cutout, height, width))
        moved, opaque = _opacity(code, param, height, width)
        out[moved] = np.where(opaque, out[moved], _GREY)
        return out


class Google:
    """The policy of the official TensorFlow code."""

    def draw(self, rng, n_images):
        """A random GooglePlan for `n_images` images, of the same random numbers as the reference's plan."""
        return GooglePlan(*randaugment.draw(rng, n_images))


def _opacity(code, param, height, width):
    """Which images become transparent anywhere, int64 [k], and their alpha channels, uint8 [k, H, W, 3].

    The alpha channel is what the geometric operations make of a white image. One that an operation through RGB follows
    does not count, since the image is opaque again after it.
    """
    followed = np.cumsum(np.isin(code, _THROUGH_RGB)[:, ::-1], axis=1)[:, ::-1] > 0
    code = np.where((code == pixels.AFFINE) & ~followed, pixels.AFFINE, pixels.IDENTITY)
    moved = np.flatnonzero((code == pixels.AFFINE).any(axis=1))
    white = np.full((len(moved), height, width, 3), 255, np.uint8)
    no_box = np.zeros((len(moved), 4), np.int64)
    return moved, pixels.render(white, np.arange(len(moved)), *pixels.no_motion(len(moved)), code[moved], param[moved],
                                no_box)


@functools.lru_cache
def _table(height, width):
    return randaugment.tabulate(_effect, height, width)


def _effect(name, magnitude, sign, height, width):
    """Kernel code and parameters of one operation at one magnitude."""
    match name:
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            value = magnitude * 1.8 / MAX_MAGNITUDE + 0.1
        case "Posterize":
            value = 4 - int(magnitude * 4 / MAX_MAGNITUDE)
        case "TranslateX" | "TranslateY":
            value = sign * int(magnitude * _scale(height, width))
        case _:
            return randaugment.reference_effect(name, magnitude, sign, height, width)
    return operation(name, value, height, width)


def _cutout_box(centre, height, width):
    """Cutout's (top, left, bottom, right), int64 [N, 4], from its centre (x, y) as a fraction, float64 [N, 2]."""
    size = np.array([height, width])
    half = int(16 * _scale(height, width)) // 2
    middle = (centre[:, ::-1] * size).astype(np.int64)
    return np.concatenate([np.maximum(0, middle - half), np.minimum(size, middle + half)], axis=1)


def _scale(height, width):
    """The factor to the official code's lengths in pixels: 1 for images of 32 pixels or more, less for smaller ones."""
    return min(1, min(height, width) / 32)
