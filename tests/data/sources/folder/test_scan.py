"""Folders named after classes: what is found in them, in which order, and what is refused."""

import os
import shutil

import numpy as np
import pytest
from data_errors import error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import levels, read, save, solid

from fixmatch.data.augment import views
from fixmatch.data.sources.folder.scan import find_images, scan_folder


def test_a_folder(root):
    source = read(root)
    assert (source.name, source.classes, source.flip, source.folds) == ("folder", ("cat", "dog"), True, ())
    assert levels(source.train) == [10, 11, 20, 30]
    assert source.train.labels.tolist() == [0, 0, 1, -1]
    assert levels(source.test) == [40, 50]
    assert source.test.labels.tolist() == [0, 1]
    assert source.test_paths == ("test/cat/a.png", "test/dog/a.png")
    for data in (source.train, source.test):
        assert data.images.dtype == np.uint8
        assert data.labels.dtype == np.int64
        assert data.images.flags.c_contiguous
        assert not data.images.flags.writeable
        assert isinstance(data.images, np.memmap)
    assert source.mean == pytest.approx([17.75 / 255] * 3)
    assert source.std == pytest.approx([np.std([10, 11, 20, 30]) / 255] * 3)


def test_paths_of_the_test_images_that_can_be_read(root):
    (root / "labeled/cat/a.png").write_bytes(b"")
    (root / "test/cat/0.png").write_bytes(b"")
    save(root / "test/cat/b\n.png", solid(45))
    source = read(root, max_broken=2)
    assert source.test_paths == ("test/cat/a.png", r"'test/cat/b\n.png'", "test/dog/a.png")
    assert levels(source.test) == [40, 45, 50]


def test_views_are_made_of_mapped_images(root):
    images = read(root).train.images
    plan = views.draw_weak(np.random.default_rng(0), 4, 8)
    assert np.array_equal(views.weak(images, plan, np.arange(4)), views.weak(images.copy(), plan, np.arange(4)))


def test_the_unlabeled_folder_may_be_missing(root):
    (root / "unlabeled/u.png").unlink()
    (root / "unlabeled").rmdir()
    assert read(root).train.labels.tolist() == [0, 0, 1]


def test_a_channel_without_variation_has_the_std_of_one_grey_level(tmp_path):
    for name in ("labeled/a/1", "labeled/b/2", "test/a/1"):
        save(tmp_path / f"{name}.png", solid(7))
    assert read(tmp_path).std == pytest.approx([1 / 255] * 3)


def test_nested_folders_and_names_in_any_script(root):
    for name, value in (("b/deep/er/x", 14), ("b-/x", 13), ("a/z", 12), ("ä β 猫", 15)):
        save(root / f"labeled/cat/{name}.png", solid(value))
    save(root / "unlabeled/1/2/3.png", solid(29))
    # by the parts of the path: a/z, a.png, b/deep/er/x, b-/x, b.png
    assert levels(read(root).train) == [12, 10, 14, 13, 11, 15, 20, 29, 30]


_NAMES = st.text("ab.-_ é", min_size=1, max_size=3).filter(lambda name: name[0] != ".")


@settings(max_examples=60, deadline=None)
@given(paths=st.sets(st.lists(_NAMES, min_size=1, max_size=4).map(lambda parts: "/".join(parts) + "x.png"), min_size=1))
def test_images_are_sorted_by_the_parts_of_their_paths(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("tree")
    kept = set()
    for path in paths:
        (root / "labeled" / "k" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "labeled" / "k" / path).touch()
        kept.add(path)
    listing = scan_folder(root)
    found = [listing.files[i].removeprefix("labeled/k/") for i in range(len(listing.files))]
    assert found == sorted(kept, key=lambda path: path.split("/"))


def test_a_class_may_have_any_name_that_a_folder_has(root):
    for name in ("0", "a b", "x=y: {z}", "line\nbreak", os.fsdecode(b"\xff")):
        for split in ("labeled", "test"):
            save(root / split / name / "a.png", solid(1))
    assert read(root).classes == ("0", "a b", "cat", "dog", "line\nbreak", "x=y: {z}", r"\xff")


def _remove(root, *names):
    for name in names:
        (root / name).unlink()


@pytest.mark.parametrize(("change", "said"), [
    (lambda r: (r / "labeled").rename(r / "pictures"), "data: has neither labeled/ nor train/; it needs labeled/CLASS/ "
     "with images (or train/CLASS/), and may have unlabeled/ and test/CLASS/ (or val/CLASS/); if pictures "
     "are the classes, move them into labeled/"),
    (lambda r: (r / "train").mkdir(), "data: labeled and train both name the labeled images; keep one of them"),
    (lambda r: r.rename(r.with_name("elsewhere")), "data: no such folder; data.root is the folder that holds"),
    (lambda r: _remove(r, "test/cat/a.png", "test/dog/a.png"), "test: no test image"),
    (lambda r: (r / "test/dog").rename(r / "test/cow"), "test/cow: labeled/ has no class of this name"),
    (lambda r: (r / "labeled/cow").mkdir(), "class cow has no labeled image"),
    (lambda r: (r / "labeled/c\now").mkdir(), r"class 'c\now' has no labeled image"),
    (lambda r: save(r / "labeled/x.PNG"), "labeled/x.PNG: lies beside the class folders"),
    (lambda r: save(r / "test/x.png"), "test/x.png: lies beside the class folders"),
    (lambda r: (r / "labeled/cow").symlink_to("nothing"), "labeled/cow: a link that leads nowhere"),
    (lambda r: (r / "labeled/dog/a.png").write_bytes(b""), "more than 0 broken images, the first of them labeled/dog"),
])
def test_a_folder_that_cannot_be_used(root, change, said):
    change(root)
    assert said in error_of(read, root)


def test_one_class_only(root):
    shutil.rmtree(root / "labeled/dog")
    shutil.rmtree(root / "test")
    assert error_of(read, root) == (f"{root}/labeled: has one class only, cat, so there is nothing to tell apart; add "
                                    "labeled images of another class")


def test_no_class_at_all(tmp_path):
    (tmp_path / "labeled").mkdir()
    assert "has no folders" in error_of(read, tmp_path)


@pytest.mark.parametrize(("name", "said"), [("labeled/dog/a.png", "class dog has no labeled image"),
                                            ("labeled/d\x07g/a.png", r"class 'd\x07g' has no labeled image"),
                                            ("test/dog/a.png", "no test image")])
def test_a_gap_that_only_decoding_shows(root, name, said):
    if "test" in name:
        _remove(root, "test/cat/a.png")
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"no image")
    for _ in range(2):  # decoded, then from the cache
        assert said in error_of(read, root, 8, 1)


# --- images of no known class


@pytest.mark.parametrize(("given", "expected"), [
    (["."], ["A.JPG", "b/[1].png", "b/c/d.png", "b/lost.png"]),
    (["b"], ["b/[1].png", "b/c/d.png", "b/lost.png"]),
    (["b/", "./A.JPG", "b/c"], ["b/[1].png", "b/c/d.png", "b/lost.png", "./A.JPG"]),
    (["notes.txt", "b/lost.png"], ["notes.txt", "b/lost.png"]),  # named by the user: reading them says what is wrong
    (["b/[1].png"], ["b/[1].png"]),  # a file's own name comes before its meaning as a pattern
    (["b/[[]1*"], ["b/[1].png"]),
    (["**/*.png"], ["b/[1].png", "b/__MACOSX/f.png", "b/c/d.png", "b/lost.png"]),
    (["*"], ["A.JPG", "b/[1].png", "b/c/d.png", "b/lost.png", "notes.txt"]),
])
def test_images_by_files_folders_and_patterns(tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b/[1].png", "b/c/d.png", ".hidden/e.png", "b/__MACOSX/f.png"):
        save(tmp_path / name)
    (tmp_path / "a.png").rename(tmp_path / "A.JPG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b/again").symlink_to(tmp_path / "b")
    (tmp_path / "b/lost.png").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "heic").mkdir()
    for name in ("a.heic", "b.HEIC"):
        (tmp_path / "heic" / name).touch()
    found, passed_over = find_images(given)
    assert found == expected
    assert passed_over == {".": {".txt": 1, ".heic": 2}, "*": {".heic": 2}}.get(given[0], {})
    for none, said in (("*.bmp", "*.bmp: no such file or folder"), ("b/x\n", r"'b/x\n': no such file or folder"),
                       ("empty", "empty: no image in it (.png"), ("e*", "e*: no image in it"),
                       ("heic", "passed over 2 files that are no images of a kind read here: 2 .heic; convert HEIC")):
        assert said in error_of(find_images, [*given, none])
