"""Runs on a user's own images: without a test folder, from the weights of another run, and what their files say."""

import json
import pathlib

import numpy as np
import pytest
from image_folders import save
from running import TINY

import fixmatch
from fixmatch import checkpoint, cli
from fixmatch.checkpoint import CheckpointError
from fixmatch.config import ConfigError
from fixmatch.data import DataError


def photographs(root: pathlib.Path, classes: dict[str, int]) -> pathlib.Path:
    """Noise around a grey level for each class, 8 x 8 pixels, and six unlabeled images."""
    rng = np.random.default_rng(0)
    for level, (name, count) in enumerate([*classes.items(), ("", 6)], start=1):
        for i in range(count):
            pixels = np.clip(rng.normal(60 * level, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            save(root / (f"labeled/{name}/{i}.png" if name else f"unlabeled/{i}.png"), pixels)
    return root


def config(place, *overrides: str, name="run", root="photos") -> fixmatch.Config:
    (place / "own.yaml").write_text("data: {name: folder, num_labeled: 0}")
    return fixmatch.load_config(place / "own.yaml", [
        *TINY, f"data.root={place / root}", f"run.dir={place / name}", "train.total_steps=3", "train.eval_every=2",
        *overrides])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photographs of cats and dogs without a test folder, and a run on them."""
    place = tmp_path_factory.mktemp("own")
    photographs(place / "photos", {"cat": 10, "dog": 5})
    fixmatch.train(config(place))
    return place


def arrays(run: pathlib.Path, part="ema") -> dict[str, np.ndarray]:
    return checkpoint.load(run / "checkpoints/latest").part(part)


def test_a_run_without_a_test_folder_is_measured_on_held_out_images(place):
    result = json.loads((place / "run/result.json").read_text())
    split = json.loads((place / "run/split.json").read_text())
    assert result["classes"] == ["cat", "dog"]
    assert (result["labeled_images"], result["test_images"]) == ({"cat": 8, "dog": 4}, {"cat": 2, "dog": 1})
    low, high = result["interval_95"]["ema"]
    assert 0 <= low <= result["top1"]["ema"]["last"] <= high <= 100
    assert (len(split["held_out"]), len(split["labeled"]), len(split["unlabeled"])) == (3, 12, 18)
    found = fixmatch.evaluate(place / "run")
    assert found.ema.top1 == result["top1"]["ema"]["last"]
    assert list(found.source.test_paths) == split["held_out"]


def test_what_a_run_on_own_images_says(place):
    said = (place / "run/train.log").read_text()
    assert "\nimages of each class (labeled + test): cat: 8 + 2, dog: 4 + 1\n" in said
    assert "\naccuracy is measured on 3 test images, 1 to 2 a class: " in said
    assert "\nwarning: 3 steps are few for ema.decay=0.999 and model.bn_momentum=0.999: " in said
    assert " With 3 test images the EMA's is known to lie in " in said
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert not any("pseudo_label_accuracy" in line for line in lines)  # the unlabeled ones' classes are not known


def test_eval_says_the_interval_and_names_the_classes(place, capsys):
    assert cli.main(["eval", str(place / "run"), "--json", str(place / "eval.json")]) == 0
    said, figures = capsys.readouterr().out, json.loads((place / "eval.json").read_text())
    low, high = json.loads((place / "run/result.json").read_text())["interval_95"]["ema"]
    assert f"  with 3 test images the EMA's top-1 is known to lie in {low:.1f} to {high:.1f} % (95 % interval)" in said
    assert figures["classes"] == ["cat", "dog"]


def test_a_split_of_other_test_images_is_not_taken(place):
    with pytest.raises(DataError, match="held out of the labeled ones"):
        fixmatch.train(config(place, f"data.split_file={place / 'run/split.json'}", "data.split_seed=1", name="other"))
    fixmatch.train(config(place, f"data.split_file={place / 'run/split.json'}", "train.total_steps=1", name="same"))


def test_a_run_without_any_test_image_trains_and_says_so(place, capsys):
    result = fixmatch.train(config(place, "data.test_fraction=0", "run.report=true", name="untested"))
    assert "There were no test images, so no accuracy" in (place / "untested/report.html").read_text()
    assert result.top1 == {}
    assert "There are no test images, so no accuracy was measured." in capsys.readouterr().out
    content = json.loads((place / "untested/result.json").read_text())
    assert (content["top1"], content["labeled_images"], content["test_images"]) == (
        {}, {"cat": 10, "dog": 5}, {"cat": 0, "dog": 0})
    assert checkpoint.load(place / "untested/checkpoints/latest").manifest.step == 3
    with pytest.raises(DataError, match=r"has no test images to evaluate on.* data\.test_fraction above 0"):
        fixmatch.evaluate(place / "untested")
    longer = fixmatch.train(config(place, "data.test_fraction=0", "train.total_steps=4", name="untested"), resume=True)
    assert longer.steps == 4


def test_an_export_of_a_run_without_any_test_image_says_what_it_was_compared_on(place, capsys):
    assert cli.main(["export", str(place / "untested"), str(place / "untested-paddle")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "100 random images, as the test images cannot be read" in lines[1]
    assert [line.split()[:2] for line in lines[2:]] == [["paddle.jit", "largest"], ["paddle.inference", "largest"]]


def test_one_class_is_refused_before_anything_is_made(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    photographs(place / "one", {"cat": 4})
    (place / "table").mkdir()
    rows = "".join(f"../one/labeled/cat/{i}.png,cat\n" for i in range(4))
    (place / "table/train.csv").write_text(f"path,label\n{rows}")
    before = sorted(place.iterdir())
    for name, root, where in (("folder", "one", "one/labeled"), ("csv", "table", "table/train.csv")):
        for arguments in (["init", root], ["train", "-c", "own.yaml", "-o", f"data.name={name}", f"data.root={root}"]):
            assert cli.main(arguments) == 2
            error = capsys.readouterr().err
            assert error.endswith(f"error: {where}: has one class only, cat, so there is nothing to tell apart; add "
                                  "labeled images of another class\n")
            assert len(error.splitlines()) == 1
    assert sorted(place.iterdir()) == before


# --- from the weights of another run


def test_a_run_starts_from_the_averaged_weights_of_another(place):
    result = fixmatch.train(config(place, f"model.init={place / 'run'}", "optim.lr=1e-12", "train.total_steps=1",
                                   name="again"))
    before = arrays(place / "run")
    for name, array in arrays(place / "again", "model").items():
        if "_mean" not in name and "_variance" not in name:  # the step moved these
            assert np.abs(array - before[name]).max() <= 1e-6, name
    assert (result.about["init"]["step"], result.about["init"]["dataset"]) == (3, "folder")
    assert result.about["init"]["checkpoint"] == str(place / "run/checkpoints/latest")
    assert "warning:" not in (place / "again/train.log").read_text()
    assert "classifier included" in (place / "again/train.log").read_text()


def test_other_classes_get_a_new_classifier(place):
    photographs(place / "birds", {"crow": 5, "hen": 5, "owl": 5})
    start = [f"model.init={place / 'run/checkpoints/best'}", "optim.lr=1e-12", "train.total_steps=1", "run.seed=5"]
    fixmatch.train(config(place, *start, name="birds-run", root="birds"))
    fresh = fixmatch.train(config(place, *start[1:], name="fresh", root="birds")).folder
    found, before = arrays(place / "birds-run", "model"), checkpoint.load(place / "run/checkpoints/best").part("ema")
    assert found["fc.weight"].shape[1] == 3
    assert np.abs(found["fc.weight"] - arrays(fresh, "model")["fc.weight"]).max() <= 1e-6
    assert np.abs(found["conv1.weight"] - before["conv1.weight"]).max() <= 1e-6
    assert np.abs(arrays(fresh, "model")["conv1.weight"] - before["conv1.weight"]).max() > 1e-3
    assert "with a new classifier" in (place / "birds-run/train.log").read_text()


def test_weights_of_another_network_are_refused_before_anything_is_touched(place):
    before = sorted(place.iterdir())
    with pytest.raises(CheckpointError, match=r"another network; use -o model\.width=1, or leave") as caught:
        fixmatch.train(config(place, f"model.init={place / 'run'}", "model.width=2"))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(CheckpointError, match="neither a run folder"):
        fixmatch.train(config(place, f"model.init={place / 'photos'}"))
    assert sorted(place.iterdir()) == before


def test_a_resumed_run_needs_its_starting_point_no_more_and_keeps_its_name(place):
    gone = place / "gone"
    (place / "run").rename(gone)
    try:
        again = [f"model.init={place / 'run'}", "optim.lr=1e-12"]
        result = fixmatch.train(config(place, *again, "train.total_steps=2", name="again"), resume=True)
    finally:
        gone.rename(place / "run")
    assert result.about["init"]["checkpoint"] == str(place / "run/checkpoints/latest")


def test_a_refused_resume_names_the_way_on(place):
    way_on = rf"start a new run from its weights: without --resume, -o model\.init={place / 'run'}"
    with pytest.raises(ConfigError, match=rf"optim\.lr: .* use the old value; or {way_on}"):
        fixmatch.train(config(place, "optim.lr=0.01"), resume=True)
    with pytest.raises(ConfigError, match=r"use the old value$"):  # weights of another network would be of no use
        fixmatch.train(config(place, "model.depth=16"), resume=True)
    save(place / "photos/labeled/cat/new.png", np.full((8, 8, 3), 99, np.uint8))
    try:
        with pytest.raises(DataError, match=f"split.json: made for .*; or {way_on}"):
            fixmatch.train(config(place), resume=True)
    finally:
        (place / "photos/labeled/cat/new.png").unlink()
