"""Without Torch, results recorded from it are the reference."""

import importlib.util
import shutil

import numpy as np
import pytest
from running import ROOT

from fixmatch.config import load_config
from parity import cli, goldens, plants, stages
from parity.case import CLASSIC_SEEDS, Case
from parity.compare import compare


def test_without_torch_recorded_results_are_the_reference(monkeypatch, prove, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, found = prove("--self-check", "-c", str(ROOT / "configs/digits.yaml"))
    assert code == 0
    assert "torch is not installed" in found["against"]
    code, found = prove("--self-check", "--plant", "weight-decay-on-bn")
    assert code == 1
    assert "weight decay on batch norm" in found["verdict"]
    for arguments in (["--stage", "train"], ["--self-check", "--real-images"]):  # not recorded, so not passed either
        assert cli.main(arguments) == 2
        assert "needs Torch" in capsys.readouterr().err


@pytest.mark.long
def test_without_torch_another_shape_names_the_nearest(monkeypatch, prove):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, found = prove("--self-check", "-o", "model.depth=16")
    assert "nearest recorded" in found["subject"]


@pytest.mark.parametrize("name", [name if case.large or name == "wideresnet-10-2" else
                                  pytest.param(name, marks=pytest.mark.long) for name, case in goldens.CASES.items()])
def test_goldens_are_what_torch_gives_today(name):
    case = goldens.CASES[name]
    for recorded, fresh in (("loss", stages.stages()["loss"].reference(case)),
                            (goldens.WHOLE, stages.whole_reference(case))):
        rows = list(compare(goldens.digest(fresh), goldens.read(name, recorded)))
        assert rows
        assert all(row.passed for row in rows)


@pytest.mark.parametrize("name", goldens.CASES)
def test_of_the_pseudo_labels_some_count_and_some_do_not(name):
    """Digests of a mask that is neither all 0 nor all 1, either of which would hide what goes wrong with the other."""
    losses = dict(goldens.read(name, goldens.WHOLE))["step 0 losses"]
    (key, found), = ((key, found) for key, found in losses.items() if key.startswith("mask "))
    for value in (0.0,) if goldens.CASES[name].large else (0.0, 1.0):  # a large network is shown two
        assert (found != goldens._project("mask", np.full(int(key.split()[1]), value))).any()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Goldens that may be damaged."""
    shutil.copytree(goldens._FOLDER, tmp_path / "goldens")
    monkeypatch.setattr(goldens, "_FOLDER", tmp_path / "goldens")
    return tmp_path / "goldens"


def without_a_value(file) -> None:
    with np.load(file) as found:
        arrays = dict(found)
    np.savez_compressed(file, **arrays | {"values": arrays["values"][:-1]})


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:5000]), "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(), "a value fewer": without_a_value,
    "another's": lambda file: shutil.copy(file.with_name("resnext-29-8x64.npz"), file),
    "of other things": lambda file: np.savez(file, a=np.zeros(3))}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_golden_is_one_line(damage, folder):
    DAMAGES[damage](folder / "wideresnet-28-8.npz")
    with pytest.raises(goldens.GoldenError) as error:
        goldens.read("wideresnet-28-8", goldens.WHOLE)
    assert str(error.value).startswith(f"{folder / 'wideresnet-28-8.npz'}: ")
    assert str(error.value).count(str(folder)) == 1
    assert "\n" not in str(error.value)


def test_a_golden_without_a_stage_is_none(folder):
    with pytest.raises(goldens.GoldenError, match="not the recorded results"):
        goldens.read("wideresnet-28-8", "no such stage")


def case_of(recipe: str, *overrides: str) -> Case:
    """As a self-check takes it."""
    return Case(load_config(recipe, overrides), 100, CLASSIC_SEEDS[0]).small()


@pytest.mark.parametrize(("recipe", "name"), [
    ("cifar100_400", "wideresnet-28-8"), ("cifar100_10000", "wideresnet-28-8"),
    ("cifar100_2500_resnext", "resnext-29-8x64")])
def test_the_large_networks_of_packaged_recipes_are_recorded(recipe, name):
    assert case_of(recipe).large
    assert goldens.recorded(case_of(recipe)) == name


@pytest.mark.parametrize("override", [
    "model.width=6", "model.depth=22", "model.bn_momentum=0.99", "optim.lr=0.02", "optim.momentum=0.8",
    "optim.nesterov=false", "optim.weight_decay=5e-4", "optim.warmup_steps=1", "ema.decay=0.99", "ssl.threshold=0.9",
    "ssl.temperature=0.5", "ssl.lambda_u=2", "ssl.policy=freematch", "ssl.mode=none"])
def test_under_other_settings_nothing_is_recorded(override):
    assert goldens.recorded(case_of("cifar100_400", override)) is None


def test_what_does_not_decide_leaves_it_recorded():
    others = ["run.seed=7", "data.num_labeled=800", "train.batch_size=16", "train.total_steps=5000",
              "train.amp=bfloat16", "augment.strong=ctaugment"]
    assert goldens.recorded(case_of("cifar100_400", *others)) == "wideresnet-28-8"


@pytest.mark.parametrize("plant", [pytest.param("nothing", marks=pytest.mark.long), "momentum-0.95"])
def test_a_recorded_network_is_compared_with_its_golden(plant, monkeypatch):
    pytest.importorskip("torch")  # for the small network before it
    right = stages.whole_reference

    def of_small_ones(case):
        assert not case.large
        return right(case)

    monkeypatch.setattr(stages, "whole_reference", of_small_ones)
    with plants.planted(None if plant == "nothing" else plant):
        rows = [row for row in stages.rows_together(case_of("cifar100_400")) if "512x512x3x3" in row.tensor]
    wrong = {row.tensor.split("/")[0] for row in rows if not row.passed}
    assert {row.tensor.split("/")[0] for row in rows} >= {"step 0 gradients", "step 0 weights", "step 0 ema"}
    assert wrong == (set() if plant == "nothing" else {"step 0 weights", "step 0 ema"})
