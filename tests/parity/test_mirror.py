"""The mirror stands beside the trainer, definition by definition."""

import ast
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from running import ROOT

MIRRORED = ("models/__init__.py", "models/layers.py", "models/wideresnet.py", "models/resnext.py", "losses.py",
            "optimizer.py", "schedule.py", "ema.py", "normalize.py", "evaluation.py", "scaler.py", "step.py")


RENAMED = {"Conv2d": "Conv2D", "BatchNorm2d": "BatchNorm2D", "momentum_buffers": "state"}


# Torch's own code does what these do on the Paddle side, or the reverse.
ONLY_THERE = {"_BatchNorm2D", "_conv2d_as_product", "interleave", "de_interleave", "accuracy"}


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


@pytest.mark.parametrize(("kernel", "stride", "groups"),
                         [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4), (3, 2, 4)])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (3, 5), (8, 8)])
def test_a_convolution_as_one_product_is_torchs(kernel, stride, groups, size, monkeypatch):
    """Its output and both gradients, on maps that go either way."""
    torch = pytest.importorskip("torch")
    from parity.mirror.models import layers

    rng = np.random.default_rng([kernel, stride, groups, *size])
    conv = layers.Conv2d(8, 12, kernel, stride, groups).double()
    x = torch.from_numpy(rng.standard_normal((5, 8, *size))).requires_grad_(True)
    found = []
    for small_map in (0, 10_000):
        monkeypatch.setattr(layers, "_SMALL_MAP", small_map)
        y = conv(x)
        upstream = torch.from_numpy(np.random.default_rng(1).standard_normal(tuple(y.shape)))
        found.append([y, *torch.autograd.grad(y, (x, conv.weight), upstream)])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13 * float(one.detach().abs().max() + 1))


def test_torchs_compiler_is_loaded_for_those_who_ask_for_it_alone():
    pytest.importorskip("torch")
    program = """
import sys

from parity import mirror
import torch

network = torch.nn.Conv2d(3, 4, 3)
torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9).step()
loaded = ["torch._dynamo.eval_frame" in sys.modules]
mirror.load_compiler()
images = torch.arange(192.0).reshape(1, 3, 8, 8)
same = torch.equal(torch.compile(network, backend="aot_eager")(images), network(images))
print(*loaded, "torch._dynamo.eval_frame" in sys.modules, same)
"""
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.split() == ["False", "True", "True"], found.stderr
