"""Data parallelism under `python -m paddle.distributed.launch`; one process is rank 0 of 1.

Tensors go through Paddle's collectives, everything else through the channel of fixmatch/channel.py, where the ranks
also meet before each collective. Running statistics are those of rank 0, as in the reference, whose
DistributedDataParallel hands them out before each forward pass: the other ranks take them over wherever they count.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Iterator

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.base import core

from fixmatch import channel
from fixmatch.channel import Channel, RankLost
from fixmatch.log import LOGGER
from fixmatch.normalize import to_device

_MOST_STEPS_UNASKED = 100  # between two questions of a Vote
_channel: Channel | None = None  # while several ranks are joined
_count = itertools.count()  # of the channels that this process has had: each is published under a name of its own


@contextlib.contextmanager
def joined(codes: dict[type[BaseException], int] | None = None) -> Iterator[tuple[int, int]]:
    """Joins the process group for a with block, if this process was launched in one. Gives (rank, world_size).

    Where the block raises on one rank it raises on all of them. Leaving it waits for all ranks.

    Args:
        codes: exceptions that are raised as they are on the other ranks too, each with the exit code of a process that
            it ends. Any other becomes RankLost there.
    """
    global _channel
    if dist.get_world_size() == 1:
        yield 0, 1
        return
    codes = codes or {}
    by_name = {kind.__name__: kind for kind in codes}

    def end(failure: dict) -> None:
        channel.end_process(failure["message"], codes.get(by_name.get(failure["kind"]), 1))

    def end_if_told() -> None:
        failure = _channel and _channel.wait_for_failure(channel.TO_TELL)
        if failure:
            LOGGER.info(f"stopped: {failure['message']}")
            end(failure)

    _channel = _join(end)
    channel.on_terminate(end_if_told)
    try:
        yield dist.get_rank(), dist.get_world_size()
        meet()
    except BaseException as error:
        expected = type(error) in codes and type(error) not in (KeyboardInterrupt, RankLost)
        failure = None if expected else _channel.wait_for_failure(channel.TO_TELL)
        if failure is None:
            _channel.report(type(error).__name__, _said_elsewhere(error, expected))
            raise
        LOGGER.info(f"stopped: {failure['message']}")
        raise by_name.get(failure["kind"], RankLost)(failure["message"]) from None
    finally:
        _channel.close()
        _channel = None


def _join(on_stuck) -> Channel:
    dist.init_parallel_env()
    store, name = core.create_or_get_global_tcp_store(), f"fixmatch/channel/{next(_count)}"
    if dist.get_rank() > 0:
        return channel.connect(dist.get_rank(), store.get(name).decode(), on_stuck=on_stuck)
    address = dist.ParallelEnv().trainer_endpoints[0].split(":")[0]
    return channel.host(address, dist.get_world_size(), functools.partial(store.set, name), on_stuck=on_stuck)


def _said_elsewhere(error: BaseException, expected: bool) -> str:
    """What the other ranks say when this one fails."""
    what = " ".join(str(error).split()) or type(error).__name__
    where = "" if dist.get_rank() == 0 else f"rank {dist.get_rank()}: "
    return where + what if expected else f"rank {dist.get_rank()} failed: {type(error).__name__}: {what:.500}"


def rank() -> int:
    """Of this process; known before it has joined, too."""
    return dist.get_rank()


def world_size() -> int:
    """How many ranks are joined; 1 outside of `joined`."""
    return dist.get_world_size() if _channel else 1


def exchange(value) -> list:
    """What all ranks said, in their order; `value` is one that JSON can hold. Waits for all, for as long as it takes.

    Raises RankLost when another rank has failed.
    """
    return _channel.exchange(value) if _channel else [value]


def meet() -> None:
    """Waits for all ranks, for as long as it takes."""
    exchange(None)


def in_turn(read):
    """The result of `read()`, called on rank 0 first, which may have to download something, and waited for.

    Then the first rank of every other machine calls it, and then all others.
    """
    turn = 0 if rank() == 0 else 1 if os.environ.get("PADDLE_LOCAL_RANK", "0") == "0" else 2
    for _ in range(turn):
        meet()
    found = read()
    for _ in range(turn, 3):
        meet()
    return found


def anywhere(flag: bool) -> bool:
    """Whether `flag` is set on any rank; on every rank the same answer."""
    return any(exchange(bool(flag)))


def difference(facts: dict[str, object]) -> str | None:
    """The first of `facts` that is not the same on all ranks, and what it is where; None if all are.

    On every rank the same answer.
    """
    everyones = exchange(facts)
    for name in facts:
        for other, theirs in enumerate(everyones):
            if theirs.get(name) != everyones[0].get(name):
                return f"{name}: {everyones[0].get(name)!r:.60} on rank 0, {theirs.get(name)!r:.60} on rank {other}"
    return None


class Vote:
    """Whether any rank wants something, such as to stop: asked about once a second, with one answer for all of them.

    Asking waits for the slowest rank, so it is not done at each step. With gloo it is, because there a rank that comes
    30 s late to the average of the gradients ends the training. A single process is not asked.
    """

    def __init__(self):
        self._asked: tuple[int, float] | None = None  # the step, and the time in seconds
        self._due = 0

    def __call__(self, step: int, wanted: bool) -> bool:
        """Whether any rank does after `step` finished steps; `wanted`: whether this one does."""
        if world_size() == 1:
            return wanted
        if step < self._due:
            return False
        before, now = self._asked, time.perf_counter()
        pace = (now - before[1]) / max(1, step - before[0]) if before else 1.0  # seconds a step
        said = exchange([pace, wanted])
        slowest = max(theirs for theirs, _ in said)  # the same on every rank, and so is the next step to ask after
        most = 1 if dist.get_backend() == "GLOO" else _MOST_STEPS_UNASKED
        self._asked, self._due = (step, now), step + int(np.clip(1 / slowest, 1, most))
        return any(wants for _, wants in said)


def gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all ranks, of one shape [n, ...], one after the other in the order of ranks: [world_size * n, ...].

    On every rank the same.
    """
    if world_size() == 1:
        return array
    meet()
    return gather_tensor(to_device(array)).numpy()


def gather_tensor(tensor):
    """Like `gather`, of a tensor that stays on the device; for use within a step, before which the ranks have met."""
    if world_size() == 1:
        return tensor
    parts = []
    dist.all_gather(parts, tensor)
    return paddle.concat(parts)


def of_rank_0(arrays: dict[str, np.ndarray] | None) -> dict[str, np.ndarray] | None:
    """What rank 0 has, on every rank; the argument of the other ranks does not count."""
    if world_size() == 1:
        return arrays
    form = exchange(arrays and {name: [str(a.dtype), a.shape] for name, a in arrays.items()})[0]
    if form is None:
        return None
    found = {}
    for name, (dtype, shape) in form.items():
        tensor = to_device(arrays[name] if rank() == 0 else np.empty(shape, dtype))
        dist.broadcast(tensor, src=0)
        found[name] = tensor.numpy()
    return found


@paddle.no_grad()
def take_statistics(model) -> None:
    """Puts rank 0's running statistics into `model` on every rank: its buffers, which are of one dtype."""
    if world_size() == 1:
        return
    meet()
    buffers = model.buffers()
    flat = paddle.concat([buffer.flatten() for buffer in buffers])
    dist.broadcast(flat, src=0)
    for buffer, part in zip(buffers, flat.split([buffer.size for buffer in buffers]), strict=True):
        buffer.copy_(part.reshape(buffer.shape), False)


def digest(arrays: dict[str, np.ndarray]) -> str:
    """The SHA-256 of names and contents, as hexadecimal digits."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        sha256.update(f"{name}\0".encode())
        sha256.update(np.ascontiguousarray(arrays[name]))
    return sha256.hexdigest()


def parallel(model):
    """`model` with gradients averaged over ranks. Batch statistics stay each rank's own, as in the reference."""
    if world_size() == 1:
        return model
    meet()
    # block2.layer.0.bn1 and its like never get a gradient, which the reducer has to look for
    return paddle.DataParallel(model, find_unused_parameters=True)
