"""SVHN's MATLAB files: what is read right, and what is refused."""

import contextlib
import functools
import http.server
import io
import os
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import scipy.io
from running import ROOT, tool_environment

from fixmatch.config import DataConfig
from fixmatch.data import DataError, load_source
from fixmatch.data.sources import svhn
from fixmatch.data.sources.svhn import load_svhn

FILES = "train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"
ARRAYS = {"X": np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8),
          "y": np.arange(20, dtype=np.uint8)[:, None] % 10 + 1}


def arrays_of(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"X": rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8),
            "y": rng.integers(1, 11, (count, 1), dtype=np.uint8)}


def packed(arrays: dict, **options) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, arrays, **{"do_compression": True} | options)
    return file.getvalue()


def read(root, extra=False):
    return load_svhn(str(root), False, extra)


def error_of(root, extra=False, allow_download=False) -> str:
    with pytest.raises(DataError) as caught:
        load_svhn(str(root), allow_download, extra)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


@pytest.fixture
def root(tmp_path):
    """A folder with the three files, of 20, 12 and 30 images."""
    for name, count in zip(FILES, (20, 12, 30), strict=True):
        (tmp_path / name).write_bytes(packed(arrays_of(count, seed=count)))
    return tmp_path


def assert_holds(dataset, *parts):
    images = np.concatenate([part["X"].transpose(3, 0, 1, 2) for part in parts])
    assert np.array_equal(dataset.images, images)
    assert dataset.labels.tolist() == [int(label) % 10 for part in parts for label in part["y"][:, 0]]
    assert (dataset.images.dtype, dataset.labels.dtype) == (np.uint8, np.int64)
    assert dataset.images.flags.c_contiguous


# --- what is read


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("folder", [".", "svhn"])
def test_images_and_labels(tmp_path, root, folder, extra):
    (tmp_path / "there" / folder).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (root / name).rename(tmp_path / "there" / folder / name)
    source = read(tmp_path / "there", extra)
    assert_holds(source.train, arrays_of(20, seed=20), *[arrays_of(30, seed=30)][:extra])
    assert_holds(source.test, arrays_of(12, seed=12))


def test_a_known_pixel_and_the_digit_0(tmp_path):
    images = np.zeros((32, 32, 3, 2), np.uint8)
    images[3, 9, 2, 1] = 200  # row 3, column 9, blue
    for name in FILES[:2]:
        (tmp_path / name).write_bytes(packed({"X": images, "y": np.array([[10], [9]], np.uint8)}))
    train = read(tmp_path).train
    assert np.argwhere(train.images).tolist() == [[1, 3, 9, 2]]
    assert train.labels.tolist() == [0, 9]


def test_what_is_known_of_the_data_set(root):
    source = load_source(DataConfig(name="svhn", root=str(root), download=False, extra=True))
    assert (source.name, source.classes, source.flip) == ("svhn", tuple("0123456789"), False)
    assert len(source.train) == 50
    assert source.mean == (0.4377, 0.4438, 0.4728)


@pytest.mark.parametrize("count", [1023, 1024, 1025])
def test_more_images_than_are_transposed_at_once(root, count):
    (root / FILES[0]).write_bytes(packed(arrays_of(count, seed=1)))
    assert_holds(read(root).train, arrays_of(count, seed=1))


@pytest.mark.parametrize("labels", [np.uint8, np.int16, np.uint32, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("count", [2, 3, 20])  # a few labels are within their tag
@pytest.mark.parametrize("compressed", [True, False])
def test_every_way_to_store_the_same(root, labels, count, compressed):
    arrays = arrays_of(count, seed=3)
    stored = {"note": "a string", "y": arrays["y"].astype(labels), "cells": np.array([[1, "a"]], object),
              "X": arrays["X"], "z": np.eye(3) * 1j}
    (root / FILES[0]).write_bytes(packed(stored, do_compression=compressed))
    assert_holds(read(root).train, arrays)


def test_unofficial_files_are_read_and_said(root, capsys, monkeypatch):
    read(root, extra=True)
    assert capsys.readouterr().out.splitlines() == [
        f"{root / name}: not the official file (its MD5 differs); read all the same" for name in FILES]
    monkeypatch.setattr(svhn, "_MD5", {name: svhn.md5_of(root / name) for name in FILES})
    read(root, extra=True)
    assert capsys.readouterr().out == ""


def test_images_are_in_memory_once(root):
    (root / FILES[0]).write_bytes(packed({"X": np.zeros((32, 32, 3, 40_000), np.uint8), "y": np.ones((40_000, 1))}))
    code = ("import resource; from fixmatch.data.sources.svhn import load_svhn\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"before = peak(); load_svhn({str(root)!r}, False, False); print((peak() - before) * 1024)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=tool_environment(), text=True,
                          capture_output=True, check=True)
    assert int(done.stdout.split()[-1]) < 1.3 * 40_000 * 3072


# --- what is not there


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_and_no_download(root, name):
    (root / name).unlink()
    message = error_of(root, extra=True)
    assert f"{root}: has no {name}" in message
    assert "data.download" in message


def test_nothing_there_and_no_download(tmp_path):
    assert "data.download" in error_of(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@contextlib.contextmanager
def served(folder):
    """The address at which `folder` is served."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_missing_files_are_downloaded_and_checked(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "*")
    here = tmp_path / "here"
    with served(root) as address:
        monkeypatch.setattr(svhn, "_HOST", address)
        message = error_of(here, allow_download=True)
        assert f"{here / 'svhn' / FILES[0]}: download of {address}{FILES[0]} has MD5" in message
        assert "by hand" in message
        assert os.listdir(here / "svhn") == []
        monkeypatch.setattr(svhn, "_MD5", {name: svhn.md5_of(root / name) for name in FILES})
        load_svhn(str(here), True, False)
        assert sorted(os.listdir(here / "svhn")) == sorted(FILES[:2])
        capsys.readouterr()
        source = load_svhn(str(here), True, True)
    assert capsys.readouterr().out.count("\n") <= 1  # only the extra file is fetched now
    assert_holds(source.train, arrays_of(20, seed=20), arrays_of(30, seed=30))


def test_downloads_are_checked_by_tls():
    assert svhn._HOST.startswith("https://")


# --- what is not SVHN


def resized(**shapes) -> dict:
    return {name: np.resize(ARRAYS[name], shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("change", [
    resized(X=(32, 32, 3)), resized(X=(32, 32, 1, 20)), resized(X=(20, 32, 32, 3)), resized(X=(32, 32, 3, 0)),
    resized(X=(32, 32, 3, 20, 1)), resized(X=(32, 3)), resized(X=(32, 32, 3, 1, 20)),
    {"X": ARRAYS["X"].astype(np.int8)}, {"X": ARRAYS["X"].astype(np.uint16)}, {"X": ARRAYS["X"] / 255},
    {"X": ARRAYS["X"] > 0}, {"X": ARRAYS["X"] * 1j}, {"X": np.zeros((32, 32, 3, 2), object)}, {"X": "text"},
    {"X": {"a": 1}}, {"X": scipy.sparse.csc_matrix(np.eye(3))},
], ids=lambda change: f"{getattr(change['X'], 'dtype', 'other')} {np.shape(change['X'])}")
@pytest.mark.parametrize("compressed", [True, False])
def test_images_that_are_none(root, change, compressed):
    (root / FILES[0]).write_bytes(packed(ARRAYS | change, do_compression=compressed))
    assert f"{root / FILES[0]}: not an SVHN file: X is not" in error_of(root)


@pytest.mark.parametrize("labels", [
    ARRAYS["y"].T, ARRAYS["y"].reshape(10, 2), ARRAYS["y"].reshape(20, 1, 1) * [[[1, 1]]], np.zeros((0, 1)),
    ARRAYS["y"] > 3, ARRAYS["y"] * 1j, ARRAYS["y"].astype(object), "text", {"a": 1},
], ids=lambda labels: f"{getattr(labels, 'dtype', 'other')} {np.shape(labels)}")
@pytest.mark.parametrize("compressed", [True, False])
def test_labels_that_are_none(root, labels, compressed):
    (root / FILES[1]).write_bytes(packed(ARRAYS | {"y": labels}, do_compression=compressed))
    assert f"{root / FILES[1]}: not an SVHN file: y is not" in error_of(root)


@pytest.mark.parametrize(("label", "said"), [(0, "0"), (11, "11"), (-1, "-1"), (2.5, "2.5"), (np.nan, "nan")])
def test_labels_out_of_range(root, label, said):
    labels = ARRAYS["y"].astype(np.float64)
    labels[7] = label
    (root / FILES[2]).write_bytes(packed(ARRAYS | {"y": labels}))
    assert f"{FILES[2]}: image 7 has the label {said}" in error_of(root, extra=True)


def test_missing_arrays_and_other_numbers_of_labels(root):
    path = root / FILES[0]
    for arrays, said in (({"y": ARRAYS["y"]}, "has no array X"), ({"X": ARRAYS["X"]}, "has no array y"),
                         ({}, "has no array X"), (ARRAYS | {"y": ARRAYS["y"][:19]}, "has 20 images, but 19 labels")):
        path.write_bytes(packed(arrays))
        assert f"{path}: not an SVHN file: {said}" in error_of(root)


@pytest.mark.parametrize(("content", "said"), [
    (b"", "not a MATLAB 5 file"),
    (b"<html>not found</html>" * 20, "not a MATLAB 5 file"),
    (b"\0" * 1000, "not a MATLAB 5 file"),
    (b"\x89HDF\r\n\x1a\n" + bytes(500), "not a MATLAB 5 file"),
    (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(384) + b"\x89HDF\r\n\x1a\n", "MATLAB 7.3"),
    (b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI" + bytes(100), "big-endian"),
    (b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + bytes(100), "data of type 0"),
    (packed({"y": ARRAYS["y"]}, format="4", do_compression=False), "not a MATLAB 5 file"),
], ids=lambda value: value[:24] if isinstance(value, str) else "")
def test_foreign_files(root, content, said):
    (root / FILES[1]).write_bytes(content)
    message = error_of(root)
    assert message.startswith(f"{root / FILES[1]}: ")
    assert said in message


def test_a_file_that_cannot_be_read(root, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(svhn, "open", refuse, raising=False)
    assert f"{root / FILES[0]}: cannot be read: Permission denied" in error_of(root)


# --- damaged and hostile files


@pytest.mark.parametrize("compressed", [True, False])
def test_every_truncation(root, compressed):
    good = packed(ARRAYS | {"Z": np.eye(9)}, do_compression=compressed)
    end = good.rindex(struct.pack("<I", 15 if compressed else 14))  # the tag of Z, which nobody needs
    cuts = [*range(0, 300, 5), *np.linspace(300, end - 4, 60, dtype=int), end - 1]
    for cut in cuts:
        (root / FILES[0]).write_bytes(good[:cut])
        assert str(root / FILES[0]) in error_of(root)


@pytest.mark.parametrize("compressed", [True, False])
def test_every_wrong_byte_is_survived(root, compressed):
    good = packed({"y": ARRAYS["y"], "X": ARRAYS["X"]}, do_compression=compressed)
    rng = np.random.default_rng(0)
    refused = 0
    for position in range(124, 400):
        blob = bytearray(good)
        blob[position] ^= int(rng.integers(1, 256))
        (root / FILES[0]).write_bytes(blob)
        try:
            read(root)
        except DataError:
            refused += 1
    assert refused > 100


def test_a_checksum_that_does_not_fit(root):
    good = packed(ARRAYS)
    size = struct.unpack_from("<I", good, 132)[0]
    blob = bytearray(good)
    blob[136 + size - 1] ^= 1  # of X's checksum
    (root / FILES[0]).write_bytes(blob)
    assert "damaged (Error -3" in error_of(root)


def variable(*parts: bytes, size=None) -> bytes:
    body = b"".join(parts)
    return struct.pack("<II", 14, len(body) if size is None else size) + body


def declared(name: bytes, shape, array_class=9) -> bytes:
    return (struct.pack("<IIII", 6, 8, array_class, 0) + struct.pack("<II", 5, 4 * len(shape))
            + struct.pack(f"<{len(shape)}i", *shape) + bytes(len(shape) % 2 * 4)
            + struct.pack("<I", len(name) << 16 | 1) + name.ljust(4, b"\0"))


HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
SHAPE = 32, 32, 3


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(("content", "said"), [
    (variable(declared(b"X", (*SHAPE, 2**31 - 1)), struct.pack("<II", 2, 2**32 - 1)), "X is not"),
    (variable(declared(b"X", (*SHAPE, -1)), struct.pack("<II", 2, 2**32 - 3072)), "X is not"),
    (variable(declared(b"X", (*SHAPE, 1 << 20)), struct.pack("<II", 2, 3072 << 20)), "ends too soon"),
    (variable(declared(b"X", (*SHAPE, 2)), struct.pack("<II", 2, 2**32 - 1)), "X is not"),
    (variable(declared(b"X", (*SHAPE, 2)), struct.pack("<II", 8, 6144), bytes(6144)), "X is not"),
    (variable(declared(b"X", (*SHAPE, 2)), struct.pack("<II", 200, 6144), bytes(6144)), "X is not"),
    (variable(declared(b"X", ())), "ends too soon"),
    (variable(declared(b"X", ()), bytes(8)), "X is not"),
    (variable(declared(b"y", (2**31 - 1, 1)), struct.pack("<II", 2, 2**31 - 1)), "y is not"),
    (variable(declared(b"y", (1, 1)), struct.pack("<II", 8 << 16 | 9, 0)), "8 bytes in a place of 4"),
    (variable(declared(b"y", (1, 1)), struct.pack("<II", 9, 4), bytes(4)), "y is not"),
    (variable(struct.pack("<II", 6, 2**32 - 1)), "bytes of declaration"),
    (variable(struct.pack("<II", 6, 2), b"\x09\0"), "ends too soon"),
    (variable(), "ends too soon"),
    (variable(declared(b"\x1b[", (1, 1)), struct.pack("<II", 2 | 1 << 16, 1)), "has no array X"),
    (b"".join(variable(declared(b"a%d" % i, (1, 1, 1)), bytes(8)) for i in range(500)), "has no array X"),
])
def test_hostile_sizes_and_types(root, content, said, compressed):
    if compressed:
        squeezed = zlib.compress(content)
        content = struct.pack("<II", 15, len(squeezed)) + squeezed
    (root / FILES[0]).write_bytes(HEADER + content)
    assert said in error_of(root)


def test_sizes_beyond_the_file(root):
    for content in (variable(declared(b"X", (*SHAPE, 2)), size=2**32 - 1), struct.pack("<II", 15, 2**31), b"\x0e\0\0"):
        (root / FILES[0]).write_bytes(HEADER + content)
        assert "ends too soon" in error_of(root)


def test_a_bomb_is_not_inflated(root):
    """A variable of no interest, however large it would be, costs nothing; nor do bytes behind the last part of one."""
    size = 100 << 20
    squeezed = zlib.compress(variable(declared(b"a", (1024, size >> 10)), struct.pack("<II", 2, size), bytes(size)))
    bomb = struct.pack("<II", 15, len(squeezed)) + squeezed
    (root / FILES[0]).write_bytes(HEADER + bomb * 20 + packed(ARRAYS)[128:])
    assert_holds(read(root).train, ARRAYS)


def test_a_variable_within_a_compressed_one_must_be_a_matrix(root):
    squeezed = zlib.compress(struct.pack("<II", 15, 8) + bytes(8))
    (root / FILES[0]).write_bytes(HEADER + struct.pack("<II", 15, len(squeezed)) + squeezed)
    assert "data of type 15" in error_of(root)
