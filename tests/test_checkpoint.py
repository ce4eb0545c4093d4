"""Checkpoints and files: whole or not at all, checked when read."""

import errno
import hashlib
import json
import os
import threading

import numpy as np
import pytest

from fixmatch import checkpoint, files
from fixmatch.checkpoint import CheckpointError, Manifest, load_weights
from fixmatch.models import build_model
from fixmatch.settings import show

ARRAYS = {"model/w": np.arange(6, dtype=np.float32).reshape(2, 3), "ema/w": np.ones((2, 3)), "scalar": np.float32(2)}


def manifest(step: int = 0, **facts) -> Manifest:
    return Manifest(step, {"run": {"seed": 1}}, "digits", ("a", "b"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), **facts)


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tmp_path / "latest", ARRAYS, manifest(7, history={"raw": [], "ema": [1.5]}))
    return tmp_path / "latest"


def error_of(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def edit(folder, **changes):
    """Changes facts as a program of another version would write them: with the right SHA-256."""
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(checkpoint.sealed(json.loads(path.read_text()) | changes)))


def test_what_was_saved_is_loaded(folder):
    saved = checkpoint.load(folder)
    assert saved.manifest.step == 7
    assert saved.manifest.history == {"raw": [], "ema": [1.5]}
    assert saved.arrays.keys() == ARRAYS.keys()
    for name, a in ARRAYS.items():
        assert np.array_equal(saved.arrays[name], a)
        assert saved.arrays[name].dtype == np.asarray(a).dtype
    assert list(saved.part("model")) == ["w"]


def test_arrays_that_are_not_contiguous_keep_their_values(tmp_path):
    checkpoint.save(tmp_path, {"a": np.arange(6).reshape(2, 3).T}, manifest())
    assert checkpoint.load(tmp_path).arrays["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("links", [True, False])
def test_the_same_arrays_are_written_once_where_the_disk_has_hard_links(folder, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    written = checkpoint.save(folder, ARRAYS, manifest(7))
    best = checkpoint.save(folder.parent / "best", ARRAYS, manifest(7), twin=written)
    again = checkpoint.save(folder, ARRAYS, manifest(8), twin=best)
    assert again == written
    assert best.file.samefile(written.file) == links
    for path, step in (folder, 8), (folder.parent / "best", 7):
        saved = checkpoint.load(path)
        assert saved.manifest.step == step
        assert all(np.array_equal(saved.arrays[name], a) for name, a in ARRAYS.items())
    checkpoint.save(folder, {"model/w": np.zeros(3)}, manifest(9))  # the other name of the file keeps its content
    assert np.array_equal(checkpoint.load(folder.parent / "best").arrays["model/w"], ARRAYS["model/w"])


def test_a_twin_that_has_gone_is_written_anew(folder):
    written = checkpoint.save(folder, ARRAYS, manifest(7))
    written.file.unlink()
    checkpoint.save(folder.parent / "best", ARRAYS, manifest(7), twin=written)
    checkpoint.load(folder.parent / "best")


def test_a_later_save_replaces_the_earlier_and_leaves_one_set_of_arrays(folder):
    checkpoint.save(folder, {"model/w": np.zeros(3)}, manifest(8))
    assert checkpoint.load(folder).manifest.step == 8
    assert len(os.listdir(folder)) == 2


def test_saving_the_same_arrays_again_keeps_them(folder):
    checkpoint.save(folder, ARRAYS, manifest(8))
    assert checkpoint.load(folder).arrays["model/w"].shape == (2, 3)


@pytest.mark.parametrize(("broken", "call"), [("fsync", 1), ("fsync", 3), ("replace", 1), ("replace", 2)])
def test_a_disk_that_fails_leaves_the_old_checkpoint(folder, monkeypatch, broken, call):
    """The arrays come first, then the manifest that commits them; each file's fsync is followed by its folder's."""
    calls = 0
    real = getattr(os, broken)

    def fail(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)
    monkeypatch.setattr(files.os, broken, fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*/latest/"):
        checkpoint.save(folder, {"model/w": np.zeros(9)}, manifest(8))
    assert checkpoint.load(folder).manifest.step == 7
    assert not list(folder.glob(".*"))


def test_a_kill_between_arrays_and_manifest_leaves_the_old_checkpoint(folder):
    process = os.fork()
    if process == 0:
        def write(path, content):
            if path.name == "checkpoint.json":
                os._exit(9)  # nothing is cleaned up, as with SIGKILL
            files.write_atomic(path, content)
        checkpoint.write_atomic = write
        checkpoint.save(folder, {"model/w": np.zeros(9)}, manifest(8))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert len(list(folder.glob("arrays-*"))) == 2
    assert checkpoint.load(folder).manifest.step == 7
    (folder / ".arrays-1.safetensors.1.tmp").write_text("of a killed process")
    checkpoint.save(folder, {"model/w": np.zeros(8)}, manifest(9))
    assert checkpoint.load(folder).manifest.step == 9
    assert len(os.listdir(folder)) == 2


def test_damaged_arrays(folder):
    arrays = next(folder.glob("arrays-*"))
    blob = bytearray(arrays.read_bytes())
    blob[-1] ^= 1
    arrays.write_bytes(blob)
    assert "damaged" in error_of(folder)
    arrays.write_bytes(blob[:-5])
    assert "damaged" in error_of(folder)
    arrays.unlink()
    assert arrays.name in error_of(folder)


def test_arrays_that_are_no_safetensors(folder):
    arrays = next(folder.glob("arrays-*"))
    arrays.write_bytes(b"\xff" * 100)
    edit(folder, sha256=hashlib.sha256(b"\xff" * 100).hexdigest())
    assert "not a checkpoint" in error_of(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", "{}", '{"format": 1}', "[" * 100_000, "\x00"])
def test_a_manifest_that_is_none(folder, content):
    (folder / "checkpoint.json").write_text(content)
    assert "checkpoint.json" in error_of(folder)


def test_a_manifest_that_is_no_text(folder):
    (folder / "checkpoint.json").write_bytes(b"\xff\xfe\x00")
    assert "checkpoint.json" in error_of(folder)


@pytest.mark.parametrize("version", [3, 0, "1", True, None])
def test_another_format(folder, version):
    edit(folder, format=version)
    assert "format" in error_of(folder)


def test_arrays_outside_the_folder_are_not_read(folder):
    (folder / "../secret").write_bytes(b"x")
    for name in ("../secret", "/etc/passwd", "..", ".", "", "a\0b", "sub/arrays-0.safetensors", 7, None, ["a"]):
        edit(folder, arrays=name)
        assert "checkpoint.json" in error_of(folder)


def test_nothing_there(tmp_path):
    assert "no such file" in error_of(tmp_path / "none")


@pytest.mark.parametrize(("key", "good", "bad"), [
    ("step", [0, 7], ["7", 7.0, True, None, [7], -5, 10**400]),
    ("seconds", [0, 1.5], ["1.5", True, None, {}, float("nan"), float("inf"), -1.0, 10**400]),
    ("split_sha256", ["", "ab"], [7, None, ["ab"]]),
    ("config", [{}, {"run": {"seed": 1}}], [[], "x", None, 5]),
    ("scaler", [{}, {"scale": 1.0}], [[], None]),
    ("classes", [[], ["a", "b"]], [5, "ab", None, {"a": 0}, ["a", 1]]),
    ("mean", [[0.5, 0, 1]], ["x", 0.5, None, [], [0.5, 0.5], [0.5] * 4, [0.5, 0.5, "x"], [[0.5, 0.5, 0.5]]]),
    ("history", [{"raw": [], "ema": [1, 1.5]}], [{}, [], None, {"raw": []}, {"raw": 1, "ema": []},
                                                 {"raw": [], "ema": ["x" * 99]}, {"raw": [101.0], "ema": []}]),
    ("dataset", ["digits"], [7, None]),
    ("image_size", [None, [8, 8]], [8, [8], [8, 8, 8], ["8", 8], [0, 8]]),
    ("evaluated_step", [None, 3], ["3", 3.5]),
    ("world_size", [1, 8], [None, "1", 0]),
])
def test_a_fact_is_what_it_must_be(folder, key, good, bad):
    for value in good:
        edit(folder, **{key: value})
        assert getattr(checkpoint.load(folder).manifest, key) == value
    for value in bad:
        edit(folder, **{key: value})
        assert error_of(folder).startswith(f"checkpoint.json: '{key}' cannot be {show(value)}: damaged")


@pytest.mark.parametrize("key", ["step", "config", "dataset", "classes", "mean", "std"])
def test_a_fact_that_is_not_there(folder, key):
    path = folder / "checkpoint.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(checkpoint.sealed({k: v for k, v in content.items() if k != key})))
    assert error_of(folder).startswith(f"checkpoint.json: has no '{key}'")


def test_a_manifest_that_was_edited_is_refused_and_one_of_format_1_is_read(folder):
    path = folder / "checkpoint.json"
    whole = path.read_text()
    for one, other in (('"step": 7', '"step": 6'), ('"ema": [\n   1.5', '"ema": [\n   2.5'),
                       ('"seconds": 0.0', '"seconds": 1')):
        assert one in whole
        path.write_text(whole.replace(one, other))
        assert "SHA-256 of itself" in error_of(folder)
    content = json.loads(whole)
    del content["manifest_sha256"]
    path.write_text(json.dumps(content))
    assert "SHA-256 of itself" in error_of(folder)  # leaving it out is no way around it
    path.write_text(json.dumps(content | {"format": 1}))
    assert checkpoint.load(folder).manifest.step == 7


def test_a_manifest_of_any_size_is_refused_without_being_read(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "_LARGEST", 100)
    assert "larger than the 100 bytes" in error_of(folder)


def test_reading_while_another_thread_saves(tmp_path):
    """The arrays of the manifest that was read may be gone when they are opened."""
    checkpoint.save(tmp_path, ARRAYS, manifest(0))
    done = threading.Event()

    def write():
        for step in range(1, 60):
            checkpoint.save(tmp_path, {"model/w": np.full(3, step, np.float32)}, manifest(step))
        done.set()
    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        saved = checkpoint.load(tmp_path)
        assert saved.manifest.step in (0, saved.arrays["model/w"].flat[0])
    thread.join()


def test_provenance_stands_beside_the_other_facts(tmp_path):
    checkpoint.save(tmp_path, ARRAYS, manifest(3, provenance={"commit": "abc"}))
    assert json.loads((tmp_path / "checkpoint.json").read_text())["commit"] == "abc"
    assert checkpoint.load(tmp_path).manifest.provenance == {"commit": "abc"}


def test_find_takes_a_run_a_checkpoints_folder_or_a_checkpoint(tmp_path):
    for which in ("latest", "best"):
        checkpoint.save(tmp_path / "checkpoints" / which, ARRAYS, manifest())
    best = tmp_path / "checkpoints/best"
    assert checkpoint.find(tmp_path, "best") == checkpoint.find(tmp_path / "checkpoints", "best") == best
    assert checkpoint.find(best) == best
    with pytest.raises(CheckpointError, match="neither a run folder"):
        checkpoint.find(tmp_path / "runs")


def test_weights_are_loaded_only_if_all_of_them_fit():
    model, other = (build_model("wideresnet", 10, depth=10, width=1) for _ in range(2))
    state = {name: t.numpy().copy() for name, t in other.state_dict().items()}
    before = model.fc.weight.numpy().copy()
    for name, change in {
        "fc.bias": lambda s: s.pop("fc.bias"),
        "extra": lambda s: s.update(extra=np.zeros(1, np.float32)),
        "fc.weight": lambda s: s.update({"fc.weight": s["fc.weight"].T}),
        "bn1._mean": lambda s: s.update({"bn1._mean": s["bn1._mean"].astype(np.float64)}),
    }.items():
        wrong = dict(state)
        change(wrong)
        with pytest.raises(CheckpointError, match=name):
            load_weights(model, wrong)
        assert np.array_equal(model.fc.weight.numpy(), before)
    load_weights(model, state)
    assert all(np.array_equal(t.numpy(), state[name]) for name, t in model.state_dict().items())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def fail(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_write_makes_the_folders_it_needs(tmp_path):
    files.write_atomic(tmp_path / "out/of/a.json", "new")
    assert (tmp_path / "out/of/a.json").read_text() == "new"
    with pytest.raises(OSError, match=r"a\.json"):
        files.write_atomic(tmp_path / "out/of/a.json/b.json", "new")
