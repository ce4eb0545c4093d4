"""Comparing fails closed: on a shape, a dtype, a NaN, a missing section or tensor."""

import numpy as np
import pytest

from parity.compare import compare, compare_tensor


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
    one, near = np.ones(2), np.array([1, 1 + 5e-11])
    sections = ["round 5 ema", "step 2 losses", "step 3 losses", "step 10 ema"]
    rows = compare(((s, {"a": near}) for s in sections), ((s, {"a": one}) for s in sections))
    assert [row.passed for row in rows] == [False, False, True, True]
    assert not next(compare([("step 3 losses", {"a": near + 1e-10})], [("step 3 losses", {"a": one})])).passed


def test_compare_fails_on_a_section_that_one_side_lacks():
    one, two = [("a", {"x": np.ones(1)})], [("a", {"x": np.ones(1)}), ("b", {"x": np.ones(1)})]
    assert not all(row.passed for row in compare(one, two))
    assert not all(row.passed for row in compare(two, one))
