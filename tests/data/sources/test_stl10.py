"""STL-10: small archives in the official layout, what is read from them, and what is refused."""

import gzip
import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
from data_errors import error_of

from fixmatch.data import DataError
from fixmatch.data.sources import stl10
from fixmatch.data.sources.stl10 import load_stl10

NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
COMPLETE = [".json", ".lock", ".npy"]


def read(root):
    return load_stl10(str(root), False)


def contents() -> dict[str, bytes]:
    """File name -> content: 20 labeled images, 3 unlabeled and 10 test ones; ten folds of 10."""
    rng = np.random.default_rng(0)
    files = {f"{split}_X.bin": rng.bytes(count * 27_648) for split, count in (("train", 20), ("unlabeled", 3),
                                                                             ("test", 10))}
    files["train_y.bin"], files["test_y.bin"] = bytes(range(1, 11)) * 2, bytes(range(10, 0, -1))
    files["class_names.txt"] = "".join(f"{name}\n" for name in NAMES).encode()
    folds = [sorted(rng.permutation(20)[:10]) for _ in range(10)]
    files["fold_indices.txt"] = "".join(" ".join(map(str, fold)) + " \n" for fold in folds).encode()
    return files


def write_archive(root: pathlib.Path, files: dict[str, bytes], mode: str = "w:gz") -> pathlib.Path:
    root.mkdir(parents=True, exist_ok=True)
    options = {"compresslevel": 1} if mode == "w:gz" else {}
    with tarfile.open(root / "stl10_binary.tar.gz", mode, **options) as archive:
        for name, blob in files.items():
            member = tarfile.TarInfo(f"stl10_binary/{name}")
            member.size = len(blob)
            archive.addfile(member, io.BytesIO(blob))
    return root / "stl10_binary.tar.gz"


def write_folder(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    (root / "stl10_binary").mkdir(parents=True)
    for name, blob in files.items():
        (root / "stl10_binary" / name).write_bytes(blob)
    return root / "stl10_binary"


def cache_files(root: pathlib.Path) -> list[str]:
    return sorted(path.suffix for path in (root / ".fixmatch-cache").iterdir())


@pytest.mark.parametrize("write", [write_archive, write_folder])
@pytest.mark.parametrize("inside", [False, True])
def test_from_archive_or_folder_or_what_holds_it(tmp_path, write, inside):
    files = contents()
    path = write(tmp_path, files)
    source = read(path if inside else tmp_path)
    assert (source.name, source.classes, source.flip) == ("stl10", tuple(NAMES), True)
    assert (source.train.images.shape, source.test.images.shape) == ((23, 96, 96, 3), (10, 96, 96, 3))
    assert source.train.labels.tolist() == [*range(10), *range(10), -1, -1, -1]
    assert source.test.labels.tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    for split, images in (("train", source.train.images), ("unlabeled", source.train.images[20:]),
                          ("test", source.test.images)):
        # image 2, row 5, column 7, blue: colour planes, each column by column
        assert images[2, 5, 7, 2] == files[f"{split}_X.bin"][2 * 27_648 + 2 * 9216 + 7 * 96 + 5]
    for data in (source.train, source.test):
        assert (data.images.dtype, data.labels.dtype) == (np.uint8, np.int64)
        assert isinstance(data.images, np.memmap)
        assert data.images.flags.c_contiguous
        assert not data.images.flags.writeable
    pixels = source.train.images / 255
    assert source.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)))
    assert source.std == pytest.approx(pixels.std(axis=(0, 1, 2)))


def test_the_folds(tmp_path):
    files = contents()
    write_archive(tmp_path, files)
    source = read(tmp_path)
    expected = [[int(word) for word in line.split()] for line in files["fold_indices.txt"].decode().splitlines()]
    assert [fold.tolist() for fold in source.folds] == expected
    assert {fold.dtype for fold in source.folds} == {np.dtype(np.int64)}
    assert (source.train.labels[np.concatenate(source.folds)] >= 0).all()


@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, reverse=True)])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_members_may_stand_in_any_order(tmp_path, order, mode):
    files = contents()
    write_archive(tmp_path, {name: files[name] for name in order(files)}, mode)
    source = read(tmp_path)
    for split, images in (("train", source.train.images[:20]), ("unlabeled", source.train.images[20:]),
                          ("test", source.test.images)):
        assert images.transpose(0, 3, 2, 1).tobytes() == files[f"{split}_X.bin"]


def test_more_images_than_are_copied_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stl10, "_CHUNK", 7)
    files = contents()
    write_archive(tmp_path, files)
    assert read(tmp_path).train.images.transpose(0, 3, 2, 1).tobytes() == (
        files["train_X.bin"] + files["unlabeled_X.bin"])


def test_unlabeled_images_may_be_left_out(tmp_path):
    write_folder(tmp_path, contents() | {"unlabeled_X.bin": b""})
    assert read(tmp_path).train.labels.min() == 0


def test_the_second_load_copies_nothing(tmp_path, monkeypatch, logged):
    archive = write_archive(tmp_path, contents())
    first = read(tmp_path)
    assert "copying 33 images" in logged()
    assert cache_files(tmp_path) == COMPLETE
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        patch.setattr(stl10, "md5_of", None)
        second = read(tmp_path)
    assert np.array_equal(first.train.images, second.train.images)
    assert (first.mean, first.std, first.classes) == (second.mean, second.std, second.classes)
    assert np.array_equal(first.folds, second.folds)
    logged()
    os.utime(archive, ns=(1, 1))
    read(tmp_path)
    assert "copying 33 images" in logged()
    assert cache_files(tmp_path) == COMPLETE


def test_an_unofficial_archive_is_read_and_said(tmp_path, logged, monkeypatch):
    archive = write_archive(tmp_path, contents())
    for _ in range(2):  # copied, then from the cache
        read(tmp_path)
        assert "not the official archive" in logged()
    monkeypatch.setattr(stl10, "_MD5", stl10.md5_of(archive))
    os.utime(archive, ns=(1, 1))
    read(tmp_path)
    assert "not the official" not in logged()


def test_nothing_there(tmp_path, monkeypatch):
    assert "data.download is false" in error_of(read, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    asked = []

    def refuse(*arguments):
        asked.append(arguments)
        raise DataError("no connection")

    monkeypatch.setattr("fixmatch.data.sources.download.download", refuse)
    assert "put there by hand" in error_of(load_stl10, str(tmp_path), True)
    assert asked == [("https://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", tmp_path / "stl10_binary.tar.gz",
                      "91f7769df0f17e558f3565bffb0c7dfb")]


@pytest.mark.parametrize("kept", [0, 10, 5000, 0.5, 0.999])
def test_a_truncated_archive(tmp_path, kept):
    path = write_archive(tmp_path, contents())
    blob = path.read_bytes()
    path.write_bytes(blob[:kept if isinstance(kept, int) else int(kept * len(blob))])
    assert str(path) in error_of(read, tmp_path)
    assert cache_files(tmp_path) == [".lock"]


def test_every_kind_of_damage_is_a_data_error_or_found_to_be_none(tmp_path):
    plain = write_archive(tmp_path, contents(), "w")
    good, rng, refused = plain.read_bytes(), np.random.default_rng(0), 0
    with tarfile.open(plain) as archive:
        headers = [member.offset for member in archive]
    for i in range(60):
        blob = bytearray(good)
        for _ in range(3):
            blob[rng.choice(headers) + rng.integers(512)] = rng.integers(256)
        plain.write_bytes(bytes(blob) if i % 2 else gzip.compress(blob, 0)[:int(rng.integers(len(blob)))])
        try:
            read(plain)
        except DataError as error:
            refused += 1
            message = str(error)
            if len(message.splitlines()) != 1 or str(plain) not in message:
                raise
    assert refused > 40


@pytest.mark.parametrize(("change", "said"), [
    (lambda f: {name: f[name] for name in f if name != "test_y.bin"}, "it has no stl10_binary/test_y.bin"),
    (lambda f: {name: f[name] for name in f if name != "unlabeled_X.bin"}, "it has no stl10_binary/unlabeled_X.bin"),
    (lambda f: f | {"train_X.bin": f["train_X.bin"][:-1]}, "train_X.bin: 552,959 bytes are not 1 to 5,000 images"),
    (lambda f: f | {"train_X.bin": b""}, "train_X.bin: 0 bytes"),
    (lambda f: f | {"test_X.bin": b""}, "test_X.bin: 0 bytes"),
    (lambda f: f | {"train_y.bin": f["train_y.bin"][1:]}, "train_y.bin: 19 labels for 20 images"),
    (lambda f: f | {"test_y.bin": f["test_y.bin"] * 2}, "test_y.bin: 20 labels for 10 images"),
    (lambda f: f | {"train_y.bin": bytes(20)}, "train_y.bin: image 0 has the label 0, expected 1..10"),
    (lambda f: f | {"test_y.bin": bytes(range(2, 12))}, "test_y.bin: image 9 has the label 11"),
    (lambda f: f | {"test_y.bin": bytes(9000)}, "test_y.bin: 9,000 bytes are more than the 8,000"),
    (lambda f: f | {"class_names.txt": b"cat\ndog\n"}, "class_names.txt: 2 names, expected 10"),
    (lambda f: f | {"fold_indices.txt": b"0 1\n" * 9}, "fold_indices.txt: 9 lines, expected 10"),
    (lambda f: f | {"fold_indices.txt": b"0 1\n" * 9 + b"0 20\n"}, "fold 9: expected distinct numbers in 0..19"),
    (lambda f: f | {"fold_indices.txt": b"0 1\n" * 9 + b"3 3\n"}, "fold 9: expected distinct numbers"),
    (lambda f: f | {"fold_indices.txt": b"0 -1\n" + b"0 1\n" * 9}, "fold 0: expected distinct numbers"),
    (lambda f: f | {"fold_indices.txt": b"0 x\n" + b"0 1\n" * 9}, "fold 0: expected distinct numbers"),
    (lambda f: f | {"fold_indices.txt": b"9" * 5000 + b"\n" + b"0 1\n" * 9}, "fold 0: expected distinct numbers"),
    (lambda f: f | {"fold_indices.txt": b"0" * (1 << 21)}, "fold_indices.txt: 2,097,152 bytes are more than"),
])
@pytest.mark.parametrize("write", [write_archive, write_folder])
def test_files_that_do_not_fit(tmp_path, write, change, said):
    write(tmp_path, change(contents()))
    assert said in error_of(read, tmp_path)
    assert cache_files(tmp_path) == [".lock"]


def test_more_images_than_stl10_has(tmp_path):
    files, folder = contents(), write_folder(tmp_path, contents())
    with open(folder / "test_X.bin", "wb") as file:
        file.truncate(8_001 * 27_648)
    assert "are not 1 to 8,000 images" in error_of(read, tmp_path)
    (folder / "test_X.bin").write_bytes(files["test_X.bin"])
    assert len(read(tmp_path).test) == 10


def test_foreign_files(tmp_path):
    (tmp_path / "stl10_binary.tar.gz").write_bytes(b"<html>not found</html>")
    assert "not a tar archive" in error_of(read, tmp_path)
    with tarfile.open(tmp_path / "stl10_binary.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("something/else"))
    assert "it has no stl10_binary/train_X.bin" in error_of(read, tmp_path)


def test_links_in_an_archive_are_not_followed_and_nothing_is_written_outside(tmp_path):
    with tarfile.open(write_archive(tmp_path / "a", {}), "w:gz") as archive:
        for name in contents():
            link = tarfile.TarInfo(f"stl10_binary/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        archive.addfile(tarfile.TarInfo("../../outside"))
    assert "it has no" in error_of(read, tmp_path / "a")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".fixmatch-cache", "a", "stl10.lock",
                                                                 "stl10_binary.tar.gz"]


def test_a_file_that_shrinks_while_it_is_copied(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, contents())
    count = stl10._count

    def shrink(place, name, size):
        os.truncate(folder / "test_X.bin", 5 * 27_648)
        return count(place, name, size)

    monkeypatch.setattr(stl10, "_count", shrink)
    assert "test_X.bin ends early" in error_of(read, tmp_path)
    assert cache_files(tmp_path) == [".lock"]


def test_a_full_disk_is_no_damage(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    write_archive(tmp_path, contents())
    monkeypatch.setattr(stl10.Writer, "append", full)
    message = error_of(read, tmp_path)
    assert "No space left on device; make room" in message
    assert "damaged" not in message
    assert cache_files(tmp_path) == [".lock"]
