"""Many image files: a size for all of them, which ones are broken, and what is not their fault."""

import warnings

import pytest
from data_errors import error_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_folders import bytes_of, cache_files, levels, read, save, solid
from PIL import Image, ImageFile

from fixmatch.data.sources.folder import decode
from fixmatch.data.sources.folder.scan import scan_folder

# --- sizes


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
    for name in ("labeled/a/1", "labeled/b/1", "unlabeled/1", "test/a/1"):
        save(tmp_path / f"{name}.png", solid(1, 9, 12))
        save(tmp_path / f"{name}.jpg", solid(1, 12, 9), exif=exif)
        save(tmp_path / f"{name}.tiff", solid(1, 12, 9), exif=exif)
    (tmp_path / "unlabeled/broken.png").write_bytes(b"")
    listing = scan_folder(tmp_path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert decode.common_size(listing, tmp_path) == (9, 12)
    monkeypatch.undo()
    assert read(tmp_path, None, 1).train.images.shape == (9, 9, 12, 3)

# --- broken images


def test_broken_images_are_named_and_counted(root, logged):
    for i in range(15):
        (root / f"unlabeled/b{i:02}.png").write_bytes(b"x")
    message = error_of(read, root, 8, 14)
    assert "more than 14 broken images" in message
    assert "unlabeled/b00.png (not an image" in message
    assert "data.max_broken" in message
    for _ in range(2):  # decoded, then from the cache
        logged()
        assert levels(read(root, 8, 15).train) == [10, 11, 20, 30]
        lines = [line for line in logged().splitlines() if "left out" in line]
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
    blob = bytearray(bytes_of(path))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(blob[:data.draw(st.integers(0, len(blob)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images, broken = decode.decode_some([str(path)], 8, 8, range(1))
    assert (len(images), len(broken)) in ((1, 0), (0, 1))
    assert all(reason.isprintable() and reason for _, reason in broken)


def test_no_memory_says_nothing_about_the_image(monkeypatch):
    def fail(*arguments):
        raise MemoryError
    monkeypatch.setattr(decode, "decode_image", fail)
    with pytest.raises(MemoryError):
        decode.decode_some(["a.png"], 8, 8, range(1))
