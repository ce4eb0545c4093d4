"""What a file becomes, of every kind that people have in their folders, and which files are broken."""

import os
import struct
import zlib

import numpy as np
import pytest
from data_errors import error_of
from image_folders import RAMP, bytes_of, cache_files, read, save, solid
from PIL import Image

from fixmatch.data.sources.folder.decode import decode_some

Image.init()
GREY = RAMP[..., 0]


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


def _cut(path, kept):
    blob = bytes_of(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path.write_bytes(blob[:int(len(blob) * kept)])


def _flip_byte(path, position):
    blob = bytearray(bytes_of(path))
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
def test_an_odd_file(root, logged, name):
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
    said = logged()
    assert said.count("left out:") == (expected is BROKEN)
    assert said.isprintable() or "\n" in said
    if isinstance(expected, np.ndarray):
        assert source.train.images[3].tolist() == expected.tolist()


@pytest.mark.parametrize("side", [10_000, 20_000])  # of one, Pillow only warns
def test_a_decompression_bomb_is_not_decoded(root, side):
    (root / "unlabeled/x.png").write_bytes(_png_of_size(side, side))
    said = error_of(read, root)
    assert "x.png (more than 89,478,485 pixels, which would take too much memory; scale it down)" in said


@pytest.mark.parametrize(("name", "content"), [
    ("IMG_1.HEIC", b""), ("IMG_2.heif", b"?" * 20), ("IMG_3.jpg", b"\0\0\0\x24ftypheic\0\0\0\0"),
    ("IMG_4.jpeg", b"\0\0\0\x18ftypmif1\0\0\0\0")])
def test_a_heic_photo_is_known_by_its_name_or_content(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert decode_some([str(tmp_path / name)], 8, 8, range(1))[1] == [
        [0, "not an image, or of a format that is not known here; convert HEIC photos to JPEG or PNG"]]


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
