"""Data parallelism under `python -m paddle.distributed.launch`; one process is rank 0 of 1."""

import time

import numpy as np
import paddle
import paddle.distributed as dist

from fixmatch.normalize import to_device

_MOST_STEPS_UNASKED = 100  # between two questions whether to stop


def init() -> tuple[int, int]:
    """Joins the process group, if this process was launched in one. Returns (rank, world_size)."""
    if dist.get_world_size() > 1:
        dist.init_parallel_env()
    return dist.get_rank(), dist.get_world_size()


def rank() -> int:
    """Of this process; known before `init`, too."""
    return dist.get_rank()


def barrier() -> None:
    """Waits for all ranks. An all-reduce, because gloo's barrier is not there for every device."""
    if dist.get_world_size() > 1:
        token = paddle.zeros([1])
        dist.all_reduce(token)
        token.numpy()  # NCCL's all-reduce alone does not hold the host


def anywhere(flag: bool) -> bool:
    """Whether `flag` is set on any rank; on every rank the same answer."""
    return bool(gather(np.array([int(flag)])).any())


class StopVote:
    """Whether the ranks are to stop: asked about once a second, and answered on all of them after the same step.

    Asking waits for the slowest rank and its device, so it is not done at each step. A single process is not asked.
    """

    def __init__(self):
        self._asked: tuple[int, float] | None = None  # the step, and the time in seconds
        self._due = 0

    def __call__(self, step: int, wanted: bool) -> bool:
        """Whether to stop after `step` finished steps; `wanted`: this rank was told to."""
        if dist.get_world_size() == 1:
            return wanted
        if step < self._due:
            return False
        before, now = self._asked, time.perf_counter()
        pace = (now - before[1]) / max(1, step - before[0]) if before else 1.0  # seconds a step
        slowest = float(gather(np.array([pace])).max())  # the same on every rank, and so is the next step to ask after
        self._asked, self._due = (step, now), step + int(np.clip(1 / slowest, 1, _MOST_STEPS_UNASKED))
        return anywhere(wanted)


def gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all ranks, of one shape [n, ...], one after the other in the order of ranks: [world_size * n, ...].

    On every rank the same.
    """
    if dist.get_world_size() == 1:
        return array
    parts = []
    dist.all_gather(parts, to_device(array))
    return np.concatenate([part.numpy() for part in parts])


def parallel(model):
    """`model` with gradients averaged over ranks. Batch statistics stay each rank's own, as in the reference."""
    if dist.get_world_size() == 1:
        return model
    # block2.layer.0.bn1 and its like never get a gradient, which the reducer has to look for
    return paddle.DataParallel(model, find_unused_parameters=True)
