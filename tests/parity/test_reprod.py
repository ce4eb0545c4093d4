"""The files of the paper-reproduction guide: the published Step 3 passes, and so does every log, until a bug is in."""

import logging

import numpy as np
import pytest
from running import first_of

from parity import cli, plants

reprod_log = pytest.importorskip("reprod_log")

from parity import classic, reprod  # noqa: E402
from parity.case import CLASSIC_SEEDS  # noqa: E402

SIDES = ("paddle", "torch")


def lines(path) -> list[str]:
    """What a log says, without time and level."""
    return [line.split("INFO: ")[1].strip() for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of one run of the command with the classic seeds."""
    folder = tmp_path_factory.mktemp("reprod")
    assert cli.main(["--reprod-log", str(folder), "--stage", "loss"]) == 0
    return folder


@pytest.mark.parametrize("batches", first_of([2, 5], 1))
def test_step_3_is_the_published_one_and_passes(batches, tmp_path):
    """The first two of its five batches, where there is no time for all."""
    written = tmp_path
    reprod.write(written, CLASSIC_SEEDS[:batches], [classic.backward_alignment])
    ours, theirs = (np.load(written / f"backward_Alignment_{side}.npy", allow_pickle=True).item() for side in SIDES)
    assert list(ours) == list(theirs) == [f"data_{i}_loss" for i in range(1, batches + 1)]
    assert all(a.shape == (1,) and a.dtype == np.float32 for a in [*ours.values(), *theirs.values()])
    # The losses that a ResNeXt with fresh statistics must have: its logits are next to 0, and log(10) is 2.3026.
    assert all(abs(float(a[0]) - np.log(10)) < 0.02 for a in ours.values())
    assert len({float(a[0]) for a in ours.values()}) == batches
    said = lines(written / "diff_backward_Alignment_model.txt")
    assert said[::2] == [f"{name}:" for name in ours] + ["diff check passed"]
    values = [float(line.removeprefix("mean diff: check passed: True, value: ")) for line in said[1::2]]
    assert len(values) == batches
    assert all(0 <= value < 1e-6 for value in values)


def test_fake_batches_are_those_of_the_guide():
    """np.random.seed(100), then randn(64, 3, 32, 32); seeded again, then randint(0, 10, 64)."""
    images, labels = classic._fake_batch(100, 64)
    np.random.seed(100)
    np.testing.assert_array_equal(images, np.random.randn(64, 3, 32, 32).astype(np.float32))
    np.random.seed(100)
    np.testing.assert_array_equal(labels, np.random.randint(0, 10, 64))


@pytest.mark.long
@pytest.mark.parametrize("log", reprod.LOGS)
def test_every_log_passes_and_holds_its_own_verdict_alone(log, written):
    ours, theirs = (reprod_log.ReprodDiffHelper().load_info(str(written / f"{log}_{side}.npy")) for side in SIDES)
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 5
    said = lines(written / reprod.LOGS[log])
    assert said[-1] == "diff check passed"
    assert [line.removesuffix(":") for line in said[:-1:2]] == list(ours)
    assert all(line.startswith("mean diff: check passed: True") for line in said[1::2])


def test_reprod_log_leaves_no_handler_behind(tmp_path):
    root = logging.getLogger()
    before = list(root.handlers), root.level
    reprod.write(tmp_path, [100], [lambda seeds: [("loss", "a", np.ones(1), np.ones(1))]])
    assert (root.handlers, root.level) == before


# What each log is there to show. The five float32 steps of Step 3 pass with a doubled weight decay; bp_align does not.
CATCHES = [
    ("activation-slope-0.01", classic.forward_metric_loss, ("forward", "metric", "loss")),
    ("weight-decay-doubled", classic.wideresnet_backward, ("bp_align",)),
    ("masked-mean", classic.forward_metric_loss, ("loss",)),
    ("no-nesterov", classic.backward_alignment, ("backward_Alignment", "bp_align")),
    ("masked-mean", classic.train_alignment, ("train_align",)),
]


@pytest.mark.parametrize(("plant", "part", "failing"), first_of(CATCHES, 1))
def test_a_planted_bug_fails_the_matching_log(plant, part, failing, tmp_path):
    with plants.planted(plant):
        summary = reprod.write(tmp_path, (100, 300, 1000), [part])
    for log in (path.name.removesuffix("_paddle.npy") for path in tmp_path.glob("*_paddle.npy")):
        verdict = "diff check " + ("failed" if log in failing else "passed")
        assert lines(tmp_path / reprod.LOGS[log])[-1] == verdict
        assert f"{log}: {verdict}" in summary


@pytest.mark.long
def test_a_planted_bug_fails_the_command(tmp_path):
    assert cli.main(["--reprod-log", str(tmp_path), "--seeds", "100", "--stage", "loss", "--plant", "masked-mean"]) == 1
