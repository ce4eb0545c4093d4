"""Stage `operators`: every distinct layer call of the network, in the precision, on the device, with the number of
threads and through the code that will train, against float64.

Files: calls.py finds the calls, probes.py runs one on both sides, truth.py is the float64 side, judge.py holds the gates,
and `rows` here chooses the batches.

Each call is tried with 5 and with 33 images, all different, on small maps that are not square, and with the run's own
map and batch. There the batch repeats three images, and is cut where the call would take too long; the cheapest call of
each kind of algorithm is cut last.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import paddle

from fixmatch import kernels, runtime
from fixmatch.kernels import openmp
from fixmatch.models import layers
from parity.case import Case
from parity.compare import Row
from parity.operators.calls import Call, batch_size, distinct_calls
from parity.operators.judge import judge
from parity.operators.probes import Probe

# What all calls of a network may take in turn, so that ... Multiplications and elements of the largest tensor: in float32
# at the run's size, and in float64.
_WORK, _ELEMENTS = 20e9, 40e6
_SMALL_WORK, _SMALL_ELEMENTS = 4e9, 8e6


def rows(case: Case, thorough: bool = False, threads: int | None = None) -> Iterator[Row]:
    """One row for each tensor of each call: the network's calls in its order, of each first the small batches.

    A row's `relative` is its largest error over the largest element of the truth; it passes if that and the relative L2
    error are within their gates, and its `why` gives both where not.

    Args:
        case: whose config, num_classes and seed are used; the sizes are the run's, not the case's.
        thorough: cut the batches of the run's maps less.
        threads: of the kernels and Paddle's operators; None: as many as a run that is started here would use.
    """
    with _as_the_run(case, threads) as amp:
        calls = distinct_calls(case)
        for number, call in enumerate(calls):
            if call.kind == "unknown":
                yield Row(f"{call.label}/", np.inf, np.inf, False, f"{call.layer}: no float64 truth for this layer")
                continue
            cheapest = min((c for c in calls if c.algorithm == call.algorithm), key=_cost_of_image) is call
            share = (5 if cheapest else 1) * (10 if thorough else 1) / len(calls)
            for part, (batch, size, distinct) in enumerate(_batches(case, call, share)):
                rng = np.random.default_rng([case.seed, number, part])
                probe = Probe(call, batch, size, distinct, case.config.model.bn_momentum, amp, rng)
                for pair in probe.pairs():
                    yield judge(pair, f"{probe.name}/{pair.name}", call.layer, _roundoff(amp))


@contextlib.contextmanager
def _as_the_run(case: Case, threads: int | None) -> Iterator[bool]:
    """Device, kernels and threads as in the run, for a while. Yields whether mixed precision is used."""
    device, setting = paddle.device.get_device(), layers._cpu_kernels
    name = runtime.select_device(case.config.runtime.device)
    layers.set_cpu_kernels(case.config.runtime.cpu_kernels)
    obeys = name == "cpu" and kernels.status()[0]
    before = openmp.num_threads() if obeys else None
    if obeys:
        kernels.set_num_threads(threads or openmp.default_threads())
    try:
        yield case.config.train.amp and name.startswith("gpu")
    finally:
        if obeys:
            kernels.set_num_threads(before)
        layers.set_cpu_kernels(setting)
        paddle.device.set_device(device)


def _cost_of_image(call: Call) -> tuple[float, float]:
    """Multiplications and elements of one image of the run."""
    pixels = call.size[0] * call.size[1]
    return pixels * call.work, pixels * max(call.channels, call.outputs)


def _batches(case: Case, call: Call, share: float) -> Iterator[tuple[int, tuple[int, int], int]]:
    """(batch, rows and columns, how many distinct images) of each probe of a call, which gets this share of the time."""
    work, elements = _cost_of_image(call)
    pixels = call.size[0] * call.size[1]
    for batch, maps in ((5, [(9, 6), (5, 4), (3, 2)]), (33, [(4, 7), (3, 4), (2, 3)])):
        at_most = pixels * min(share * _SMALL_WORK / work, share * _SMALL_ELEMENTS / elements) / batch
        fitting = [size for size in maps if size[0] * size[1] <= at_most]
        yield batch, (fitting or maps[-1:])[0] if pixels > 1 else (1, 1), batch
    batch = min(batch_size(case), int(min(share * _WORK / work, share * _ELEMENTS / elements)))
    distinct = int(min(share * _SMALL_WORK / work, share * _SMALL_ELEMENTS / elements))
    batch = max(batch, 3)
    yield batch, call.size, min(batch, max(distinct, 3))


def _roundoff(amp: bool) -> float:
    """Of one operation in the run: float16 has 11 bits, as have the products of float32 numbers in TF32."""
    tf32 = paddle.device.get_device().startswith("gpu") and paddle.base.core.get_cudnn_switch()
    return 2**-11 if amp or tf32 else 2**-24
