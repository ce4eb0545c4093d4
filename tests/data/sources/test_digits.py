"""The embedded digits."""

import numpy as np
from sklearn import datasets

from fixmatch.data.sources.digits import load_digits


def test_digits():
    source = load_digits()
    assert (source.train.images.shape, source.test.images.shape) == ((1297, 8, 8, 3), (500, 8, 8, 3))
    assert source.train.images.dtype == np.uint8
    assert source.train.images.min() == 0
    assert source.train.images.max() == 255
    assert (source.train.images[..., 0] == source.train.images[..., 2]).all()
    assert np.bincount(source.train.labels).min() > 100
    assert not source.flip
    normal = (source.train.images / 255 - source.mean) / source.std
    assert abs(normal.mean()) < 1e-9
    assert abs(normal.std() - 1) < 1e-9


def test_they_are_those_that_scikit_learn_gives_in_their_order():
    source, given = load_digits(), datasets.load_digits()
    assert np.array_equal(np.concatenate([source.train.labels, source.test.labels]), given.target)
    grey = np.concatenate([source.train.images, source.test.images])[..., 0]
    assert np.array_equal(np.round(grey * (16 / 255)), given.images)


def test_digits_test_images_are_not_among_the_training_images():
    source = load_digits()
    test = {image.tobytes() for image in source.test.images}
    assert not test & {image.tobytes() for image in source.train.images}


def test_digits_are_the_same_every_time():
    np.random.seed(1)
    first = load_digits()
    np.random.seed(2)
    assert np.array_equal(first.train.images, load_digits().train.images)
