"""A step does not wait: it asks the device for no number, other ranks for no word, and copies without holding the host.

The copies are tried with stand-ins for a GPU's pinned memory and events, which make a copy as late as they may.
"""

import numpy as np
import paddle
import pytest
from running import TINY

import fixmatch
from fixmatch import distributed, monitor, pinned, scaler, trainer
from fixmatch import step as algorithm

READS = ("numpy", "item", "tolist", "__float__", "__int__", "__index__", "__bool__", "__array__")


@pytest.mark.parametrize("settings", [(), ("ssl.mode=none", "runtime.cpu_kernels=off"), ("float16",)])
def test_no_number_is_read_in_ten_steps(tmp_path, monkeypatch, settings):
    reads, counting = [], []

    def noted(name):
        right = getattr(paddle.Tensor, name)

        def read(self, *args, **kwargs):
            if counting:
                reads.append(name)
            return right(self, *args, **kwargs)
        return read

    for name in READS:
        monkeypatch.setattr(paddle.Tensor, name, noted(name))
    right = trainer.Trainer._step

    def step(self, batches):
        counting[:] = [True] * (1 <= self.step < 11)  # the first step shows its losses
        right(self, batches)
        counting.clear()

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    monkeypatch.setattr(monitor, "_PATIENCE", np.inf)
    if settings == ("float16",):  # whose scaler runs on a CPU, too
        settings = ()
        build = algorithm.build_state

        def with_a_scaler(*args):
            state = build(*args)
            state.scaler = scaler.LossScaler()
            return state

        monkeypatch.setattr(algorithm, "build_state", with_a_scaler)
    config = fixmatch.load_config("digits", [*TINY, f"run.dir={tmp_path}/run", "train.total_steps=12",
                                             "run.log_every=12", "train.eval_every=12", *settings])
    fixmatch.train(config)
    assert reads == []
    counting.append(True)
    float(paddle.ones([]))
    assert reads, "the reads are not seen"


class LatePinnedMemory:
    """Copies that are made when their event is waited for, and not before."""

    def __init__(self, monkeypatch):
        self.pending = []
        monkeypatch.setattr(paddle, "CUDAPinnedPlace", paddle.CPUPlace)
        monkeypatch.setattr(paddle.Tensor, "cuda", lambda buffer, blocking: self.copy(buffer, blocking))
        monkeypatch.setattr(paddle.device.cuda, "Event", lambda: self)
        self.waits = 0

    def copy(self, buffer, blocking):
        assert not blocking
        target = paddle.zeros(buffer.shape, buffer.dtype)
        self.pending.append((buffer, target))
        return target

    def record(self):
        pass

    def synchronize(self):
        """A stream keeps its order: with a copy, the ones before it have been made."""
        self.waits += 1
        self.make(1)

    def make(self, count):
        for buffer, target in self.pending[:count]:
            target.set_value(buffer)
        del self.pending[:count]


def test_a_pinned_buffer_is_not_filled_before_its_copy_was_made(monkeypatch):
    memory, copy = LatePinnedMemory(monkeypatch), pinned.PinnedCopies()
    array = np.zeros((2, 3), np.int64)
    found = []
    for i in range(20):
        array[:] = i
        found.append(copy(array))
    assert memory.waits == 20 - pinned._UNDER_WAY
    memory.make(len(memory.pending))
    assert [t.numpy().max() for t in found] == [t.numpy().min() for t in found] == list(range(20))


def test_arrays_of_other_shapes_have_buffers_of_their_own(monkeypatch):
    memory, copy = LatePinnedMemory(monkeypatch), pinned.PinnedCopies()
    arrays = [np.arange(4).reshape(2, 2), np.arange(4), np.arange(4, dtype=np.uint8), np.arange(8).reshape(2, 4).T]
    found = [copy(a) for a in arrays]
    memory.make(len(found))
    for tensor, array in zip(found, arrays, strict=True):
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype


def test_ranks_are_asked_once_a_second_and_stop_after_the_same_step(monkeypatch):
    """Rank 0 takes 10 ms a step and rank 1 250 ms; rank 1 is told to stop after step 6."""
    clock, asked = [0.0], []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "NCCL")
    monkeypatch.setattr(distributed.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(distributed, "exchange", lambda mine: asked.append(step) or [mine, [0.25, step >= 6]])
    vote, stopped = distributed.Vote(), []
    for step in range(12):
        stopped.append(vote(step, wanted=False))
        clock[0] += 0.01
    assert asked == [0, 1, 5, 9]
    assert stopped.index(True) == 9
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "GLOO")  # which gives up on a rank that is late
    asked.clear()
    for step in range(12, 16):
        vote(step, wanted=False)
        clock[0] += 0.01
    assert asked == [13, 14, 15]  # the step to ask after had been chosen before
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    assert [vote(step, wanted) for step, wanted in ((16, False), (17, True))] == [False, True]
