"""The sums behind a report, by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixmatch.data.dataset import Dataset
from fixmatch.report.figures import calibration, class_rows, confusion_matrix, interval, spread, thin
from fixmatch.report.predictions import judge


def test_calibration_by_hand():
    found = calibration(np.array([0.9, 0.92, 0.5, 1.0]), np.array([True, False, True, True]))
    assert found.count.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 1]  # bins of 1/15: 0.5 ends the eighth
    assert found.confidence[13] == pytest.approx(0.91)
    assert found.accuracy[[7, 13, 14]].tolist() == [1, 0.5, 1]
    assert math.isnan(found.accuracy[0])
    assert found.ece == pytest.approx((1 * 0.5 + 2 * 0.41 + 0) / 4)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_ece_lies_between_0_and_1_and_every_image_in_one_bin(pairs):
    confidence, right = (np.array(column) for column in zip(*pairs, strict=True))
    found = calibration(confidence, right)
    assert found.count.sum() == len(pairs)
    assert -1e-12 <= found.ece <= 1 + 1e-12


def test_classes_by_hand():
    matrix = confusion_matrix(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 0, 2]), 4)
    assert matrix.tolist() == [[3, 1, 0, 0], [1, 0, 1, 0], [0] * 4, [0] * 4]
    rows = class_rows(matrix, "abcd")
    assert rows[0] == ("b", 2, 0.0, 0.0, "a")  # the worst first; of equal errors the first class
    assert rows[1] == ("a", 4, 75.0, 75.0, "b")
    assert rows[2] == ("c", 0, None, 0.0, "")
    assert rows[3] == ("d", 0, None, None, "")


def test_spread_as_papers_report_it():
    assert spread([97.0, 98.0, 99.0]) == (98.0, 1.0, 3)  # n - 1
    assert str(spread([97.0, 98.0, 99.0])) == "98.00 ± 1.00"
    assert spread([5.0]) == (5.0, None, 1)
    assert str(spread([5.0])) == "5.00"


def test_the_interval_of_few_images_is_wide():
    assert interval(50.0, 100) == pytest.approx((40.383, 59.617), abs=1e-3)
    assert interval(100.0, 10) == pytest.approx((72.246, 100.0), abs=1e-3)


def test_a_long_curve_is_thinned_by_means_of_neighbours():
    x, y = thin([1, 2, 3, 4], [1.0, None, 5.0, 7.0], most=2)
    assert (x.tolist(), y.tolist()) == ([2.0, 4.0], [3.0, 7.0])
    assert [len(axis) for axis in thin([1, 2], [None, None])] == [0, 0]


def test_the_wrong_ones_that_the_network_is_surest_of_come_first():
    logits = np.log(np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.6, 0.4]]))
    images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1).repeat(3, axis=3)
    found = judge(logits, Dataset(images, np.array([0, 1, 0, 0])))
    assert found.predicted.tolist() == [0, 0, 1, 0]
    assert found.confidence == pytest.approx([0.9, 0.7, 0.8, 0.6])
    assert found.wrong.tolist() == [2, 1]
    assert found.pictures[:, 0, 0, 0].tolist() == [2, 1]
