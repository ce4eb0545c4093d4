"""The mirror stands beside the trainer, definition by definition."""

import ast
import pathlib

import pytest
from running import ROOT

MIRRORED = ("models/__init__.py", "models/layers.py", "models/wideresnet.py", "models/resnext.py", "losses.py",
            "optimizer.py", "schedule.py", "ema.py", "normalize.py", "evaluation.py", "scaler.py", "step.py")


RENAMED = {"Conv2d": "Conv2D", "BatchNorm2d": "BatchNorm2D", "momentum_buffers": "state"}


# Torch's own code does what these do on the Paddle side, or the reverse.
ONLY_THERE = {"_BatchNorm2D", "interleave", "de_interleave", "accuracy"}


def definitions(path: pathlib.Path) -> list[str]:
    """Names of classes, functions and methods in the order of the file."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(RENAMED.get(node.name, node.name))
        if isinstance(node, ast.ClassDef):
            names += [f"{names[-1]}.{RENAMED.get(n.name, n.name)}" for n in node.body if isinstance(n, ast.FunctionDef)]
    return names


@pytest.mark.parametrize("file", MIRRORED)
def test_the_mirror_defines_the_same_things_in_the_same_order(file):
    ours, mirror = definitions(ROOT / "fixmatch" / file), definitions(ROOT / "parity/mirror" / file)
    mirror = [name for name in mirror if name not in ONLY_THERE]
    assert [name for name in ours if name in mirror] == mirror
