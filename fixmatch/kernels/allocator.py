"""Memory for the operators' outputs, kept between steps.

glibc returns big freed blocks to the operating system, so every step gets the pages of all its activations anew, which
costs 15% of a WideResNet-28-2 step and half of a ResNeXt-28 one. Telling glibc to keep them (mallopt) is no way out:
with Paddle's page-aligned requests its heap breaks into pieces, and peak memory doubled. So blocks from 1 MB on come
from a pool here and return to it when Paddle lets go of the tensor; smaller ones are left to Paddle.
"""

import mmap
import threading
import weakref
from math import prod

import numpy as np
import paddle
from paddle.base import core

POOL_FROM = 1 << 20  # bytes
_SLACK = 1.1  # blocks in use and idle together, relative to the most that was in use at one time


class _Pool:
    """Blocks of private memory, reused by exact size; the longest idle ones are given up when the slack is used up."""

    def __init__(self):
        self._lock = threading.RLock()  # a garbage collection inside take() may call give()
        self._idle = []  # longest idle first
        self._idle_bytes = self._used_bytes = self._most_used_bytes = 0

    def take(self, nbytes):
        """A block of this size with undefined content."""
        with self._lock:
            self._used_bytes += nbytes
            self._most_used_bytes = max(self._most_used_bytes, self._used_bytes)
            for index in range(len(self._idle) - 1, -1, -1):
                if len(self._idle[index]) == nbytes:
                    self._idle_bytes -= nbytes
                    return self._idle.pop(index)
            while self._idle and self._used_bytes + self._idle_bytes > _SLACK * self._most_used_bytes:
                self._idle_bytes -= len(self._idle.pop(0))
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def give(self, block):
        """Takes a block back."""
        with self._lock:
            self._used_bytes -= len(block)
            self._idle_bytes += len(block)
            self._idle.append(block)

    def give_up_idle(self):
        """Gives all idle blocks back to the system."""
        with self._lock:
            self._idle.clear()
            self._idle_bytes, self._most_used_bytes = 0, self._used_bytes


_pool = _Pool()
give_up_idle = _pool.give_up_idle  # where what comes next needs blocks of other sizes


def empty(shape):
    """An uninitialized float32 tensor of this shape."""
    nbytes = 4 * prod(shape)
    if nbytes < POOL_FROM:
        return paddle.empty(shape, dtype="float32")
    block = _pool.take(nbytes)
    array = np.frombuffer(block, dtype=np.float32).reshape(shape)
    weakref.finalize(array, _pool.give, block).atexit = False
    tensor = paddle.empty([0], dtype="float32")
    # Keeps the array, and with it the block, until the last tensor that shares it is gone. Not by paddle's from_dlpack,
    # which constructs a paddle.Tensor in Python and so, in Paddle 3.3, loses 80 bytes for good at every call.
    tensor.get_tensor()._share_data_with(core.from_dlpack(array.__dlpack__()))
    return tensor
