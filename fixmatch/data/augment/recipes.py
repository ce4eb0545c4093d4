"""The strong augmentations to choose from (`augment.strong`): RandAugment as other code bases have it, and CTAugment.

RandAugment differs from one FixMatch code base to the next, and so do the published results. Here each is byte for byte
what Pillow makes of it (tests/test_recipes.py), by the kernels of the reference recipe. A policy is anything with
draw(rng, n_images) -> plan, and a plan has take(part) and render(images, index, flip, corner, out), as
randaugment.Plan does. N images, n operations an image.
"""

import functools
from typing import NamedTuple

import numpy as np

from fixmatch.data.augment import ctaugment, pixels, randaugment
from fixmatch.data.augment.randaugment import MAX_MAGNITUDE, OPS


class Google(randaugment.Plan):
    """RandAugment and Cutout of the official TensorFlow code. Drawn as in the reference, but another thing is done:

    - Enhancements by 0.1 + 0.18 v, 0.28..1.72, so that half of them strengthen; Posterize keeps 4..1 bits;
      translations are of v pixels. Rotate, Shear and Solarize are the reference's.
    - Images are RGBA. What a geometric operation brings in from outside is black but transparent, and what is
      transparent at the end becomes 0 of -1..1, mid-grey. AutoContrast, Equalize, Posterize and Solarize go through
      RGB, which makes it black for good.
    - Cutout: 16 x 16 about a whole pixel, less at the border, 0 of -1..1.

    Where the official code has 127.5, a byte has 127, and its rounding of floats between operations and tensors is left
    out. Images smaller than 32 pixels, which it does not know, get translations and a Cutout in proportion.

    Source: google-research/fixmatch, third_party/auto_augment/augmentations.py and AugmentPoolRAMC in libml/augment.py,
    as ablation/ab_fixmatch_ra.py runs them (--augment=d.d.rac).
    """

    __slots__ = ()
    OPAQUE = (pixels.AUTOCONTRAST, pixels.EQUALIZE, pixels.POSTERIZE, pixels.SOLARIZE)

    @classmethod
    def draw(cls, rng, n_images):
        """Random plan, of the same random numbers as the reference's."""
        return cls(*randaugment.draw(rng, n_images))

    def render(self, images, index, flip, corner, out=None):
        height, width = images.shape[1:3]
        code, param = _google_table(height, width)
        code = np.where(self.applied, code[self.op], pixels.IDENTITY)
        param = param[self.op, self.magnitude, self.negated.astype(np.int64)]
        out = pixels.render(images, index, flip, corner, code, param, _google_box(self.cutout, height, width), out)

        # The alpha channel, where it matters: a white image under the geometric operations that no opaque one follows.
        followed = np.cumsum(np.isin(code, self.OPAQUE)[:, ::-1], axis=1)[:, ::-1] > 0
        code = np.where((code == pixels.AFFINE) & ~followed, pixels.AFFINE, pixels.IDENTITY)
        moved = np.flatnonzero((code == pixels.AFFINE).any(axis=1))
        white = np.full((len(moved), height, width, 3), 255, np.uint8)
        alpha = pixels.render(white, np.arange(len(moved)), *pixels.no_motion(len(moved)), code[moved], param[moved],
                               np.zeros((len(moved), 4), np.int64))
        out[moved] = np.where(alpha, out[moved], 127)
        return out


@functools.lru_cache
def _google_table(height, width):
    return randaugment.tabulate(_google_effect, height, width)


def _google_effect(name, magnitude, sign, height, width):
    """One operation at one magnitude: kernel code and parameters."""
    match name:
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            value = magnitude * 1.8 / MAX_MAGNITUDE + 0.1
        case "Posterize":
            value = 4 - int(magnitude * 4 / MAX_MAGNITUDE)
        case "TranslateX" | "TranslateY":
            value = sign * int(magnitude * _google_scale(height, width))
        case _:
            return randaugment.reference_effect(name, magnitude, sign, height, width)
    return randaugment.operation(name, value, height, width)


def _google_box(centre, height, width):
    """(top, left, bottom, right) of Cutout, int64 [N, 4], from its centre (x, y) as a fraction, float64 [N, 2]."""
    size = np.array([height, width])
    half = int(16 * _google_scale(height, width)) // 2
    middle = (centre[:, ::-1] * size).astype(np.int64)
    return np.concatenate([np.maximum(0, middle - half), np.minimum(size, middle + half)], axis=1)


def _google_scale(height, width):
    """What the lengths of the official code, in pixels of images of 32 or more, come to in smaller ones."""
    return min(1, min(height, width) / 32)


class TorchSSL(NamedTuple):
    """RandAugment and Cutout of TorchSSL and its successor USB, with the ranges of the FixMatch paper's appendix D.

    Three operations instead of two, always applied, each at a level anywhere in its range instead of one of nine:
    translations and rotations by fractions, thresholds in between. Cutout is a square of random side up to half the
    image's width, in (125, 123, 114), CIFAR-10's mean. As in USB it all comes after flip and crop; in TorchSSL, before.

    Source: RandAugment in datasets/augmentation/randaugment.py of TorchSSL/TorchSSL; the same file is in
    semilearn/datasets/augmentation/ of microsoft/Semi-supervised-learning, with RandAugment(3, 5) in its cv_datasets.
    """

    op: np.ndarray  # int64 [N, 3], index into OPS, in the order of application
    level: np.ndarray  # float64 [N, 3], where in the operation's range, [0, 1)
    cutout: np.ndarray  # float64 [N, 2], Cutout's centre (x, y) as a fraction of width and height, [0, 1)
    side: np.ndarray  # float64 [N], Cutout's side as a fraction of the width, [0, 0.5)

    RANGES = (  # not annotated, so no field: lowest and highest value of each of OPS, in the units of `operation`
        (0, 0), (0.05, 0.95), (0.05, 0.95), (0.05, 0.95), (0, 0), (0, 0), (4, 8), (-30, 30), (0.05, 0.95),
        (-0.3, 0.3), (-0.3, 0.3), (0, 256), (-0.3, 0.3), (-0.3, 0.3))
    COLOUR = (125, 123, 114)

    @classmethod
    def draw(cls, rng, n_images):
        """Random plan."""
        return cls(op=rng.integers(len(OPS), size=(n_images, 3)), level=rng.random((n_images, 3)),
                   cutout=rng.random((n_images, 2)), side=rng.random(n_images) * 0.5)

    def take(self, part):
        """The plan of images[part], for a slice, mask or array of indices."""
        return TorchSSL(*(field[part] for field in self))

    def render(self, images, index, flip, corner, out=None):
        height, width = images.shape[1:3]
        code, param = np.empty(self.op.shape, np.int64), np.zeros((*self.op.shape, 6))
        for at, op in np.ndenumerate(self.op):
            code[at], values = self._effect(op, self.level[at], height, width)
            param[at][:len(values)] = values
        out = pixels.render(images, index, flip, corner, code, param, np.zeros((len(code), 4), np.int64), out)
        for view, (top, left, bottom, right) in zip(out, self._box(height, width), strict=True):
            view[top:bottom, left:right] = self.COLOUR
        return out

    def _effect(self, op, level, height, width):
        low, high = self.RANGES[op]
        value = low + (high - low) * level
        match OPS[op]:
            case "Posterize":
                value = int(value)
            case "TranslateX":
                value *= width
            case "TranslateY":
                value *= height
        return randaugment.operation(OPS[op], value, height, width)

    def _box(self, height, width):
        """As in the reference but for the fractions, which Pillow's rectangle truncates: int64 [N, 4]."""
        size, side = np.array([width, height]), self.side[:, None] * width
        first = np.maximum(0, self.cutout * size - side / 2).astype(np.int64)
        stop = np.minimum(size, np.minimum(size, first + side).astype(np.int64) + 1)
        return np.concatenate([first[:, ::-1], stop[:, ::-1]], axis=1)


POLICIES = {"reference": randaugment, "google": Google, "torchssl": TorchSSL, "ctaugment": ctaugment.Policy()}
