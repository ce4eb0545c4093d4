"""Splits: how they are drawn, and which split files are refused."""

import json

import numpy as np
import pytest
from data_errors import error_of

from fixmatch.data.split import Split, choose_split, draw_split, load_split, save_split

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 30))


def test_a_split_is_balanced_sorted_and_distinct():
    split = draw_split(LABELS, 10, 40, seed=1)
    assert np.bincount(LABELS[split.labeled]).tolist() == [4] * 10
    assert (np.diff(split.labeled) > 0).all()
    assert np.array_equal(split.unlabeled, np.arange(300))


def test_a_split_depends_on_its_seed_alone():
    first = draw_split(LABELS, 10, 40, seed=1)
    np.random.seed(99)
    assert draw_split(LABELS, 10, 40, seed=1).sha256() == first.sha256()
    assert draw_split(LABELS, 10, 40, seed=2).sha256() != first.sha256()


def test_without_the_labeled_images_the_unlabeled_are_the_rest():
    split = draw_split(LABELS, 10, 40, seed=1, include_labeled=False)
    assert sorted([*split.labeled, *split.unlabeled]) == list(range(300))


@pytest.mark.parametrize(("num_labeled", "said"), [(41, "nearest: 40"), (5, "nearest: 10"), (310, "which has 30")])
def test_a_split_that_cannot_be(num_labeled, said):
    message = error_of(draw_split, LABELS, 10, num_labeled, 0)
    assert message.startswith(f"data.num_labeled: {num_labeled} ")
    assert said in message


def test_a_split_with_a_count_for_each_class():
    counts = (1, 2, 3, 4, 5, 6, 7, 8, 9, 30)
    split = draw_split(LABELS, 10, counts, seed=1)
    assert np.bincount(LABELS[split.labeled]).tolist() == list(counts)
    assert "10 classes" in error_of(draw_split, LABELS, 10, (4, 4), 0)
    for wrong in ((0, *counts[1:]), (*counts[:9], 31)):
        assert error_of(draw_split, LABELS, 10, wrong, 0).startswith("data.labels_per_class: ")


def test_images_of_unknown_class_are_unlabeled_only():
    labels = np.where(np.arange(300) % 2, LABELS, -1)
    split = draw_split(labels, 10, 0, seed=1)  # every label there is
    assert np.array_equal(split.labeled, np.flatnonzero(labels >= 0))
    assert len(split.unlabeled) == 300
    assert (labels[draw_split(labels, 10, 20, seed=1).labeled] >= 0).all()
    labels[labels == 7] = -1
    assert "class 7" in error_of(draw_split, labels, 10, 0, 1)


def test_a_split_that_leaves_nothing_unlabeled():
    assert "include_labeled" in error_of(draw_split, LABELS, 10, 300, 0, False)

# --- split files


@pytest.fixture
def split_file(tmp_path):
    save_split(draw_split(LABELS, 10, 40, seed=1), tmp_path / "split.json", "digits", LABELS)
    return tmp_path / "split.json"


def test_a_split_file_with_unknown_labels_is_refused(tmp_path):
    labels = np.where(np.arange(300) % 2, LABELS, -1)
    save_split(choose_split(np.arange(4), 300), tmp_path / "split.json", "folder", labels)
    assert "class is not known" in error_of(load_split, tmp_path / "split.json", "folder", labels, 4)


def test_a_split_file_gives_the_split_back(split_file):
    split = load_split(split_file, "digits", LABELS, 40)
    assert split.sha256() == draw_split(LABELS, 10, 40, seed=1).sha256()
    assert split.labeled.dtype == np.int64


def test_a_split_file_for_other_data_or_settings_is_refused(split_file):
    swapped = LABELS.copy()
    i, j = np.flatnonzero(LABELS == 0)[0], np.flatnonzero(LABELS == 1)[0]
    swapped[[i, j]] = swapped[[j, i]]
    for said, *arguments in (("cifar10", "cifar10", LABELS, 40), ("299", "digits", LABELS[:-1], 40),
                             ("another order", "digits", swapped, 40), ("num_labeled is 50", "digits", LABELS, 50)):
        assert said in error_of(load_split, split_file, *arguments)


def _resealed(content: dict) -> dict:
    seal = Split(np.array(content["labeled"]), np.array(content["unlabeled"])).sha256()
    return content | {"sha256": seal}


@pytest.mark.parametrize(("change", "said"), [
    (lambda c: c | {"labeled": [c["labeled"][0] + 1, *c["labeled"][1:]]}, "edited or damaged"),
    (lambda c: _resealed(c | {"labeled": [300, *c["labeled"][1:]]}), "distinct and in 0..299"),
    (lambda c: _resealed(c | {"labeled": [-1, *c["labeled"][1:]]}), "distinct and in 0..299"),
    (lambda c: _resealed(c | {"unlabeled": [1, 1]}), "distinct and in 0..299"),
    (lambda c: _resealed(c | {"unlabeled": []}), "distinct and in 0..299"),
    (lambda c: c | {"labeled": "abc"}, "not a split file"),
    (lambda c: c | {"labeled": [1 << 70]}, "not a split file"),
    (lambda c: c | {"labeled": [[1], [2, 3]]}, "not a split file"),
    (lambda c: {k: v for k, v in c.items() if k != "sha256"}, "not a split file"),
    (lambda c: [c], "not a split file"),
    (lambda c: None, "not a split file"),
])
def test_a_damaged_split_file_is_refused(split_file, change, said):
    split_file.write_text(json.dumps(change(json.loads(split_file.read_text()))))
    assert said in error_of(load_split, split_file, "digits", LABELS, 40)


def test_a_split_file_that_is_no_json_or_not_there(split_file, tmp_path):
    assert "cannot be read" in error_of(load_split, tmp_path / "none.json", "digits", LABELS, 40)
    assert "cannot be read" in error_of(load_split, tmp_path, "digits", LABELS, 40)
    split_file.write_bytes(b"\xff\xfe{")
    assert "not a split file" in error_of(load_split, split_file, "digits", LABELS, 40)
    split_file.write_text("[" * 100_000)
    assert "not a split file" in error_of(load_split, split_file, "digits", LABELS, 40)


def test_a_split_file_of_other_held_out_test_images_is_refused(tmp_path):
    path = tmp_path / "split.json"
    save_split(draw_split(LABELS, 10, 40, seed=1), path, "folder", LABELS, ["labeled/a/1.png"])
    assert json.loads(path.read_text())["held_out"] == ["labeled/a/1.png"]
    assert len(load_split(path, "folder", LABELS, 40, held_out=("labeled/a/1.png",)).labeled) == 40
    for other in ((), ("labeled/a/2.png",)):
        assert "held out" in error_of(load_split, path, "folder", LABELS, 40, True, other)


def test_a_class_is_called_by_its_name():
    names = ["cat", "dog\n", *"23456789"]
    assert "1 images of class cat, which has 0" in error_of(draw_split, LABELS[LABELS > 0], 10, 10, 0, True, names)
    assert r"class 'dog\n', which" in error_of(draw_split, LABELS[LABELS != 1], 10, 10, 0, True, names)
