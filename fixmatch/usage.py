"""What the user types here to call a command or to install what is missing, for usage lines and messages."""

import pathlib
import shutil
import sys

_TOOLS = pathlib.Path(__file__).resolve().parent.parent / "tools"
OPTIONAL = {  # package that some commands need -> what to give `pip install`; Torch's own index has its builds for CPUs
    "torch": "torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu",
    "reprod_log": "reprod_log==1.0.1",
    "paddle2onnx": "'paddle2onnx>=2.1,<2.2' onnxruntime",
    "onnx": "'paddle2onnx>=2.1,<2.2' onnxruntime",
    "onnxruntime": "onnxruntime",
}


def command(name: str) -> str:
    """The command `name` as the user types it: "python tools/train.py" in a checkout, "fixmatch train" elsewhere."""
    script = _TOOLS / f"{name}.py"
    if pathlib.Path(sys.argv[0]).stem == "fixmatch" or not script.exists():
        return f"{program('fixmatch')} {name}"
    return f"{program('python')} {_shown(script)}"


def program(name: str) -> str:
    """A program beside this Python, such as fixmatch: its name where PATH leads there, else the path that works."""
    beside = shutil.which(str(pathlib.Path(sys.executable).with_name(name)))
    return name if beside is None or shutil.which(name) == beside else _shown(pathlib.Path(beside))


def _shown(path: pathlib.Path) -> str:
    """Relative to the working directory where it lies in there."""
    here = pathlib.Path.cwd()
    shown = str(path.relative_to(here) if path.is_relative_to(here) else path)
    return f'"{shown}"' if " " in shown else shown
