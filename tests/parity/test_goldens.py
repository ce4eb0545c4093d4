"""Without Torch, results recorded from it are the reference."""

import importlib.util

import numpy as np
import pytest
from running import ROOT, first_of

from parity import cli, goldens, stages
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


@pytest.mark.parametrize("name", first_of(goldens.CASES, 2))
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
