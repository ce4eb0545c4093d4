"""The command: usage, settings, real images, exit codes."""

import os
import subprocess
import sys

import pytest
from PIL import Image
from running import ROOT

from parity import cli


def test_plant_from_the_command_line(prove, capsys):
    code, found = prove("--stage", "forward", "--plant", "bn-momentum-inverted")
    assert code == 1
    assert found["verdict"].startswith("PARITY FAIL buffers/block1.layer.0.bn1.running_mean")
    assert "likely BN momentum inverted" in found["verdict"]
    divergence = found["stages"][0]["first_divergence"]
    assert divergence["tensor"] == "buffers/block1.layer.0.bn1.running_mean"
    assert "inverted" in divergence["hint"]
    assert "reference" in capsys.readouterr().out  # the element dump


@pytest.mark.parametrize("arguments", [["--stage", "bogus"], ["--plant", "bogus"], ["-c", "no/such.yaml"],
                                       ["--steps", "0"], ["--seeds", "-1"], ["--seeds", str(2**63)],
                                       ["-o", "model.depht=3"], ["--mutation-score", "--plant", "max-pool"],
                                       ["--mutation-score", "--html", "x"], ["--write-goldens", "-c", "x.yaml"],
                                       ["--self-check", "--stage", "train"]])
def test_wrong_usage_exits_2_with_one_line(arguments, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.long
def test_networks_of_another_structure_end_in_a_verdict(prove):
    code, found = prove("--stage", "all", "--plant", "residual-missing")
    assert code == 1
    assert found["verdict"].startswith("PARITY FAIL eval activations/block1.layer.0.convShortcut missing")
    assert ("backward", "float32") not in [(s["stage"], s["dtype"]) for s in found["stages"]]  # nothing to round


@pytest.mark.parametrize("settings", [
    ["train.clip_grad_norm=0.1", "train.amp=float16", "optim.weight_decay=0", "run.seed=18446744073709551615"],
    pytest.param(["optim.momentum=0", "optim.nesterov=false"], marks=pytest.mark.long)])
def test_settings_without_counterpart_in_the_reference_are_no_divergence(settings, prove):
    for stage in ("optimizer", "scaler", "run"):
        assert prove("--stage", stage, "-o", *settings)[0] == 0


@pytest.mark.parametrize("settings", [
    ["augment.strong=ctaugment"], ["data.split_seed=5", "data.labels_per_class=[1,2,3,1,1,1,1,1,1,1]"]])
def test_real_images_are_those_of_the_configuration(settings, prove):
    code, found = prove("--stage", "train", "--steps", "2", "--real-images", "-o", *settings)
    assert code == 0
    assert "real images" in found["subject"]


def test_real_images_bring_their_number_of_classes(prove, tmp_path):
    for split in ("labeled", "test"):
        for name in ("left", "middle", "right"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (40 * i, 80, 120)).save(tmp_path / split / name / f"{i}.png")
    code, found = prove("--stage", "loss", "--real-images", "-o", "data.name=folder", f"data.root={tmp_path}",
                        "data.num_labeled=3")
    assert code == 0
    assert "3 classes" in found["subject"]


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_every_entrance_has_one_order_of_summation():
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", "import os, parity; print(os.environ['OMP_NUM_THREADS'])"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout == "1\n", done.stderr


def test_the_device_is_chosen_and_said(prove, capsys):
    code, found = prove("--stage", "loss", "--device", "cpu")
    assert (code, [stage["device"] for stage in found["stages"]]) == (0, ["cpu"])
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[3:]] == [
        ["stage", "device", "dtype"], ["loss", "cpu", "float64"]]
    assert cli.main(["--stage", "loss", "--device", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("error: runtime.device: gpu: this Paddle build or machine has none")
