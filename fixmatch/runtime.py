"""Threads, BLAS path and device: what has to be set before Paddle loads, and what is chosen just after.

Paddle starts with one math thread, and its wheel carries an MKL that takes a slow path on AMD processors. Both are read
when the library loads, so `import fixmatch` sets them first. Measured on 2 cores of an AMD Zen 4 with
`python tools/bench.py step`; the figures stand in README.md. A variable that the user has set is left alone.
"""

import contextlib
import gc
import importlib.util
import io
import logging
import os
import pathlib
import platform
import sys
import warnings
from collections.abc import Iterator

# What a GPU needs to give the same bits each time: convolutions by cuDNN algorithms that add in one order, chosen by
# rule and not by trial, and gradients of lookups without atomic additions. A build without CUDA does not know them all.
_DETERMINISTIC = {"FLAGS_cudnn_deterministic": True, "FLAGS_cudnn_exhaustive_search": False,
                  "FLAGS_use_autotune": False, "FLAGS_embedding_deterministic": 1}
# Paddle prints these lines on every import with more than one thread. They warn of OpenBLAS builds; wheels carry MKL.
_IMPORT_NOISE = ("WARNING: OMP_NUM_THREADS set to", "PLEASE USE OMP_NUM_THREADS WISELY")


NO_PADDLE = ("Paddle is not installed: pip install 'paddlepaddle>=3.3,<3.4'; for a GPU, paddlepaddle-gpu from Paddle's "
             "own index, as README.md says")


def has_paddle() -> bool:
    return "paddle" in sys.modules or importlib.util.find_spec("paddle") is not None


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


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def peak_memory() -> int:
    """The most memory that this process had at one time so far, in bytes."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil

        info = psutil.Process().memory_info()
        return getattr(info, "peak_wset", info.rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def configure() -> None:
    """Sets the environment for Paddle's math libraries and imports Paddle, if it is installed, without its noise."""
    if not has_paddle():
        return
    if "paddle" in sys.modules:
        _warn_of_one_thread()
    os.environ.setdefault("OMP_NUM_THREADS", str(physical_cores()))
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")  # on Intel this would cap MKL at AVX2
    os.environ.setdefault("GLOG_minloglevel", "1")  # what Paddle's C++ notes below a warning is for its developers
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, so that no thread is there when a process is copied
    os.environ.setdefault("KMP_INIT_AT_FORK", "TRUE")  # scikit-learn puts FALSE here, and forked children then hang
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), warnings.catch_warnings(), without_garbage_collection():
        warnings.filterwarnings("ignore", message="No ccache found")
        import paddle  # noqa: F401
    for line in printed.getvalue().splitlines():
        if not line.startswith(_IMPORT_NOISE):
            print(line, file=sys.stderr)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For the import of large packages: nothing of it is garbage, and looking for it takes a sixth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _warn_of_one_thread() -> None:
    """Paddle, imported without OMP_NUM_THREADS, has set it to 1 and keeps to that, whatever is done later."""
    if os.environ.get("OMP_NUM_THREADS") == "1" and not started_with("OMP_NUM_THREADS") and physical_cores() > 1:
        logging.getLogger("fixmatch").warning(
            "fixmatch: paddle was imported first, so its operators have one thread; import fixmatch before paddle, or "
            "set OMP_NUM_THREADS to the number of cores before both")


def started_with(variable: str) -> bool:
    """Whether this process was given the environment variable, rather than has set it; False where nobody knows."""
    given = pathlib.Path("/proc/self/environ")
    return given.exists() and f"{variable}=".encode() in given.read_bytes()


def select_device(device: str, deterministic: bool = False) -> str:
    """Makes `device` ("auto", "cpu" or "gpu") Paddle's current one and returns its name, such as "cpu" or "gpu:0".

    Args:
        deterministic: a GPU is to give the same bits each time; a CPU does so anyway, at one number of threads.

    Raises ValueError where a GPU is asked for and the Paddle build or the machine has none.
    """
    import paddle

    has_gpu = paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if device == "gpu" and not has_gpu:
        raise ValueError("runtime.device: gpu: this Paddle build or machine has none; use cpu or auto")
    on_gpu = has_gpu and device != "cpu"
    if on_gpu and deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        paddle.set_flags(_DETERMINISTIC)
    paddle.device.set_device("gpu" if on_gpu else "cpu")
    return paddle.device.get_device()


def device_name() -> str:
    """Paddle's current device and, of a GPU, its model: "cpu", or "gpu:0 NVIDIA A100-SXM4-40GB"."""
    import paddle

    device = paddle.device.get_device()
    return f"{device} {paddle.device.cuda.get_device_name()}" if device.startswith("gpu") else device


def mixed_precision(setting: str) -> str | None:
    """What of train.amp holds on Paddle's current device: "float16" or "bfloat16", or None for float32.

    A CPU trains in float32. Raises ValueError for a GPU that lacks the dtype, of which Paddle would only warn.
    """
    import paddle

    if setting == "off" or not paddle.device.get_device().startswith("gpu"):
        return None
    supported = {"float16": paddle.amp.is_float16_supported, "bfloat16": paddle.amp.is_bfloat16_supported}
    if not supported[setting]():
        raise ValueError(f"train.amp: {setting}: this GPU cannot compute in it; use off or "
                         f"{'float16' if setting == 'bfloat16' else 'a newer GPU'}")
    return setting


def arithmetic(amp: str | None) -> str:
    """In what convolutions and products are computed on the current device: `amp`, or "tf32" or "float32".

    A GPU that has TF32 rounds the factors of float32 products to the 11 bits of float16, unless that is switched off.
    """
    import paddle

    on_gpu = paddle.device.get_device().startswith("gpu")
    return amp or ("tf32" if on_gpu and paddle.base.core.get_cudnn_switch() else "float32")
