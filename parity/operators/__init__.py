"""Stage `operators`: every distinct layer call of the network, in the precision, on the device, with the number of
threads and through the code that will train, against float64.

Files: calls.py finds the calls; probe.py and kinds.py run one on both sides, truth.py being the float64 one; judge.py
holds the gates; `rows` here chooses the batches.

Each call is tried with 5 and with 33 images, all different, on small maps that are not square, and with the run's own
map and batch. A call of many weights is, unless thorough, tried with 33 images of 2 x 2 pixels in the place of the
small ones. The run's batch repeats a few images, and is cut where the call would take too long, and so is the map where
two images would. Of each algorithm one call keeps its map, and its batch longest: the cheapest, and of batch norms the
one of the most pixels, whose sums are the longest.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import numpy as np
import paddle

from fixmatch import runtime
from fixmatch import step as algorithm
from fixmatch.kernels import allocator, openmp
from fixmatch.models import layers
from parity import subject
from parity.case import Case
from parity.compare import ROUNDOFF, Row, exact, raised
from parity.operators.calls import Call, batch_size, distinct_calls
from parity.operators.judge import judge
from parity.operators.kinds import pairs
from parity.operators.probe import Probe

# What the probes of all calls together may cost, unless thorough: multiplications of one operator, and elements of its
# largest tensor, in float32 on the run's maps and in float64.
_WORK, _ELEMENTS = 8e9, 40e6
_EXACT_WORK, _EXACT_ELEMENTS = 2e9, 6e6
_FAVOUR = 8  # times the share of the others, for one call of each algorithm
_THOROUGH = 4
# Batches, and their maps, of which the first is taken that is cheap enough. A call of many weights takes its time on
# each: unless thorough it is tried on one alone.
_MANY_WEIGHTS = 1e6
_SMALL = ((5, ((9, 6), (5, 4), (3, 2))), (33, ((4, 7), (3, 4), (2, 3))))
_SMALLEST = ((33, ((2, 2),)),)


def rows(case: Case, thorough: bool = False, threads: int | None = None,
         turns: Callable[[int], Iterable[int]] = range) -> Iterator[Row]:
    """One row for each tensor of each call: the network's calls in its order, of each first the small batches.

    A row's `relative` is its largest error over the largest element of the truth; it passes if that and the relative L2
    error are within their gates, and its `why` gives both where not.

    Args:
        case: whose config, num_classes and seed are used; the sizes are the run's, not the case's.
        thorough: cut the batches of the run's maps less.
        threads: of the kernels and Paddle's operators; None: as many as a run that is started here would use.
        turns: given how many calls there are, the places of those to try here; another process may have the others.
    """
    with _as_the_run(case, threads) as amp:
        calls = distinct_calls(case)
        by_place = ((place, _rows_of(case, calls, place, thorough, amp)) for place in turns(len(calls)))
        if turns is not range:  # one that goes backwards: then all is computed first
            by_place = sorted((place, [*found]) for place, found in by_place)
        for _, found in by_place:
            yield from found


def _rows_of(case: Case, calls: list[Call], place: int, thorough: bool, amp: str | None) -> Iterator[Row]:
    """The rows of the call at this place, and before the first one's that of the joint forward pass."""
    if place == 0:
        yield _joint_forward(case)
    call = calls[place]
    if call.kind == "unknown":
        yield Row(f"{call.label}/call", np.inf, np.inf, False, f"{call.layer}: no float64 truth for this layer")
        return
    favoured = min((c for c in calls if c.algorithm == call.algorithm), key=_first_favoured) is call
    share = (_THOROUGH if thorough else 1) / len(calls)
    small = _SMALL if thorough or call.weights <= _MANY_WEIGHTS else _SMALLEST
    batches = _batches(case, call, share, _FAVOUR if favoured else 1, small)
    for part, (batch, size, distinct) in enumerate(batches):
        modes = ("train", "eval") if thorough or part < len(small) else ("train",)
        rng = np.random.default_rng([case.seed, place, part])
        probe = Probe(call, batch, size, distinct, modes, case.config.model.bn_momentum, amp, rng)
        yield from _judged(probe, _roundoff(amp))


def _joint_forward(case: Case) -> Row:
    """A step passes all its images through the network at once, as many as the run has. The network is small here."""
    train, case = case.config.train, case.on_a_small_network("wideresnet")
    case = dataclasses.replace(case, image_size=4, batch_size=train.batch_size, mu=train.mu)
    batch, (unlabeled, label_counts), seen = case.batch(0), case.label_facts(), []
    batch = batch._replace(index_u=np.arange(len(batch.u_w)) % unlabeled)
    state = algorithm.build_state(case.short_config(), case.num_classes, case.mean, case.std, unlabeled, label_counts)
    state.model.register_forward_pre_hook(lambda layer, inputs: seen.append(len(inputs[0])))
    with mock.patch.object(algorithm, "update"):  # which has no forward pass
        if case.config.ssl.mode == "none":
            algorithm.supervised_step(state, batch)
        else:
            algorithm.train_step(state, batch, case.config.ssl)
    return exact("joint forward/images", np.array(seen), np.array([batch_size(case)]))


def _judged(probe: Probe, roundoff: float) -> Iterator[Row]:
    """Rows of one probe; an operator that raises is a row that failed."""
    try:
        for pair in pairs(probe):
            yield judge(pair, f"{probe.name}/{pair.name}", probe.call.layer, roundoff)
    except Exception as error:
        yield raised(f"{probe.name}/call", error, f" ({probe.call.layer})")


@contextlib.contextmanager
def _as_the_run(case: Case, threads: int | None) -> Iterator[str | None]:
    """Device, kernels and threads as in the run, for a while. Yields its mixed precision, None for float32."""
    device, setting = paddle.device.get_device(), layers._cpu_kernels
    runtime.select_device(case.config.runtime.device, case.config.runtime.deterministic)
    layers.set_cpu_kernels(case.config.runtime.cpu_kernels)
    try:
        with subject.threads(threads or openmp.default_threads()):
            yield runtime.mixed_precision(case.config.train.amp)
    finally:
        allocator.give_up_idle()
        layers.set_cpu_kernels(setting)
        paddle.device.set_device(device)


def _cost_of_image(call: Call) -> tuple[float, float]:
    """Multiplications and elements of one image of the run; a sum has two inputs."""
    pixels = call.size[0] * call.size[1]
    elements = max(call.channels, call.outputs / call.stride**2) * (2 if call.kind == "add" else 1)
    return pixels * call.work, pixels * elements


def _first_favoured(call: Call) -> tuple[float, ...]:
    """The smaller, the rather is this call of its algorithm favoured."""
    pixels = call.size[0] * call.size[1] if call.kind == "batch norm" else 0
    work, elements = _cost_of_image(call)
    return -pixels, work, call.weights, elements


def _batches(case: Case, call: Call, share: float, favour: int, small) -> Iterator[tuple[int, tuple[int, int], int]]:
    """(batch, rows and columns, how many distinct images) of each probe of a call, for this share of the cost: first
    the `small` ones, then the run's own."""
    work, elements = _cost_of_image(call)
    exact = share * min(_EXACT_WORK / work, _EXACT_ELEMENTS / elements)  # images of the run
    pixels = call.size[0] * call.size[1]
    for batch, maps in small:
        cheap = [size for size in maps if batch * size[0] * size[1] <= exact * pixels]
        yield batch, (cheap or maps[-1:])[0] if pixels > 1 else (1, 1), batch
    rows, columns = call.size
    if favour == 1 and exact < 2:  # two images of so many rows take the share
        rows = min(rows, max(4, int(rows * exact / 2)))
    at_most = favour * share * min(_WORK / work, _ELEMENTS / elements) * call.size[0] / rows
    batch = min(batch_size(case), max(3, int(at_most)))
    distinct = min(batch, max(2, int(exact)))
    while distinct < batch and batch // 2 % distinct == 0:  # else both halves of the batch would be the same images
        distinct += 1
    yield batch, (rows, columns), distinct


def _roundoff(amp: str | None) -> float:
    """Of one operation in the run."""
    return ROUNDOFF[runtime.arithmetic(amp)]
