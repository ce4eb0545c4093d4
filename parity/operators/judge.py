"""The gates of stage `operators`, and one row out of what both sides computed."""

from typing import NamedTuple

import numpy as np

from parity.compare import Row

# On the L2 norm of the difference over that of the truth, in units of the precision's roundoff (float32: 6e-8). A
# parameter's gradient is a sum of n terms, which operators add up in parts of many terms: it is off by a fraction of
# sqrt(n) roundoffs. The rounding of 20 clean seeds on two networks stays ten times below; that of Paddle's own
# operators, five times.
_GATE = 170.0  # 1e-5
_GATE_OF_SUM = 10.0  # times sqrt(n)
_LARGEST = 10.0  # the gate on the largest difference over the largest element of the truth is so many times wider
# No tensor of a probe has all its elements below this, unless they are exactly 0 (what a running statistic with a
# momentum of 1 gains): then rounding is not divided by rounding.
_FLOOR = 1e-7
_AT_ONCE = 1 << 16  # elements that are compared at once: they fit the cache


class Pair(NamedTuple):
    """One tensor of a probe from both sides."""

    name: str
    ours: np.ndarray | None  # float32, of the whole batch; None where production made none
    truth: np.ndarray  # float64; of a tensor with an axis of images the distinct ones
    of_images: bool
    terms: int  # of the sum over the batch that an element is; 1: it is none


def judge(pair: Pair, tensor: str, layer: str, roundoff: float) -> Row:
    """A row: `relative` is the largest difference over the largest element of the truth, and `passed` needs the L2
    error, too, to be within its gate. For a failed tensor of images the row keeps the worst image alone."""
    ours, truth = pair.ours, pair.truth
    if ours is None or ours.shape[pair.of_images:] != truth.shape[pair.of_images:]:
        why = "missing" if ours is None else f"shape {ours.shape}, must be {truth.shape}"
        return Row(tensor, np.inf, np.inf, False, f"{why} ({layer})", ours, truth)
    absolute, relative, relative_l2 = errors(pair)
    gate, gate_l2 = gates(pair.terms, roundoff)
    if relative <= gate and relative_l2 <= gate_l2:
        return Row(tensor, absolute, relative, True)
    if pair.of_images:
        image = int(np.argmax([np.abs(ours[n] - truth[n % len(truth)]).max() for n in range(len(ours))]))
        layer, ours, truth = f"{layer}, image {image}", ours[image], truth[image % len(truth)]
    if not np.isfinite(absolute):
        return Row(tensor, np.inf, np.inf, False, f"NaN or infinity ({layer})", ours, truth)
    why = f"largest {relative:.1e} (gate {gate:.0e}), L2 {relative_l2:.1e} (gate {gate_l2:.0e}) ({layer})"
    return Row(tensor, absolute, relative, False, why, ours, truth)


def errors(pair: Pair) -> tuple[float, float, float]:
    """The largest difference, this over the largest element of the truth, and the relative L2 error. NaN where ours
    has one."""
    ours, truth = (a if pair.of_images else a.reshape(-1) for a in (pair.ours, pair.truth))  # images, or numbers
    absolute, largest, squares, squares_of_truth = [0.0], [_FLOOR], 0.0, 0.0
    at_once = max(1, _AT_ONCE * len(truth) // max(1, truth.size))
    for first in range(0, len(truth), at_once):
        expected = truth[first:first + at_once].astype(np.float32)
        largest.append(np.abs(expected).max())
        for start in range(first, len(ours), len(truth)):  # the batch repeats its images
            found = ours[start:start + len(expected)]
            difference = found - expected[:len(found)]
            squares += float(np.vdot(difference, difference))
            squares_of_truth += float(np.vdot(expected[:len(found)], expected[:len(found)]))
            absolute.append(np.abs(difference, out=difference).max())
    worst = float(np.max(absolute))  # which, unlike max(), keeps a NaN
    return (worst, worst / float(max(largest)),
            float(np.sqrt(squares) / max(np.sqrt(squares_of_truth), _FLOOR * np.sqrt(ours.size))))


def gates(terms: int, roundoff: float) -> tuple[float, float]:
    """On the largest difference and on the L2 error, both relative, where an element depends on a sum of `terms`."""
    gate_l2 = roundoff * max(_GATE, _GATE_OF_SUM * np.sqrt(terms))
    return _LARGEST * gate_l2, gate_l2
