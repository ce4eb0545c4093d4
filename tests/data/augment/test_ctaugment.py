"""CTAugment: its operations, its rates by hand, and runs that depend on nothing but their seed."""

import itertools
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from images import random_images
from running import ROOT, digits, tool_environment

from fixmatch import checkpoint, cli
from fixmatch.checkpoint import CheckpointError
from fixmatch.config import load_config
from fixmatch.data.augment import ctaugment, randaugment
from fixmatch.data.augment.ctaugment import BINS, OPS, CTAugment, Plan, Policy, draw_probe, updated, weights
from fixmatch.data.loader import Loader, ProbedBatch
from fixmatch.data.sources.digits import load_digits
from fixmatch.data.split import draw_split, load_split
from fixmatch.monitor import Monitor
from fixmatch.step import build_state
from fixmatch.trainer import probe

NAMES = [op.name for op in OPS]
STEPS = 30


def plan_of(name, level, second=0.0, centre=(0.5, 0.5), n_images=1):
    """The plan that applies one operation to every image."""
    return Plan(np.full((n_images, 1), NAMES.index(name)), np.tile([level, second], (n_images, 1, 1)),
                np.tile(centre, (n_images, 1, 1)))


def augment(images, name, level, second=0.0, centre=(0.5, 0.5)):
    return randaugment.apply(images, plan_of(name, level, second, centre, len(images)))


def grey(value, size=32):
    return np.full((1, size, size, 3), value, np.uint8)


def arrays_of(run) -> dict[str, np.ndarray]:
    return checkpoint.load(run / "checkpoints/latest").arrays


# --- operations


def test_the_operations_are_those_of_the_official_code():
    assert len(OPS) == 19
    others = {op.name: op.bins for op in OPS if op.bins != (17,)}
    assert others == {"identity": (), "posterize": (8,), "rescale": (17, 6)}


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (32, 32), (40, 24)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_at_every_bin_gives_an_image(name, size):
    bins, others = BINS[NAMES.index(name)]
    edges = np.concatenate([np.arange(bins) / bins, (np.arange(bins) + 0.999999) / bins])
    level, second = (grid.ravel() for grid in np.meshgrid(edges, (np.arange(others) + 0.5) / others))
    rng = np.random.default_rng(0)
    images = random_images(rng, len(level), size)
    before = images.copy()
    plan = Plan(np.full((len(level), 1), NAMES.index(name)), np.stack([level, second], axis=-1)[:, None],
                rng.random((len(level), 1, 2)))
    result = randaugment.apply(images, plan)
    assert result.dtype == np.uint8
    assert result.shape == images.shape
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(("name", "level"), [
    ("autocontrast", 0), ("blur", 0), ("cutout", 0), ("equalize", 0), ("invert", 0), ("smooth", 0), ("rescale", 0),
    ("brightness", 0.9 / 1.9), ("color", 0.9 / 1.9), ("contrast", 0.9 / 1.9), ("sharpness", 0.9 / 1.9),
    ("identity", 0.7), ("posterize", 0.999), ("rotate", 0.5), ("shear_x", 0.5), ("shear_y", 0.5)])
def test_the_level_that_changes_nothing(name, level):
    images = random_images(np.random.default_rng(0), 20, (32, 32))
    difference = np.abs(augment(images, name, level, second=0.9).astype(int) - images)
    assert difference.max() <= (1 if level == 0.9 / 1.9 else 0)  # a factor just below 1 truncates
    assert name == "identity" or (augment(images, name, 0.93 if level < 0.9 else 0.1) != images).any()


@pytest.mark.parametrize("name", ["translate_x", "translate_y"])
def test_translations_of_a_fraction_of_a_pixel_are_none(name):
    images = random_images(np.random.default_rng(0), 5, (32, 32))
    for level in (0, 0.3, 0.999):
        np.testing.assert_array_equal(augment(images, name, level), images)


@pytest.mark.parametrize(("name", "level", "value"), [
    ("brightness", 0.0, 10), ("brightness", 0.5, 104),  # by 0.1 and by 1.05, which float32 has a little below
    ("invert", 1.0, 155), ("invert", 0.5, 127),  # half-way, truncated
    ("posterize", 0.12, 0), ("posterize", 0.13, 64), ("posterize", 0.3, 96),  # 1, 2 and 3 bits of 0b01100100
    ("solarize", 0.3, 155), ("solarize", 0.4, 100),  # thresholds 76 and 102
])
def test_operations_by_hand(name, level, value):
    assert (augment(grey(100), name, level) == value).all()


@pytest.mark.parametrize(("level", "centre", "box"), [  # (top, left, bottom, right), bottom and right exclusive
    (1.0, (0.5, 0.5), (8, 8, 24, 24)),
    (1.0, (0.0, 0.75), (16, 0, 32, 8)),
    (0.5, (0.5, 0.5), (12, 12, 20, 20)),  # 1 + int(7.98) = 8
])
def test_cutout(level, centre, box):
    top, left, bottom, right = box
    expected = grey(0)
    expected[:, top:bottom, left:right] = 127
    np.testing.assert_array_equal(augment(grey(0), "cutout", level, centre=centre), expected)


def test_rescale_cuts_a_quarter_and_enlarges_the_rest():
    image = random_images(np.random.default_rng(0), 1, (32, 32))
    inner = image[:, 8:24, 8:24].repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(augment(image, "rescale", 1.0, second=0.99), inner)  # nearest
    assert (augment(image, "rescale", 1.0, second=0.0) != inner).any()


# --- rates


def test_rates_start_at_one_and_weights_are_equal():
    rates = Policy().rates
    assert rates.shape == (19, 2, 17)
    assert (rates.sum(axis=-1) == BINS).all()
    np.testing.assert_array_equal(weights(rates), rates)


def test_weights_are_relative_to_the_best_bin_and_cut_off_at_the_threshold():
    rates = Policy().rates.copy()
    rates[0, 0, :4] = 0.89, 0.5, 0.799, 0.798  # + 0.01: 0.9, 0.51, 0.809 and 0.808, over 1.01
    found = weights(rates)[0, 0]
    np.testing.assert_allclose(found[:5], [0.9 / 1.01, 0, 0.809 / 1.01, 0.808 / 1.01, 1])
    rates[0, 0, 2] = 0.797  # 0.807 / 1.01 = 0.79901
    assert weights(rates)[0, 0, 2] == 0
    rates[0, 0] = 0
    assert (weights(rates)[0, 0] == 1).all()


def test_an_update_by_hand():
    op = np.array([[NAMES.index("rotate"), NAMES.index("rescale")], [NAMES.index("identity"), NAMES.index("rotate")]])
    level = np.array([[[0.5, 0.9], [0.1, 0.99]], [[0.1, 0.1], [0.5, 0.0]]])
    before = Policy().rates
    after = updated(before, op, level, np.array([0.25, 0.75]))
    expected = before.copy()
    expected[11, 0, 8] = 0.99 * (0.99 * 1 + 0.01 * 0.25) + 0.01 * 0.75  # twice, in this order; int(8.5 * 0.999) = 8
    expected[10, 0, 1] = 0.99 + 0.01 * 0.25  # int(1.7 * 0.999)
    expected[10, 1, 5] = 0.99 + 0.01 * 0.25  # int(5.94 * 0.999)
    np.testing.assert_allclose(after, expected, rtol=1e-15)
    assert (before == Policy().rates).all()


def test_a_level_at_the_lower_edge_counts_for_the_bin_below_as_in_the_official_code():
    op, edge = np.array([[NAMES.index("blur")]]), np.array([[[8 / 17, 0.0]]])
    assert np.flatnonzero(updated(Policy().rates, op, edge, np.zeros(1))[1, 0] == 0.99).tolist() == [7]


# --- plans


def test_probes_are_uniform():
    plan = draw_probe(np.random.default_rng(0), 50_000)
    assert plan.op.shape == (50_000, 2)
    counts = np.bincount(plan.op.ravel(), minlength=19)
    assert np.abs(counts - 100_000 / 19).max() < 5 * np.sqrt(100_000 / 19)
    for values in (plan.level, plan.centre):
        counts, _ = np.histogram(values, 17, (0, 1))
        assert counts.sum() == values.size
        assert np.abs(counts - values.size / 17).max() < 5 * np.sqrt(values.size / 17)


def test_strong_views_take_bins_by_weight_and_end_with_the_largest_cutout():
    rates = Policy().rates.copy()
    rates[:, 0] *= 0
    rates[:, 0, 3], rates[:, 0, 5] = 0.99, 0.89  # weights 1 and 0.9
    plan = Policy(rates).draw(np.random.default_rng(0), 20_000)
    assert plan.op.shape == (20_000, 3)
    assert (plan.op[:, 2] == NAMES.index("cutout")).all()
    assert (plan.level[:, 2, 0] == 1).all()
    learnt = BINS[plan.op[:, :2], 0] == 17
    which, counts = np.unique(np.floor(plan.level[:, :2, 0] * 17)[learnt], return_counts=True)
    assert which.tolist() == [3, 5]
    assert counts[0] / counts.sum() == pytest.approx(1 / 1.9, abs=0.02)
    within = (plan.level[:, :2, 0] * 17 % 1)[learnt]
    assert abs(within.mean() - 0.5) < 0.02


# --- which rates a step draws from


def test_a_step_draws_from_the_rates_of_lag_steps_ago():
    cta = CTAugment(lag=2)
    start = cta.policy(0).rates
    one = np.array([[NAMES.index("blur")]]), np.array([[[0.5, 0.0]]]), np.array([0.0])
    for step in range(1, 6):
        cta.update(step, *one)
        assert len(cta.history) == min(step, 2) + 1
    assert cta.policy(7).rates[1, 0, 8] == pytest.approx(0.99**5)
    assert cta.policy(5).rates[1, 0, 8] == pytest.approx(0.99**3)
    assert start[1, 0, 8] == 1


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_restored_history_is_the_one_that_was_saved(steps):
    cta, again = CTAugment(lag=2), CTAugment(lag=2)
    for step in range(1, steps + 1):
        cta.update(step, np.array([[step]]), np.array([[[0.5, 0.0]]]), np.array([0.0]))
    again.restore(steps, cta.state())
    assert again.history.keys() == cta.history.keys()
    assert all(np.array_equal(again.history[step], rates) for step, rates in cta.history.items())
    for step, arrays in ((steps, {}), (steps, {"rates": np.ones((9, 19, 2, 17))}), (0, cta.state())):
        with pytest.raises(CheckpointError, match="rates"):
            again.restore(step, arrays)


def fed(threads, steps=25):
    """Batches of a loader whose probes are given proximities that depend on the batch, and the rates in the end."""
    data = load_digits().train
    made = Loader(data, draw_split(data.labels, 10, 40, seed=0), 4, 3, seed=5, flip=False, threads=threads,
                  strong="ctaugment")
    batches = []
    for step, batch in enumerate(made.batches(0, steps), start=1):
        batches.append(batch)
        made.cta.update(step, *batch.probe_plan[:2], batch.probes.mean(axis=(1, 2, 3)) / 255)
    return batches, made.cta.history[steps]


@pytest.mark.usefixtures("fickle")
@pytest.mark.parametrize("threads", [2, 3])
def test_batches_and_rates_do_not_depend_on_threads(threads):
    (batches, rates), (expected, expected_rates) = fed(threads), fed(1)
    np.testing.assert_array_equal(rates, expected_rates)
    for batch, other in zip(batches, expected, strict=True):
        assert isinstance(batch, ProbedBatch)
        for a, b in zip([*batch[:6], *batch.probe_plan], [*other[:6], *other.probe_plan], strict=True):
            np.testing.assert_array_equal(a, b)


def test_probes_are_the_labeled_views_further_augmented():
    batch = fed(1, steps=1)[0][0]
    assert batch.probes.shape == batch.x.shape
    np.testing.assert_array_equal(batch.probes, randaugment.apply(batch.x, batch.probe_plan))
    assert batch.probe_plan.op.shape == (4, 2)


# --- the feedback


def test_the_proximity_is_the_probability_that_the_averaged_network_gives_to_the_label():
    config = load_config(ROOT / "configs/digits.yaml", ["model.depth=10", "model.width=1"])
    source = load_digits()
    state = build_state(config, 10, source.mean, source.std)
    for parameter in state.model.parameters():  # the live network does not matter
        parameter.set_value(parameter * 0)
    batch = fed(1, steps=1)[0][0]
    op, level, proximity = probe(state, batch)
    assert np.array_equal(op, batch.probe_plan.op)
    assert np.array_equal(level, batch.probe_plan.level)
    logits = state.ema.average(state.normalize(batch.probes)).numpy().astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(proximity, p[np.arange(4), batch.targets_x], rtol=1e-5)
    assert np.ptp(proximity) > 0


# --- runs


def arguments(run, *more) -> list[str]:
    return [*map(str, digits(f"run.dir={run}", f"train.total_steps={STEPS}", "train.eval_every=12",
                             "augment.strong=ctaugment", *more))]


@pytest.fixture
def fickle(monkeypatch):
    """Rates that change so fast that drawing from those of another step shows."""
    monkeypatch.setattr(ctaugment, "DECAY", 0.5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of STEPS steps with fickle rates, never interrupted."""
    run = tmp_path_factory.mktemp("ctaugment") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ctaugment, "DECAY", 0.5)
        assert cli.main(["train", *arguments(run)]) == 0
    return run


def assert_same_arrays(run, expected):
    found, wanted = arrays_of(run), arrays_of(expected)
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not np.array_equal(found[name], wanted[name])]


def test_a_checkpoint_holds_the_rates_of_the_last_steps(whole):
    rates = arrays_of(whole)["augment/rates"]
    assert rates.shape == (5, 19, 2, 17)
    assert (rates <= Policy().rates).all()
    assert all((later != earlier).any() for earlier, later in itertools.pairwise(rates))
    assert 0 < rates[-1][rates[-1] > 0].min() < 0.5


@pytest.mark.usefixtures("fickle")
def test_three_threads_end_in_the_same_weights(whole, tmp_path):
    assert cli.main(["train", *arguments(tmp_path / "run", "runtime.data_threads=3")]) == 0
    assert_same_arrays(tmp_path / "run", whole)


@pytest.mark.usefixtures("fickle")
@pytest.mark.parametrize("step", [2, 13])
def test_an_interrupted_run_ends_in_the_same_weights(step, whole, tmp_path, monkeypatch, capsys):
    def record(self, done, *rest):
        right(self, done, *rest)
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)
    right = Monitor.record
    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "record", record)
        assert cli.main(["train", *arguments(tmp_path / "run")]) == 130
    assert f"interrupted after step {step}" in capsys.readouterr().out
    assert len(arrays_of(tmp_path / "run")["augment/rates"]) == min(step, 4) + 1
    assert cli.main(["train", *arguments(tmp_path / "run"), "--resume"]) == 0
    assert_same_arrays(tmp_path / "run", whole)


def test_a_checkpoint_without_rates_is_refused_in_one_line(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    saved = checkpoint.load(run / "checkpoints/latest")
    checkpoint.save(run / "checkpoints/latest", {k: a for k, a in saved.arrays.items() if k != "augment/rates"},
                    saved.manifest)
    assert cli.main(["train", *arguments(run), "--resume"]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "rates" in message


@pytest.mark.parametrize("settings", [("augment.strong=ctaugment", "ssl.mode=none"), ("augment.strong=torchssl",)])
def test_runs_without_probes_have_no_rates(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *map(str, digits("run.dir=run", "train.total_steps=2", *settings))]) == 0
    assert not [name for name in arrays_of(tmp_path / "run") if name.startswith("augment")]


@pytest.mark.long
def test_two_ranks_share_their_probes(tmp_path):
    """Under Paddle's launcher, with gloo: the rates in the end have felt both ranks' probes and no others."""
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--backend", "gloo",
               ROOT / "tools/train.py", *arguments("run", "train.total_steps=3")]
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, env=tool_environment(), text=True,
                          capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rates = arrays_of(tmp_path / "run")["augment/rates"]
    source = load_digits()
    split = load_split(tmp_path / "run/split.json", "digits", source.train.labels, 40)
    seed = load_config(tmp_path / "run/config.yaml").run.seed
    expected = np.ones_like(rates) * Policy().rates
    for rank in (0, 1):
        made = Loader(source.train, split, 4, 2, seed, False, rank, 2, strong="ctaugment")
        for step in range(3):
            op, level, _ = made.batch(step).probe_plan  # the first steps all draw from the first rates
            expected[step + 1:] = [updated(one, op, level, np.zeros(4)) for one in expected[step + 1:]]
    np.testing.assert_array_equal(rates < Policy().rates, expected < Policy().rates)
