"""How many threads the kernels use.

oneDNN starts its threads through whichever OpenMP library its symbols were bound to when Paddle loaded: Intel's
libiomp5 from Paddle's wheel, or GNU's libgomp where another package (Torch) had put one into the process before. Only
the bound one obeys, so `bound_runtime` finds it by asking oneDNN whether a kernel's buffers grow with the number of
threads.

A child forked after libgomp has run threads deadlocks when it starts threads itself; libiomp5 survives a fork. Under
libgomp a forked child therefore stays with one thread.
"""

import ctypes
import functools
import os
import pathlib
import re

import paddle

from fixmatch.kernels import onednn
from fixmatch.runtime import physical_cores, started_with

_VARIABLE = "OMP_NUM_THREADS"


class _Runtime:
    """One OpenMP library, opened by path."""

    def __init__(self, path):
        self.library = library = ctypes.CDLL(path)
        self.name = os.path.basename(path)
        self.survives_fork = "iomp" in self.name
        self.set_threads = library.omp_set_num_threads
        self.set_threads.argtypes, self.set_threads.restype = [ctypes.c_int], None
        self.max_threads = library.omp_get_max_threads
        self.max_threads.argtypes, self.max_threads.restype = [], ctypes.c_int

    def address(self, function):
        """Of one of its functions, for compiled code."""
        return ctypes.cast(getattr(self.library, function), ctypes.c_void_p).value

    def parallel(self, function, argument, threads):
        """Calls the machine code at the address `function`, void (void *), once in each of so many threads."""
        self.library.GOMP_parallel(ctypes.c_void_p(function), argument, ctypes.c_uint(threads), ctypes.c_uint(0))

    def is_bound(self):
        """Whether oneDNN listens to this library. Leaves the number of threads as it was."""
        before = self.max_threads()
        sizes = []
        for threads in (1, 3):
            self.set_threads(threads)
            sizes.append(_probe_bytes())
        self.set_threads(before)
        return sizes[0] != sizes[1]


def _probe_bytes():
    """Buffer of a batch norm whose statistics are summed per thread."""
    data = onednn.Description((64, 16, 8, 8), onednn.ACDB)
    operation = onednn.PrimitiveDesc.on_engine(
        "batch_normalization_forward", onednn.FORWARD_TRAINING, data, data, 1e-5, 0, None)
    return operation.scratch_bytes


@functools.cache
def bound_runtime():
    """The OpenMP library that oneDNN uses. Raises onednn.Unusable when there is none that obeys."""
    onednn.load()
    own = os.path.join(os.path.dirname(paddle.__file__), "libs", "libiomp5.so")
    mapped = re.findall(r"\S*/lib[gi]?omp[^/\s]*\.so\S*", pathlib.Path("/proc/self/maps").read_text())
    for path in dict.fromkeys([own, *mapped]):
        if os.path.exists(path):
            runtime = _Runtime(path)
            if runtime.is_bound():
                return runtime
    raise onednn.Unusable("no OpenMP library in this process sets oneDNN's number of threads")


def default_threads():
    """OMP_NUM_THREADS where the user or fixmatch.runtime set it, else the physical cores this process may use.

    Paddle puts the variable to 1 when it is imported without one, so a 1 counts only if the process was started with
    it.
    """
    value = os.environ.get(_VARIABLE, "")
    if value.isdigit() and int(value) > 0 and (value != "1" or started_with(_VARIABLE)):
        return int(value)
    return physical_cores()


_chosen = None  # what set_num_threads was told, for threads that have not run a kernel yet
_forked = False


def _after_fork():
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def set_num_threads(count):
    """Threads for every kernel and, since they share the OpenMP library, for Paddle's own operators in the calling
    thread.

    Args:
        count: at least 1.

    Raises:
        ValueError: count is smaller than 1.
        onednn.Unusable: the kernels cannot run here.
    """
    global _chosen
    if count < 1:
        raise ValueError(f"set_num_threads: at least 1, got {count}")
    _chosen = count
    num_threads()


def num_threads():
    """Brings the calling thread's OpenMP setting in line with what was chosen and returns it."""
    global _chosen
    if _chosen is None:
        _chosen = default_threads()
    runtime = bound_runtime()
    count = 1 if _forked and not runtime.survives_fork else _chosen
    if runtime.max_threads() != count:
        runtime.set_threads(count)
    return count
