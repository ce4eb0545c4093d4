"""What Windows and macOS lack: every module can be imported without what only Linux has, and then trains."""

import ast
import pkgutil
import re
import subprocess
import sys

import pytest
from running import ROOT, digits, tool_environment

import fixmatch
import parity

UNIX_ONLY = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
LINUX_ONLY = ("sched_getaffinity", "register_at_fork", "fork", "forkpty", "killpg", "getpgid", "setsid", "getuid")
UNIX_SIGNALS = "SIG(ALRM|HUP|KILL|QUIT|STOP|CONT|USR1|USR2|CHLD|PIPE)"
ELSEWHERE = """
import importlib, importlib.util, os, signal, sys
import numpy, PIL.Image, numba, psutil, scipy.io, sklearn.datasets, tqdm, paddle, visualdl, filelock
if importlib.util.find_spec("torch"):
    import torch, parity.mirror.models  # libraries look after themselves
unix_only, linux_only, modules, arguments = (part.split(",") for part in sys.argv[1:])
for name in unix_only:
    sys.modules[name] = None  # from now on, an import of it is an ImportError
for name in linux_only:
    delattr(os, name)
for name in modules:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "reprod_log"):
            raise
from fixmatch import cli
sys.exit(cli.main(arguments))
"""


def modules() -> list[str]:
    found = [info.name for package in (fixmatch, parity)
             for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return [name for name in found if name != "parity.__main__"]


def test_every_module_is_imported_and_three_steps_are_trained_without_unix(tmp_path):
    assert len(modules()) > 100
    arguments = ["train", *digits("runtime.cpu_kernels=off", "train.total_steps=3", "run.dir=run")]
    lists = [UNIX_ONLY, LINUX_ONLY, modules(), map(str, arguments)]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *map(",".join, lists)], cwd=tmp_path, text=True,
                          capture_output=True, env={**tool_environment(), "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr
    assert "done: 3 steps" in done.stdout


def unix_names(source: str) -> list[str]:
    """Of os and signal, where `source` uses what Windows has not; what stands behind hasattr is left to it."""
    return [f"{node.value.id}.{node.attr}" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and f"hasattr({node.value.id}, \"{node.attr}\")" not in source
            and ((node.value.id == "os" and node.attr in LINUX_ONLY) or
                 (node.value.id == "signal" and (node.attr == "alarm" or re.fullmatch(UNIX_SIGNALS, node.attr))))]


@pytest.mark.parametrize("package", ["fixmatch", "parity", "tools"])
def test_no_code_calls_what_only_unix_has(package):
    """Also where it is only called late, which an import does not show."""
    found = {str(file): names for file in (ROOT / package).rglob("*.py")
             if (names := unix_names(file.read_text(encoding="utf-8")))}
    assert not found
    assert unix_names("def f(p):\n    os.killpg(p, signal.SIGKILL)") == ["os.killpg", "signal.SIGKILL"]
