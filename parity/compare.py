"""Comparing two traces, tensor by tensor, in the order in which a fault would show.

A trace is an iterator of (section, {name: array}): what one side computed, in the order of diagnosis. The two sides are
walked in step, and a section is read before the trace goes on, so that it may hold tensors as they are (`Reading`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import paddle

GATE = 1e-11  # on max|a - b| / max|b| in float64; a correct port measures 1e-14, the weakest planted bug 1e-5
# Sums on a GPU have another order, which is not to matter: a hundred times the CPU's gate is still far below any bug.
# It was not measured, for want of a GPU. `fixmatch parity --device gpu --seeds 0 1 2 3 4 --json FILE` measures it: the
# gate is to be about a hundred times the worst of its stages in float64.
GPU_GATE = 1e-9
LATER = 10.0  # times wider from the fourth free-running step on: in 40 steps training amplifies rounding a thousandfold

# Of one product, relative: float32 has 24 bits, float16 and the factors in TF32 have 11, bfloat16 has 8.
ROUNDOFF = {"float32": 2.0**-24, "tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}

_BLOCK = 1 << 15  # elements
FRESH_WEIGHTS = "initial"  # the section whose tensors are random on both sides, so that their distributions must agree

Trace = Iterable[tuple[str, Mapping[str, np.ndarray]]]


class Reading(Mapping):
    """The tensors of a section, each copied when it is asked for, so that one copy at a time is in memory.

    Args:
        names: of the tensors.
        read: makes the array of one name, as it is at that moment.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], np.ndarray]):
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Row(NamedTuple):
    """One compared tensor."""

    tensor: str  # "section/name"
    absolute: float  # max|ours - reference|; inf where they cannot be compared
    relative: float  # over max|reference|
    passed: bool
    why: str = ""  # what kind of difference, where it is not one of values
    ours: np.ndarray | None = None  # kept for a tensor that failed
    reference: np.ndarray | None = None

    def name(self) -> str:
        return self.tensor.rpartition("/")[2]


def raised(tensor: str, error: Exception, where: str = "") -> Row:
    """The failed row of what raised `error` in the place of computing `tensor`; `where` ends its reason."""
    return Row(tensor, np.inf, np.inf, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{where}")


def float64_gate() -> float:
    """On tensors in float64, on the device that Paddle computes on."""
    return GPU_GATE if paddle.device.get_device().startswith("gpu") else GATE


def gate_of(section: str) -> float:
    """The gate of a section or tensor; a wider one from "step 3" on."""
    first, _, rest = section.partition(" ")
    return float64_gate() * (LATER if first == "step" and int(rest.split()[0]) >= 3 else 1.0)


def compare(ours: Trace, reference: Trace) -> Iterator[Row]:
    """The rows of all sections of both traces, in order.

    A section or tensor that only one side has fails. Fresh weights are compared by their distribution.
    """
    theirs_by_section = iter(reference)
    for section, mine in ours:
        other_section, theirs = next(theirs_by_section, (None, {}))
        if other_section != section:
            yield Row(f"{section}/", np.inf, np.inf, False, f"the reference has section {other_section} here")
            return
        for name in [*theirs, *(n for n in mine if n not in theirs)]:
            row = compare_tensor(f"{section}/{name}", mine.get(name), theirs.get(name), gate_of(section))
            yield _same_distribution(row) if section == FRESH_WEIGHTS else row
    for section, _ in theirs_by_section:
        yield Row(f"{section}/", np.inf, np.inf, False, "only the reference has this section")


def compare_tensor(tensor: str, ours, reference, gate: float | None = None) -> Row:
    """One row. Integers and booleans must be equal; nothing is transposed, broadcast or cast to make it fit.

    Args:
        gate: on the relative error; None: that of tensors in float64.
    """
    def failed(why: str, absolute=np.inf, relative=np.inf):
        return Row(tensor, absolute, relative, False, why, ours, reference)

    if ours is None or reference is None:
        return failed("missing here" if ours is None else "only here, not in the reference")
    ours, reference = np.asarray(ours), np.asarray(reference)
    if ours.shape != reference.shape:
        return failed(f"shape {ours.shape}, the reference has {reference.shape}")
    if ours.dtype != reference.dtype:
        return failed(f"dtype {ours.dtype}, the reference has {reference.dtype}")
    if not ours.size:
        return Row(tensor, 0.0, 0.0, True)
    if ours.dtype.kind != "f":
        different = int((ours != reference).sum())
        largest = float(np.abs(ours.astype(np.int64) - reference.astype(np.int64)).max())
        return Row(tensor, 0.0, 0.0, True) if not different else failed(
            f"{different} of {ours.size} elements differ", largest, different / ours.size)
    if not (np.isfinite(ours).all() and np.isfinite(reference).all()):
        return failed("NaN or infinity")
    absolute = float(np.abs(ours - reference).max())
    scale = float(np.abs(reference).max())
    relative = absolute / scale if scale else absolute
    passed = relative <= (gate or float64_gate())
    return Row(tensor, absolute, relative, True) if passed else failed("", absolute, relative)


def _same_distribution(row: Row) -> Row:
    """Mean and standard deviation of two independent samples, each within 6 standard errors; constants exactly."""
    if row.passed or row.ours is None or row.reference is None or row.why:
        return row
    ours, reference = row.ours, row.reference
    spread, count = float(reference.std()), reference.size
    if spread == 0 or ours.std() == 0:
        return row
    z_mean = abs(ours.mean() - reference.mean()) / (spread * np.sqrt(2 / count))
    z_spread = abs(ours.std() - spread) / (spread * np.sqrt(1 / count))
    if max(z_mean, z_spread) < 6:
        return Row(row.tensor, 0.0, 0.0, True)
    return row._replace(why=f"initial standard deviation {ours.std():.4g}, the reference has {spread:.4g}")


def exact(tensor: str, ours, reference) -> Row:
    """A row of two arrays that must be equal."""
    if row := _no_match(tensor, ours, reference):
        return row
    different = int((ours != reference).sum())
    if not different:
        return Row(tensor, 0.0, 0.0, True)
    return Row(tensor, 1.0, different / ours.size, False, f"{different} of {ours.size} elements differ", ours,
               reference)


def same_print(tensor: str, ours: str | None, reference: str | None, why: str) -> Row:
    """A row of two arrays' fingerprints, which must be equal; None where there is no array. `why` if they are not."""
    equal = ours == reference
    apart = 0.0 if equal else np.inf
    return Row(tensor, apart, apart, equal, "" if equal else why)


def near(tensor: str, ours, reference, gate: float, floor: float = 0.0, norm: str = "max") -> Row:
    """A row whose `relative` is the error over the reference's size, or over `floor` where that is smaller."""
    if row := _no_match(tensor, ours, reference):
        return row
    if not ours.size:
        return Row(tensor, 0.0, 0.0, True)
    absolute, size, scale = _sizes(ours, reference, norm)
    floor *= 1.0 if norm == "max" else np.sqrt(ours.size)
    scale = float(max(scale, floor, np.finfo(np.float64).tiny))
    passed = size / scale <= gate  # false for NaN, too
    return Row(tensor, absolute, size / scale, passed, "" if passed else f"{size / scale:.1e}, gate {gate:g}",
               None if passed else ours, None if passed else reference)


def _sizes(ours: np.ndarray, reference: np.ndarray, norm: str) -> tuple[float, float, float]:
    """The largest difference, and the size of the difference and of the reference by this norm; NaN where ours has one.

    Block by block, since arrays that stay in the processor's cache take a third of the time.
    """
    ours, reference = ours.reshape(-1), reference.reshape(-1)
    sizes = []
    for start in range(0, ours.size, _BLOCK):
        truth = reference[start:start + _BLOCK]
        truth = truth if truth.dtype.kind == "f" else truth.astype(np.float64)
        difference = np.subtract(ours[start:start + _BLOCK], truth, dtype=np.float64)
        largest = max(difference.max(), -difference.min())
        sizes.append((largest, largest, max(truth.max(), -truth.min())) if norm == "max" else
                     (largest, np.dot(difference, difference), np.dot(truth, truth)))
    absolute, size, scale = np.array(sizes, dtype=np.float64).T
    if norm == "max":
        return float(absolute.max()), float(size.max()), float(scale.max())
    return float(absolute.max()), float(np.sqrt(size.sum())), float(np.sqrt(scale.sum()))


def _no_match(tensor: str, ours, reference) -> Row | None:
    if ours is None or reference is None:
        why = "missing here" if ours is None else "only here, not in the reference"
    elif ours.shape != reference.shape:
        why = f"shape {ours.shape}, the reference has {reference.shape}"
    else:
        return None
    return Row(tensor, np.inf, np.inf, False, why, ours, reference)
