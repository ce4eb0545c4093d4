"""Checkpoints of the reference, to us and back."""

import os
import subprocess
import sys

import cifar_archive
import numpy as np
import pytest
from running import ROOT

torch = pytest.importorskip("torch")

from fixmatch import checkpoint  # noqa: E402
from fixmatch.cli import eval_main  # noqa: E402
from fixmatch.data import NUM_CLASSES  # noqa: E402
from parity import convert  # noqa: E402
from parity.mirror.models import build_model  # noqa: E402

SHAPES = {"wideresnet": {"depth": 16, "width": 2}, "resnext": {"depth": 20, "width": 4, "cardinality": 4}}


def reference_file(path, arch: str, prefix: str = "", num_classes: int = 10) -> dict:
    torch.manual_seed(0)
    raw, average = (build_model(arch, num_classes, **SHAPES[arch]).state_dict() for _ in range(2))
    named = {key: {prefix + n: t for n, t in s.items()} for key, s in
             (("state_dict", raw), ("ema_state_dict", average))}
    torch.save({"epoch": 7, "acc": 12.5, "best_acc": np.float64(93.5), **named}, path)
    return {"state_dict": raw, "ema_state_dict": average}


@pytest.mark.parametrize("arch", SHAPES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_there_and_back_is_the_same(arch, prefix, tmp_path, capsys):
    states = reference_file(tmp_path / "model_best.pth.tar", arch, prefix)
    assert convert.main([str(tmp_path / "model_best.pth.tar"), str(tmp_path / "ours")]) == 0
    assert "logits agree" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "ours").manifest.config["model"]["arch"] == arch
    assert convert.main([str(tmp_path / "ours"), str(tmp_path / "back.pth.tar")]) == 0
    back = torch.load(tmp_path / "back.pth.tar", weights_only=True)
    for key, state in states.items():
        assert back[key].keys() == state.keys()
        assert all(torch.equal(back[key][n], t) for n, t in state.items() if not n.endswith("num_batches_tracked"))


def test_a_bare_state_dict(tmp_path):
    torch.save(build_model("wideresnet", 100, depth=10, width=1).state_dict(), tmp_path / "bare.pth")
    assert convert.main([str(tmp_path / "bare.pth"), str(tmp_path / "ours")]) == 0
    assert checkpoint.load(tmp_path / "ours").manifest.dataset == "cifar100"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_what_was_converted_can_be_evaluated(name, tmp_path, capsys):
    torch.save(build_model("wideresnet", NUM_CLASSES[name], depth=10, width=1).state_dict(), tmp_path / "bare.pth")
    assert convert.main([str(tmp_path / "bare.pth"), str(tmp_path / "ours")]) == 0
    files = cifar_archive.contents(name)
    meta, key = ("batches.meta", b"label_names") if name == "cifar10" else ("meta", b"fine_label_names")
    files[meta][key] = [word.encode() for word in convert._CLASSES[name].split()]
    cifar_archive.write_folder(tmp_path / "data", files, name)
    capsys.readouterr()
    code = eval_main([str(tmp_path / "ours"), "-o", f"data.root={tmp_path / 'data'}"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "raw" in out


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_was_here",)


@pytest.mark.parametrize("content", [
    {"state_dict": Hostile()}, {"state_dict": {"a.weight": torch.zeros(2)}}, [1, 2], {"state_dict": 3},
    {"state_dict": {"bn1.weight": torch.zeros(2, dtype=torch.bfloat16)}}, {"state_dict": {1: torch.zeros(2)}},
    {"state_dict": {**build_model("wideresnet", 10, depth=10, width=1).state_dict(), "extra.weight": torch.zeros(3)}},
    {"state_dict": {n: t for n, t in build_model("wideresnet", 10, depth=10, width=1).state_dict().items()
                    if n != "bn1.running_var"}},
])
def test_what_is_no_reference_checkpoint_is_refused(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "bad.pth")
    assert convert.main(["bad.pth", "ours"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(os.listdir()) == ["bad.pth"]


def test_a_checkpoint_with_a_foreign_name_is_refused(tmp_path, capsys):
    checkpoint.save(tmp_path / "ours", {"model/fc.wieght": np.zeros((2, 2)), "ema/fc.weight": np.zeros((2, 2))}, {})
    assert convert.main([str(tmp_path / "ours"), str(tmp_path / "back.pth.tar")]) == 2
    assert "fc.wieght" in capsys.readouterr().err
    assert not (tmp_path / "back.pth.tar").exists()


def test_garbage_and_absence_are_one_line(tmp_path, capsys):
    (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint")
    for name in ("garbage.pth", "absent.pth"):
        assert convert.main([str(tmp_path / name), str(tmp_path / "ours")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


WITHOUT_TORCH = """
import importlib.util, runpy, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_command(tmp_path):
    reference_file(tmp_path / "a.pth.tar", "wideresnet")
    tool = ROOT / "tools/convert.py"
    command = [sys.executable, tool, tmp_path / "a.pth.tar", tmp_path / "ours"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "hide.py").write_text(WITHOUT_TORCH)
    done = subprocess.run([sys.executable, tmp_path / "hide.py", *command[1:]], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "needs Torch" in done.stderr
