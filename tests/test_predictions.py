"""tools/eval.py --predictions, and data of other classes than the checkpoint's."""

import csv
import json
import shutil

import numpy as np
import pytest
import scipy.io
from cifar_archive import contents, write_archive
from running import digits

from fixmatch import checkpoint, cli
from fixmatch.data.sources import svhn
from fixmatch.data.sources.digits import load_digits
from fixmatch.evaluation import predictions_csv


@pytest.fixture(scope="module")
def run(tmp_path_factory, run_tool):
    """A short run, at the end of which raw and averaged weights are not alike."""
    place = tmp_path_factory.mktemp("predictions")
    ran = run_tool("train", *digits("run.dir=run", "train.total_steps=12", "train.eval_every=6"), cwd=place)
    assert ran.code == 0, ran.stderr
    return place / "run"


def rows_of(text: str) -> list[dict]:
    return list(csv.DictReader(text.splitlines(keepends=True)))


def test_every_test_image_has_its_line(run, run_here, tmp_path):
    ran = run_here("eval", run, "--predictions", "found.csv", "--json", "found.json", cwd=tmp_path)
    assert (ran.code, ran.stderr) == (0, "")
    text, labels = (tmp_path / "found.csv").read_text(), load_digits().test.labels
    assert text.splitlines()[0] == "image,label,predicted,confidence"
    rows = rows_of(text)
    assert [int(row["image"]) for row in rows] == list(range(500))
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert all(0.1 < float(row["confidence"]) <= 1 for row in rows)

    figures = json.loads((tmp_path / "found.json").read_text())
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels, [int(row["predicted"]) for row in rows]), 1)
    assert confusion.tolist() == figures["ema"]["confusion"] != figures["raw"]["confusion"]
    assert figures["ema"].keys() == {"top1", "top5", "loss", "per_class", "confusion"}


def test_the_lines_worked_out_by_hand():
    logits = np.log([[1, 2, 1], [5, 5, 90], [2, 2, 0.5]]) + 1000  # exp(1000) is infinite
    text = predictions_csv(range(3), logits, np.array([1, 0, 1]), ["cat", 'a "big", dog', "owl"])
    assert text == ('image,label,predicted,confidence\n0,"a ""big"", dog","a ""big"", dog",0.500000\n'
                    '1,cat,owl,0.900000\n2,"a ""big"", dog",cat,0.444444\n')  # of equals, the first
    assert [row["predicted"] for row in rows_of(text)] == ['a "big", dog', "owl", "cat"]


def test_a_logit_that_is_no_number_has_no_confidence():
    text = predictions_csv(range(2), np.array([[np.nan, 1], [0, 0]], np.float32), np.array([0, 0]), ["a", "b"])
    assert text.splitlines()[1:] == ["0,a,b,nan", "1,a,a,0.500000"]


def test_a_file_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "old.csv").mkdir()
    assert cli.main(["eval", str(run), "--predictions", str(tmp_path / "old.csv")]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert str(tmp_path / "old.csv") in error
    assert [path.name for path in tmp_path.iterdir()] == ["old.csv"]


# --- other classes


def error_of(capsys, *arguments) -> str:
    assert cli.main(["eval", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_as_many_classes_with_other_names(run, tmp_path, capsys):
    write_archive(tmp_path, contents())
    file = tmp_path / "found.csv"
    error = error_of(capsys, run, "-o", "data.name=cifar10", f"data.root={tmp_path}", "--predictions", file)
    assert f"{run}/checkpoints/latest: trained on 10 classes, of which number 0 is '0'" in error
    assert "of the 10 of cifar10 it is 'class 0'" in error
    assert not file.exists()


@pytest.mark.parametrize("change", [lambda c: c[:9], lambda c: [*c, "ten"], lambda c: [*c[:8], "9", "8"]])
def test_fewer_or_more_classes_or_another_order(run, tmp_path, capsys, change):
    changed = shutil.copytree(run, tmp_path / "run")
    manifest = changed / "checkpoints/latest/checkpoint.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(checkpoint.sealed(content | {"classes": change(content["classes"])})))
    error = error_of(capsys, changed)
    differing = {9: "number 9 is None", 11: "number 10 is 'ten'", 10: "number 8 is '9'"}
    assert differing[len(change(content["classes"]))] in error


def test_a_checkpoint_without_classes(run, tmp_path, capsys):
    changed = shutil.copytree(run, tmp_path / "run")
    manifest = changed / "checkpoints/latest/checkpoint.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(checkpoint.sealed({k: v for k, v in content.items() if k != "classes"})))
    assert "has no 'classes'" in error_of(capsys, changed)


def test_other_data_of_the_same_classes_are_evaluated(run, tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {
            "X": rng.integers(0, 256, (32, 32, 3, 10), dtype=np.uint8), "y": np.arange(1, 11, dtype=np.uint8)[:, None]})
    monkeypatch.setattr(svhn, "_MD5", {path.name: svhn.md5_of(path) for path in tmp_path.glob("*.mat")})
    assert cli.main(["eval", str(run), "--predictions", str(tmp_path / "found.csv"), "-o", "data.name=svhn",
                     f"data.root={tmp_path}"]) == 0
    assert capsys.readouterr().err == ""
    assert [row["label"] for row in rows_of((tmp_path / "found.csv").read_text())] == list("1234567890")
