"""Exported models: equal to evaluation on all test images, whole or not there, and run as docs/deploy.md shows."""

import contextlib
import dataclasses
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import paddle
import pytest
from image_folders import make_root, save
from running import ROOT, first_of, tool_environment
from trained import in_threads, softmax, train

import fixmatch
from fixmatch import cli
from fixmatch.config import ConfigError
from fixmatch.export import export
from fixmatch.export_check import choose_sample
from fixmatch.models import layers
from fixmatch.selfcheck import SelfCheckFailed

pytest.importorskip("onnxruntime")
pytest.importorskip("paddle2onnx")

RESNEXT = ("model.arch=resnext", "model.depth=11", "model.width=1", "train.total_steps=12")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def runs(place):
    return {"wideresnet": train(place / "wideresnet"),
            "resnext": train(place / "resnext", *RESNEXT)}


@pytest.fixture(scope="module")
def evaluations(runs):
    return {arch: fixmatch.evaluate(run) for arch, run in runs.items()}


@pytest.fixture(scope="module")
def said(runs, place):
    """(arch, kind) -> what the command prints that writes the export below."""
    return {}


@pytest.fixture(scope="module")
def exports(runs, place, said):
    """(arch, kind) -> what the command writes; the average, but the raw weights to resnext.onnx."""
    paths = {(arch, kind): place / f"{arch}{'.onnx' if kind == 'onnx' else '-paddle'}"
             for arch in runs for kind in ("paddle", "onnx")}
    for (arch, kind), path in paths.items():
        weights = "raw" if (arch, kind) == ("resnext", "onnx") else "ema"
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            assert cli.main(["export", str(runs[arch]), str(path), "--weights", weights]) == 0
        said[arch, kind] = out.getvalue(), err.getvalue()
    return paths


def lose_the_slope(monkeypatch):
    """As paddle2onnx does by itself with Paddle's leaky_relu: the exported graph has another slope."""
    right = layers.activate

    def activate(x, activation):
        return right(x, activation if paddle.in_dynamic_mode() else ("leaky_relu", 0.0))
    monkeypatch.setattr(layers, "activate", activate)


@pytest.mark.parametrize("arch", ["wideresnet", "resnext"])
@pytest.mark.parametrize("kind", ["paddle", "onnx"])
def test_an_export_is_what_evaluation_scores_on_all_test_images(exports, evaluations, arch, kind):
    found, classifier = evaluations[arch], fixmatch.load(exports[arch, kind])
    test = found.source.test
    given = classifier.predict(test.images)
    if classifier.facts.weights == "ema":
        np.testing.assert_allclose(given.probabilities, softmax(found.ema_logits), atol=1e-5)
    scores = getattr(found, classifier.facts.weights)
    assert 100 * np.mean(given.labels == test.labels) == scores.top1
    assert classifier.classes == found.source.classes
    assert given.probabilities.std(axis=0).max() > 0.01  # they are not alike, which would prove nothing
    parts = [classifier.predict(test.images[a:b]).probabilities for a, b in ((0, 1), (1, 4), (4, 41))]
    np.testing.assert_allclose(np.concatenate(parts), given.probabilities[:41], atol=1e-6)


def test_what_the_command_says(runs, evaluations, exports, said):
    """Top-1 of checkpoint and runtimes as evaluation gives it, and what they were compared on."""
    path, (out, error) = exports["wideresnet", "paddle"], said["wideresnet", "paddle"]
    top1, lines = f"top-1 {evaluations['wideresnet'].ema.top1:6.2f} %", out.splitlines()
    assert error == ""
    assert lines[:2] == [f"{path}: {runs['wideresnet']}/checkpoints/latest, step 60, EMA weights, 10 classes, "
                         "images of 8x8 pixels", "compared with the checkpoint on all 500 test images of digits; "
                         "probabilities may differ by 1e-04:"]
    assert [line.split()[0] for line in lines[2:]] == ["checkpoint", "paddle.jit", "paddle.inference"]
    assert all(top1 in line for line in lines[2:])
    assert sorted(file.name for file in path.iterdir()) == ["inference.json", "inference.pdiparams", "metadata.json"]


def test_several_threads_may_ask_an_export_at_once(exports, evaluations):
    """paddle.jit alone fails then, or waits for ever."""
    images = evaluations["wideresnet"].source.test.images[:20]
    classifier = fixmatch.load(exports["wideresnet", "paddle"])
    assert in_threads(classifier, images, classifier.predict(images).probabilities) < 1e-5


def test_onnxruntime_warns_of_nothing(exports, capfd):
    import onnxruntime

    onnxruntime.InferenceSession(exports["wideresnet", "onnx"])
    assert capfd.readouterr() == ("", "")


# --- whole or not at all


@pytest.mark.parametrize("name", ["new.onnx", "old-paddle"])
def test_a_model_that_computes_something_else_is_not_written(runs, exports, tmp_path, monkeypatch, capsys, name):
    if name.startswith("old"):
        shutil.copytree(exports["wideresnet", "paddle"], tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    lose_the_slope(monkeypatch)
    assert cli.main(["export", str(runs["wideresnet"]), str(tmp_path / name)]) == 3
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"{tmp_path / name}: not written: " in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert len(list(tmp_path.iterdir())) == name.startswith("old")


def test_an_earlier_export_is_replaced(runs, exports, tmp_path):
    shutil.copytree(exports["resnext", "paddle"], tmp_path / "m")
    export(runs["wideresnet"], tmp_path / "m")
    assert fixmatch.load(tmp_path / "m").facts.step == 60
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("name", "kind", "message"), [
    ("model", "onnx", "name ends in .onnx"), ("model.onnx", "paddle", "cannot end in .onnx"),
    ("full", None, "holds something else"), ("file", None, "holds something else"),
    ("folder.onnx", None, "is a folder")])
def test_names_that_cannot_be(runs, tmp_path, name, kind, message):
    for folder in ("full", "folder.onnx"):
        save(tmp_path / folder / "photo.png")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / name)) + ".*" + re.escape(message)):
        export(runs["wideresnet"], tmp_path / name, kind)
    assert sorted(tmp_path.rglob("*")) == before


# --- the data of the run


def test_a_run_whose_images_are_gone_is_compared_on_random_ones(tmp_path, monkeypatch, capsys):
    """And on its own again where -o says where they are; a lost slope is seen either way."""
    make_root(tmp_path / "data")
    run = train(tmp_path / "run", "data.name=folder", f"data.root={tmp_path}/data", "data.image_size=8",
                "data.num_labeled=0", "train.total_steps=8", "train.batch_size=2")
    (tmp_path / "data").rename(tmp_path / "moved")
    capsys.readouterr()
    assert cli.main(["export", str(run), str(tmp_path / "m")]) == 0
    said = capsys.readouterr().out
    assert "compared with the checkpoint on 100 random images, as the test images cannot be read " in said
    assert f"{tmp_path}/data: no such folder" in said
    assert "top-1" not in said
    assert "100 random images" in json.loads((tmp_path / "m/metadata.json").read_text())["compared"]["images"]

    config, facts = fixmatch.load_config(run / "config.yaml"), fixmatch.load(run).facts
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, root=f"{tmp_path}/moved"))
    sample = choose_sample(moved, facts)
    assert (sample.what, sample.labels.tolist()) == ("all 2 test images of folder", [0, 1])
    assert sample.images[:, 0, 0, 0].tolist() == [40, 50]
    other = choose_sample(moved, dataclasses.replace(facts, image_size=(9, 10)))
    assert other.what == "100 random images, as the test images cannot be read (its images are 8x8 pixels now)"
    assert other.images.shape == (100, 9, 10, 3)

    lose_the_slope(monkeypatch)  # last, because Paddle keeps what it has translated for tracing
    with pytest.raises(SelfCheckFailed, match="differ from the checkpoint's by"):
        export(run, tmp_path / "o")


# --- damaged or foreign


def foreign_onnx() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "other", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.metadata_props.add(key="names", value="{0: 'cat'}")
    return onnx.ModelProto.SerializeToString(model)


DAMAGE = {  # file of the export -> what becomes of its bytes
    "inference.pdiparams": lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), "inference.json": lambda blob: blob[:100],
    "metadata.json": lambda blob: blob[:100], "m.onnx": lambda blob: blob[:1000]}


@pytest.mark.parametrize(("name", "change", "message"), [
    *((name, change, "damaged" if name != "m.onnx" else "not an ONNX model that can be run")
      for name, change in DAMAGE.items()),
    *((name, None, "not there") for name in DAMAGE if name != "metadata.json"),
    ("metadata.json", lambda blob: b'{"name": "other"}', "was not exported by this program"),
    ("metadata.json", lambda blob: b"[]", "was not exported by this program"),
    ("metadata.json", lambda blob: blob.replace(b'"format": 1', b'"format": 2'), "format 2 is not one this version"),
    ("m.onnx", lambda blob: foreign_onnx(), "was not exported by this program"),
    ("m.onnx", lambda blob: b"", "not an ONNX model that can be run")])
def test_damage_and_files_of_others_are_one_line(exports, tmp_path, capsys, name, change, message):
    kind = "onnx" if name == "m.onnx" else "paddle"
    model = tmp_path / "m.onnx" if kind == "onnx" else tmp_path
    if kind == "onnx":
        shutil.copyfile(exports["wideresnet", kind], model)
    else:
        shutil.copytree(exports["wideresnet", kind], tmp_path, dirs_exist_ok=True)
    file = tmp_path / name
    if change is None:
        file.unlink()
        message = "cannot be read: No such file"
    else:
        file.write_bytes(change(file.read_bytes()))
    assert cli.main(["predict", str(model), str(save(tmp_path / "p.png"))]) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert str(file) in said.err
    assert message in said.err


def test_other_weights_than_those_inside(exports, tmp_path, capsys):
    photo = str(save(tmp_path / "p.png"))
    assert cli.main(["predict", str(exports["resnext", "onnx"]), photo, "--weights", "raw"]) == 0
    capsys.readouterr()
    assert cli.main(["predict", str(exports["resnext", "onnx"]), photo, "--weights", "ema"]) == 2
    assert "holds the weights 'raw', not 'ema'" in capsys.readouterr().err


def test_without_the_extra(runs, exports, tmp_path, monkeypatch, capsys):
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    for command in (["predict", exports["wideresnet", "onnx"], save(tmp_path / "p.png")],
                    ["export", runs["wideresnet"], tmp_path / "m.onnx"]):
        assert cli.main(list(map(str, command))) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert re.search(r"this needs onnx(runtime)?: pip install .*onnxruntime", error)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("kind", first_of(["paddle", "onnx"], 1))
def test_a_full_disk_is_one_line_and_leaves_nothing(runs, tmp_path, kind):
    """The limit on the size of files stands in for it: Paddle, too, writes no more than fits, and says nothing."""
    code = ("import resource, sys; from fixmatch import cli; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2);"
            "sys.exit(cli.main(sys.argv[1:]))")
    (tmp_path / "temporary").mkdir()
    out, where = {"paddle": ("m", "m"), "onnx": ("m.onnx", "temporary/tmp")}[kind]
    done = subprocess.run(
        [sys.executable, "-c", code, "export", str(runs["wideresnet"]), str(tmp_path / out)], capture_output=True,
        text=True, timeout=120, env={**tool_environment(), "TMPDIR": str(tmp_path / "temporary")})
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith(f"error: {tmp_path / where}")
    assert done.stderr.endswith(": File too large; make room there for the model\n")
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_names_of_other_kinds_of_models_are_refused(runs, exports, tmp_path, capsys):
    for name in ("m.tflite", "m.pt", "m.pdmodel", "m.v2"):
        assert cli.main(["export", str(runs["wideresnet"]), str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert f"{name}: no model of a kind {name[1:]} is written here, but .onnx files and folders" in error
        assert "say --format paddle" in error
    assert list(tmp_path.iterdir()) == []
    for name, more in (("v1.2", []), ("m.v2", ["--format", "paddle"])):
        assert cli.main(["export", str(runs["wideresnet"]), str(tmp_path / name), *more]) == 0
        assert (tmp_path / name / "metadata.json").exists()


# --- the documentation


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/deploy.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_documentation_runs(runs, evaluations, tmp_path, monkeypatch, capsys):
    """Each command and each example; the examples agree on the photo."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(runs["wideresnet"], "runs/digits")
    for name, pixels in zip(("photo.png", "one.png", "photos/1.png", "more/x/2.jpg"),
                            evaluations["wideresnet"].source.test.images[:4], strict=True):
        save(pathlib.Path(name), pixels)
    commands = [line.removeprefix("$ fixmatch ") for text in blocks("console") for line in text.splitlines()]
    assert [command.split()[0] for command in commands] == ["predict", "predict", "export", "export"]
    for command in commands:
        assert cli.main(command.replace("'", "").split()) == 0
    assert pathlib.Path("found.csv").exists()
    assert pathlib.Path("found.json").exists()
    capsys.readouterr()
    said = []
    for example in blocks("python"):
        exec(compile(example, "docs/deploy.md", "exec"), {})
        said.append(capsys.readouterr().out.splitlines()[0])
    assert len(said) == 3
    assert len({line.split()[0] for line in said}) == 1
    assert np.ptp([float(line.split()[1]) for line in said]) < 0.00011
    assert said[0].split()[0] == fixmatch.load("runs/digits").predict("photo.png").names[0]
