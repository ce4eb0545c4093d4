"""Files from elsewhere are data: read, or refused in one line; nothing is run, and nothing grows without bound.

Image folders, images and CSV files have their property tests beside their own (tests/data/sources/folder).
"""

import errno
import json
import os
import pickle

import numpy as np
import pytest
from cifar_archive import pickle_as_python2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixmatch import checkpoint, metrics_file
from fixmatch.checkpoint import CheckpointError, Manifest
from fixmatch.config import ConfigError, load_config
from fixmatch.data.dataset import DataError
from fixmatch.data.sources import arrays_pickle
from fixmatch.data.sources.folder import table
from fixmatch.data.split import draw_split, load_split, save_split
from fixmatch.files import write_atomic

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = settings(FEW, max_examples=20_000)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
                    max_leaves=8)
LABELS = np.arange(20) % 10
MANIFEST = Manifest(7, {}, "digits", ("a",), (0.5,) * 3, (0.2,) * 3)


def one_line(call, *errors):
    """Calls; of these errors, each with one line of text, none, or any other raised as it is."""
    try:
        return call()
    except errors as error:
        lines = str(error).splitlines()
    assert len(lines) == 1, lines
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("hostile")
    checkpoint.save(where / "whole", {"model/w": np.zeros(2)}, MANIFEST)
    save_split(draw_split(LABELS, 10, 10, 0), where / "split.json", "digits", LABELS)
    return where


def _changed_manifests(folder, data):
    content = json.loads((folder / "whole/checkpoint.json").read_text())
    name = data.draw(st.sampled_from(sorted(content)))
    content[name] = data.draw(JSON)
    if data.draw(st.booleans()):  # by someone who knows how to seal it
        content = checkpoint.sealed(content)
    (folder / "changed").mkdir(exist_ok=True)
    for file in (folder / "whole").glob("arrays-*"):
        (folder / "changed" / file.name).write_bytes(file.read_bytes())
    (folder / "changed/checkpoint.json").write_text(json.dumps(content))
    saved = one_line(lambda: checkpoint.load(folder / "changed"), CheckpointError)
    assert saved is None or saved.manifest.step >= 0


def _damaged_bytes(folder, data):
    """Of a manifest and of a split: some bytes replaced, or cut off."""
    for name, load, error in (
            ("whole/checkpoint.json", lambda: checkpoint.load(folder / "changed"), CheckpointError),
            ("split.json", lambda: load_split(folder / "changed.json", "digits", LABELS, 10), DataError)):
        content = bytearray((folder / name).read_bytes())
        start = data.draw(st.integers(0, len(content)))
        content[start:start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        target = folder / ("changed/checkpoint.json" if name.startswith("whole") else "changed.json")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
        one_line(load, error)


def _any_split(folder, content):
    (folder / "any.json").write_text(json.dumps(content))
    assert one_line(lambda: load_split(folder / "any.json", "digits", LABELS, 10), DataError) is None


def _any_metrics(folder, lines):
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    metrics_file.drop_later_lines(path, 3, 3)
    assert all(line["step"] <= 3 for _, line in metrics_file.read(path))


def _any_yaml(folder, text):
    (folder / "any.yaml").write_text(text, encoding="utf-8", errors="replace")
    one_line(lambda: load_config(folder / "any.yaml"), ConfigError)


def _damaged_pickle(folder, data):
    content = bytearray(pickle_as_python2({b"labels": [1, 2], b"data": np.zeros((2, 5), np.uint8), b"x": [b"a.png"]}))
    start = data.draw(st.integers(0, len(content)))
    content[start:start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    one_line(lambda: arrays_pickle.unpickle(bytes(content), "data_batch_1"), DataError)


PROPERTIES = {
    _changed_manifests: st.data(),
    _damaged_bytes: st.data(),
    _any_split: JSON,
    _any_metrics: st.lists(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode())
                | st.integers(-5, 9).map(lambda n: b'{"kind": "train", "step": %d}' % n), max_size=9),
    _any_yaml: st.text(max_size=60) | JSON.map(json.dumps) | st.text("[]{}&*a:,- \n", max_size=60),
    _damaged_pickle: st.data()}


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_what_is_damaged_is_read_or_refused_in_one_line(folder, check):
    FEW(given(PROPERTIES[check])(check))(folder)


@pytest.mark.long
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_the_same_at_length(folder, check):
    LONG(given(PROPERTIES[check])(check))(folder)


NESTED = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(("text", "said"), [
    (NESTED, "more than 10,000 values"), ("train: &a [*a]", "more than 10,000 values"),
    ("run: {" + ", ".join(f"k{i}: 1" for i in range(6000)) + "}", "more than 10,000 values"),
    ("[" * 1001, "more than 1,000 brackets"), ("a" * 100_001, "larger than the 100,000 bytes")])
def test_yaml_that_would_take_long_is_refused_before(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "x.yaml")


def test_a_pickle_of_many_instructions_is_refused(monkeypatch):
    monkeypatch.setattr(arrays_pickle._Counted, "left", 1000)
    for filler in (b"]0", b"I1\n0"):
        with pytest.raises(DataError, match="instructions, which no image archive needs"):
            arrays_pickle.unpickle(b"\x80\x02" + filler * 1000 + b"}.", "data_batch_1")


def test_a_line_of_csv_and_a_split_are_of_bounded_length(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_LONGEST_LINE", 100)
    (tmp_path / "train.csv").write_text("path,label\na.png," + "x" * 100)
    with pytest.raises(DataError, match="line 2: longer than 100 bytes"):
        list(table._rows(tmp_path / "train.csv"))
    (tmp_path / "split.json").write_text(" " * 2**25)
    with pytest.raises(DataError, match="larger than the"):
        load_split(tmp_path / "split.json", "digits", LABELS, 10)


def test_a_failed_write_names_the_file_that_was_wanted(tmp_path, monkeypatch):
    """On a disk that is mounted read-only, where removing what is not there fails, too."""
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        write_atomic(tmp_path / "report.html", b"x")
    assert caught.value.filename == str(tmp_path / "report.html")


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")
    checkpoint.save(tmp_path, {"model/w": np.zeros(2)}, MANIFEST)
    next(tmp_path.glob("arrays-*")).write_bytes(pickle.dumps(Payload()))
    one_line(lambda: checkpoint.load(tmp_path), CheckpointError)
    assert not (tmp_path / "ran").exists()
