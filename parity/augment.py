"""The data side of the proof: the same plan through the batched kernels and through Pillow, uint8 for uint8.

Also what is drawn at random (which operations, magnitudes and images), by its exact support and its frequencies, and
the constants. Nothing here needs Torch.
"""

from collections.abc import Callable

import numpy as np

from fixmatch.data import split
from fixmatch.data.augment import randaugment, views
from fixmatch.data.sources import cifar
from fixmatch.normalize import Normalize
from parity.case import Case
from parity.compare import Trace
from parity.mirror import randaugment as pillow
from parity.subject import precision

SIZE = 32
_OBLONG = ((21, 32), (32, 21))  # height and width of the images on which what is mixed up shows
_OPS = ("AutoContrast", "Brightness", "Color", "Contrast", "Equalize", "Identity", "Posterize", "Rotate", "Sharpness",
        "ShearX", "ShearY", "Solarize", "TranslateX", "TranslateY")
_STATISTICS = {  # mean and std, Krizhevsky's training images
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
_DRAWS = 20_000
_SPLITS = 200


def probe_images(seed: int, size: int = SIZE) -> np.ndarray:
    """uint8 [9, size, size, 3]: ordinary images and odd ones, which operations treat apart."""
    rng = np.random.default_rng([seed, 4])
    noise = rng.integers(0, 256, (size, size, 3))
    blobs = rng.integers(0, 256, (4, 4, 3)).repeat(-(-size // 4), axis=0).repeat(-(-size // 4), axis=1)[:size, :size]
    one_constant = noise.copy()
    one_constant[..., 1] = 77
    ramp = np.broadcast_to(np.linspace(0, 255, size)[:, None], (size, size))[..., None].repeat(3, axis=2)
    return np.stack([noise, blobs, np.clip(blobs + noise // 4 - 32, 0, 255), 90 + noise // 16, one_constant, ramp,
                     np.zeros_like(noise), np.full_like(noise, 255), np.full_like(noise, 128)]).astype(np.uint8)


def _single_operation_plans(count: int) -> dict[str, randaugment.Plan]:
    """For each operation: every magnitude 1..9 on each of `count` images, as one plan of 9 * count.

    Each magnitude has its sign negated on every other image, and the next one on those between.
    """
    magnitude, image = np.repeat(np.arange(1, 10), count), np.tile(np.arange(count), 9)
    negated = (magnitude + image) % 2 == 1
    plans = {}
    for op, name in enumerate(_OPS):
        n = len(magnitude)
        plans[name] = randaugment.Plan(
            op=np.stack([np.full(n, op), np.full(n, _OPS.index("Identity"))], axis=1),
            magnitude=np.stack([magnitude, magnitude], axis=1), applied=np.ones((n, 2), dtype=bool),
            negated=np.stack([negated, negated], axis=1), cutout=np.linspace(0, 0.999, 2 * n).reshape(n, 2))
    return plans


def _random_plan(seed: int, count: int, height: int, width: int) -> views.ViewPlan:
    """Made here and not by the production draw, so that a fault of that shows by itself."""
    rng = np.random.default_rng([seed, 5])

    def weak():
        return views.WeakPlan(flip=rng.random(count) < 0.5,
                              offset=rng.integers(0, [2 * (height // 8) + 1, 2 * (width // 8) + 1], (count, 2)))

    shape = (count, 2)
    return views.ViewPlan(weak(), weak(), randaugment.Plan(
        op=rng.integers(0, len(_OPS), shape), magnitude=rng.integers(1, 10, shape), applied=rng.random(shape) < 0.5,
        negated=rng.random(shape) < 0.5, cutout=rng.random(shape)))


def ours(case: Case) -> Trace:
    yield from _pictures(case.seed, randaugment.apply, views.weak_and_strong)
    yield "draws", _drawn(case.seed)
    yield "split", _split(case.seed)
    with precision("float64"):
        yield "normalization", {name: Normalize(*cifar.statistics(name))(probe_images(case.seed)).numpy()
                                for name in _STATISTICS}


def reference(case: Case) -> Trace:
    yield from _pictures(case.seed, pillow.apply,
                         lambda images, index, plan: pillow.weak_and_strong(images[index], plan))
    yield "draws", {"operations": np.arange(len(_OPS)), "operation frequencies": np.full(len(_OPS), 1 / len(_OPS)),
                    "magnitudes": np.arange(1, 10), "magnitude frequencies": np.full(9, 1 / 9),
                    "applied": np.array(0.5), "negated": np.array(0.5), "flipped": np.array(0.5),
                    "flipped where not allowed": np.array(0.0), "crop offsets": np.arange(9),
                    "crop offset frequencies": np.full(9, 1 / 9), "cutout centre": np.array(0.5)}
    yield "split", {"labels a class": np.full(10, 4), "labeled images are unlabeled too": np.array(True),
                    "unlabeled": np.arange(1000), "same again": np.array(True),
                    "distinct labeled images under each seed": np.full(_SPLITS, 40),
                    "images labeled equally often": np.array(True)}
    scaled = probe_images(case.seed).astype(np.float64) / 255.0
    yield "normalization", {name: ((scaled - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
                            for name, (mean, std) in _STATISTICS.items()}


def _pictures(seed: int, apply: Callable, weak_and_strong: Callable) -> Trace:
    """Every operation on each of the images, and random views of them; of oblong images, too.

    Args:
        apply: (images, plan) -> uint8 [N, H, W, 3], of a randaugment.Plan.
        weak_and_strong: (images, index, plan) -> two such, of a views.ViewPlan of images[index].
    """
    square = probe_images(seed)
    oblong = {f" {h}x{w}": np.ascontiguousarray(square[:2, :h, :w]) for h, w in _OBLONG}
    for label, images in {"": square, **oblong}.items():
        count, (height, width) = len(images), images.shape[1:3]
        yield f"operations{label}", {name: apply(np.tile(images, (9, 1, 1, 1)), plan)
                                     for name, plan in _single_operation_plans(count).items()}
        plan = _random_plan(seed, 40 * count, height, width)
        weak, strong = weak_and_strong(images, np.tile(np.arange(count), 40), plan)
        yield f"views{label}", {"weak": weak, "strong": strong}


def _drawn(seed: int) -> dict[str, np.ndarray]:
    """What the production code draws: values that occur, and their frequencies, set to the expected where they fit."""
    rng = np.random.default_rng([seed, 6])
    plan = views.draw(rng, _DRAWS, SIZE)
    ra, offset = plan.strong_plan, plan.strong.offset
    unflipped = views.draw(rng, _DRAWS, SIZE, flip=False)
    flips = np.concatenate([unflipped.weak.flip, unflipped.strong.flip])
    return {
        "operations": np.unique(ra.op), "operation frequencies": _frequencies(ra.op, np.arange(len(_OPS))),
        "magnitudes": np.unique(ra.magnitude), "magnitude frequencies": _frequencies(ra.magnitude, np.arange(1, 10)),
        "applied": _fits(ra.applied, 0.5, 0.5), "negated": _fits(ra.negated, 0.5, 0.5),
        "flipped": _fits(plan.weak.flip, 0.5, 0.5), "flipped where not allowed": np.array(float(flips.mean())),
        "crop offsets": np.unique(offset), "crop offset frequencies": _frequencies(offset, np.arange(9)),
        "cutout centre": _fits(ra.cutout, 0.5, 1 / np.sqrt(12)),
    }


def _fits(values: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    """`mean` if the values' mean is within 6 standard errors of it, else what it is."""
    found = float(np.mean(values))
    return np.array(mean if abs(found - mean) < 6 * deviation / np.sqrt(values.size) else found)


def _frequencies(values: np.ndarray, support: np.ndarray) -> np.ndarray:
    p = 1 / len(support)
    return np.array([float(_fits(values == v, p, np.sqrt(p * (1 - p)))) for v in support])


def _split(seed: int) -> dict[str, np.ndarray]:
    labels = np.random.default_rng([seed, 7]).integers(0, 10, 1000)
    drawn, again = (split.draw_split(labels, 10, 40, seed) for _ in range(2))
    equal = np.arange(1000) % 10  # as many images of each class, so that all are as likely to be labeled
    labeled = np.stack([split.draw_split(equal, 10, 40, seed + i).labeled for i in range(_SPLITS)])
    often, expected = np.bincount(labeled.ravel(), minlength=1000), labeled.size / 1000
    chi_square = float(np.square(often - expected).sum()) / expected  # 960 +- 45 where the draw is fair
    return {"labels a class": np.bincount(labels[drawn.labeled], minlength=10),
            "labeled images are unlabeled too": np.array(bool(np.isin(drawn.labeled, drawn.unlabeled).all())),
            "unlabeled": np.sort(drawn.unlabeled), "same again": np.array(drawn.sha256() == again.sha256()),
            "distinct labeled images under each seed": np.array([len(np.unique(images)) for images in labeled]),
            "images labeled equally often": np.array(chi_square < 1000 + 10 * np.sqrt(2 * 1000))}
