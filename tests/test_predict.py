"""New images through a trained network: fixmatch.load and the command predict."""

import csv
import json
import os
import shutil

import numpy as np
import paddle
import pytest
from image_folders import RAMP, save
from PIL import Image
from trained import in_threads, softmax, train

import fixmatch
from fixmatch import cli
from fixmatch.data import DataError
from fixmatch.data.sources.folder.image import decode_image

ROTATED = Image.Exif()
ROTATED[0x0112] = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("predict") / "run")


@pytest.fixture(scope="module")
def evaluation(run):
    return fixmatch.evaluate(run)


@pytest.fixture(scope="module")
def classifier(run):
    return fixmatch.load(run)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, evaluation):
    """Twelve test images at two depths, a broken one, and what no search should find."""
    root = tmp_path_factory.mktemp("photos")
    for index, pixels in enumerate(evaluation.source.test.images[:12]):
        save(root / ("" if index % 3 else "deep/er") / f"{index:02}.png", pixels)
    (root / "broken.jpg").write_bytes(b"nothing")
    (root / "notes.txt").write_text("no image")
    for name in ("IMG_1.HEIC", "deep/IMG_2.heic"):
        (root / name).touch()
    save(root / ".hidden/13.png")
    return root


# --- in Python


def test_what_is_predicted_is_what_evaluation_scores(run, classifier, evaluation):
    test = evaluation.source.test
    found = classifier.predict(test.images)
    np.testing.assert_allclose(found.probabilities, softmax(evaluation.ema_logits), atol=1e-5)
    assert (found.labels.dtype, found.probabilities.dtype, len(found)) == (np.int64, np.float32, 500)
    assert found.labels.tolist() == evaluation.ema_logits.argmax(axis=1).tolist()
    assert 100 * np.mean(found.labels == test.labels) == evaluation.ema.top1 != evaluation.raw.top1
    assert found.names == tuple(classifier.classes[label] for label in found.labels)
    assert found.confidence.tolist() == found.probabilities.max(axis=1).tolist()
    raw = fixmatch.load(run, weights="raw").predict(test.images)
    assert 100 * np.mean(raw.labels == test.labels) == evaluation.raw.top1


def test_paths_pictures_and_arrays_give_the_same(tmp_path, classifier, evaluation):
    arrays = list(evaluation.source.test.images[:40])
    paths = [save(tmp_path / f"{index}.png", pixels) for index, pixels in enumerate(arrays)]
    pictures = [Image.fromarray(pixels) for pixels in arrays]
    expected = classifier.predict(np.stack(arrays)).probabilities
    for images in (arrays, paths, [str(path) for path in paths], pictures, iter(pictures),
                   [*arrays[:10], *paths[10:20], *pictures[20:]]):
        assert np.abs(classifier.predict(images).probabilities - expected).max() < 1e-6
    for image in (arrays[0], paths[0], str(paths[0]), pictures[0]):
        assert np.abs(classifier.predict(image).probabilities - expected[:1]).max() < 1e-6
    assert classifier.predict([]).probabilities.shape == classifier.predict(np.empty((0, 8, 8, 3), np.uint8)
                                                                            ).probabilities.shape == (0, 10)


PICTURES = {  # what can be saved losslessly, and how
    "larger.png": (np.kron(RAMP, np.ones((3, 5, 1), np.uint8)), {}),
    "grey.png": (RAMP[:, :, 0], {}),
    "sixteen.png": (RAMP[:, :, 0].astype(np.uint16) * 300, {}),
    "transparent.png": (np.dstack([RAMP, RAMP[:, :, :1]]), {}),
    "turned.png": (np.kron(RAMP, np.ones((3, 5, 1), np.uint8)), {"exif": ROTATED}),
    "palette.gif": (Image.fromarray(RAMP).quantize(16), {}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_is_read_as_training_reads_it(tmp_path, classifier, name):
    pixels, options = PICTURES[name]
    path = save(tmp_path / name, pixels, **options)
    expected = classifier.predict(decode_image(str(path), 8, 8)).probabilities
    assert np.abs(classifier.predict(path).probabilities - expected).max() < 1e-6
    with Image.open(path) as picture:
        assert np.abs(classifier.predict(picture).probabilities - expected).max() < 1e-6
    if name == "larger.png":
        assert np.abs(classifier.predict(pixels).probabilities - expected).max() < 1e-6


@pytest.mark.parametrize(("images", "message"), [
    (np.zeros((8, 8, 3), np.float32), r"image 0: a float32 array of shape \[8, 8, 3\]; an array must be uint8"),
    (np.zeros((2, 8, 8, 3), np.int64), "image 0: a int64 array"),
    (np.zeros((8, 8), np.uint8), r"shape \[8, 8\]"),
    (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\]"),
    (np.zeros((2, 8, 8, 4), np.uint8), r"shape \[8, 8, 4\]"),
    (np.zeros((0, 8, 3), np.uint8), r"shape \[0, 8, 3\]"),
    ([RAMP, 7], "image 1: a int; give a path"),
    (7, "images: a int"),
    (None, "images: a NoneType"),
    (["missing.png"], "missing.png: No such file"),
    ([RAMP, "missing.png"], "missing.png: No such file"),
    ([os.curdir], "Is a directory"),
    ([RAMP, Image.new("F", (8, 8))], "image 1: floating-point pixels have no known range"),
])
def test_what_is_no_image_is_named(classifier, images, message):
    with pytest.raises(DataError, match=message) as error:
        classifier.predict(images)
    assert "\n" not in str(error.value)


def test_wrong_arguments_of_load(run):
    for wrong in ({"which": "first"}, {"weights": "mean"}):
        with pytest.raises(ValueError, match="which is latest or best, weights is ema or raw"):
            fixmatch.load(run, **wrong)


def test_nothing_outside_is_changed(run):
    """Neither the random numbers, nor the device, nor gradients; and training goes on as if nothing had been asked."""
    paddle.seed(7)
    expected = paddle.rand([3]).tolist()
    paddle.seed(7)
    fixmatch.load(run).predict(RAMP)
    assert paddle.rand([3]).tolist() == expected
    assert paddle.is_grad_enabled()


def test_several_threads_may_ask_at_once(classifier, evaluation):
    images = evaluation.source.test.images[:20]
    assert in_threads(classifier, images, classifier.predict(images).probabilities) < 1e-6


@pytest.mark.long
def test_a_hundred_thousand_images_take_no_more_memory(tmp_path, classifier):
    """Nothing but their probabilities is kept: 4 MB, where the images themselves are 19 MB even at 8x8 pixels."""
    import tracemalloc

    path = str(save(tmp_path / "a.png"))
    classifier.predict([path] * 1000)
    tracemalloc.start()
    classifier.predict([path] * 100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6


# --- the command


def test_the_table_and_the_files(run, photos, tmp_path, capsys, classifier):
    assert cli.main(["predict", str(run), str(photos), "--sort", "confidence", "--top", "2", "--csv",
                     str(tmp_path / "f.csv"), "--json", str(tmp_path / "f.json")]) == 0
    said = capsys.readouterr()
    assert said.err == (f"left out: {photos}/broken.jpg: not an image, or of a format that is not known here\n"
                        "passed over 3 files that are no images of a kind read here: 2 .heic, 1 .txt; convert HEIC "
                        "photos to JPEG or PNG\n")
    head, *lines = said.out.splitlines()
    assert head == f"{run}/checkpoints/latest: step 60, EMA weights, 10 classes, images of 8x8 pixels"

    paths = [path for path in sorted(photos.rglob("[01]*.png")) if ".hidden" not in str(path)]
    found = classifier.predict(paths)
    order = np.argsort(found.confidence, kind="stable")
    rows = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == [str(paths[index]) for index in order]
    assert list(rows[0]) == ["image", "predicted", "confidence", *(f"p_{name}" for name in "0123456789")]
    for row, index, line in zip(rows, order, lines, strict=True):
        assert row["predicted"] == found.names[index]
        assert float(row["confidence"]) == pytest.approx(found.confidence[index], abs=2e-6)
        assert [float(row[f"p_{k}"]) for k in range(10)] == pytest.approx(found.probabilities[index], abs=2e-6)
        path, first, share, percent, *second = line.split()
        assert (path, first, percent, len(second)) == (row["image"], row["predicted"], "%", 3)
        assert float(share) == pytest.approx(100 * found.confidence[index], abs=0.0051)

    content = json.loads((tmp_path / "f.json").read_text())
    assert content.keys() == {"model", "step", "weights", "classes", "images", "broken", "passed_over"}
    assert content["passed_over"] == {".heic": 2, ".txt": 1}
    assert [image["image"] for image in content["images"]] == [row["image"] for row in rows]
    assert [image["confidence"] for image in content["images"]] == [float(row["confidence"]) for row in rows]
    assert content["images"][0]["probabilities"] == [float(rows[0][f"p_{k}"]) for k in range(10)]
    assert content["broken"] == [{"image": f"{photos}/broken.jpg",
                                  "reason": "not an image, or of a format that is not known here"}]


def test_the_order_in_which_they_were_given(run, photos, capsys):
    last, first = photos / "11.png", photos / "01.png"
    assert cli.main(["predict", str(run), str(last), f"{photos}/0*.png", str(first), "--weights", "raw"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "raw weights" in head
    assert [line.split()[0] for line in lines] == [f"{photos}/{n:02}.png" for n in (11, 1, 2, 4, 5, 7, 8)]


@pytest.mark.parametrize(("arguments", "message"), [
    (["RUN", "PHOTOS/broken.jpg"], "no image can be read, the first of them PHOTOS/broken.jpg: not an image"),
    (["RUN", "PHOTOS", "--max-broken", "0"], "more than 0 images cannot be read, the first of them PHOTOS/broken.jpg"),
    (["RUN", "PHOTOS/IMG_1.HEIC"], "IMG_1.HEIC: not an image, or of a format that is not known here; convert HEIC "
     "photos to JPEG or PNG"),
    (["RUN", "PHOTOS", "--json", "PHOTOS/nowhere/found.json"], "--json: PHOTOS/nowhere/found.json: there is no folder "
     "PHOTOS/nowhere; make it, or name another one"),
    (["RUN", "PHOTOS/none*"], "PHOTOS/none*: no such file or folder"),
    (["RUN", "PHOTOS/.hidden/13.png/x"], "no such file or folder"),
    (["RUN", "EMPTY"], "EMPTY: no image in it"),
    (["EMPTY", "PHOTOS"], "EMPTY: neither a run folder with checkpoints/latest nor a checkpoint"),
    (["PHOTOS/notes.txt", "PHOTOS"], "notes.txt: neither"),
    (["RUN", "PHOTOS", "--top", "0"], "--top: at least 1"),
    (["RUN", "PHOTOS", "--top", "x"], "--top: invalid integer value: 'x'"),
    (["RUN", "PHOTOS", "--max-broken", "-1"], "--max-broken: at least 0"),
])
def test_what_cannot_be_is_one_line_and_nothing_is_written(run, photos, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()

    def filled(text: str) -> str:
        return text.replace("RUN", str(run)).replace("PHOTOS", str(photos)).replace("EMPTY", str(tmp_path / "empty"))

    try:
        code = cli.main(["predict", *map(filled, arguments), "--csv", str(tmp_path / "found.csv")])
    except SystemExit as stop:  # argparse
        code = stop.code
    said = capsys.readouterr()
    assert (code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert filled(message) in said.err
    assert not (tmp_path / "found.csv").exists()
    assert not (photos / "nowhere").exists()


def test_a_file_that_cannot_be_written_costs_no_result(run, photos, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    assert cli.main(["predict", str(run), f"{photos}/01.png", "--csv", str(tmp_path / "taken")]) == 1
    said = capsys.readouterr()
    assert f"{photos}/01.png" in said.out
    assert str(tmp_path / "taken") in said.err


def test_weights_that_are_no_numbers(run, photos, tmp_path, capsys):
    from fixmatch import checkpoint

    folder = shutil.copytree(run / "checkpoints/latest", tmp_path / "broken")
    saved = checkpoint.load(folder)
    saved.arrays["ema/fc.bias"][:] = np.nan
    checkpoint.save(folder, saved.arrays, saved.manifest)
    assert cli.main(["predict", str(folder), f"{photos}/01.png"]) == 2
    assert "gives NaN for an image" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_say_its_image_size(run, photos, tmp_path, capsys):
    folder = shutil.copytree(run / "checkpoints/latest", tmp_path / "old")
    content = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(  # as the first format had it
        json.dumps({k: v for k, v in content.items() if k not in ("image_size", "manifest_sha256")} | {"format": 1}))
    assert cli.main(["predict", str(folder), f"{photos}/01.png"]) == 2
    assert 'write "image_size": [height, width] into its checkpoint.json' in capsys.readouterr().err
