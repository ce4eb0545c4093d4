"""Fixtures that more than one test file uses. Every random number in the tests has a fixed seed."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from cifar_archive import ARCHIVES, contents, write_archive
from running import ROOT, Ran, tool_environment

import fixmatch  # noqa: F401  before paddle: it sets the math threads


def pytest_collection_modifyitems(items):
    """What is marked gpu is skipped by name where there is none."""
    import paddle

    if not (paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {item.name}"))


@pytest.fixture(autouse=True)
def _seeds():
    import paddle

    np.random.seed(0)
    paddle.seed(0)


@pytest.fixture(scope="session")
def run_tool():
    """run_tool("train", *arguments, cwd=...) runs tools/train.py in a process of its own."""
    def run(tool: str, *arguments, cwd: pathlib.Path, timeout: float = 120, **options) -> Ran:
        done = subprocess.run([sys.executable, ROOT / f"tools/{tool}.py", *map(str, arguments)], cwd=cwd, text=True,
                              capture_output=True, timeout=timeout, env=tool_environment(), check=False, **options)
        return Ran(done.returncode, done.stdout, done.stderr)
    return run


@pytest.fixture
def run_here(monkeypatch, capsys):
    """As run_tool, in this process: what a test needs that is about the command and not about a process."""
    def run(tool: str, *arguments, cwd: pathlib.Path) -> Ran:
        from fixmatch import cli

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            code = cli.main([tool, *map(str, arguments)])
        return Ran(code, *capsys.readouterr())
    return run


@pytest.fixture
def cifar10_root(tmp_path) -> pathlib.Path:
    """A folder with a synthetic CIFAR-10 archive of 100 training and 20 test images."""
    write_archive(tmp_path / "cifar", contents())
    return tmp_path / "cifar"


@pytest.fixture(scope="session")
def real_cifar10() -> pathlib.Path:
    """A folder that holds the CIFAR-10 archive, named by FIXMATCH_TEST_CIFAR."""
    root = pathlib.Path(os.environ.get("FIXMATCH_TEST_CIFAR", ""))
    if not os.environ.get("FIXMATCH_TEST_CIFAR") or not (root / ARCHIVES["cifar10"]).exists():
        pytest.skip(f"FIXMATCH_TEST_CIFAR names no folder with {ARCHIVES['cifar10']}")
    return root
