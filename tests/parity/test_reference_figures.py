"""Stage `reference`: the files hold what they should, both sides agree with them, and shared misunderstandings fail."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from running import ROOT, first_of

from fixmatch.config import Config, ModelConfig
from parity import goldens, plants
from parity import reference_figures as stage
from parity.case import Case
from parity.compare import GATE
from parity.reference_production import Production, initial

CASES = {arch: Case(Config(model=ModelConfig(arch, 28, 4)), 10) for arch in ("wideresnet", "resnext")}
WITH_TORCH = importlib.util.find_spec("torch") is not None
SHARED = {name: bug for name, bug in plants.PLANTS.items() if bug.kind == "reference"}
PRODUCTION_ALONE = {"ema-starts-elsewhere", "network-left-in-eval-mode"}

# The row that names each bug: the first that diverges.
NAMED_BY = {
    "both-bn-momentum-inverted": "wideresnet-16-2/step0/state/block1.layer.0.bn1.running_mean",
    "both-bn-epsilon-1e-3": "wideresnet-16-2/step0/logits",
    "both-relu": "wideresnet-16-2/step0/logits",
    "both-slope-0.01": "wideresnet-16-2/step0/logits",
    "both-resnext-leaky-relu": "resnext-20-4x4d/step0/logits",
    "both-activate-before-residual-everywhere": "wideresnet-16-2/step0/logits",
    "both-stride-on-conv2": "wideresnet-16-2/step0/logits",
    "both-max-pool": "wideresnet-16-2/step0/logits",
    "both-threshold-exclusive": "schedule-randaugment/tie/mask",
    "both-temperature-ignored": "wideresnet-10-1-warmup/step0/confidence",
    "both-lambda-u-ignored": "wideresnet-10-1-warmup/step0/loss",
    "both-masked-mean": "wideresnet-16-2/step0/loss_u",
    "both-weak-and-strong-swapped": "wideresnet-16-2/step0/confidence",
    "both-no-nesterov": "wideresnet-16-2/step0/state/conv1.weight",
    "both-weight-decay-on-bn": "wideresnet-16-2/step0/momentum/block1.layer.0.bn1.weight",
    "both-weight-decay-halved": "wideresnet-16-2/step0/momentum/conv1.weight",
    "both-cosine-1-2": "schedule-randaugment/schedule/1048576-0/factors",
    "both-lr-off-by-one": "schedule-randaugment/schedule/1048576-0/factors",
    "both-warmup-in-epochs": "schedule-randaugment/schedule/1000-100/factors",
    "both-ema-buffers-averaged": "wideresnet-16-2/step0/ema/block1.layer.0.bn1.running_mean",
    "both-ema-before-step": "wideresnet-16-2/step0/ema/conv1.weight",
    "both-ema-decay-0.99": "wideresnet-16-2/step0/ema/conv1.weight",
    "ema-starts-elsewhere": "wideresnet-16-2/step0/ema/conv1.weight",
    "network-left-in-eval-mode": "wideresnet-16-2/step0/logits",
    "both-translate-range": "schedule-randaugment/randaugment/TranslateX",
    "both-brightness-range": "schedule-randaugment/randaugment/Brightness",
    "both-solarize-from-the-other-end": "schedule-randaugment/randaugment/Solarize",
    "both-rotate-clockwise": "schedule-randaugment/randaugment/Rotate",
    "both-cutout-exclusive": "schedule-randaugment/randaugment/AutoContrast",
    "both-cutout-black": "schedule-randaugment/randaugment/AutoContrast",
}


@pytest.fixture(scope="module")
def every():
    with plants.planted(None):
        return list(stage.rows(CASES["wideresnet"]))


def test_production_and_mirror_compute_every_figure_of_the_reference(every):
    assert [row for row in every if not row.passed] == []
    figures = [f"{name}/{key.removesuffix('|digest')}" for name in stage._SHA256 for key in stage.read(name)
               if "/input/" not in key and "/steps" not in key and "/" in key and not key.startswith("randaugment/")]
    figures += [f"{stage.RULES}/randaugment/{name}" for name in stage.read(stage.RULES)["randaugment/names"]]
    wanted = {*figures, f"{stage.RULES}/tie/mask"}
    ours = [row.tensor for row in every if not row.tensor.startswith("mirror/")]
    assert len(ours) == len(wanted) == 18 + 914 + 514 + 1106
    assert set(ours) == wanted
    mirrored = {row.tensor for row in every if row.tensor.startswith("mirror/")}
    assert mirrored == ({f"mirror/{name}" for name in wanted} if WITH_TORCH else set())


def test_views_are_compared_byte_for_byte(every):
    views = [row for row in every if "/randaugment/" in row.tensor]
    assert len(views) == 14 * (1 + WITH_TORCH)
    golden = stage.read(stage.RULES)
    assert golden["randaugment/views"].shape == (14, 9, 2, 4, 32, 32, 3)
    assert 14 * 9 * 2 * 4 == 1008
    wrong = golden["randaugment/views"].copy()
    wrong[3, 8, 1, 2, 31, 31, 2] ^= 1  # Contrast, v = 9: one bit of one pixel
    changed = {**golden, "randaugment/views": wrong}
    failed = [row for row in stage._rules(Production(), changed) if not row.passed]
    assert [(row.tensor, row.why) for row in failed] == [
        ("schedule-randaugment/randaugment/Contrast", f"1 of {9 * 2 * 4 * 32 * 32 * 3} elements differ")]


@pytest.mark.parametrize("arch", CASES)
def test_the_light_variant_takes_the_network_of_the_architecture(arch):
    rows = list(stage.rows(CASES[arch], thorough=False))
    assert all(row.passed for row in rows)
    assert {row.tensor.partition("/")[0] for row in rows} == {stage.RULES, *stage.LIGHT[arch]}
    forward = 8 + 2 * 22  # lr, logits, confidence, label, mask, three losses; statistics of as many batch norms
    assert len(rows) == 18 + 514 + {"wideresnet": 0, "resnext": forward}[arch]


WITHOUT_TORCH = """
import sys
import scipy.stats  # which would take the None for a module
sys.modules["torch"] = None  # any import of it fails
from parity import reference_figures
from parity.case import small_case
rows = list(reference_figures.rows(small_case("wideresnet", 0)))
print(len(rows), sum(row.passed for row in rows), {row.tensor.split("/")[0] for row in rows} >= {"mirror"})
"""


@pytest.mark.long  # without Torch the self-check holds it to fewer of them by default, in test_goldens.py
def test_without_torch_production_is_still_held_to_every_figure():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2552 2552 False\n", done.stderr


def test_figures_that_can_be_checked_by_hand():
    """lr = 0.03 times a warm-up of 0/3, 1/3, 2/3, then the cosine's start; 7/16 of a cosine ends at cos(7 pi / 16)."""
    warm = stage.read("wideresnet-10-1-warmup")
    assert [float(warm[f"step{s}/lr"]) for s in range(4)] == pytest.approx([0.0, 0.01, 0.02, 0.03], rel=1e-15)
    plain = stage.read("wideresnet-16-2")
    assert float(plain["step1/lr"]) == pytest.approx(0.03 * math.cos(7 * math.pi / 16 / 20), rel=1e-15)
    factors = stage.read(stage.RULES)["schedule/1048576-0/factors"]
    assert float(factors[-1]) == pytest.approx(0.19509032201612825, rel=1e-12)
    settings = json.loads(str(warm["settings"]))
    assert (settings["weight_decay"], settings["temperature"], settings["lambda_u"]) == (1e-3, 0.8, 1.5)
    loss = float(warm["step0/loss_x"]) + 1.5 * float(warm["step0/loss_u"])
    assert float(warm["step0/loss"]) == pytest.approx(loss, rel=1e-15)
    # with a learning rate of 0 the first step leaves the weights, and the average of equals is the same again
    start = initial("conv1.weight", (16, 3, 3, 3), 8.0)
    assert np.array_equal(warm["step0/state/conv1.weight"], start)
    np.testing.assert_allclose(warm["step0/ema/conv1.weight"], start, rtol=1e-14)


def test_a_digest_by_hand():
    """[3, -4]: largest 4, norm 5, sums of +-3 and +-4. A change of 2e-9 in one of 10,000 elements is seen."""
    found = stage.digest("key", np.array([[3.0], [-4.0]]))
    assert found[:2].tolist() == [4.0, 5.0]
    assert set(np.abs(found[2:])) <= {1.0, 7.0}
    array = np.random.default_rng(0).standard_normal(10_000)
    golden, off = stage.digest("key", array), array.copy()
    off[4321] += 2e-9 * np.abs(array).max()
    assert stage.compare_digest("a", golden, golden).passed
    row = stage.compare_digest("a", stage.digest("key", off), golden)
    assert not row.passed
    assert row.relative == pytest.approx(2e-9 * golden[0] / golden[1], rel=1e-2)
    assert stage.compare_digest("a", np.full(6, np.nan), golden).why == "NaN or infinity"


def test_gradients_must_be_of_the_same_parameters():
    golden = {"step0/gradient/a": np.ones(2), "step0/gradient/b": np.ones(2)}
    ours = {"step0/gradient/a": np.ones(2), "step0/gradient/idle": np.zeros(2)}
    rows = {row.name(): row.why for row in stage._judge("x", ours, golden, list(golden))}
    assert rows == {"a": "", "b": "missing here", "idle": "only here, not in the reference"}


@pytest.mark.parametrize("name", stage._SHA256)
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_or_missing_file_is_one_line(name, damage, tmp_path, monkeypatch):
    shutil.copytree(stage.FOLDER, tmp_path / "reference")
    monkeypatch.setattr(stage, "FOLDER", tmp_path / "reference")
    file = tmp_path / "reference" / f"{name}.npz"
    if damage == "missing":
        file.unlink()
    else:
        blob = bytearray(file.read_bytes())
        blob[len(blob) // 2] ^= 1
        file.write_bytes(blob)
    with pytest.raises(goldens.GoldenError, match=file.name) as caught:
        next(stage.rows(CASES["resnext"], thorough=False))
    assert len(str(caught.value).splitlines()) == 1


def planted(name, monkeypatch):
    return plants.planted(name)


def first_failure(rows):
    return next((row for row in rows if not row.passed), None)


def test_every_shared_bug_says_which_row_names_it():
    assert NAMED_BY.keys() == SHARED.keys()
    assert len(SHARED) >= 12


@pytest.mark.skipif(not WITH_TORCH, reason="the bugs are put into the Torch side as well")
@pytest.mark.parametrize("name", first_of(SHARED, 2))
def test_a_bug_in_both_sides_alike_is_caught(name, monkeypatch):
    sides = list(stage._sides(thorough=True))
    with planted(name, monkeypatch):
        for side in sides:
            monkeypatch.setattr(stage, "_sides", lambda thorough, side=side: [side])
            row = first_failure(stage.rows(CASES["wideresnet"]))
            if side.prefix and name in PRODUCTION_ALONE:
                assert row is None
            else:
                assert row.tensor == side.prefix + NAMED_BY[name]
                assert row.relative > 1e3 * GATE
    monkeypatch.undo()
    assert first_failure(stage.rows(CASES["wideresnet"], thorough=False)) is None, "the plant was not taken out again"
