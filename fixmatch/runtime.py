"""Threads, BLAS path and device: what has to be set before Paddle loads, and what is chosen just after.

Paddle starts with one math thread, and its wheel carries an MKL that takes a slow path on AMD processors. Both are read
when the library loads, so `import fixmatch` sets them first. Measured on 2 cores of an AMD Zen 4 with
`python tools/bench.py step`; the figures stand in README.md. A variable that the user has set is left alone.
"""

import contextlib
import io
import os
import pathlib
import sys
import warnings

# Paddle prints these lines on every import with more than one thread. They warn of OpenBLAS builds; wheels carry MKL.
_IMPORT_NOISE = ("WARNING: OMP_NUM_THREADS set to", "PLEASE USE OMP_NUM_THREADS WISELY")


def physical_cores() -> int:
    """Physical cores that this process may run on: hyper-threads of a core count once, a cgroup quota is kept to."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = set()
    for cpu in allowed:
        topology = pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(topology.read_text().strip() if topology.exists() else str(cpu))
    quota = pathlib.Path("/sys/fs/cgroup/cpu.max")
    limit, period = (quota.read_text().split() if quota.exists() else ("max", "100000"))[:2]
    cores = len(siblings)
    return cores if limit == "max" else max(1, min(cores, round(int(limit) / int(period))))


def configure() -> None:
    """Sets the environment for Paddle's math libraries and imports Paddle without its import noise."""
    os.environ.setdefault("OMP_NUM_THREADS", str(physical_cores()))
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")  # on Intel this would cap MKL at AVX2
    os.environ.setdefault("KMP_INIT_AT_FORK", "TRUE")  # scikit-learn puts FALSE here, and forked children then hang
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No ccache found")
        import paddle  # noqa: F401
    for line in printed.getvalue().splitlines():
        if not line.startswith(_IMPORT_NOISE):
            print(line, file=sys.stderr)


def select_device(device: str) -> str:
    """Makes `device` ("auto", "cpu" or "gpu") Paddle's current one and returns its name, such as "cpu" or "gpu:0".

    Raises ValueError where a GPU is asked for and the Paddle build or the machine has none.
    """
    import paddle

    has_gpu = paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if device == "gpu" and not has_gpu:
        raise ValueError("runtime.device: gpu: this Paddle build or machine has none; use cpu or auto")
    paddle.device.set_device("gpu" if has_gpu and device != "cpu" else "cpu")
    return paddle.device.get_device()
