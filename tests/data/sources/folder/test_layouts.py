"""Layouts of own images, test images held out of the labeled ones, files that are passed over, and equal images."""

import numpy as np
import pytest
from data_errors import error_of
from image_folders import levels, make_csv, make_root, save, solid

from fixmatch.config import DataConfig
from fixmatch.data import load_source
from fixmatch.data.sources.folder.duplicates import Digests
from fixmatch.data.sources.folder.load import load_csv, load_folder
from fixmatch.data.sources.folder.scan import scan_folder

# --- layouts


@pytest.mark.parametrize(("labeled", "test"), [("train", "val"), ("train", "test"), ("labeled", "valid")])
def test_the_folders_of_an_image_folder_data_set(root, labeled, test):
    (root / "labeled").rename(root / labeled)
    (root / "test").rename(root / test)
    source = load_folder(str(root), 8, 0)
    assert (levels(source.train), levels(source.test)) == ([10, 11, 20, 30], [40, 50])
    assert source.test_paths[0] == f"{test}/cat/a.png"
    assert not source.held_out


def test_of_two_test_folders_one_is_used_and_the_other_named(root, logged):
    save(root / "val/cat/a.png", solid(77))
    assert levels(load_folder(str(root), 8, 0).test) == [40, 50]
    assert f"{root}: the accuracy is measured on test/; not used: val/\n" in logged()


def test_files_of_other_kinds_are_counted_by_extension(root, logged):
    for name in ("labeled/cat/a.HEIC", "labeled/dog/b.heic", "unlabeled/x/c.heic", "test/cat/notes.txt",
                 "labeled/dog/README", "labeled/dog/.hidden.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    scan_folder(root)
    assert logged() == (f"{root}: passed over 5 files that are no images of a kind read here: 3 .heic, 1 without an "
                        "extension, 1 .txt; convert HEIC photos to JPEG or PNG\n")
    for name in "abcdefgh":
        (root / f"labeled/cat/x.{name}").touch()
    scan_folder(root)
    assert "passed over 13 files" in (said := logged())
    assert ", ...; convert" in said


# --- held-out test images


def tens(root, cats: int = 10, dogs: int = 4):
    """cat 10 + i, dog 60 + i, unlabeled 100 and 101, and no test folder."""
    for name, first, count in (("labeled/cat", 10, cats), ("labeled/dog", 60, dogs), ("unlabeled", 100, 2)):
        for i in range(count):
            save(root / name / f"{i:02}.png", solid(first + i))
    return root


def test_a_fifth_of_each_class_is_held_out_where_there_is_no_test_folder(tmp_path, logged):
    source = load_folder(str(tens(tmp_path)), 8, 0)
    assert source.held_out
    assert np.bincount(source.test.labels).tolist() == [2, 1]  # a fifth of ten; at least one of four
    assert np.bincount(source.train.labels + 1).tolist() == [2, 8, 3]
    assert sorted(levels(source.train) + levels(source.test)) == [*range(10, 20), *range(60, 64), 100, 101]
    assert [int(path[-6:-4]) + (10 if "cat" in path else 60) for path in source.test_paths] == levels(source.test)
    assert source.mean == pytest.approx([np.mean(levels(source.train)) / 255] * 3)  # of the training images alone
    assert (f"{tmp_path}/test: not there, so 3 of the 14 labeled images are held out as test images: 0.2 of each "
            "class and at least one (data.test_fraction)\n") in logged()


def test_which_images_are_held_out_depends_on_the_split_seed_and_not_on_the_runs(tmp_path):
    tens(tmp_path, cats=40)

    def held_out(**settings):
        return load_source(DataConfig(name="folder", root=str(tmp_path), image_size=8, **settings)).test_paths

    first = held_out()
    assert held_out(split_seed=0) == first == held_out()
    assert held_out(split_seed=1) != first
    assert len(held_out(test_fraction=0.5)) == 20 + 2
    assert held_out(test_fraction=0.0) == ()
    save(tmp_path / "labeled/cat/new.png", solid(200))  # a later image leaves nearly all of them as they were
    assert len(set(first) - set(held_out())) <= 1


def test_a_class_of_one_image_has_none_to_hold_out(tmp_path):
    tens(tmp_path, dogs=1)
    said = error_of(load_folder, str(tmp_path), 8, 0)
    assert "class dog has 1 labeled image, so none can be held out" in said
    assert "data.test_fraction=0" in said
    assert len(load_folder(str(tmp_path), 8, 0, test_fraction=0.0).test) == 0


@pytest.mark.parametrize("dogs", [2, 3])
def test_a_class_keeps_a_training_image_whatever_the_fraction(tmp_path, dogs):
    source = load_folder(str(tens(tmp_path, dogs=dogs)), 8, 0, test_fraction=0.9)
    assert np.bincount(source.train.labels[source.train.labels >= 0]).tolist() == [1, 1]


def test_a_path_that_a_csv_file_names_twice_is_held_out_whole_or_not_at_all(tmp_path):
    root = make_csv(tmp_path, "path,label\na.png,cat\nb.png,cat\nb.png,cat\na.png,cat\nu.png,dog\nv.png,dog\n", None)
    source = load_csv(str(root), 8, 0)
    assert not set(levels(source.train)) & set(levels(source.test))
    assert (len(source.train), len(source.test)) == (3, 3)


def classes_of(source, split) -> dict[int, set[int]]:
    """The classes of each grey level, of the labeled images of a split."""
    found = {}
    for level, label in zip(levels(split), split.labels.tolist(), strict=True):
        if label >= 0:
            found.setdefault(level, set()).add(label)
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("read", ["folder", "csv"])
def test_copies_of_a_picture_are_on_one_side(tmp_path, logged, read, seed):
    """Half of the cats twice, as other kinds of files and in other folders; two pictures of a cat are dogs, too."""
    tens(tmp_path, cats=20, dogs=10)
    for i in range(10):
        save(tmp_path / f"labeled/cat/more/copy of {i}.bmp", solid(10 + i))
    for i in (0, 15):
        save(tmp_path / f"labeled/dog/no cat {i}.png", solid(10 + i))
    (tmp_path / "labeled/cat/broken.png").write_bytes(b"")
    if read == "csv":
        lines = [f"{path.relative_to(tmp_path)},{path.relative_to(tmp_path).parts[1]}" for path in
                 sorted(tmp_path.glob("labeled/**/*.*"))]
        lines += [f"{path.relative_to(tmp_path)}," for path in sorted(tmp_path.glob("unlabeled/*"))]
        (tmp_path / "train.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    load = {"folder": load_folder, "csv": load_csv}[read]
    source = load(str(tmp_path), 8, 1, seed=seed)
    train, test = classes_of(source, source.train), classes_of(source, source.test)
    assert not train.keys() & test.keys()
    assert train[10] == train[25] == {0, 1}  # what is in two classes is not held out
    # Of the cats, 3 of the 30 pictures are such; 5 of the 27 others are a fifth, as far as pairs allow. Of the dogs, 2
    # of 10.
    assert np.bincount(source.test.labels).tolist() == [5, 2]
    assert np.bincount(source.train.labels + 1).tolist() == [2, 25, 10]
    assert [levels(source.test)[i] < 60 for i in range(7)] == [True] * 5 + [False] * 2
    assert source.mean == pytest.approx([np.mean(levels(source.train)) / 255] * 3)
    said = logged()
    assert "accuracy is too high" not in said
    assert "warning: labeled images that are in another class, too: 2, such as labeled/dog/no cat 0.png and " in said
    again = load(str(tmp_path), 8, 1, seed=seed)  # from the cache
    assert (again.test_paths, levels(again.train)) == (source.test_paths, levels(source.train))
    assert [path for path in logged().splitlines() if "broken.png" in path]
    anew = load(str(tmp_path), 16, 1, seed=seed)
    assert anew.test_paths == source.test_paths  # whatever the size that the images are made into


def test_a_class_of_nothing_but_copies(tmp_path):
    tens(tmp_path, dogs=1)
    for i in range(3):
        save(tmp_path / f"labeled/dog/again {i}.png", solid(60))
    assert "class dog has 1 labeled image without copies and those that are in another class, too, so none" in error_of(
        load_folder, str(tmp_path), 8, 0)
    for i in range(5):
        save(tmp_path / f"labeled/dog/other {i}.png", solid(61))
    source = load_folder(str(tmp_path), 8, 0)  # of 4 and 5 copies, where a fifth would be 2
    assert levels(source.test)[2:] == [60] * 4
    assert levels(source.train)[8:13] == [61] * 5


def test_where_the_test_images_come_from(root, logged):
    load_folder(str(root), 8, 0, test_fraction=0.5)
    assert f"{root}: the test images are those of {root}/test; data.test_fraction is for data without any\n" in logged()


# --- equal images


def test_equal_images_are_named_by_what_they_mean(root, logged):
    save(root / "unlabeled/more/10.png", solid(10))
    save(root / "labeled/cat/z.png", solid(10))
    save(root / "labeled/dog/again.bmp", solid(11))
    save(root / "test/cat/b.png", solid(20))
    save(root / "test/cat/c.png", solid(30))
    save(root / "test/cat/d.png", solid(10))
    load_folder(str(root), 8, 0)
    expected = [
        "warning: labeled images that are in another class, too: 2, such as labeled/dog/again.bmp and "
        "labeled/cat/b.png",
        "warning: the accuracy is too high, as test images are labeled training images, too: 1, such as "
        "test/cat/d.png and labeled/cat/a.png",
        "warning: the accuracy may be too high, as test images are unlabeled training images, too: 2, such as "
        "test/cat/d.png and unlabeled/more/10.png",
        "labeled images that are there more than once: 1, such as labeled/cat/z.png and labeled/cat/a.png",
        "labeled images that are among the unlabeled ones, too, which does no harm: 2, such as labeled/cat/a.png and "
        "unlabeled/more/10.png"]
    for _ in range(2):  # decoded, then from the cache
        assert logged().splitlines()[-5:] == [f"{root}: {line}" for line in expected]
        load_folder(str(root), 8, 0)


def test_images_that_differ_are_not_called_equal(tmp_path, logged):
    root = make_root(tmp_path / "data")
    (root / "labeled/cat/c.png").write_bytes(b"broken")
    load_folder(str(root), 8, 1)
    assert "such as" not in logged()


def test_groups_of_equal_images():
    digests = Digests()
    assert digests.groups() == []
    digests.add(np.stack([solid(1), solid(2), solid(1)]), np.array([0, 1, 4]))
    digests.add(np.stack([solid(3), solid(2), solid(1)]), np.array([5, 6, 7]))
    assert digests.groups() == [[0, 4, 7], [1, 6]]
