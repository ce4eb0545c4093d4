"""Images that several test files use."""

import numpy as np

SIZES = (8, 9, 16, 31, 32, 48, 96, 224)


def pixels(rows):
    """uint8 [1, H, W, 3] grey image from rows of values."""
    return np.repeat(np.array(rows, np.uint8)[None, :, :, None], 3, axis=3)


def random_images(rng, n_images, size):
    """uint8 [N, H, W, 3]: noise in a random range a channel, fine or in blocks, as it is or on a slope."""
    images = np.empty((n_images, *size, 3), np.uint8)
    y, x = (np.linspace(-1, 1, length) for length in size)
    for image in images:
        low, high = np.sort(rng.integers(0, 256, (2, 3)), axis=0)
        block = rng.choice([1, 4])
        noise = rng.integers(low, high + 1, (*(-(-length // block) for length in size), 3))
        noise = noise.repeat(block, axis=0).repeat(block, axis=1)[: size[0], : size[1]]
        slope = rng.integers(0, 128, 2) * (rng.random() < 0.5)
        image[:] = np.clip(noise + (slope[0] * y[:, None] + slope[1] * x)[..., None], 0, 255)
    return images
