"""The weak and the strong view of an image.

A weak view is flipped horizontally with probability 1/2, padded by reflection by an eighth of the image, and cropped
back to the image's size at a random place. A strong view is the same, drawn anew, and after that comes RandAugment with
Cutout, or another policy of fixmatch/data/augment/recipes.py.

Drawing and applying are separate: the plan of a batch is drawn once, and threads may follow it slice by slice with the
same result. Images may be oblong: TranslateX goes by the width, TranslateY by the height and Cutout by the shorter
side, as the reference has it. The padding, for which the reference knows only squares, is an eighth of each axis.

Source: TransformFixMatch in dataset/cifar.py of kekmodel/FixMatch-pytorch. N views, D images in the data set, each of
H x W pixels.
"""

from typing import NamedTuple

import numpy as np

from fixmatch.data.augment import pixels, randaugment

_REFERENCE = randaugment.RandAugment()


class WeakPlan(NamedTuple):
    """The flip and the crop of N views. Both fields have the image axis first, so that a plan can be cut by images."""

    flip: np.ndarray  # bool [N], whether the image is mirrored left to right before the crop
    offset: np.ndarray  # int64 [N, 2], (top, left) of the crop in the padded image, 0..2*padding

    def take(self, part):
        """The plan of the views in `part`, a slice, a mask or an array of indices."""
        return WeakPlan(*(field[part] for field in self))


class ViewPlan(NamedTuple):
    """The weak and the strong view of N images."""

    weak: WeakPlan  # the weak view's flip and crop
    strong: WeakPlan  # the strong view's own flip and crop
    strong_plan: randaugment.Plan  # what follows them in the strong view; a plan of another policy fits, too

    def take(self, part):
        """The plan of the views in `part`, a slice, a mask or an array of indices."""
        return ViewPlan(*(plan.take(part) for plan in self))


def padding(size):
    """The pixels of padding on either side of an axis of `size` pixels: 4 for 32."""
    return int(size * 0.125)


def draw_weak(rng, n_images, image_size, flip=True):
    """A random WeakPlan.

    Args:
        rng: the numpy.random.Generator that all random numbers come from.
        n_images: N.
        image_size: the side of square images, or (height, width), in pixels.
        flip: False for images that mean something else when mirrored, such as digits. It uses up the same random
            numbers.
    """
    height, width = np.broadcast_to(image_size, 2)
    return WeakPlan(
        flip=(rng.random(n_images) < 0.5) & flip,
        offset=rng.integers([2 * padding(height) + 1, 2 * padding(width) + 1], size=(n_images, 2)),
    )


def draw(rng, n_images, image_size, flip=True, policy=_REFERENCE):
    """A random ViewPlan.

    Args:
        rng, n_images, image_size, flip: as in draw_weak.
        policy: of the strong views, see recipes.Policy. The default is the reference's RandAugment.
    """
    return ViewPlan(
        weak=draw_weak(rng, n_images, image_size, flip),
        strong=draw_weak(rng, n_images, image_size, flip),
        strong_plan=policy.draw(rng, n_images),
    )


def weak(images, plan, index):
    """The weak views of images[index].

    Args:
        images: uint8 [D, H, W, 3], C-contiguous. This is the whole data set, which is never written or copied, and
            which may be memory-mapped.
        plan: the WeakPlan of N views.
        index: int64 [N], the image that each view shows.

    Returns:
        new uint8 [N, H, W, 3]

    Raises:
        IndexError: an index lies outside 0..D-1.
    """
    return pixels.render(images, index, plan.flip, _corner(plan, images), *pixels.no_operations(len(index)))


def strong(images, plan, index):
    """The strong views of images[index], by a ViewPlan; all else is as in `weak`."""
    return plan.strong_plan.render(images, index, plan.strong.flip, _corner(plan.strong, images))


def weak_and_strong(images, index, plan):
    """The (weak, strong) views of images[index] by a ViewPlan, each uint8 [N, H, W, 3]; all else is as in `weak`."""
    return weak(images, plan.weak, index), strong(images, plan, index)


def _corner(plan, images):
    """The (top, left) of each crop in the image without its padding, int64 [N, 2]."""
    return plan.offset - [padding(size) for size in images.shape[1:3]]
