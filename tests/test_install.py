"""What is installed: the wheel, used from an empty folder, and no build of Paddle unasked; Makefile and Dockerfile."""

import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from running import ROOT, TINY, tool_environment

from fixmatch import runtime, usage
from fixmatch.commands.configs import purpose
from fixmatch.config import recipes

PACKAGED = ("fixmatch", "parity", "configs")


def run(*command, cwd: pathlib.Path, timeout: float = 300, **variables) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in tool_environment().items() if name != "PYTHONPATH"}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment | variables, text=True,
                          capture_output=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from a copy, so that the checkout keeps clean."""
    place = tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGED, "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    done = run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", place / "dist", place,
               cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((place / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """A folder with the installed wheel alone."""
    place = tmp_path_factory.mktemp("installed")
    done = run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", place,
               wheel, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


# --- the wheel


def test_the_wheel_holds_all_files_of_its_packages_and_no_other(wheel):
    expected = {str(file.relative_to(ROOT)) for name in PACKAGED for file in (ROOT / name).rglob("*")
                if file.is_file() and "__pycache__" not in file.parts}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == {re.sub("^configs/", "fixmatch/configs/", name) for name in expected}


def test_no_build_of_paddle_is_asked_for(wheel):
    """So that pip puts none over another one."""
    metadata = zipfile.Path(wheel, next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA")))
    lines = metadata.read_text(encoding="utf-8").splitlines()
    found = [Requirement(line.split(": ", 1)[1]) for line in lines if line.startswith("Requires-Dist: ")]
    always = {r.name for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert {"numpy", "numba", "visualdl", "psutil"} <= always
    assert not {name for name in always if "paddle" in name or "torch" in name}
    extras = {extra: {r.name for r in found if r.marker and r.marker.evaluate({"extra": extra})} - always
              for extra in ("cpu", "gpu", "parity")}
    assert extras == {"cpu": {"paddlepaddle"}, "gpu": {"paddlepaddle-gpu"}, "parity": {"torch", "reprod_log"}}
    torch = next(str(r.specifier) for r in found if r.name == "torch")
    assert usage.OPTIONAL["torch"].startswith(f"torch{torch} ")


def test_an_installed_package_lists_recipes_proves_them_and_trains(installed, tmp_path):
    """The whole self-check takes a minute: the test below has it."""
    def call(*arguments) -> str:
        done = run(installed / "bin/fixmatch", *arguments, cwd=tmp_path, timeout=600, PYTHONPATH=str(installed))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert [line.split()[0] for line in call("configs").splitlines()] == sorted(recipes())
    assert call("parity", "--stage", "config").startswith("PARITY PASS")
    call("train", "-c", "digits", "-o", *TINY, "train.total_steps=2", "run.dir=run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 2
    assert result["commit"] is None  # which would be that of a checkout
    assert result["build"].startswith("paddlepaddle")


@pytest.mark.long
def test_an_empty_environment_from_wheel_to_convert(wheel, tmp_path):
    """Installed with [cpu] by pip, from its index, beside a build of Paddle for GPUs that pip takes for installed."""
    python, command = tmp_path / "venv/bin/python", tmp_path / "venv/bin/fixmatch"
    assert run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path).returncode == 0
    gpu = next((tmp_path / "venv").rglob("site-packages")) / "paddlepaddle_gpu-3.3.0.dist-info"
    gpu.mkdir()
    (gpu / "METADATA").write_text("Metadata-Version: 2.1\nName: paddlepaddle-gpu\nVersion: 3.3.0\n")
    (gpu / "RECORD").write_text("")
    planned = run(python, "-m", "pip", "install", "--dry-run", wheel, cwd=tmp_path)
    assert "Would install" in planned.stdout
    assert "paddlepaddle" not in planned.stdout
    shutil.rmtree(gpu)
    assert run(python, "-m", "pip", "install", f"{wheel}[cpu]", cwd=tmp_path, timeout=3000).returncode == 0
    (tmp_path / "empty").mkdir()

    def step(*arguments) -> str:
        done = run(*arguments, cwd=tmp_path / "empty", timeout=1800, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "No broken requirements" in step(python, "-m", "pip", "check")
    short = ["train", "-c", "digits", "-o", "train.total_steps=50", "train.eval_every=50"]
    assert "since torch is not installed" in step(command, "parity", "--self-check", "-c", "digits")
    assert "PARITY PASS" in step(command, *short)
    refused = run(command, "convert", "runs/digits", "digits.pth.tar", cwd=tmp_path / "empty")
    assert (refused.returncode, refused.stderr) == (
        2, f"error: this needs torch: pip install {usage.OPTIONAL['torch']}\n")
    step(python, "-m", "pip", "install", Requirement(usage.OPTIONAL["torch"].split()[0]))
    assert "against torch" in step(command, "parity", "--self-check", "-c", "digits")
    assert "PARITY PASS" in step(command, *short)
    assert "logits agree to" in step(command, "convert", "runs/digits", "digits.pth.tar")


# --- without Paddle


@pytest.fixture(scope="module")
def without_paddle(installed, tmp_path_factory) -> str:
    """A search path with what every command needs before Paddle, and no Paddle."""
    place = tmp_path_factory.mktemp("without")
    import tqdm
    import yaml

    for package in (tqdm, yaml):
        (place / package.__name__).symlink_to(pathlib.Path(package.__file__).parent)
    return os.pathsep.join([str(installed), str(place)])


@pytest.mark.parametrize("arguments", [["train", "-c", "digits"], ["configs"], ["convert", "a", "b"], ["check"]])
def test_every_command_says_in_one_line_what_to_install(without_paddle, installed, tmp_path, arguments):
    done = run(sys.executable, "-S", installed / "bin/fixmatch", *arguments, cwd=tmp_path, PYTHONPATH=without_paddle)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {runtime.NO_PADDLE}\n")
    assert os.listdir(tmp_path) == []


def test_a_notebook_gets_an_import_error_that_says_the_same(without_paddle, tmp_path):
    program = "import fixmatch\ntry:\n    fixmatch.train\nexcept ImportError as error:\n    print(error)"
    done = run(sys.executable, "-S", "-c", program, cwd=tmp_path, PYTHONPATH=without_paddle)
    assert done.stdout.splitlines() == [runtime.NO_PADDLE], done.stderr


def test_paddle_before_fixmatch_is_said_once(monkeypatch, caplog):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(runtime, "physical_cores", lambda: 2)
    monkeypatch.setattr(runtime, "started_with", lambda variable: True)
    runtime.configure()
    assert not caplog.records  # the user wants one thread
    monkeypatch.setattr(runtime, "started_with", lambda variable: False)
    with caplog.at_level(logging.WARNING):
        runtime.configure()
    assert len(caplog.messages) == 1
    assert "import fixmatch before paddle" in caplog.messages[0]


# --- what is printed to be typed


@pytest.mark.parametrize(("started", "on_path", "expected"), [
    ("tools/train.py", True, "python tools/parity.py"),
    ("tools/train.py", False, ".venv/bin/python tools/parity.py"),
    ("/there/bin/fixmatch", True, "fixmatch parity"),
    ("/there/bin/fixmatch", False, ".venv/bin/fixmatch parity"),
])
def test_printed_commands_can_be_typed(monkeypatch, tmp_path, started, on_path, expected):
    for name in ("python", "fixmatch", "visualdl"):
        program = tmp_path / ".venv/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(mode=0o755)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/parity.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(usage, "_TOOLS", tmp_path / "tools")
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.setenv("PATH", str(tmp_path / ".venv/bin") if on_path else "/nowhere")
    assert usage.command("parity") == expected
    assert usage.program("visualdl") == ("visualdl" if on_path else ".venv/bin/visualdl")


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda tool: tool.name)
def test_tools_can_be_run_as_they_are(tool):
    assert os.access(tool, os.X_OK)
    assert tool.read_text(encoding="utf-8").splitlines()[0] == "#!/usr/bin/env python3"


@pytest.mark.parametrize("recipe", recipes().values(), ids=lambda path: path.stem)
def test_a_recipe_says_its_command_and_what_it_is_for(recipe):
    content = recipe.read_text(encoding="utf-8")
    assert content.startswith(f"#   tools/train.py -c configs/{recipe.name}")
    assert re.fullmatch(r"[A-Z].{20,110}\.", purpose(content))
    others = [purpose(path.read_text(encoding="utf-8")) for path in recipes().values() if path != recipe]
    assert purpose(content) not in others


# --- the Makefile, which installs a build of Paddle


@pytest.fixture
def make(tmp_path):
    """make(*arguments) in a folder whose .venv/bin/python only writes down what it is told; returns what that was."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >> log\n')
    python.chmod(0o755)

    def call(*arguments: str) -> list[str]:
        (tmp_path / "log").write_text("")
        done = run("make", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        told = (tmp_path / "log").read_text().replace("--quiet --disable-pip-version-check ", "")
        return told.replace("-m pip ", "").splitlines()
    return call


CPU = "install paddlepaddle~=3.3.0"
SELF = "install --editable ."
TRAIN = "tools/train.py -c configs/digits.yaml"
UNINSTALL = "uninstall --yes paddlepaddle paddlepaddle-gpu"


def test_make_train_needs_no_torch_and_make_install_brings_its_build_for_cpus(make):
    assert make("train") == [CPU, SELF, TRAIN]
    assert make("train") == [TRAIN]
    assert make("install") == ["install --retries 0 --index-url https://download.pytorch.org/whl/cpu torch==2.13.0",
                               "install --editable .[parity,dev]"]
    assert make("install") == []


def test_make_keeps_to_the_build_of_paddle_that_was_chosen(make):
    gpu = "install paddlepaddle-gpu~=3.3.0 --index-url https://www.paddlepaddle.org.cn/packages/stable/cu118/"
    assert make("train") == [CPU, SELF, TRAIN]
    assert make("train", "PADDLE=gpu", "CUDA=118") == [UNINSTALL, gpu, SELF, TRAIN]
    assert make("train") == [TRAIN]
    assert make("train", "PADDLE='paddlepaddle>=3.3,<3.4' -i https://there/simple".replace("'", '"')) == [
        UNINSTALL, "install paddlepaddle>=3.3,<3.4 -i https://there/simple", SELF, TRAIN]
    assert make("train", "PADDLE=cpu") == [UNINSTALL, CPU, SELF, TRAIN]


def test_the_dockerfile_takes_the_makefiles_way():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 20
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    steps = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN make")]
    assert steps == ['make install PADDLE="$PADDLE" CUDA="$CUDA"']
    defaults = dict(line.removeprefix("ARG ").split("=") for line in lines if line.startswith("ARG "))
    assert f"CUDA ?= {defaults['CUDA']}\n" in makefile
    assert f"|| echo {defaults['PADDLE']})" in makefile
    version = re.search(r"FROM python:(3\.\d+)", "\n".join(lines))[1]
    supported = re.search(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert Requirement(f"python{supported}").specifier.contains(version)
    arguments = json.loads(next(line for line in lines if line.startswith("CMD ")).removeprefix("CMD "))
    assert arguments == ["train", "-c", "digits"]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {".venv", ".git", "runs", "data"} <= set(ignored)
