"""fixmatch init: what it chooses for which images, machine and time, and the file that it writes."""

import pathlib

import numpy as np
import pytest
from image_folders import make_csv, make_root, save, solid

from fixmatch import cli, recipe
from fixmatch.config import from_dict, load_config
from fixmatch.notes import short_run
from fixmatch.recipe import Choice, Images, Rung


def images(**facts) -> Images:
    known = {"name": "folder", "root": pathlib.Path("/photos"), "classes": 3, "labeled": 60, "unlabeled": 2000,
             "test": 30, "size": (300, 400), "test_fraction": None}
    return Images(**{**known, **facts})


def machine(rate: float):
    """A measure of a machine that takes `rate` seconds for a step of a WRN-10 at 32 x 32; and what was measured."""
    asked = []

    def seconds_of(config, size):
        asked.append((size[0], config.model.depth))
        return rate * size[0] * size[1] / 1024 * config.model.depth / 10
    return seconds_of, asked


@pytest.mark.parametrize(("rate", "size", "rung", "steps"), [
    # 9 of 14 steps have unlabeled images and take 1.125 s, 5 of 14 a fifth of it: 0.9 * 1,800 s / 0.804 s
    (0.5, (300, 400), Rung(48, 10), 2000),  # with 64 pixels it would be 1,130 steps
    (0.094, (300, 400), Rung(128, 10), 1500), (0.096, (300, 400), Rung(96, 10), 2600),  # with 128 it would be 1,480
    (0.001, (300, 400), Rung(128, 28), 50000), (0.5, (32, 32), Rung(None, 10), 4500),
    (0.01, (32, 32), Rung(None, 28), 81000), (0.1, (28, 28), Rung(None, 28), 10000),
    (100.0, (8, 8), Rung(None, 10), 360),
])
def test_larger_images_and_deeper_networks_as_far_as_the_steps_reach(rate, size, rung, steps):
    seconds_of, _ = machine(rate)
    found = recipe.choose(images(size=size), 30, False, seconds_of, 64e9)
    assert found.rung == rung
    assert found.steps == pytest.approx(steps, rel=0.06)
    assert int(str(found.steps)[2:] or 0) == 0  # two leading digits


def test_what_cannot_fit_is_not_even_measured():
    seconds_of, asked = machine(1.0)
    recipe.choose(images(), 30, False, seconds_of, 64e9)
    assert asked == [(32, 10), (48, 10)]  # which leaves 1,008 steps, and 64 pixels fewer
    seconds_of, asked = machine(1e-6)
    assert recipe.choose(images(), 30, False, seconds_of, 4e9).rung == Rung(64, 10)  # 300 images of 96 pixels: 6.8 GB
    assert asked[-1] == (64, 10)


def test_batches_fit_the_images_and_averages_the_steps():
    few = recipe.settings(images(labeled=6, unlabeled=20), Rung(None, 10), False, 300)
    assert (few["train"]["batch_size"], few["train"]["mu"], few["train"]["eval_every"]) == (6, 2, 30)
    usual = recipe.settings(images(labeled=600), Rung(64, 28), False, 1400)
    assert (usual["train"]["batch_size"], usual["train"]["mu"]) == (64, 2)
    assert usual["ssl"]["supervised_steps"] == 500  # 500 at a fifth of the time of the other 900 are a tenth of it
    many = recipe.settings(images(labeled=600), Rung(64, 28), True, 50_000)
    assert (many["train"]["batch_size"], many["train"]["mu"], many["ema"]["decay"]) == (64, 7, 0.999)
    for tree in (few, many):
        assert short_run(from_dict(tree, "here")) is None


@pytest.mark.parametrize("facts", [
    {}, {"test_fraction": 0.2}, {"test_fraction": 0.0, "test": 0}, {"root": pathlib.Path("/a 'b': #c"), "name": "csv"},
    {"size": (48, 32)},
])
def test_the_file_says_what_was_chosen(tmp_path, facts):
    choice = Choice(Rung(None if "size" in facts else 64, 16), 4000, 0.25)
    (tmp_path / "c.yaml").write_text(recipe.write(images(**facts), choice, 30, False, "fixmatch train -c c.yaml"))
    tree = recipe.settings(images(**facts), choice.rung, False, 4000)
    tree["augment"] = {"flip": True}
    tree["run"] = {"name": "c", "dir": "runs/c"}
    assert load_config(tmp_path / "c.yaml") == from_dict(tree, "here")


def test_a_look_at_a_folder_and_at_csv_files(tmp_path):
    make_root(tmp_path / "a")
    found = recipe.look(tmp_path / "a")
    assert (found.name, found.classes, found.labeled, found.unlabeled, found.test) == ("folder", 2, 3, 4, 2)
    assert (found.size, found.test_fraction) == ((8, 8), None)
    make_csv(tmp_path / "b", "path,label\na.png,cat\nb.png,dog\nu.png,\n", None)
    for root in (tmp_path / "b", tmp_path / "b/train.csv"):
        found = recipe.look(root)
        assert (found.name, found.labeled, found.test, found.test_fraction) == ("csv", 2, 0, 0.0)  # one image a class


def test_the_command_looks_measures_writes_and_never_overwrites(tmp_path, monkeypatch, capsys):
    for i in range(5):
        for level, name in ((40, "labeled/cat"), (120, "labeled/dog"), (200, "unlabeled")):
            save(tmp_path / f"photos/{name}/{i}.png", solid(level + i))
    save(tmp_path / "photos/labeled/dog/x.png", solid(40))
    (tmp_path / "photos/labeled/dog/y.png").write_bytes(b"broken")
    (tmp_path / "photos/unlabeled/z.HEIC").touch()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "photos", "--minutes", "0.01"]) == 0
    said = capsys.readouterr().out
    for part in ("y.png: left out", "1 .heic; convert", "in another class, too: 1, such as labeled/dog/x.png and",
                 "held out as test images", "images of each class (labeled + test): cat: 4 + 1, dog", "steps are few",
                 "\nwrote photos.yaml: ", "\ntrain with: "):
        assert part in said
    assert said.count("passed over") == 1
    assert " as measured here, in about 0.01 minutes\n" in said
    written = (tmp_path / "photos.yaml").read_text()  # without the broken one
    assert "# 2 classes, 9 labeled, 14 training and 2 test images.\n" in written
    assert "# Made for a run of about 0.01 minutes on" in written
    config = load_config(tmp_path / "photos.yaml")
    assert (config.data.root, config.train.batch_size, config.train.mu) == (str(tmp_path / "photos"), 9, 1)
    assert short_run(config) is None
    before = (tmp_path / "photos.yaml").read_bytes()
    assert cli.main(["init", "photos"]) == 2
    assert capsys.readouterr().err.startswith("error: photos.yaml: is there already; name another file with -o")
    assert cli.main(["init", "nowhere", "-o", "x.yaml"]) == 2
    assert (tmp_path / "photos.yaml").read_bytes() == before
    assert not (tmp_path / "x.yaml").exists()


def test_a_step_is_measured_with_its_data(monkeypatch):
    seconds = recipe.measure(3)(from_dict({"model": {"depth": 10, "width": 1}, "train": {
        "batch_size": 2, "mu": 1}}, "here"), (8, 8))
    assert 0 < seconds < 30
    assert np.isfinite(recipe.memory())
