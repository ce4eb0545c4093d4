"""The self-check before training: parity in a subprocess with a timeout, remembered until something changes.

A subprocess, because a fault in a framework can crash or hang it, and that too is a verdict. It starts before the data
is read and is waited for when the data is there.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time

from fixmatch.config import Config, to_dict, to_yaml
from fixmatch.files import write_atomic

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_SECTIONS = ("model", "ssl", "optim", "ema")  # what the verdict depends on, beside the data set's number of classes


class SelfCheck:
    """Starts at once, unless its verdict is known or parity.enabled is false.

    `result` waits for the verdict, `close` gives up on it.
    """

    def __init__(self, config: Config):
        self.started = time.perf_counter()
        self.process = self.scratch = None
        self.timeout = config.parity.timeout
        if not config.parity.enabled:
            self.known = {"verdict": "not checked: parity.enabled is false", "passed": None}
            return
        self.remembered = _cache_folder() / f"{_fingerprint(config)}.json"
        self.known = _read(self.remembered)
        if self.known is not None:
            self.known["cached"] = True
            return
        self.scratch = tempfile.TemporaryDirectory(prefix="fixmatch-selfcheck-")
        folder = pathlib.Path(self.scratch.name)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "parity", "--self-check", "-c", "config.yaml", "--json", "parity.json"]
        environment = _without_launcher(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
            [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        self.output = open(folder / "output.txt", "w+")  # noqa: SIM115, closed in close()
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,  # noqa: S603
                                        stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True)

    def result(self) -> dict:
        """The content of parity.json: {"verdict", "passed", "cached", "seconds", ...}. Only a pass is remembered."""
        if self.known is not None:
            return self.known
        try:
            code = self.process.wait(timeout=max(0.0, self.timeout - (time.perf_counter() - self.started)))
        except subprocess.TimeoutExpired:
            return self._failed(f"the self-check did not finish within {self.timeout:g} s (parity.timeout)")
        found = _read(pathlib.Path(self.scratch.name) / "parity.json")
        if code not in (0, 1) or found is None or found["passed"] != (code == 0):
            self.output.seek(0)
            said = self.output.read().strip().splitlines()
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return self._failed(f"the self-check crashed ({cause}){': ' + said[-1] if said else ''}")
        found = {**found, "cached": False, "seconds": round(time.perf_counter() - self.started, 3)}
        if found["passed"]:
            try:
                self.remembered.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.remembered, json.dumps(found))
            except OSError:  # a read-only home: the check runs again next time
                pass
        return found

    def _failed(self, why: str) -> dict:
        return {"verdict": f"PARITY FAIL {why}", "passed": False, "cached": False, "stages": [],
                "seconds": round(time.perf_counter() - self.started, 3)}

    def close(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.output.close()
            self.scratch.cleanup()


def _without_launcher(environment) -> dict[str, str]:
    """What paddle.distributed.launch sets is left out: the self-check is no rank of the training."""
    return {name: value for name, value in environment.items() if not name.startswith(("PADDLE_", "FLAGS_selected_"))}


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
    """SHA-256 of everything the verdict depends on: source, settings, versions, processor."""
    digest = hashlib.sha256()
    for package in ("fixmatch", "parity"):
        for file in sorted((_ROOT / package).rglob("*")):
            if file.suffix in (".py", ".npz"):
                digest.update(f"{file.relative_to(_ROOT)}\0".encode() + file.read_bytes())
    tree = to_dict(config)
    settings = {name: tree[name] for name in _SECTIONS}
    versions = {name: _version(name) for name in ("paddlepaddle", "torch", "numpy", "pillow", "numba")}
    digest.update(json.dumps([settings, config.data.name, versions, platform.python_version(), platform.machine(),
                              platform.processor()], sort_keys=True).encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
