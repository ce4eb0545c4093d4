"""RandAugment and Cutout of TorchSSL and its successor USB, with the ranges of the FixMatch paper's appendix D.

There are three operations instead of two. They are always applied, each at a level anywhere in its range instead of one
of nine, so translations and rotations are by fractions, and thresholds lie in between. Cutout is a square of random
side, up to half the image's width, in CIFAR-10's mean colour. As in USB it all comes after flip and crop; in TorchSSL
it comes before. The result is byte for byte what Pillow makes of it.

Source: RandAugment in datasets/augmentation/randaugment.py of TorchSSL/TorchSSL; the same file is in
semilearn/datasets/augmentation/ of microsoft/Semi-supervised-learning, with RandAugment(3, 5) in its cv_datasets.
N images of H x W pixels.
"""

from typing import NamedTuple

import numpy as np

from fixmatch.data.augment import pixels
from fixmatch.data.augment.operations import OPS, operation

_COLOUR = (125, 123, 114)
_RANGES = (  # the lowest and the highest value of each of OPS, in the units of `operation`
    (0, 0), (0.05, 0.95), (0.05, 0.95), (0.05, 0.95), (0, 0), (0, 0), (4, 8), (-30, 30), (0.05, 0.95),
    (-0.3, 0.3), (-0.3, 0.3), (0, 256), (-0.3, 0.3), (-0.3, 0.3))


class TorchSSLPlan(NamedTuple):
    """What is done to each of N images. Every field has the image axis first, so that a plan can be cut by images."""

    op: np.ndarray  # int64 [N, 3], indices into OPS, in the order of application
    level: np.ndarray  # float64 [N, 3], where in the operation's range its value lies, [0, 1)
    cutout: np.ndarray  # float64 [N, 2], Cutout's centre (x, y) as a fraction of width and height, [0, 1)
    side: np.ndarray  # float64 [N], Cutout's side as a fraction of the width, [0, 0.5)

    def take(self, part):
        """The plan of images[part], where `part` is a slice, a mask or an array of indices."""
        return TorchSSLPlan(*(field[part] for field in self))

    def render(self, images, index, flip, corner):
        """Strong views, uint8 [N, H, W, 3], of the arguments that pixels.render takes."""
        height, width = images.shape[1:3]
        code, param = np.empty(self.op.shape, np.int64), np.zeros((*self.op.shape, 6))
        for at, op in np.ndenumerate(self.op):
            code[at], values = _effect(op, self.level[at], height, width)
            param[at][:len(values)] = values
        out = pixels.render(images, index, flip, corner, code, param, np.zeros((len(code), 4), np.int64))
        for view, (top, left, bottom, right) in zip(out, _cutout_box(self, height, width), strict=True):
            view[top:bottom, left:right] = _COLOUR
        return out


class TorchSSL:
    """The policy of TorchSSL and USB."""

    def draw(self, rng, n_images):
        """A random TorchSSLPlan for `n_images` images."""
        return TorchSSLPlan(op=rng.integers(len(OPS), size=(n_images, 3)), level=rng.random((n_images, 3)),
                            cutout=rng.random((n_images, 2)), side=rng.random(n_images) * 0.5)


def _effect(op, level, height, width):
    """Kernel code and parameters of one operation at one level."""
    low, high = _RANGES[op]
    value = low + (high - low) * level
    match OPS[op]:
        case "Posterize":
            value = int(value)
        case "TranslateX":
            value *= width
        case "TranslateY":
            value *= height
    return operation(OPS[op], value, height, width)


def _cutout_box(plan, height, width):
    """Cutout's (top, left, bottom, right), int64 [N, 4].

    The boxes are the reference's but for the fractions of the far corner, which Pillow's rectangle truncates.
    """
    size, side = np.array([width, height]), plan.side[:, None] * width
    first = np.maximum(0, plan.cutout * size - side / 2).astype(np.int64)
    stop = np.minimum(size, np.minimum(size, first + side).astype(np.int64) + 1)
    return np.concatenate([first[:, ::-1], stop[:, ::-1]], axis=1)
