"""What proves a run while it starts: the self-check before the first step, and the check of the first steps themselves.

Both are parity in a process of its own with a timeout, because a fault in a framework can crash or hang it, and that
too is a verdict. The self-check starts before the data is read, is waited for when the data is there, and its pass is
remembered until something changes. The check of the first steps runs beside the training, on a recording of them.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import pathlib
import platform
import runpy
import sys
import time
from subprocess import TimeoutExpired

from fixmatch import process
from fixmatch.config import Config, to_dict, to_yaml
from fixmatch.data.augment import pixels
from fixmatch.files import write_atomic
from fixmatch.kernels import loops
from fixmatch.recorder import Recorder
from fixmatch.runtime import device_name, without_garbage_collection
from fixmatch.scratch import scratch_folder
from fixmatch.version import versions

_ROOT = process.ROOT
# what the self-check's verdict depends on, beside the data set's number of classes
_SECTIONS = ("augment", "model", "train", "ssl", "optim", "ema", "runtime")
# glibc gives big freed blocks back to the system, which clears each page anew; so short a process keeps all but the
# biggest, of which gaps would be left. One that is started takes pages of 2 MiB, of which fewer have to be asked for.
_BIGGEST = 1 << 25  # bytes, and more
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(_BIGGEST), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # the same two, of glibc's malloc.h
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_PATIENCE = 20  # times parity.timeout: so long the check of the first steps may take beside the training


class SelfCheckFailed(RuntimeError):
    """The run is not what the reference computes; the message is one line."""


class _Parity:
    """`python -m parity ARGUMENTS` in a scratch folder that holds config.yaml; it writes parity.json there."""

    def __init__(self, config: Config, threads: str):
        self.scratch = contextlib.ExitStack()
        self.folder = self.scratch.enter_context(scratch_folder())
        self.threads, self.process, self.output, self.started = threads, None, None, time.perf_counter()
        (self.folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

    def start(self, *arguments: str, cwd: pathlib.Path | None = None, fork: bool = False) -> None:
        """With `fork` as a copy of this process, where that can be: what is to train is then what is proven."""
        self.started = time.perf_counter()
        files = ["-c", str(self.folder / "config.yaml"), "--json", str(self.folder / "parity.json")]
        environment = process.environment(_ROOT) | {
            "KMP_BLOCKTIME": "0", "OPENBLAS_NUM_THREADS": "1",  # who waits leaves the core to the other process
            "OMP_NUM_THREADS": self.threads, **_MEMORY}
        tunables = environment.get("GLIBC_TUNABLES")
        environment["GLIBC_TUNABLES"] = f"{tunables}:{_HUGE_PAGES}" if tunables else _HUGE_PAGES
        self.output = open(self.folder / "output.txt", "w+", encoding="utf-8")  # noqa: SIM115, closed in close()
        arguments, cwd = [*arguments, *files], cwd or self.folder
        if fork and process.can_fork():
            load_machine_code()  # which starts no thread
            self.process = process.Forked(functools.partial(_become_parity, arguments), environment, self.output, cwd)
        else:
            self.process = process.start(["-m", "parity", *arguments], environment, self.output, cwd)

    def result(self, timeout: float, what: str) -> dict:
        """Waits for the verdict: the content of parity.json, {"verdict", "passed", "seconds", ...}."""
        try:
            code = self.process.wait(timeout=max(0.0, timeout - (time.perf_counter() - self.started)))
        except TimeoutExpired:
            return self._failed(f"{what} did not finish within {timeout:g} s (parity.timeout)")
        found = _read(self.folder / "parity.json")
        if code not in (0, 1) or found is None or found["passed"] != (code == 0):
            self.output.seek(0)
            said = "".join(self.output.read().strip().splitlines()[-1:]).removeprefix("error: ") if code > 0 else ""
            return self._failed(f"{what} crashed ({process.cause(code)}){said and ': '}{said}")
        return {**found, "cached": False, "seconds": self._seconds()}

    def _failed(self, why: str) -> dict:
        return {"verdict": f"PARITY FAIL {why}", "passed": False, "cached": False, "stages": [],
                "seconds": self._seconds()}

    def _seconds(self) -> float:
        return round(time.perf_counter() - self.started, 3)

    def close(self) -> None:
        if self.process is not None:
            process.end(self.process)
            self.output.close()
        self.scratch.close()


class SelfCheck:
    """The check before the first step. Starts at once, unless its verdict is known or parity.enabled is false.

    `result` waits for the verdict, `close` gives up on it.
    """

    def __init__(self, config: Config):
        self.parity, self.timeout = None, config.parity.timeout
        if not config.parity.enabled:
            self.known = {"verdict": "not checked: parity.enabled is false", "passed": None}
            return
        self.remembered = _cache_folder() / f"{_fingerprint(config)}.json"
        self.known = _read(self.remembered)
        if self.known is not None:
            self.known["cached"] = True
            return
        self.parity = _Parity(config, threads=os.environ["OMP_NUM_THREADS"])
        self.parity.start("--self-check", "--processes", "2", fork=True)

    def result(self) -> dict:
        """The content of parity.json: {"verdict", "passed", "cached", "seconds", ...}. Only a pass is remembered."""
        if self.known is not None:
            return self.known
        found = self.parity.result(self.timeout, "the self-check")
        if found["passed"]:
            try:
                self.remembered.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.remembered, json.dumps(found))
            except OSError:  # a read-only home: the check runs again next time
                pass
        return found

    def close(self) -> None:
        if self.parity is not None:
            self.parity.close()


class StartCheck:
    """The check of the run's first steps: recorded as they happen, and recomputed beside the training.

    Args:
        config: of the run.
        facts: what the recomputation needs to know of the run beside its configuration, as JSON.
    """

    def __init__(self, config: Config, facts: dict):
        self.timeout = _PATIENCE * config.parity.timeout
        self.parity = _Parity(config, threads="1")
        self.recorder = Recorder(self.parity.folder / "recording")
        (self.parity.folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")

    def poll(self, wait: bool = False) -> dict | None:
        """The verdict, once it is there; None before that. To be called after every step; waits for it with `wait`.

        A run that ends before the last recorded step is judged by the steps that it had.
        """
        if self.parity.process is None:
            if self.recorder.facts and (wait or self.recorder.done):
                self.parity.start("--recording", str(self.recorder.folder), cwd=pathlib.Path.cwd())
            if not wait or self.parity.process is None:
                return None
        late = time.perf_counter() - self.parity.started > self.timeout
        if not wait and not late and self.parity.process.poll() is None:
            return None
        return self.parity.result(self.timeout, "the check of the first steps")

    def close(self) -> None:
        self.parity.close()


def load_machine_code() -> None:
    """Loads what numba compiles, before there are several processes that would all do so."""
    with without_garbage_collection(), contextlib.suppress(Exception):  # loaded again where needed, and judged there
        pixels.load()
        loops.load()


def _become_parity(arguments: list[str]) -> None:
    """What `python -m parity ARGUMENTS` does, in a copy of a process that has loaded Paddle."""
    process.end_with_parent()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # which is glibc's; the variables are read when a process starts
        libc.mallopt(_M_MMAP_THRESHOLD, _BIGGEST)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    sys.argv = ["parity", *arguments]
    runpy.run_module("parity", run_name="__main__", alter_sys=True)


def _read(path: pathlib.Path) -> dict | None:
    """A verdict, or None where there is none or it was damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and {"verdict", "passed"} <= found.keys() else None
    except (OSError, ValueError):
        return None


def _cache_folder() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "fixmatch-paddle" / "selfcheck"


def _fingerprint(config: Config) -> str:
    """SHA-256 of everything the verdict depends on: source, settings, versions, processor, threads and device."""
    digest = hashlib.sha256()
    for package in ("fixmatch", "parity"):
        for file in sorted((_ROOT / package).rglob("*")):
            if file.suffix in (".py", ".npz"):
                digest.update(f"{file.relative_to(_ROOT)}\0".encode() + file.read_bytes())
    tree = to_dict(config)
    tree["model"].pop("init")  # the values of weights decide nothing here
    settings = {name: tree[name] for name in _SECTIONS}
    digest.update(json.dumps([settings, tree["data"], versions(), platform.machine(), platform.processor(),
                              os.environ.get("OMP_NUM_THREADS"), device_name()], sort_keys=True).encode())
    return digest.hexdigest()
