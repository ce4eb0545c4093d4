"""CTAugment (arXiv 1911.09785, section 3.3): strong views that learn how far each operation may go.

The range of every parameter of every operation is cut into bins, and every bin has a rate: how well, of late, the
averaged network classified labeled images that the bin had a part in augmenting. These labeled images are the probes,
drawn from all bins alike. Strong views take the bins whose rate is near the best of its parameter, and end with Cutout.

The numbers are those of the official code as its published runs had them: threshold 0.80 (the flag `ath` in
cta/lib/train.py; the class's own default, 0.85, is not used), depth 2, decay 0.99. One oddity of that code is kept,
since its numbers rest on it: a level just above the lower edge of its bin counts for the bin below (the factor 0.999).

Source: libml/ctaugment.py, cta/lib/train.py and AugmentPoolCTACutOut in fixmatch.py of google-research/fixmatch.
N images, n operations an image; rates are float64 [19, 2, 17], by operation, parameter and bin.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from fixmatch.checkpoint import CheckpointError, check_fit
from fixmatch.data.augment import pixels
from fixmatch.data.augment.ctaugment_operations import CUTOUT, OPS

DEPTH = 2
THRESHOLD = 0.80
DECAY = 0.99
BINS = np.array([(*op.bins, 1, 1)[:2] for op in OPS])  # int64 [19, 2]; a parameter that is not there has one bin
_EXISTS = np.arange(BINS.max()) < BINS[..., None]  # bool [19, 2, 17]


class Plan(NamedTuple):
    """What is done to each of N images. Every field has the image axis first, so that a plan can be cut by images."""

    op: np.ndarray  # int64 [N, n], indices into OPS, in the order of application
    level: np.ndarray  # float64 [N, n, 2], [0, 1), of both parameters; without meaning where an operation has fewer
    centre: np.ndarray  # float64 [N, n, 2], where a cutout goes, (x, y) as a fraction of width and height, [0, 1)

    def take(self, part):
        """The plan of images[part], where `part` is a slice, a mask or an array of indices."""
        return Plan(*(field[part] for field in self))

    def render(self, images, index, flip, corner):
        """Views, uint8 [N, H, W, 3]: flipped and cropped by pixels.render, and then augmented by Pillow."""
        out = pixels.render(images, index, flip, corner, *pixels.no_operations(len(index)))
        for view, *operations in zip(out, *(field.tolist() for field in self), strict=True):
            image = Image.fromarray(view)
            for op, levels, centre in zip(*operations, strict=True):
                image = OPS[op].apply(image, *levels, centre)
            view[:] = np.asarray(image)
        return out


class Policy(NamedTuple):
    """The policy of CTAugment at one moment of a run, which its rates describe; by default, as a run begins."""

    rates: np.ndarray = _EXISTS.astype(float)

    def draw(self, rng, n_images):
        """A random Plan: DEPTH operations, all alike, at levels from bins by their weight, then the largest Cutout."""
        plan = _draw(rng, n_images, weights(self.rates))
        return Plan(op=np.concatenate([plan.op, np.full((n_images, 1), CUTOUT)], axis=1),
                    level=np.concatenate([plan.level, np.ones((n_images, 1, 2))], axis=1),
                    centre=np.concatenate([plan.centre, rng.random((n_images, 1, 2))], axis=1))


def draw_probe(rng, n_images):
    """A random Plan of DEPTH operations, in which all operations and bins are alike."""
    return _draw(rng, n_images, _EXISTS.astype(float))


def _draw(rng, n_images, weight):
    """DEPTH operations an image, with replacement, each at a level drawn uniformly within a bin drawn by its weight."""
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
        rates: float64 [19, 2, 17], which are left as they are.
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
    later ones are there already. That makes a batch independent of threads and their timing. The official code, which
    keeps four batches in its queue, has the same lag.

    Args:
        lag: the most batches that are prepared ahead of the one in training.
    """

    def __init__(self, lag):
        self.lag = lag
        self.history = {0: Policy().rates}  # number of finished steps -> rates after them, for the last lag + 1 steps

    def policy(self, step):
        """The policy for the batch of `step`, at most `lag` steps beyond those in `update`. Any thread may call it."""
        return Policy(self.history[max(0, step - self.lag)])

    def update(self, step, op, level, proximity):
        """Takes in the probes of one more step, the `step`-th. The other arguments are as in `updated`."""
        self.history[step] = updated(self.history[step - 1], op, level, proximity)
        self.history.pop(step - self.lag - 1, None)

    def state(self):
        """What a checkpoint keeps: {"rates": float64 [lag + 1 or, early in a run, fewer, 19, 2, 17]}, oldest first."""
        return {"rates": np.stack([self.history[step] for step in sorted(self.history)])}

    def restore(self, step, arrays):
        """Goes on after `step` steps from a `state`. Raises CheckpointError if it is not one of this lag and step."""
        check_fit("CTAugment", {"rates": np.empty((min(step, self.lag) + 1, *_EXISTS.shape))}, arrays)
        if not ((arrays["rates"] >= 0) & (arrays["rates"] <= 1)).all():
            raise CheckpointError("checkpoint does not fit: rates: CTAugment's lie in [0, 1], the checkpoint's do not")
        self.history = dict(zip(range(step - len(arrays["rates"]) + 1, step + 1), arrays["rates"], strict=True))
