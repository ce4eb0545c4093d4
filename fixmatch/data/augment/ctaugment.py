"""CTAugment (arXiv 1911.09785, section 3.3): strong views that learn how far each operation may go.

The range of every parameter of every operation is cut into bins, and every bin has a rate: how well, of late, the
averaged network classified labeled images that the bin had a part in augmenting. These are the probes, drawn from all
bins alike. Strong views take the bins whose rate is near the best of its parameter, and end with Cutout.

The numbers are those of the official code as its published runs had them: threshold 0.80 (the flag `ath` in
cta/lib/train.py; the class's own default, 0.85, is not used), depth 2, decay 0.99. Two of its oddities are part of
these numbers and kept: TranslateX and TranslateY move by at most 0.3 *pixels*, which nearest-neighbour sampling rounds
to none, and a level just above the lower edge of its bin counts for the bin below (the factor 0.999).

Operations are Pillow's, one image after another, in the loader's threads: a library instead of more kernels, for a
variant of the paper, at some 10,000 images of 32 x 32 a second on one core, a twentieth of the kernels' rate.

Source: libml/ctaugment.py, cta/lib/train.py and AugmentPoolCTACutOut in fixmatch.py of google-research/fixmatch.
N images, n operations an image; rates are float64 [19, 2, 17], by operation, parameter and bin.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from fixmatch.checkpoint import CheckpointError
from fixmatch.data.augment import pixels

DEPTH = 2
THRESHOLD = 0.80
DECAY = 0.99
GREY = (127, 127, 127)


# Every operation is a function of (image, level, ...), levels in [0, 1): another level follows for `rescale`, and last,
# for `cutout`, a place. Operations of one level swallow them.


def _enhanced(enhancer):
    return lambda image, level, *_: enhancer(image).enhance(0.1 + 1.9 * level)


def _blended(change):
    return lambda image, level, *_: Image.blend(image, change(image), level)


def cutout(image, level, _, centre):
    """A square of grey around a pixel, its side up to half of the image's shorter one."""
    half = (1 + int(level * min(image.size) * 0.499)) // 2
    x, y = (int(place * size) for place, size in zip(centre, image.size, strict=True))
    width, height = image.size
    image.paste(GREY, (max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half)))
    return image


def posterize(image, level, *_):
    return ImageOps.posterize(image, 1 + int(level * 7.999))


_FILTERS = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.BOX,
            Image.Resampling.HAMMING, Image.Resampling.NEAREST)


def rescale(image, level, method, _):
    """Up to a quarter cut off at each border, the rest enlarged to the image's size."""
    (width, height), margin = image.size, 0.25 * level
    inside = image.crop((margin * width, margin * height, width * (1 - margin), height * (1 - margin)))
    return inside.resize(image.size, _FILTERS[int(method * 5.99)])


def rotate(image, level, *_):
    return image.rotate(round((2 * level - 1) * 45))


def _moved(coefficients):
    """An affine transform by coefficients(x), x in -0.3..0.3."""
    return lambda image, level, *_: image.transform(image.size, Image.Transform.AFFINE,
                                                    coefficients((2 * level - 1) * 0.3))


class Operation(NamedTuple):
    name: str
    bins: tuple[int, ...]  # of each parameter
    apply: Callable[..., Image.Image]  # of a PIL image, two levels and a place (x, y)


OPS = (
    Operation("autocontrast", (17,), _blended(ImageOps.autocontrast)),
    Operation("blur", (17,), _blended(lambda image: image.filter(ImageFilter.BLUR))),
    Operation("brightness", (17,), _enhanced(ImageEnhance.Brightness)),
    Operation("color", (17,), _enhanced(ImageEnhance.Color)),
    Operation("contrast", (17,), _enhanced(ImageEnhance.Contrast)),
    Operation("cutout", (17,), cutout),
    Operation("equalize", (17,), _blended(ImageOps.equalize)),
    Operation("invert", (17,), _blended(ImageOps.invert)),
    Operation("identity", (), lambda image, *_: image),
    Operation("posterize", (8,), posterize),
    Operation("rescale", (17, 6), rescale),
    Operation("rotate", (17,), rotate),
    Operation("sharpness", (17,), _enhanced(ImageEnhance.Sharpness)),
    Operation("shear_x", (17,), _moved(lambda x: (1, x, 0, 0, 1, 0))),
    Operation("shear_y", (17,), _moved(lambda x: (1, 0, 0, x, 1, 0))),
    Operation("smooth", (17,), _blended(lambda image: image.filter(ImageFilter.SMOOTH))),
    Operation("solarize", (17,), lambda image, level, *_: ImageOps.solarize(image, int(level * 255.999))),
    Operation("translate_x", (17,), _moved(lambda x: (1, 0, x, 0, 1, 0))),
    Operation("translate_y", (17,), _moved(lambda x: (1, 0, 0, 0, 1, x))),
)
CUTOUT = [op.name for op in OPS].index("cutout")
BINS = np.array([(*op.bins, 1, 1)[:2] for op in OPS])  # int64 [19, 2]; a parameter that is not there has one bin
_EXISTS = np.arange(BINS.max()) < BINS[..., None]  # bool [19, 2, 17]


class Plan(NamedTuple):
    """What happens to each of N images. Image axis first."""

    op: np.ndarray  # int64 [N, n], index into OPS, in the order of application
    level: np.ndarray  # float64 [N, n, 2], [0, 1), of its parameters; without meaning where it has fewer
    centre: np.ndarray  # float64 [N, n, 2], where a cutout goes, (x, y) as a fraction of width and height, [0, 1)

    def take(self, part):
        """The plan of images[part], for a slice, mask or array of indices."""
        return Plan(*(field[part] for field in self))

    def render(self, images, index, flip, corner, out=None):
        """Views as of pixels.render, flipped and cropped there, and then augmented by Pillow."""
        out = pixels.render(images, index, flip, corner, *pixels.no_operations(len(index)), out)
        for view, *operations in zip(out, *(field.tolist() for field in self), strict=True):
            image = Image.fromarray(view)
            for op, levels, centre in zip(*operations, strict=True):
                image = OPS[op].apply(image, *levels, centre)
            view[:] = np.asarray(image)
        return out


def draw_probe(rng, n_images):
    """Random Plan of DEPTH operations, all operations and bins alike."""
    return _draw(rng, n_images, _EXISTS.astype(float))


class Policy(NamedTuple):
    """What strong views are drawn from; by default, as a run begins."""

    rates: np.ndarray = _EXISTS.astype(float)

    def draw(self, rng, n_images):
        """Random Plan: DEPTH operations, all alike, at levels from bins by their weight, then the largest Cutout."""
        plan = _draw(rng, n_images, weights(self.rates))
        return Plan(op=np.concatenate([plan.op, np.full((n_images, 1), CUTOUT)], axis=1),
                    level=np.concatenate([plan.level, np.ones((n_images, 1, 2))], axis=1),
                    centre=np.concatenate([plan.centre, rng.random((n_images, 1, 2))], axis=1))


def _draw(rng, n_images, weight):
    """DEPTH operations an image, with replacement; a bin by its weight, then a level uniformly within the bin."""
    shape = (n_images, DEPTH)
    op = rng.integers(len(OPS), size=shape)
    share = np.cumsum(weight, axis=-1)
    share = (share / share[..., -1:])[op]  # [N, n, 2, 17], exactly 1 from the last bin with weight on
    which = (rng.random((*shape, 2, 1)) >= share).sum(axis=-1)  # [N, n, 2]
    return Plan(op, (which + rng.random((*shape, 2))) / BINS[op], rng.random((*shape, 2)))


def weights(rates):
    """A bin's chance among those of its parameter, not normalized: the rate, or 0 below THRESHOLD times the best one.

    Args:
        rates: float64 [19, 2, 17]; 0.01 is added to them so that they are not all 0.

    Returns:
        float64 [19, 2, 17], 0 or THRESHOLD..1
    """
    weight = np.where(_EXISTS, rates + (1 - DECAY), 0.0)
    weight /= weight.max(axis=-1, keepdims=True)
    return np.where(weight < THRESHOLD, 0.0, weight)


def updated(rates, op, level, proximity):
    """The rates after some probes, in their order: those of a probe's bins move by 1 - DECAY towards its proximity.

    Args:
        rates: float64 [19, 2, 17], left as they are.
        op, level: of the probes' Plan, int64 [N, n] and float64 [N, n, 2].
        proximity: float [N], 1 - |p - onehot| / 2 summed over classes: 1 where the network is certain and right.
    """
    rates = rates.copy()
    for ops, levels, near in zip(op.tolist(), level.tolist(), proximity.tolist(), strict=True):
        for which, of_parameters in zip(ops, levels, strict=True):
            for parameter, bins in enumerate(OPS[which].bins):
                at = which, parameter, int(of_parameters[parameter] * bins * 0.999)
                rates[at] = DECAY * rates[at] + (1 - DECAY) * near
    return rates


class CTAugment:
    """The rates of a run, and which of them a step draws from.

    Batches are made ahead, so step s (0-based) draws from the rates as they were after s - lag steps, whether or not
    later ones are there already: that makes a batch independent of threads and their timing. The official code, which
    keeps four batches in its queue, has the same lag.

    Args:
        lag: the most batches that are prepared ahead of the one in training.
    """

    def __init__(self, lag):
        self.lag = lag
        self.history = {0: Policy().rates}  # number of finished steps -> rates after them, the last lag + 1

    def policy(self, step):
        """Of the batch of `step`, at most `lag` steps beyond those in `update`. May be called from any thread."""
        return Policy(self.history[max(0, step - self.lag)])

    def update(self, step, op, level, proximity):
        """Takes in the probes of one more step, the `step`-th; arguments as in `updated`."""
        self.history[step] = updated(self.history[step - 1], op, level, proximity)
        self.history.pop(step - self.lag - 1, None)

    def state(self):
        """For a checkpoint: {"rates": float64 [lag + 1 or, early in a run, fewer, 19, 2, 17]}, oldest first."""
        return {"rates": np.stack([self.history[step] for step in sorted(self.history)])}

    def restore(self, step, arrays):
        """Goes on after `step` steps from a `state`. Raises CheckpointError if it is not one of this lag and step."""
        wanted, found = (min(step, self.lag) + 1, *_EXISTS.shape), np.shape(arrays.get("rates"))
        if found != wanted:
            raise CheckpointError(f"checkpoint does not fit: augment/rates is {found} and should be {wanted}")
        self.history = dict(zip(range(step - len(arrays["rates"]) + 1, step + 1), arrays["rates"], strict=True))
