"""The weak and the strong view of an image.

Weak: horizontal flip with probability 1/2, then reflection padding by an eighth of the image and a random crop back to
its size.
Strong: the same, drawn anew, then RandAugment and Cutout, or another policy of fixmatch/data/augment/recipes.py.

Drawing and applying are separate: the plan of a batch is drawn once, and threads may follow it slice by slice with the
same result. Images may be oblong: TranslateX goes by the width, TranslateY by the height, Cutout by the shorter side,
as the reference has it; the padding, for which the reference knows only squares, is an eighth of each axis.

Source: TransformFixMatch in dataset/cifar.py of kekmodel/FixMatch-pytorch. N views, D images in the data set.
"""

from typing import NamedTuple

import numpy as np

from fixmatch.data.augment import pixels, randaugment


class WeakPlan(NamedTuple):
    """Flip and crop of N views. Image axis first: `take` gives the plan of a part of the batch."""

    flip: np.ndarray  # bool [N], mirrored left to right before the crop
    offset: np.ndarray  # int64 [N, 2], (top, left) of the crop in the padded image, 0..2*padding

    def take(self, part):
        """The plan of the views in `part`, a slice, mask or array of indices."""
        return WeakPlan(*(field[part] for field in self))


class ViewPlan(NamedTuple):
    """The weak and the strong view of N images."""

    weak: WeakPlan
    strong: WeakPlan  # the strong view's own flip and crop
    strong_plan: randaugment.Plan  # and what follows them, or the plan of another policy

    def take(self, part):
        """The plan of the views in `part`, a slice, mask or array of indices."""
        return ViewPlan(*(plan.take(part) for plan in self))


def padding(size):
    """Pixels of padding on either side of an axis of this length: 4 for 32."""
    return int(size * 0.125)


def draw_weak(rng, n_images, image_size, flip=True):
    """Random WeakPlan.

    Args:
        rng: numpy.random.Generator.
        image_size: side of a square image, or (height, width).
        flip: False for images that mean something else when mirrored, such as digits. Uses up the same random numbers.
    """
    height, width = np.broadcast_to(image_size, 2)
    return WeakPlan(
        flip=(rng.random(n_images) < 0.5) & flip,
        offset=rng.integers([2 * padding(height) + 1, 2 * padding(width) + 1], size=(n_images, 2)),
    )


def draw(rng, n_images, image_size, flip=True, policy=randaugment):
    """Random ViewPlan; arguments as in draw_weak.

    Args:
        policy: of the strong views, with a method draw(rng, n_images) -> plan; a plan has `take` and `render`, as
            randaugment.Plan does. The default is RandAugment with n=2, m=10.
    """
    return ViewPlan(
        weak=draw_weak(rng, n_images, image_size, flip),
        strong=draw_weak(rng, n_images, image_size, flip),
        strong_plan=policy.draw(rng, n_images),
    )


def weak(images, plan, index=None, out=None):
    """The weak views of images[index].

    Args:
        images: uint8 [D, H, W, 3], C-contiguous; the whole data set, never written or copied, may be memory-mapped.
        plan: WeakPlan of N views.
        index: int64 [N]; all images in order by default.
        out: uint8 [N, H, W, 3], C-contiguous, to write to; a new array by default.

    Returns:
        uint8 [N, H, W, 3]

    Raises:
        IndexError: an index outside 0..D-1.
    """
    n_views = len(plan.flip)
    if index is None:
        index = np.arange(n_views)
    return pixels.render(images, index, plan.flip, _corner(plan, images), *pixels.no_operations(n_views), out)


def strong(images, plan, index=None, out=None):
    """The strong views of images[index]; as `weak`, with a ViewPlan."""
    if index is None:
        index = np.arange(len(plan.strong.flip))
    return plan.strong_plan.render(images, index, plan.strong.flip, _corner(plan.strong, images), out)


def weak_and_strong(images, index, plan, out=(None, None)):
    """(weak, strong) views of images[index], each uint8 [N, H, W, 3]; `out` is a pair, otherwise as in `weak`."""
    return weak(images, plan.weak, index, out[0]), strong(images, plan, index, out[1])


def _corner(plan, images):
    """(top, left) of the crops in the image without padding, int64 [N, 2]."""
    return plan.offset - [padding(size) for size in images.shape[1:3]]
