"""Draft for tools/bench.py: weak+strong pairs a second from the data engine, beside a per-image Pillow pipeline."""

import itertools
import pathlib
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from fixmatch.data import views

SIZE = 32
BATCH = 448  # unlabeled images a step: mu = 7, B = 64
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)[:, None, None]
STD = np.array([0.2471, 0.2435, 0.2616], np.float32)[:, None, None]


def bench_data(seconds: float = 3.0) -> dict:
    """Measure for about `seconds`: ours and Pillow's rounds alternate, the best round of each counts.

    Returns:
        pairs_per_second_per_core: weak+strong uint8 pairs, plans drawn anew each batch, one thread.
        pillow_pairs_per_second_per_core: normalized float32 pairs from a per-image pipeline, one thread.
        ratio_to_pillow: the first over the second.
        threads: pairs a second by number of threads, each on its slice of a batch eight times as large.
    """
    rng = np.random.default_rng(0)
    images = _smooth_images(rng, 4096)
    _pairs(images, rng, BATCH)  # compile
    ours, pillow, threads = 0.0, 0.0, {1: 0.0, 2: 0.0, 4: 0.0}
    deadline = time.perf_counter() + seconds
    while not pillow or time.perf_counter() < deadline:
        ours = max(ours, _rate(lambda: _pairs(images, rng, BATCH), BATCH, repeat=30))
        pillow = max(pillow, _rate(lambda: _pillow_pairs(images[:100]), 100, repeat=2))
        for n in threads:
            threads[n] = max(threads[n], _threaded_rate(images, rng, n))
    return {
        "pairs_per_second_per_core": ours,
        "pillow_pairs_per_second_per_core": pillow,
        "ratio_to_pillow": ours / pillow,
        "threads": threads,
    }


def _rate(work, pairs, repeat):
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    return repeat * pairs / (time.perf_counter() - start)


def _smooth_images(rng, count):
    """uint8 [count, SIZE, SIZE, 3], smooth as photographs are, with full-range histograms."""
    y, x = np.mgrid[:SIZE, :SIZE]
    phase = rng.random((count, 1, 1, 3)) * 6
    waves = np.sin(x[:, :, None] / 5 + phase) * np.cos(y[:, :, None] / 7 - phase)
    return np.clip(127 + 90 * waves + rng.normal(0, 10, waves.shape), 0, 255).astype(np.uint8)


def _pairs(images, rng, count):
    index = rng.integers(len(images), size=count)
    return views.weak_and_strong(images, index, views.draw(rng, count, SIZE))


def _threaded_rate(images, rng, n):
    with ThreadPoolExecutor(n) as pool:
        return _rate(lambda: _threaded_pairs(images, rng, 8 * BATCH, pool, n), 8 * BATCH, repeat=6)


def _threaded_pairs(images, rng, count, pool, n):
    index, plan = rng.integers(len(images), size=count), views.draw(rng, count, SIZE)
    weak, strong = np.empty((2, count, SIZE, SIZE, 3), np.uint8)

    def work(part):
        views.weak_and_strong(images, index[part], plan.take(part), (weak[part], strong[part]))

    bounds = np.linspace(0, count, n + 1).astype(int)
    list(pool.map(work, [slice(a, b) for a, b in itertools.pairwise(bounds)]))


# The per-image pipeline as it is usually written: Pillow operations drawn by `random`, ToTensor, Normalize.


def _enhance(kind):
    return lambda img, v: kind(img).enhance(v * 0.09 + 0.05)


def _signed(v):
    return -v if random.random() < 0.5 else v


def _affine(matrix):
    return lambda img, v: img.transform(img.size, Image.Transform.AFFINE, matrix(_signed(v * 0.03)))


PILLOW_OPS = (
    lambda img, v: ImageOps.autocontrast(img),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    lambda img, v: ImageOps.equalize(img),
    lambda img, v: img,
    lambda img, v: ImageOps.posterize(img, int(v * 0.4) + 4),
    lambda img, v: img.rotate(_signed(3 * v)),
    _enhance(ImageEnhance.Sharpness),
    _affine(lambda v: (1, v, 0, 0, 1, 0)),
    _affine(lambda v: (1, 0, 0, v, 1, 0)),
    lambda img, v: ImageOps.solarize(img, 256 - int(v * 25.6)),
    _affine(lambda v: (1, 0, int(v * SIZE), 0, 1, 0)),
    _affine(lambda v: (1, 0, 0, 0, 1, int(v * SIZE))),
)


def _pillow_weak(image):
    img = Image.fromarray(image)
    if random.random() < 0.5:
        img = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    img = Image.fromarray(np.pad(np.asarray(img), ((4, 4), (4, 4), (0, 0)), mode="reflect"))
    left, top = random.randint(0, 8), random.randint(0, 8)
    return img.crop((left, top, left + SIZE, top + SIZE))


def _pillow_strong(image):
    img = _pillow_weak(image)
    for op in random.choices(PILLOW_OPS, k=2):
        v = random.randint(1, 9)
        if random.random() < 0.5:
            img = op(img, v)
    x0 = int(max(0, random.uniform(0, SIZE) - 8))
    y0 = int(max(0, random.uniform(0, SIZE) - 8))
    img = img.copy()
    ImageDraw.Draw(img).rectangle((x0, y0, min(SIZE, x0 + 16), min(SIZE, y0 + 16)), (127, 127, 127))
    return img


def _normalize(img):
    """ToTensor and Normalize: float32 [3, H, W]."""
    tensor = np.asarray(img).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    return (tensor - MEAN) / STD


def _pillow_pairs(images):
    pairs = [(_normalize(_pillow_weak(image)), _normalize(_pillow_strong(image))) for image in images]
    return np.stack([weak for weak, _ in pairs]), np.stack([strong for _, strong in pairs])


if __name__ == "__main__":
    print(bench_data())
