"""Going on from a checkpoint: all of it or not at all, and with nothing lost."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import visualdl
from running import TINY, After
from visualdl import LogReader

import fixmatch
from fixmatch import checkpoint, inputs, run, trainer
from fixmatch.checkpoint import CheckpointError
from fixmatch.config import Config, ConfigError, ModelConfig, TrainConfig
from fixmatch.curves import Curves
from fixmatch.data.dataset import DataError, Dataset
from fixmatch.data.loader import Batch
from fixmatch.models import idle_parameters
from fixmatch.monitor import Monitor
from fixmatch.step import build_state, train_step


def tiny(folder, *overrides: str) -> fixmatch.Config:
    return fixmatch.load_config("digits", [*TINY, f"run.dir={folder}", "train.total_steps=4", "train.eval_every=2",
                                           *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 4 steps, evaluated and saved after 2 and 4."""
    folder = tmp_path_factory.mktemp("resume") / "run"
    fixmatch.train(tiny(folder))
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def change(folder, arrays=None, **facts):
    """Saves the latest checkpoint again with some arrays and facts changed; an array that is None is left out."""
    latest = folder / "checkpoints/latest"
    saved = checkpoint.load(latest)
    kept = {name: a for name, a in {**saved.arrays, **(arrays or {})}.items() if a is not None}
    checkpoint.save(latest, kept, dataclasses.replace(saved.manifest, **facts))


@pytest.mark.parametrize("shape", [ModelConfig("wideresnet", depth=10, width=1), ModelConfig("wideresnet", depth=16),
                                   ModelConfig("resnext", depth=11, width=4, cardinality=2)])
def test_momentum_is_of_every_parameter_that_is_not_idle(shape):
    state = build_state(Config(model=shape, train=TrainConfig(total_steps=1)), 3, (0.5,) * 3, (0.5,) * 3)
    images, labels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8), np.arange(3)
    train_step(state, Batch(images, labels, images, images, labels), Config().ssl)
    every = {name for name, _ in state.model.named_parameters()}
    assert state.optimizer.state().keys() == every - idle_parameters(state.model)
    assert (idle_parameters(state.model) == set()) == (shape.arch == "resnext")


@pytest.mark.parametrize(("name", "damage"), [
    ("momentum/conv1.weight", None), ("momentum/fc.bias", lambda a: a.astype(np.float64)),
    ("momentum/fc.weight", lambda a: a.T), ("momentum/fc.wieght", np.float32(1)), ("ema/fc.bias", None),
    ("model/fc.bias", lambda a: a[:-1]), ("augment/rates", np.ones((5, 19, 2, 17)))])
def test_arrays_that_do_not_fit_are_one_line(copy, name, damage):
    """Each would be skipped in silence by Paddle's own set_state_dict."""
    arrays = checkpoint.load(copy / "checkpoints/latest").arrays
    change(copy, {name: damage(arrays[name]) if callable(damage) else damage})
    with pytest.raises(CheckpointError, match=name.split("/")[1]) as caught:
        fixmatch.train(tiny(copy, "train.total_steps=5"), resume=True)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_without_any_momentum_says_so(copy, capsys):
    arrays = checkpoint.load(copy / "checkpoints/latest").arrays
    change(copy, {name: None for name in arrays if name.startswith("momentum/")})
    fixmatch.train(tiny(copy, "train.total_steps=5"), resume=True)
    assert "has no momentum, so it starts from zero" in capsys.readouterr().out


def test_saving_right_after_loading_keeps_the_momentum(copy):
    """Paddle makes its buffers at the first step, so a run that is resumed and does none has them from its loading."""
    before = checkpoint.load(copy / "checkpoints/latest")
    change(copy, evaluated_step=2, history={name: [1.0] for name in ("raw", "ema")})  # so that it is saved once more
    fixmatch.train(tiny(copy), resume=True)
    after = checkpoint.load(copy / "checkpoints/latest")
    assert after.manifest.evaluated_step == 4
    assert after.part("momentum").keys() == before.part("momentum").keys() != set()
    assert all(np.array_equal(a, after.arrays[name]) for name, a in before.arrays.items())


# --- a checkpoint that cannot be read


def damage(folder, which: str):
    arrays = next((folder / "checkpoints" / which).glob("arrays-*"))
    content = arrays.read_bytes()
    arrays.unlink()  # and not in place, because the one before it may be the same file
    arrays.write_bytes(content[:-1])


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_end(one, other):
    """Weights, momentum, history and log of two runs are the same."""
    saved, expected = (checkpoint.load(folder / "checkpoints/latest") for folder in (one, other))
    assert saved.arrays.keys() == expected.arrays.keys()
    assert all(np.array_equal(a, saved.arrays[name]) for name, a in expected.arrays.items())
    assert saved.manifest.history == expected.manifest.history
    figures = [[(line["kind"], line["step"], line.get("loss"), line.get("ema")) for line in lines_of(folder)]
               for folder in (one, other)]
    assert figures[0] == figures[1]


def test_so_many_checkpoints_are_kept(tmp_path):
    fixmatch.train(tiny(tmp_path / "run", "train.eval_every=1", "checkpoints.keep=3", "train.eval_batch_size=500"))
    steps = {path.name: checkpoint.load(path).manifest.step for path in (tmp_path / "run/checkpoints").iterdir()}
    assert {**steps, "best": None} == {"latest": 4, "step-3": 3, "step-2": 2, "best": None}


@pytest.mark.parametrize("gone", [False, True])
def test_a_latest_that_cannot_be_read_costs_the_steps_since_the_one_before(trained, copy, capsys, gone):
    latest = copy / "checkpoints/latest"
    shutil.rmtree(copy / "checkpoints/best")
    if gone:
        (latest / "checkpoint.json").unlink()  # as after a first save that a full disk cut
    else:
        damage(copy, "latest")
    fixmatch.train(tiny(copy), resume=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "going on from" in line]
    assert len(said) == 1
    assert str(latest) in said[0]
    assert f"{copy}/checkpoints/step-2, of step 2" in said[0]
    assert (copy / "checkpoints/damaged-1").exists()
    assert_same_end(copy, trained)


def test_best_is_taken_where_it_is_all_there_is(trained, copy, capsys):
    saved = checkpoint.load(copy / "checkpoints/step-2")
    for name in ("latest", "step-2", "best"):
        shutil.rmtree(copy / "checkpoints" / name)
    checkpoint.save(copy / "checkpoints/best", saved.arrays, saved.manifest)
    fixmatch.train(tiny(copy), resume=True)
    assert f"latest: there is none; going on from {copy}/checkpoints/best, of step 2" in capsys.readouterr().out
    assert_same_end(copy, trained)


def test_a_run_that_has_steps_never_starts_at_step_0(copy):
    for name in ("latest", "step-2", "best"):
        damage(copy, name)
    before = sorted(copy.rglob("*"))
    with pytest.raises(CheckpointError, match=r"no other checkpoint in .* can be read"):
        fixmatch.train(tiny(copy), resume=True)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="has evaluations, but"):
        fixmatch.train(tiny(copy), resume=True)
    assert [path for path in before if "checkpoints" not in path.parts] == sorted(copy.rglob("*"))


def test_a_run_killed_while_it_is_evaluated_has_saved_before(trained, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    calls = iter([trainer.Trainer._save, killed])

    def killed_after_one(self):
        next(calls)(self)

    folder = tmp_path / "run"
    for where, name, stand_in in ((trainer, "evaluate", killed),  # before the evaluation of step 2
                                  (trainer.Trainer, "_save", killed_after_one)):  # and between it and the save after it
        with monkeypatch.context() as patched:
            patched.setattr(where, name, stand_in)
            with pytest.raises(Killed):
                fixmatch.train(tiny(folder), resume=True)
        assert checkpoint.load(folder / "checkpoints/latest").manifest.step == 2
    fixmatch.train(tiny(folder), resume=True)
    assert_same_end(folder, trained)


# --- what a run writes down


def drawn(folder, kind: str, tag: str) -> list:
    """The records of a curve, in the file of the folder that VisualDL's server shows."""
    [(directory, file)] = LogReader(logdir=str(folder / "vdl")).logs().items()
    return LogReader(file_path=f"{directory}/{file}").get_data(kind, tag)


def curve(folder, tag: str) -> list[tuple[int, float]]:
    points = [(point.id, point.value) for point in drawn(folder, "scalar", tag)]
    return [point for point in points if not math.isnan(point[1])]  # its page leaves these out


def test_a_resumed_run_logs_and_draws_what_one_that_was_never_stopped_does(tmp_path, capsys):
    settings = "train.total_steps=8", "train.eval_every=4", "run.log_every=3", "train.eval_batch_size=500"
    fixmatch.train(tiny(tmp_path / "whole", *settings))
    for step in (2, 3):  # after steps 2 and 5 of the run
        with pytest.raises(run.Interrupted):
            fixmatch.train(tiny(tmp_path / "run", *settings), resume=True, recorder=After(step))
        shutil.rmtree(tmp_path / "run/vdl")  # it is made again from metrics.jsonl
        (tmp_path / "run/vdl").mkdir()
        (tmp_path / "run/vdl/vdlrecords.9999999999.log").write_bytes(b"of a run with another name of it")
    fixmatch.train(tiny(tmp_path / "run", *settings), resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    for line, other in zip(*map(lines_of, (tmp_path / "run", tmp_path / "whole")), strict=True):
        differing = {key for key in line if line[key] != other[key]}
        assert differing <= {"time", "images_per_second", "data_wait"}
    train = [(line["step"], line["steps"]) for line in lines_of(tmp_path / "run") if line["kind"] == "train"]
    assert train == [(1, 1), (3, 2), (6, 3), (8, 2)]
    for tag, steps in {"3_training/loss": [1, 3, 6, 8], "2_evaluation/ema_top1": [4, 8]}.items():
        assert [step for step, _ in curve(tmp_path / "run", tag)] == steps
        assert curve(tmp_path / "run", tag) == curve(tmp_path / "whole", tag)
    assert [point.id for point in drawn(tmp_path / "run", "histogram", "ssl/confidence")] == [1, 3, 6, 8]


def test_another_log_every_says_how_many_steps_a_line_is_of(tmp_path):
    folder, settings = tmp_path / "run", ("train.total_steps=7", "train.eval_every=7", "train.eval_batch_size=500")
    with pytest.raises(run.Interrupted):
        fixmatch.train(tiny(folder, *settings, "run.log_every=4"), recorder=After(3))
    fixmatch.train(tiny(folder, *settings, "run.log_every=2"), resume=True)
    train = [(line["step"], line["steps"]) for line in lines_of(folder) if line["kind"] == "train"]
    assert train == [(1, 1), (4, 3), (6, 2), (7, 1)]


def test_whole_matrices_are_kept_of_the_last_and_the_best_evaluation_alone(trained):
    content, history = json.loads((trained / "evaluation.json").read_text()), ema_history(trained)
    assert content.keys() == {"last", "best"}
    assert content["last"]["step"] == 4
    assert content["best"]["step"] == 2 * (1 + history.index(max(history)))
    for found in content.values():
        assert np.sum(found["ema"]["confusion"]) == np.sum(found["raw"]["confusion"]) == 500
    assert all(line[name].keys() == {"top1", "top5", "loss"} for line in lines_of(trained) if line["kind"] == "eval"
               for name in ("raw", "ema"))


def ema_history(folder) -> list[float]:
    return checkpoint.load(folder / "checkpoints/latest").manifest.history["ema"]


def after_step(monkeypatch, step: int, action) -> None:
    right = Monitor.record

    def record(self, done, *rest):
        if done == step:
            action()
        right(self, done, *rest)
    monkeypatch.setattr(Monitor, "record", record)


def test_a_log_that_is_deleted_under_a_run_is_said_and_begun_anew(tmp_path, monkeypatch, capsys):
    after_step(monkeypatch, 3, (tmp_path / "run/metrics.jsonl").unlink)
    fixmatch.train(tiny(tmp_path / "run"))
    assert "metrics.jsonl: was deleted or replaced while the run trained" in capsys.readouterr().out
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [3, 4, 4]


@pytest.mark.parametrize("again", [False, True])
def test_a_run_folder_that_is_moved_away_stops_the_run(tmp_path, monkeypatch, again):
    def move():
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        if again:
            (tmp_path / "run").mkdir()
    after_step(monkeypatch, 3, move)
    with pytest.raises(OSError, match="the run folder was moved or removed while the run trained"):
        fixmatch.train(tiny(tmp_path / "run"))
    assert not list(tmp_path.glob("run/*"))
    monkeypatch.undo()
    fixmatch.train(tiny(tmp_path / "elsewhere"), resume=True)


def test_a_visualdl_that_fails_costs_its_curves_and_not_the_run(tmp_path, monkeypatch, capsys):
    def broken(self, *arguments):
        raise TypeError("Descriptors cannot be created directly")
    monkeypatch.setattr(visualdl.LogWriter, "add_scalar", broken)
    fixmatch.train(tiny(tmp_path / "run"))
    assert capsys.readouterr().out.count("VisualDL failed (TypeError: Descriptors cannot be created directly)") == 1


# --- what must be the same, and what is said where it is not


@pytest.mark.parametrize(("change", "said"), [
    (lambda source: source.train.images.__setitem__((5, 3, 3, 0), 77), "the training images of digits"),
    (lambda source: source.test.images.__setitem__((5, 3, 3, 0), 77), "the test images of digits"),
    (lambda source: source.train.labels.__setitem__(slice(None), source.train.labels[::-1]), "labels"),
    (lambda source: {"classes": (*source.classes[:8], "9", "8")}, "number 8 is '8'; of the 10 of digits it is '9'")])
def test_data_that_changed_are_refused(trained, monkeypatch, change, said):
    right, before = inputs.load_source, sorted(trained.rglob("*"))

    def changed(config):
        source = right(config)
        source = dataclasses.replace(source, train=Dataset(source.train.images.copy(), source.train.labels.copy()),
                                     test=Dataset(source.test.images.copy(), source.test.labels.copy()))
        return dataclasses.replace(source, **(change(source) or {}))
    monkeypatch.setattr(inputs, "load_source", changed)
    with pytest.raises((ConfigError, DataError), match=said) as caught:
        fixmatch.train(tiny(trained, "train.total_steps=5"), resume=True)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(trained.rglob("*")) == before


def test_other_threads_operators_or_versions_are_said(copy, capsys):
    facts = checkpoint.load(copy / "checkpoints/latest").manifest.provenance
    versions = {**facts["versions"], "paddle": "2.6"}
    change(copy, provenance={**facts, "operators": "gpu:0\x1b[31m", "versions": versions})
    fixmatch.train(tiny(copy), resume=True)
    said = capsys.readouterr().out
    assert "operators: was 'gpu:0\\x1b[31m', now cpu" in said
    assert f"paddle: was 2.6, now {facts['versions']['paddle']}; sums may differ" in said


def test_the_curves_of_a_whole_run_fit_on_a_disk(trained, tmp_path):
    """Of 2^20 steps on 10 classes with the default settings: metrics.jsonl and vdl/ together below 200 MB."""
    by_kind = {line["kind"]: line for line in lines_of(trained)}
    times = {"train": 2**20 // Config().run.log_every, "eval": 2**20 // Config().train.eval_every}
    lines = sum(times[kind] * len(json.dumps(line)) for kind, line in by_kind.items())
    sizes = []
    for count in (10, 110):
        curves = Curves(tmp_path / str(count), 10, [by_kind["train"], by_kind["eval"]] * count)
        curves.close()
        sizes.append(sum(file.stat().st_size for file in (tmp_path / str(count)).iterdir()))
    assert 10_000 < lines + (sizes[1] - sizes[0]) / 100 * times["train"] < 200e6
