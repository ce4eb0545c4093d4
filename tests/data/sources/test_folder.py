"""The user's own images: what every kind of file becomes, which are refused, and a cache that survives what it must."""

import itertools
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import warnings
import zlib

import numpy as np
import pytest
from running import tool_environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from fixmatch.data import DataError
from fixmatch.data.augment import views
from fixmatch.data.sources import cache, decode, folder
from fixmatch.data.sources.cache import cached_images
from fixmatch.data.sources.folder import load_csv, load_folder

Image.init()
RAMP = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)  # no two pixels alike, no symmetry
GREY = RAMP[..., 0]


def error_of(call, *arguments) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


def save(path: pathlib.Path, pixels=RAMP, **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    image.save(path, **options)
    return path


def solid(value: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def make_root(root: pathlib.Path) -> pathlib.Path:
    """cat 10 and 11, dog 20; one unlabeled image, 30; test: cat 40, dog 50. The numbers are their grey levels."""
    for name, value in (("labeled/cat/a", 10), ("labeled/cat/b", 11), ("labeled/dog/a", 20), ("unlabeled/u", 30),
                        ("test/cat/a", 40), ("test/dog/a", 50)):
        save(root / f"{name}.png", solid(value))
    return root


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path / "data")


def read(root, image_size=8, max_broken=0):
    return load_folder(str(root), image_size, max_broken)


def levels(data) -> list[int]:
    return data.images[:, 0, 0, 0].tolist()


def cache_files(root) -> list[str]:
    return sorted(path.suffix for path in (root / ".fixmatch-cache").iterdir())


COMPLETE = [".json", ".lock", ".npy"]


# --- folders


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
    assert np.array_equal(views.weak(images, plan), views.weak(images.copy(), plan))


def test_the_unlabeled_folder_may_be_missing(root):
    (root / "unlabeled/u.png").unlink()
    (root / "unlabeled").rmdir()
    assert read(root).train.labels.tolist() == [0, 0, 1]


def test_a_channel_without_variation_has_the_std_of_one_grey_level(tmp_path):
    for name in ("labeled/a/1", "labeled/a/2", "test/a/1"):
        save(tmp_path / f"{name}.png", solid(7))
    assert read(tmp_path).std == pytest.approx([1 / 255] * 3)


def test_nested_folders_and_names_in_any_script(root):
    for name, value in (("b/deep/er/x", 14), ("b-/x", 13), ("a/z", 12), ("ä β 猫", 15)):
        save(root / f"labeled/cat/{name}.png", solid(value))
    save(root / "unlabeled/1/2/3.png", solid(29))
    # by the parts of the path: a/z, a.png, b/deep/er/x, b-/x, b.png
    assert levels(read(root).train) == [12, 10, 14, 13, 11, 15, 20, 29, 30]


def test_a_class_may_have_any_name_that_a_folder_has(root):
    for name in ("0", "a b", "x=y: {z}", "line\nbreak", os.fsdecode(b"\xff")):
        for split in ("labeled", "test"):
            save(root / split / name / "a.png", solid(1))
    assert read(root).classes == ("0", "a b", "cat", "dog", "line\nbreak", "x=y: {z}", r"\xff")


def _remove(root, *names):
    for name in names:
        (root / name).unlink()


@pytest.mark.parametrize(("change", "said"), [
    (lambda r: (r / "labeled").rename(r / "train"), "labeled: no such folder; data.root needs labeled/CLASS/"),
    (lambda r: r.rename(r.with_name("elsewhere")), "no such folder"),
    (lambda r: (r / "test").rename(r / "val"), "test: no test image"),
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


# --- what a file becomes; each is put into unlabeled/, beside u.png, as the last in order


def _palette(transparency=None):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4, "L").convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 90, 90, 90])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def _palette_colors(*colors):
    return np.array(colors, np.uint8)[np.arange(64).reshape(8, 8) % 4]


def _grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=2)


def _with_alpha(alpha):
    return np.dstack([RAMP, np.full((8, 8), alpha, np.uint8)])


def _on_white(pixels, alpha):
    return np.round(pixels * (alpha / 255) + 255 - alpha)


def _cmyk():
    return Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 0, 0]] * 4] * 8, np.uint8), "CMYK")


def _png_of_size(width, height) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"IHDR" + header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)


def _bytes_of(path, pixels=RAMP, **options) -> bytes:
    """Of an image saved at `path`, which is removed."""
    blob = save(path, pixels, **options).read_bytes()
    path.unlink()
    return blob


def _cut(path, kept):
    blob = _bytes_of(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path.write_bytes(blob[:int(len(blob) * kept)])


def _flip_byte(path, position):
    blob = bytearray(_bytes_of(path))
    blob[position] ^= 255
    path.write_bytes(blob)


def _link(path, target):
    path.symlink_to(target)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
BROKEN, PASSED_OVER = "broken", "passed over"
LOUD = np.array([[0, 128, 129, 257, 32767, 32768, 65407, 65535]] * 8, np.uint16)
LOUD_IN_8_BITS = _grey([[0, 0, 1, 1, 127, 128, 255, 255]] * 8)  # round(x / 257), by hand

ODD_FILES = {
    # name in unlabeled/: (how to make it, what becomes of it)
    "grey.png": (lambda p: save(p, GREY), _grey(GREY)),
    "one bit.png": (lambda p: save(p, GREY > 100), _grey((GREY > 100) * 255)),
    "palette.png": (lambda p: save(p, _palette()), _palette_colors((255, 0, 0), (0, 255, 0), (0, 0, 255), (90,) * 3)),
    "palette, one transparent.png": (lambda p: save(p, _palette(1)), _palette_colors(
        (255, 0, 0), (255, 255, 255), (0, 0, 255), (90,) * 3)),
    "palette, alpha.png": (lambda p: save(p, _palette(b"\x00\xff\x33\xff")), _palette_colors(
        (255, 255, 255), (0, 255, 0), (204, 204, 255), (90,) * 3)),
    "palette, one transparent.gif": (lambda p: save(p, _palette(1)), _palette_colors(
        (255, 0, 0), (255, 255, 255), (0, 0, 255), (90,) * 3)),
    "grey, alpha.png": (lambda p: save(p, Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (8, 8), 51)])),
                        _grey(_on_white(GREY, 51))),
    "alpha.png": (lambda p: save(p, _with_alpha(51)), _on_white(RAMP, 51)),
    "transparent.webp": (lambda p: save(p, _with_alpha(0), lossless=True), solid(255)),
    "alpha.tiff": (lambda p: save(p, _with_alpha(255)), RAMP),
    "transparent color.png": (lambda p: save(p, Image.fromarray(RAMP), transparency=tuple(RAMP[2, 3].tolist())),
                              np.where((RAMP[2, 3] == RAMP).all(axis=2, keepdims=True), 255, RAMP)),
    "transparent grey.png": (lambda p: save(p, Image.fromarray(GREY), transparency=int(GREY[2, 3])),
                             _grey(np.where(GREY[2, 3] == GREY, 255, GREY))),
    "16 bits.png": (lambda p: save(p, LOUD), LOUD_IN_8_BITS),
    "16 bits.tiff": (lambda p: save(p, LOUD), LOUD_IN_8_BITS),
    "16 bits, big-endian.tiff": (lambda p: save(p, LOUD.astype(">u2")), LOUD_IN_8_BITS),
    "16 bits.pgm": (lambda p: p.write_bytes(b"P5 8 8 65535\n" + LOUD.astype(">u2").tobytes()), LOUD_IN_8_BITS),
    "16 bits, in 32.tiff": (lambda p: save(p, LOUD.astype(np.int32)), LOUD_IN_8_BITS),
    "32 bits.tiff": (lambda p: save(p, LOUD.astype(np.int32) * 2), BROKEN),
    "negative.tiff": (lambda p: save(p, LOUD.astype(np.int32) - 1), BROKEN),
    "floating point.tiff": (lambda p: save(p, np.full((8, 8), 0.5, np.float32)), BROKEN),
    "cmyk.tiff": (lambda p: save(p, _cmyk()), np.array([[[0, 255, 255], [255, 255, 255]] * 4] * 8)),
    "cmyk.jpg": (lambda p: save(p, Image.new("CMYK", (8, 8), (0, 0, 0, 255))), solid(0)),
    "YCbCr.jpg": (lambda p: save(p, solid(77), quality=95), solid(77)),
    "animated.gif": (lambda p: save(p, _palette(), save_all=True, append_images=[Image.new("P", (8, 8))]),
                     _palette_colors((255, 0, 0), (0, 255, 0), (0, 0, 255), (90,) * 3)),
    "animated.webp": (lambda p: save(p, RAMP, lossless=True, save_all=True, append_images=[Image.new("RGB", (8, 8))]),
                      RAMP),
    "animated.png": (lambda p: save(p, RAMP, save_all=True, append_images=[Image.new("RGB", (8, 8))]), RAMP),
    "two pages.tiff": (lambda p: save(p, RAMP, save_all=True, append_images=[Image.new("RGB", (8, 8))]), RAMP),
    "deflated.tif": (lambda p: save(p, RAMP, compression="tiff_deflate"), RAMP),
    "windows.bmp": (save, RAMP),
    "netpbm.ppm": (save, RAMP),
    "UPPER.PNG": (save, RAMP),
    "Mixed.JpEg": (lambda p: save(p, solid(77), format="JPEG"), solid(77)),
    "a png, in truth.jpg": (lambda p: save(p, RAMP, format="PNG"), RAMP),
    "one pixel.png": (lambda p: save(p, solid(9, 1, 1)), solid(9)),
    "a line.png": (lambda p: save(p, solid(9, 1, 3000)), solid(9)),
    "exif that is rubbish.png": (lambda p: save(p, RAMP, exif=b"Exif\0\0rubbish"), RAMP),
    "exif that is rubbish.jpg": (lambda p: save(p, solid(77), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), solid(77)),
    os.fsdecode(b"not utf-8 \xff.png"): (save, RAMP),
    "a folder.png/x.png": (save, RAMP),
    "link.png": (lambda p: _link(p, save(p.parents[1] / "elsewhere.png")), RAMP),
    "linked folder": (lambda p: _link(p, save(p.parents[1] / "elsewhere/x.png").parent), RAMP),
    "empty.png": (lambda p: p.write_bytes(b""), BROKEN),
    "text.jpg": (lambda p: p.write_text("not an image\n"), BROKEN),
    "cut.png": (lambda p: _cut(p, 0.5), BROKEN),
    "cut.jpg": (lambda p: _cut(p, 0.5), BROKEN),
    "cut.gif": (lambda p: _cut(p, 0.5), BROKEN),
    "cut.bmp": (lambda p: _cut(p, 0.5), BROKEN),
    "cut.webp": (lambda p: _cut(p, 0.5), BROKEN),
    "cut.tiff": (lambda p: _cut(p, 0.3), BROKEN),
    "cut in the header.png": (lambda p: _cut(p, 0.002), BROKEN),
    "wrong checksum.png": (lambda p: _flip_byte(p, 17), BROKEN),
    "bomb.png": (lambda p: p.write_bytes(_png_of_size(20_000, 20_000)), BROKEN),
    "bomb that Pillow only warns of.png": (lambda p: p.write_bytes(_png_of_size(10_000, 10_000)), BROKEN),
    "huge.png": (lambda p: p.write_bytes(_png_of_size(2**31 - 1, 2**31 - 1)), BROKEN),
    "for Ghostscript.png": (lambda p: p.write_bytes(EPS), BROKEN),
    "bro\nken.png": (lambda p: p.write_bytes(b""), BROKEN),
    "leads nowhere.png": (lambda p: _link(p, "nothing"), BROKEN),
    "leads to itself.png": (lambda p: _link(p, p), BROKEN),
    "leads to where it is": (lambda p: _link(p, p.parent), PASSED_OVER),
    "leads to the root": (lambda p: _link(p, p.parents[1]), PASSED_OVER),
    "leads to itself": (lambda p: _link(p, p), BROKEN),
    "leads nowhere": (lambda p: _link(p, "nothing"), BROKEN),
    "leads nowhere.txt": (lambda p: _link(p, "nothing"), PASSED_OVER),
    "pipe.png": (os.mkfifo, PASSED_OVER),
    ".DS_Store": (lambda p: p.write_bytes(b"\0\0\0\1Bud1"), PASSED_OVER),
    ".hidden.png": (lambda p: p.write_bytes(b""), PASSED_OVER),
    ".ipynb_checkpoints/x.png": (save, PASSED_OVER),
    "__MACOSX/x.png": (save, PASSED_OVER),
    "Thumbs.db": (lambda p: p.write_bytes(b"\xd0\xcf\x11\xe0"), PASSED_OVER),
    "notes.txt": (lambda p: p.write_text("notes"), PASSED_OVER),
    "archive.tar.gz": (lambda p: p.write_bytes(b""), PASSED_OVER),
    "drawing.svg": (lambda p: p.write_text("<svg/>"), PASSED_OVER),
    "no extension": (lambda p: save(p, RAMP, format="PNG"), PASSED_OVER),
    "png": (lambda p: save(p, RAMP, format="PNG"), PASSED_OVER),
}


@pytest.mark.parametrize("name", ODD_FILES, ids=ascii)
def test_an_odd_file(root, capsys, name):
    make, expected = ODD_FILES[name]
    (root / "unlabeled/u.png").unlink()
    path = root / "unlabeled" / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    if expected is BROKEN:
        shown = name if name.isprintable() else "n"
        assert shown in error_of(read, root)
        assert cache_files(root) == [".lock"]
    source = read(root, max_broken=1)
    assert len(source.train) == 3 + isinstance(expected, np.ndarray)
    said = capsys.readouterr().out
    assert said.count("left out:") == (expected is BROKEN)
    assert said.isprintable() or "\n" in said
    if isinstance(expected, np.ndarray):
        assert source.train.images[3].tolist() == expected.tolist()


@pytest.mark.parametrize("side", [10_000, 20_000])  # of one, Pillow only warns
def test_a_decompression_bomb_is_not_decoded(root, side):
    (root / "unlabeled/x.png").write_bytes(_png_of_size(side, side))
    assert f"({side * side} pixels) exceeds limit" in error_of(read, root)


def test_no_format_is_tried_that_runs_a_program(root):
    (root / "unlabeled/x.png").write_bytes(EPS)
    assert "x.png (not an image, or of a format that is not known here)" in error_of(read, root)


@pytest.mark.parametrize("extension", ["png", "tiff", "webp"])
@pytest.mark.parametrize(("orientation", "turned"), list(enumerate([
    RAMP, RAMP[:, ::-1], RAMP[::-1, ::-1], RAMP[::-1], RAMP.swapaxes(0, 1), np.rot90(RAMP, -1),
    RAMP[::-1, ::-1].swapaxes(0, 1), np.rot90(RAMP), RAMP], 1)))  # 9 is not defined
def test_the_orientation_in_the_exif_is_applied(root, extension, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"lossless": True} if extension == "webp" else {})
    save(root / f"unlabeled/x.{extension}", RAMP, **options)
    assert np.array_equal(read(root).train.images[-1], turned)


# --- sizes


def test_the_shorter_side_is_fitted_and_the_middle_kept(root):
    stripes = np.repeat(solid(100, 16, 16), 3, axis=1)  # 16 high, 48 wide
    stripes[:, :16], stripes[:, 32:] = 0, 250
    save(root / "unlabeled/v.png", stripes)
    save(root / "unlabeled/w.png", stripes.swapaxes(0, 1))
    wide, tall = read(root).train.images[-2:]
    assert (wide[:, 1:-1] == 100).all()  # beside it, black and white reach in by the width of the filter
    assert np.array_equal(wide, tall.swapaxes(0, 1))
    scaled = Image.fromarray(stripes).resize((24, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(wide, np.asarray(scaled)[:, 8:16])


def test_scaling_down_is_smoothed(root):
    lines = solid(0, 64, 64)
    lines[::2] = 240
    save(root / "unlabeled/x.png", lines)
    assert abs(read(root).train.images[-1].astype(int) - 120).max() < 10


@pytest.mark.parametrize(("sizes", "expected"), [  # (height, width)
    ([(10, 14)] * 6, (10, 14)),
    ([(300, 40)] * 6, (300, 40)),
    ([(6, 20)] * 6, (8, 8)),
    ([(3, 3)] * 6, (8, 8)),
    ([(10, 14)] * 5 + [(14, 10)], (10, 10)),
    ([(10, 14), (30, 11), (12, 12), (99, 13), (14, 99), (15, 15)], (12, 12)),
    ([(230, 250), (250, 229)] * 3, (224, 224)),
    ([(5, 9), (9, 6)] * 3, (8, 8)),
])
def test_a_size_that_is_left_open(tmp_path, sizes, expected):
    names = ("labeled/a/1", "labeled/a/2", "labeled/b/1", "unlabeled/1", "test/a/1", "test/b/1")
    for name, size in zip(names, sizes, strict=True):
        save(tmp_path / f"{name}.png", solid(1, *size))
    source = read(tmp_path, None)
    assert source.train.images.shape == (4, *expected, 3)
    assert source.test.images.shape == (2, *expected, 3)


def test_sizes_count_as_seen_and_come_from_headers(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("labeled/a/1", "unlabeled/1", "test/a/1"):
        save(tmp_path / f"{name}.png", solid(1, 9, 12))
        save(tmp_path / f"{name}.jpg", solid(1, 12, 9), exif=exif)
        save(tmp_path / f"{name}.tiff", solid(1, 12, 9), exif=exif)
    (tmp_path / "unlabeled/broken.png").write_bytes(b"")
    listing = folder._scan_folder(tmp_path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert decode.common_size(listing, tmp_path) == (9, 12)
    monkeypatch.undo()
    assert read(tmp_path, None, 1).train.images.shape == (6, 9, 12, 3)


# --- broken images


def test_broken_images_are_named_and_counted(root, capsys):
    for i in range(15):
        (root / f"unlabeled/b{i:02}.png").write_bytes(b"x")
    message = error_of(read, root, 8, 14)
    assert "more than 14 broken images" in message
    assert "unlabeled/b00.png (not an image" in message
    assert "data.max_broken" in message
    for _ in range(2):  # decoded, then from the cache
        capsys.readouterr()
        assert levels(read(root, 8, 15).train) == [10, 11, 20, 30]
        lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
        assert [line.split("/")[-1].split(":")[0] for line in lines[:-1]] == [f"b{i:02}.png" for i in range(10)]
        assert "5 more broken images" in lines[-1]
    assert "more than 14 broken images" in error_of(read, root, 8, 14)  # though the cache holds the others


def test_labels_stay_with_their_images_where_some_are_broken(root):
    for name in ("labeled/cat/aa", "labeled/dog/0", "labeled/dog/z", "unlabeled/0", "test/cat/0", "test/dog/b"):
        (root / f"{name}.png").write_bytes(b"x")
    source = read(root, 8, 6)
    assert (levels(source.train), source.train.labels.tolist()) == ([10, 11, 20, 30], [0, 0, 1, -1])
    assert (levels(source.test), source.test.labels.tolist()) == ([40, 50], [0, 1])


def test_a_failing_disk_is_no_broken_image(root, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    assert "cat/a.png: cannot be read: Input/output error" in error_of(read, root, 8, 100)
    assert cache_files(root) == [".lock"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extension=st.sampled_from(["png", "jpg", "gif", "bmp", "webp", "tiff", "ppm"]), data=st.data())
def test_damage_of_any_kind_is_a_broken_image_or_a_readable_one(tmp_path, extension, data):
    path = tmp_path / f"x.{extension}"
    blob = bytearray(_bytes_of(path))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(blob[:data.draw(st.integers(0, len(blob)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images, broken = decode._decode_some([str(path)], 8, 8, range(1))
    assert (len(images), len(broken)) in ((1, 0), (0, 1))
    assert all(reason.isprintable() and reason for _, reason in broken)


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
    listing = folder._scan_folder(root)
    found = [listing.files[i].removeprefix("labeled/k/") for i in range(len(listing.files))]
    assert found == sorted(kept, key=lambda path: path.split("/"))


def test_no_memory_says_nothing_about_the_image(monkeypatch):
    def fail(*arguments):
        raise MemoryError
    monkeypatch.setattr(decode, "_decode", fail)
    with pytest.raises(MemoryError):
        decode._decode_some(["a.png"], 8, 8, range(1))


# --- CSV

TRAIN = "path,label\na.png,cat\nb.png,dog\nu.png,\n"
TEST = "path,label\nt.png,dog\n"


def make_csv(root: pathlib.Path, train: str | bytes = TRAIN, test: str | bytes | None = TEST) -> pathlib.Path:
    for name, value in (("a", 10), ("b", 20), ("u", 30), ("t", 40), ("sub/c,d", 50), ("v", 60)):
        save(root / f"{name}.png", solid(value))
    for name, text in (("train.csv", train), ("test.csv", test)):
        if text is not None:
            (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def read_csv(root, max_broken=0):
    return load_csv(str(root), 8, max_broken)


def test_csv_files(tmp_path):
    source = read_csv(make_csv(tmp_path))
    assert (source.name, source.classes, source.flip) == ("csv", ("cat", "dog"), True)
    assert (levels(source.train), source.train.labels.tolist()) == ([10, 20, 30], [0, 1, -1])
    assert (levels(source.test), source.test.labels.tolist()) == ([40], [1])
    assert source.mean == pytest.approx([20 / 255] * 3)


@pytest.mark.parametrize(("train", "values", "labels"), [
    ("path,label\nv.png,\nb.png,dog\nu.png,\na.png,cat\n", [10, 20, 30, 60], [0, 1, -1, -1]),  # sorted, labeled first
    ("label,id, path \r\ncat,1,a.png\r\n dog ,2,b.png\r\n\r\n", [10, 20], [0, 1]),
    ("\ufeffpath,label\na.png,cat\nb.png,dog", [10, 20], [0, 1]),  # as Excel writes it
    ('path,label\n"sub/c,d.png","cat"\nb.png,dog\n', [20, 50], [1, 0]),
    ("path,label\nsub/../a.png,cat\nb.png,dog\n", [20, 10], [1, 0]),
    ("path,label\na.png,cat\na.png,\nb.png,dog\nb.png,dog\n", [10, 20, 20, 10], [0, 1, 1, -1]),
    ("path,label\na.png,cat\nb.png,dog\nt.png,\n", [10, 20, 40], [0, 1, -1]),  # a test image, but without its label
])
def test_what_a_csv_file_may_look_like(tmp_path, train, values, labels):
    source = read_csv(make_csv(tmp_path, train))
    assert (levels(source.train), source.train.labels.tolist()) == (values, labels)


def test_a_csv_file_given_by_name_and_paths_that_lead_out_of_its_folder(tmp_path):
    root = make_csv(tmp_path / "data")
    outside = save(tmp_path / "o.png", solid(99))
    (root / "few.csv").write_text(f"path,label\n{outside},cat\n../o.png,dog\n")
    source = read_csv(root / "few.csv")
    assert (source.name, levels(source.train), len(source.test)) == ("csv", [99, 99], 1)
    assert len(read_csv(root).train) == 3
    assert cache_files(root) == sorted(2 * COMPLETE)  # one each


@pytest.mark.parametrize(("train", "test", "said"), [
    (None, TEST, "train.csv: cannot be read: No such file"),
    (TRAIN, None, "test.csv: cannot be read: No such file"),
    ("", TEST, "train.csv: line 1: no column label and no column path"),
    ("path;label\na.png;cat\n", TEST, "train.csv: line 1: no column"),
    ("a.png,cat\n", TEST, "train.csv: line 1: no column"),
    (TRAIN, "path,class\nt.png,dog\n", "test.csv: line 1: no column label;"),
    ("path,label\na.png\n", TEST, "train.csv: line 2: 1 fields"),
    ("path,label\na,b.png,cat\n", TEST, "train.csv: line 2: 3 fields"),
    ("path,label\na.png,cat\n,dog\n", TEST, "train.csv: line 3: no path"),
    ("path,label\na.png,cat\nx.png,dog\n", TEST, "train.csv: line 3: x.png: No such file"),
    ("path,label\na.png,cat\nsub,dog\n", TEST, "train.csv: line 3: sub: not a file"),
    (f"path,label\n{'x' * 300},cat\n", TEST, "train.csv: line 2: x"),
    ("path,label\na\0.png,cat\n", TEST, "train.csv: line 2: "),
    ("path,label\na.png,\nb.png,\n", TEST, "train.csv: no line has a label"),
    ("path,label\n", TEST, "train.csv: no line has a label"),
    ("path,label\na.png,cat\nb.png,dog\na.png,dog\n", TEST, "train.csv: line 4: a.png has the label dog, but cat in "),
    ('path,label\na.png,"cat\nb.png,dog\n', TEST, "not CSV: unexpected end of data"),
    (f"path,label\na.png,{'x' * 200_000}\n", TEST, "not CSV: field larger"),
    (TRAIN.encode() + b"caf\xe9.png,cat\n", TEST, "train.csv: line 5: not UTF-8"),
    (TRAIN.encode("utf-16"), TEST, "train.csv: line 1: not UTF-8"),
    (TRAIN, "path,label\nt.png,dog\nt.png,cow\n", "test.csv: line 3: no image in train.csv has the label cow"),
    (TRAIN, "path,label\nt.png,dog\nt.png, \n", "test.csv: line 3: the label is empty"),
    (TRAIN, "path,label\n\nx.png,dog\n", "test.csv: line 3: x.png: No such file"),
    (TRAIN, "path,label\n", "test.csv: no test image"),
    (TRAIN, "path,label\nt.png,dog\na.png,cat\n",
     "test.csv: line 3: a.png is a labeled training image, too, in line 2 of train.csv"),
])
def test_a_csv_file_that_cannot_be_used(tmp_path, train, test, said):
    assert said in error_of(read_csv, make_csv(tmp_path, train, test))


def test_a_broken_image_in_a_csv_file(tmp_path, capsys):
    root = make_csv(tmp_path, TRAIN + "v.png,cat\n")
    (root / "v.png").write_bytes(b"x")
    assert "v.png (not an image" in error_of(read_csv, root)
    assert levels(read_csv(root, 1).train) == [10, 20, 30]
    assert "v.png: left out: not an image" in capsys.readouterr().out


def test_other_labels_need_no_decoding(tmp_path, monkeypatch):
    root = make_csv(tmp_path)
    read_csv(root)
    (root / "train.csv").write_text("path,label\nb.png,cow\nu.png,\na.png,dog\n")
    monkeypatch.setattr(Image, "open", None)
    source = read_csv(root)
    assert (source.classes, source.train.labels.tolist()) == (("cow", "dog"), [1, 0, -1])


_FIELDS = st.sampled_from(["path", "label", "a.png", "b.png", "cat", "dog", "", " ", "\0", "..", "/", "x", '"', "é"])
_LINES = st.lists(st.one_of(_FIELDS, st.text(max_size=5)), max_size=4).map(",".join)


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(_LINES, max_size=5), headed=st.booleans(), encoding=st.sampled_from(["utf-8", "latin-1"]))
def test_any_text_is_read_or_refused(tmp_path_factory, lines, headed, encoding):
    root = tmp_path_factory.getbasetemp() / "csv"
    if not root.exists():
        make_csv(root)
    text = "\n".join(["path,label"] * headed + lines)
    (root / "any.csv").write_bytes(text.encode(encoding, "replace"))
    try:
        listing = folder._scan_csv(root / "any.csv")
    except DataError as error:
        message = str(error)
    else:
        assert set(listing.files.labels()) <= set(range(-1, len(listing.classes)))
        return
    assert message.startswith(str(root))
    assert message.isprintable()


# --- the cache


def built(capsys) -> bool:
    return "images decoded in" in capsys.readouterr().out


def test_the_second_load_decodes_nothing(root, monkeypatch):
    first = read(root, None)
    monkeypatch.setattr(Image, "open", None)
    second = read(root, None)
    assert np.array_equal(first.train.images, second.train.images)
    assert (first.mean, first.std) == (second.mean, second.std)
    assert cache_files(root) == COMPLETE


def _touch(path):
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [
    lambda r: save(r / "labeled/cat/a.png", solid(5)),
    lambda r: save(r / "labeled/cat/c.png", solid(5)),
    lambda r: save(r / "unlabeled/new/c.png", solid(5)),
    lambda r: (r / "unlabeled/u.png").unlink(),
    lambda r: (r / "labeled/cat/b.png").rename(r / "labeled/dog/b.png"),
    lambda r: _touch(r / "test/dog/a.png"),
])
def test_a_changed_file_has_everything_decoded_anew(root, tmp_path, capsys, change):
    read(root)
    before = {path.name for path in (root / ".fixmatch-cache").iterdir()}
    assert built(capsys)
    change(root)
    read(root)
    assert built(capsys)
    after = {path.name for path in (root / ".fixmatch-cache").iterdir()}
    assert len(before - after) == len(after - before) == 1  # the stale images are gone
    read(root)
    assert not built(capsys)


def test_another_size_has_a_cache_of_its_own(root, capsys):
    for size, expected in ((8, True), (16, True), (8, False), (16, False), (None, True)):
        read(root, size)
        assert built(capsys) == expected


def test_the_cache_moves_with_the_data(root, capsys):
    read(root)
    assert built(capsys)
    read(root.rename(root.with_name("elsewhere")))
    assert not built(capsys)


def _npy(root) -> pathlib.Path:
    return next((root / ".fixmatch-cache").glob("*.npy"))


def _manifest(root, change):
    path = root / ".fixmatch-cache/folder-8.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("damage", [
    lambda r: _npy(r).unlink(),
    lambda r: _npy(r).write_bytes(b""),
    lambda r: _npy(r).write_bytes(_npy(r).read_bytes()[:-1]),
    lambda r: _npy(r).write_bytes(b"x" * 2000),
    lambda r: np.save(_npy(r), np.zeros((6, 8, 8, 3))),
    lambda r: np.save(_npy(r), np.zeros((5, 8, 8, 3), np.uint8)),
    lambda r: (r / ".fixmatch-cache/folder-8.json").unlink(),
    lambda r: (r / ".fixmatch-cache/folder-8.json").write_bytes(b"\xff"),
    lambda r: (r / ".fixmatch-cache/folder-8.json").write_bytes(b""),
    lambda r: _manifest(r, lambda m: [m]),
    lambda r: _manifest(r, lambda m: m | {"fingerprint": "0" * 64}),
    lambda r: _manifest(r, lambda m: {k: v for k, v in m.items() if k != "facts"}),
])
def test_a_damaged_cache_is_built_anew(root, capsys, damage):
    expected = read(root).train.images.copy()
    damage(root)
    capsys.readouterr()
    assert np.array_equal(read(root).train.images, expected)
    assert built(capsys)
    assert cache_files(root) == COMPLETE


def test_images_stay_readable_while_their_cache_is_replaced(root):
    old = read(root)
    save(root / "unlabeled/u.png", solid(99))
    read(root)
    assert levels(old.train) == [10, 11, 20, 30]


def test_a_root_that_cannot_be_written_to(root, tmp_path, monkeypatch, capsys):
    (root / ".fixmatch-cache").touch()  # where the folder should be; a superuser may write to any folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = make_root(tmp_path / "other")
    (other / ".fixmatch-cache").touch()
    for place, expected in ((root, True), (other, True), (root, False), (other, False)):
        read(place)
        assert built(capsys) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "labeled/cat/a.png"))
    message = error_of(read, root)
    assert "XDG_CACHE_HOME" in message
    assert str(root / ".fixmatch-cache") in message


def test_a_cache_in_a_folder_that_cannot_be_written_to_is_used(root, monkeypatch):
    read(root)
    monkeypatch.setattr(cache, "_lock", None)
    read(root)


# Paddle takes seconds to import, and nothing here needs it.
PROCESS = """
import sys, types
sys.modules["paddle"] = types.ModuleType("paddle")
import os, resource, signal, time
from fixmatch.data.sources import cache, decode, folder
ORIGINAL = {}
def on_call(owner, name, number, act, after=False):
    original, calls = getattr(owner, name), []
    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == number and not after:
            act()
        result = original(*arguments, **options)
        if len(calls) == number and after:
            act()
        return result
    setattr(owner, name, wrapped)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
exec(sys.argv[2])
try:
    source = folder.load_folder(sys.argv[1], 8, 0)
except folder.DataError as error:
    sys.exit(str(error))
print(source.train.images[:, 0, 0, 0].tolist())
"""


def start(root, hook: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROCESS, str(root), hook], text=True, env=tool_environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("hook", [
    "on_call(decode, '_decode', 1, die)",
    "on_call(decode, '_decode', 5, die)",
    "on_call(cache.Writer, 'append', 1, die, after=True)",
    "on_call(os, 'fsync', 1, die, after=True)",
    "on_call(os, 'replace', 1, die)",
    "on_call(os, 'replace', 1, die, after=True)",
    "on_call(os, 'fsync', 2, die)",
    "on_call(os, 'replace', 2, die)",
    "on_call(os, 'replace', 2, die, after=True)",
])
def test_a_killed_build_leaves_nothing_that_the_next_one_does_not_put_right(root, tmp_path, hook):
    read(root)
    save(root / "unlabeled/u.png", solid(31))  # so that there is a stale cache, too
    process = start(root, hook)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    clean = make_root(tmp_path / "clean")
    save(clean / "unlabeled/u.png", solid(31))
    source, expected = read(root), read(clean)
    assert np.array_equal(source.train.images, expected.train.images)
    assert np.array_equal(source.test.images, expected.test.images)
    assert (source.mean, source.std) == (expected.mean, expected.std)
    if "2, die, after" not in hook:  # then the new cache is in place, and nothing is left to do but to delete
        assert cache_files(root) == COMPLETE


def test_what_was_stale_when_the_builder_was_killed_goes_with_the_next_build(root):
    read(root)
    (root / ".fixmatch-cache/folder-8-0123456789abcdef.npy").touch()
    _touch(root / "unlabeled/u.png")
    read(root)
    assert cache_files(root) == COMPLETE


def test_two_processes_at_once_decode_once(root):
    slowly = "on_call(decode, '_decode', 1, lambda: time.sleep(0.5))"
    done = [(process, *process.communicate(timeout=60)) for process in [start(root, slowly), start(root, slowly)]]
    assert [process.returncode for process, _, _ in done] == [0, 0]
    assert [out.splitlines()[-1] for _, out, _ in done] == ["[10, 11, 20, 30]"] * 2
    assert sum("images decoded in" in out for _, out, _ in done) == 1
    assert cache_files(root) == COMPLETE


def test_a_second_builder_waits_and_says_so(tmp_path, capsys):
    building, finish, results = threading.Event(), threading.Event(), []

    def build(writer):
        building.set()
        assert finish.wait(30)
        writer.begin(8, 8, 1)
        writer.append(RAMP[None], counted=True)
        return {}

    def run():
        results.append(cached_images(tmp_path, "x", "ab" * 32, build))

    threads = [threading.Thread(target=run) for _ in range(2)]
    threads[0].start()
    assert building.wait(30)
    threads[1].start()
    said = ""
    for _ in range(3000):
        said += capsys.readouterr().out
        if "waiting for another process" in said:
            break
        time.sleep(0.01)
    finish.set()
    for thread in threads:
        thread.join()
    assert "waiting for another process" in said
    assert [images.tolist() for images, _ in results] == [[RAMP.tolist()]] * 2


def test_a_full_disk(root):
    """The limit on the size of files stands in for it: writing fails half-way, with an errno."""
    process = start(root, "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))")
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "decoded images cannot be written: File too large; make room there" in message
    assert len(message.splitlines()) == 1
    assert cache_files(root) == [".lock"]
    assert levels(read(root).train) == [10, 11, 20, 30]


@pytest.mark.parametrize("call", range(1, 5))
def test_a_disk_that_is_full_at_any_moment(root, monkeypatch, call):
    """1: the images' fsync, 2: their replacement, 3 and 4: those of the JSON file."""
    calls = itertools.count(1)

    def full(original):
        def wrapped(*arguments):
            if next(calls) == call:
                raise OSError(28, "No space left on device")
            return original(*arguments)
        return wrapped

    monkeypatch.setattr(os, "fsync", full(os.fsync))
    monkeypatch.setattr(os, "replace", full(os.replace))
    assert "No space left on device; make room" in error_of(read, root)
    assert cache_files(root) == [".lock"]


def test_a_disk_that_will_be_full_is_known_before_decoding(root, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    monkeypatch.setattr(decode, "_decode", None)
    assert "0.0 GB are needed, 0.0 GB are free" in error_of(read, root)
    assert cache_files(root) == [".lock"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_nothing(root, monkeypatch, error):
    def interrupt(*arguments, **options):
        raise error

    monkeypatch.setattr(cache.Writer, "append", interrupt)
    with pytest.raises(error):
        read(root)
    assert cache_files(root) == [".lock"]


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=6), seed=st.integers(0, 99),
       high=st.integers(1, 256))
def test_images_and_statistics_do_not_depend_on_the_pieces(tmp_path_factory, counts, seed, high):
    root, rng = tmp_path_factory.mktemp("pieces"), np.random.default_rng(seed)
    pieces = [(rng.integers(0, high, (n, 3, 5, 3), np.uint8), counted) for n, counted in counts]

    def build(writer):
        writer.begin(3, 5, 30)
        for images, counted in pieces:
            writer.append(images, counted)
        return writer.statistics()

    images, facts = cached_images(root, "x", "ab" * 32, build)
    assert np.array_equal(images, np.concatenate([images for images, _ in pieces]))
    counted = np.concatenate([images for images, counted in pieces if counted] + [np.zeros((0, 3, 5, 3))]) / 255
    if len(counted):
        assert facts["mean"] == pytest.approx(counted.mean(axis=(0, 1, 2)))
        assert facts["std"] == pytest.approx(np.maximum(counted.std(axis=(0, 1, 2)), 1 / 255))
    assert np.array_equal(np.load(next((root / ".fixmatch-cache").glob("*.npy"))), images)
