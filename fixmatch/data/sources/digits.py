"""The embedded data set: 1,797 handwritten digits of 8x8 pixels that scikit-learn carries (UCI optdigits, test set)."""

import importlib.metadata

import numpy as np

from fixmatch.data.dataset import Dataset, Source

# read by ourselves, because importing scikit-learn takes as long as importing Paddle
_FILE = "sklearn/datasets/data/digits.csv.gz"  # a digit each line: 64 grey levels row by row, then the label
TEST_IMAGES = 500  # the last ones, as the images are ordered by writer and a test should be on other writers


def load_digits() -> Source:
    """The digits, uint8 [1297, 8, 8, 3] for training and [500, 8, 8, 3] for the test.

    The grey levels 0..16 become 0..255 in three equal channels. Digits are not mirrored, as a mirrored 2 is not a 2.
    """
    table = np.loadtxt(importlib.metadata.distribution("scikit-learn").locate_file(_FILE), np.int64, delimiter=",")
    grey, labels = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), table[:, -1]
    images = np.repeat(grey[..., None], 3, axis=3)
    train, test = slice(None, -TEST_IMAGES), slice(-TEST_IMAGES, None)
    pixels = images[train] / 255.0
    mean, std = (float(pixels.mean()),) * 3, (float(pixels.std()),) * 3
    return Source("digits", tuple("0123456789"), Dataset(images[train], labels[train]),
                  Dataset(images[test], labels[test]), mean, std, flip=False)
