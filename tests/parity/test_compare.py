"""Comparing fails closed: on a shape, a dtype, a NaN, a missing section or tensor."""

import json

import numpy as np
import paddle
import pytest

from parity.compare import compare, compare_tensor, near


def test_compare_tensor_fails_closed():
    a = np.linspace(1, 2, 6).reshape(2, 3)
    assert compare_tensor("t", a, a.copy()).passed
    assert not compare_tensor("t", a.T, a).passed
    assert not compare_tensor("t", a[0], a).passed
    assert not compare_tensor("t", a.astype(np.float32), a).passed
    assert not compare_tensor("t", np.full_like(a, np.nan), np.full_like(a, np.nan)).passed
    assert not compare_tensor("t", None, a).passed
    assert not compare_tensor("t", a, None).passed
    assert not compare_tensor("t", np.array([1, 2]), np.array([1, 3])).passed
    off = a.copy()
    off[1, 2] += 3e-11
    row = compare_tensor("t", off, a)
    assert not row.passed
    assert row.relative == pytest.approx(1.5e-11, rel=1e-3)


def test_the_gate_is_wider_after_three_free_running_steps():
    one, off = np.ones(2), np.array([1, 1 + 5e-11])
    sections = ["round 5 ema", "step 2 losses", "step 3 losses", "step 10 ema"]
    rows = compare(((s, {"a": off}) for s in sections), ((s, {"a": one}) for s in sections))
    assert [row.passed for row in rows] == [False, False, True, True]
    assert not next(compare([("step 3 losses", {"a": off + 1e-10})], [("step 3 losses", {"a": one})])).passed


def test_compare_fails_on_a_section_that_one_side_lacks():
    one, two = [("a", {"x": np.ones(1)})], [("a", {"x": np.ones(1)}), ("b", {"x": np.ones(1)})]
    assert not all(row.passed for row in compare(one, two))
    assert not all(row.passed for row in compare(two, one))


def test_compare_fails_on_a_tensor_that_one_side_lacks():
    one, two = [("a", {"x": np.ones(1)})], [("a", {"x": np.ones(1), "y": np.ones(1)})]
    for sides, why in ((one, two), "missing here"), ((two, one), "only here"):
        assert [(row.tensor, row.passed, row.why[:len(why)]) for row in compare(*sides) if not row.passed] == [
            ("a/y", False, why)]


def test_a_gpu_has_a_gate_of_its_own(monkeypatch):
    one, off = np.ones(2), np.array([1, 1 + 5e-10])
    for device, passes in (("cpu", False), ("gpu:0", True)):
        monkeypatch.setattr(paddle.device, "get_device", lambda device=device: device)
        assert compare_tensor("t", off, one).passed == passes
        assert next(compare([("step 3 losses", {"a": off})], [("step 3 losses", {"a": one})])).passed == passes
        assert not compare_tensor("t", np.array([1, 1 + 5e-9]), one).passed


def test_figures_of_a_row_are_numbers_that_json_has():
    """A floor may be a float32, as finfo gives it."""
    row = near("t", np.float32([1e-9]), np.float32([0.0]), 1.0, floor=np.finfo(np.float32).eps * 4)
    assert json.dumps([row.absolute, row.relative]) == f"[{row.absolute}, {row.relative}]"


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("place", [0, 40_000, 99_999])
def test_one_element_anywhere_in_a_large_tensor_shows(norm, place):
    reference = np.full(100_000, 2.0)
    ours = reference.astype(np.float32)
    assert near("t", ours, reference, 0.0, norm=norm).passed
    ours[place] = 5.0
    row = near("t", ours, reference, 1e-6, norm=norm)
    assert not row.passed
    assert row.absolute == 3.0
    assert row.relative == pytest.approx(1.5 if norm == "max" else 1.5 / np.sqrt(100_000))
    ours[place] = np.nan
    assert not near("t", ours, reference, np.inf, norm=norm).passed
