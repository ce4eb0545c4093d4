"""What is said before a run trains, by hand."""

import dataclasses

import numpy as np
import pytest
from running import ROOT

from fixmatch import notes
from fixmatch.config import from_dict, load_config, recipes
from fixmatch.data.dataset import Dataset, Source
from fixmatch.data.split import Split


def source(train, test, classes=("cat", "dog")) -> Source:
    data = (Dataset(np.zeros((len(labels), 8, 8, 3), np.uint8), np.array(labels, np.int64)) for labels in (train, test))
    return Source("folder", classes, *data, (0.5,) * 3, (0.5,) * 3, True)


def config(**sections):
    return from_dict({"data": {"name": "folder"}, **sections}, "here")


def test_the_classes_and_their_images_are_counted():
    lines = list(notes.before_training(config(), source([0, 0, 1, -1, 1], [0, 1, 1]),
                                       Split(np.array([0, 1, 2]), np.arange(5))))
    assert lines == ["images of each class (labeled + test): cat: 2 + 1, dog: 1 + 2",
                     "accuracy is measured on 3 test images, 1 to 2 a class: 90 % would mean 35.8 to 99.3 % "
                     "(95 % interval)"]


def test_how_many_test_images_a_class_has():
    assert "on 6 test images, 3 a class: " in notes.describe_test({"cat": 3, "dog": 3})
    assert "on 1,005 test images, 5 to 1,000 a class: " in notes.describe_test({"cat": 5, "dog": 1000})


@pytest.mark.parametrize("recipe", recipes())
def test_no_packaged_recipe_is_too_short_for_its_averages(recipe):
    assert notes.short_run(load_config(recipe)) is None


def test_the_warning_that_the_documentation_shows():
    lines = (ROOT / "docs/own-images.md").read_text(encoding="utf-8").splitlines()
    assert notes.short_run(config(train={"total_steps": 300})) in lines


def test_of_many_classes_the_extremes_are_named():
    classes = tuple(f"c{i}" for i in range(300))
    found = source([*range(300), 7], [0, 0, *range(300)], classes)
    line = next(notes.before_training(config(), found, Split(np.arange(301), np.arange(301))))
    assert line == "300 classes, with 1 (c0) to 2 (c7) labeled and 1 (c1) to 3 (c0) test images"


def test_without_test_images_and_for_official_data_nothing_is_said_of_them():
    split = Split(np.array([0, 1]), np.arange(2))
    assert list(notes.before_training(config(), source([0, 1], []), split)) == [
        "images of each class (labeled + test): cat: 1 + 0, dog: 1 + 0"]
    assert list(notes.before_training(config(data={"name": "digits"}), source([0, 1], [0]), split)) == []


@pytest.mark.parametrize(("steps", "share"), [
    (1, 0.0), (10, 0.5), (24, 0.5), (25, 0.8), (49, 0.8), (50, 0.9), (300, 0.98), (499, 0.98), (500, 0.99),
    (1000, 0.995), (2500, 0.998), (4999, 0.998), (5000, 0.999), (2**20, 0.999),
])
def test_the_share_that_fits_so_many_steps(steps, share):
    assert notes.fitting_share(steps) == share


@pytest.mark.parametrize(("steps", "decay", "momentum", "said"), [
    (5000, 0.999, 0.999, None), (4999, 0.999, 0.999, "for ema.decay=0.999: the average will"),
    (2500, 0.99, 0.999, None),  # configs/digits.yaml
    (2499, 0.99, 0.999, "for model.bn_momentum=0.999: the average will"),
    (300, 0.999, 0.999, "300 steps are few for ema.decay=0.999 and model.bn_momentum=0.999: the averages will"),
    (300, 0.98, 0.98, None), (10**6, 1.0, 0.9, "for ema.decay=1: "), (3, 0.0, 0.0, None),
])
def test_a_run_too_short_for_its_averages_is_warned_of(steps, decay, momentum, said):
    asked = config(train={"total_steps": steps}, ema={"decay": decay}, model={"bn_momentum": momentum})
    found = notes.short_run(asked)
    assert (found is None) if said is None else said in found
    if found:
        fits = dict(part.split("=") for part in found.split(" -o ")[1].split())
        better = dataclasses.replace(
            asked, ema=dataclasses.replace(asked.ema, decay=float(fits.get("ema.decay", decay))),
            model=dataclasses.replace(asked.model, bn_momentum=float(fits.get("model.bn_momentum", momentum))))
        assert notes.short_run(better) is None
