"""CIFAR's archives: what is read right, and what is refused without running anything."""

import builtins
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest
from cifar_archive import contents, pickle_as_python2, write_archive, write_folder
from data_errors import error_of

from fixmatch.data import DataError
from fixmatch.data.sources import cifar
from fixmatch.data.sources.arrays_pickle import unpickle
from fixmatch.data.sources.cifar import load_cifar


def read(root, name="cifar10"):
    return load_cifar(name, str(root), False)


@pytest.mark.parametrize("write", [write_archive, write_folder])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar10_from_archive_or_folder_or_what_holds_it(tmp_path, write, inside):
    files = contents()
    path = write(tmp_path, files)
    source = read(path if inside else tmp_path)
    assert (source.train.images.shape, source.test.images.shape) == ((100, 32, 32, 3), (20, 32, 32, 3))
    assert source.train.images.dtype == np.uint8
    assert source.train.labels.dtype == np.int64
    assert source.classes == tuple(f"class {i}" for i in range(10))
    rows = np.concatenate([files[f"data_batch_{i}"][b"data"] for i in range(1, 6)])
    assert source.train.images[57, 3, 9, 2] == rows[57, 2 * 1024 + 3 * 32 + 9]  # rows hold channel planes
    assert source.train.labels.tolist() == [label for i in range(1, 6) for label in files[f"data_batch_{i}"][b"labels"]]
    assert source.flip


def test_cifar100_has_its_fine_labels(tmp_path):
    files = contents("cifar100", per_class=2)
    write_archive(tmp_path, files, "cifar100")
    source = read(tmp_path, "cifar100")
    assert source.train.labels.tolist() == files["train"][b"fine_labels"]
    assert len(source.classes) == 100


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_archive_pickled_by_python3_is_read_too(tmp_path, protocol):
    files = contents()
    expected = files["test_batch"][b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    write_archive(tmp_path, {name: pickle.dumps(content, protocol) for name, content in files.items()})
    assert np.array_equal(read(tmp_path).test.images, expected)


def test_the_real_archive(real_cifar10):
    source = read(real_cifar10)
    assert source.classes[:2] == ("airplane", "automobile")
    assert len(np.bincount(source.train.labels)) == 10
    assert 90 < source.train.images.mean() < 150


def test_an_unofficial_archive_is_read_and_said(cifar10_root, logged):
    read(cifar10_root)
    assert "not the official archive" in logged()


def test_nothing_there_and_no_download(tmp_path):
    assert "data.download" in error_of(read, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_missing_archive_is_downloaded_and_checked(server, tmp_path, monkeypatch):
    server.content = write_archive(tmp_path / "there", contents()).read_bytes()
    monkeypatch.setattr(cifar, "_HOST", server.url + "/")
    assert "MD5" in error_of(load_cifar, "cifar10", str(tmp_path / "here"), True)
    assert list((tmp_path / "here").iterdir()) == []

# --- damaged and foreign archives


@pytest.mark.parametrize("kept", [0, 10, 5000, 0.5, 0.999])
def test_a_truncated_archive(cifar10_root, kept):
    path = cifar10_root / "cifar-10-python.tar.gz"
    blob = path.read_bytes()
    path.write_bytes(blob[:kept if isinstance(kept, int) else int(kept * len(blob))])
    assert str(path) in error_of(read, cifar10_root)


def test_every_kind_of_damage_is_a_data_error(tmp_path):
    path = write_archive(tmp_path, contents())
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    plain = tmp_path / "plain.tar"
    with tarfile.open(plain, "w") as archive:
        archive.add(tmp_path / "unpacked/cifar-10-batches-py", "cifar-10-batches-py")
    rng = np.random.default_rng(0)
    messages = []
    for source, region in ((path, 4000), (plain, 2048)):
        good = source.read_bytes()
        for _ in range(40):
            blob = bytearray(good)
            for position in rng.integers(0, region, 3):
                blob[position] = rng.integers(256)
            source.write_bytes(blob)
            try:
                read(source)
            except DataError as error:
                messages.append(str(error))
    assert len(messages) > 20
    assert not [message for message in messages if len(message.splitlines()) != 1]


def test_every_damaged_pickle_is_a_data_error():
    good = pickle_as_python2({b"labels": [0, 1], b"data": np.zeros((2, 3072), np.uint8), b"names": [b"a"]})
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        blob = bytearray(good)
        for position in rng.integers(0, 170, 2):
            blob[position] = rng.integers(256)
        try:
            cifar._parse_batch(bytes(blob), "f", cifar._LAYOUTS["cifar10"])
        except DataError:
            refused += 1
    assert refused > 1000


def test_foreign_and_incomplete_archives(tmp_path):
    files = contents()
    del files["data_batch_3"]
    write_archive(tmp_path / "a", files)
    assert "data_batch_3" in error_of(read, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/cifar-10-python.tar.gz").write_bytes(b"<html>not found</html>")
    assert "not a tar archive" in error_of(read, tmp_path / "b")
    write_archive(tmp_path / "c", contents("cifar100", 1), "cifar100").rename(tmp_path / "c/cifar-10-python.tar.gz")
    assert "it has no cifar-10-batches-py/" in error_of(read, tmp_path / "c")
    folder = write_folder(tmp_path / "d", contents())
    (folder / "test_batch").unlink()
    assert "test_batch" in error_of(read, tmp_path / "d")


def test_links_in_an_archive_are_not_followed(tmp_path):
    path = write_archive(tmp_path, {"batches.meta": contents()["batches.meta"]})
    with tarfile.open(path, "w:gz") as archive:
        for name in contents():
            link = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    assert "it has no" in error_of(read, tmp_path)


@pytest.mark.parametrize(("change", "said"), [
    ({b"labels": [0] * 19}, "labels"),
    ({b"labels": [10] + [0] * 19}, "image 0 has the label 10"),
    ({b"labels": [0] * 19 + [-1]}, "image 19 has the label -1"),
    ({b"labels": [b"cat"] * 20}, "bytes"),
    ({b"labels": b"01234567890123456789"}, "labels"),
    ({b"data": b"x"}, "'data'"),
    ({b"data": np.zeros((20, 3071), np.uint8)}, "'data'"),
    ({b"data": np.zeros((20, 3072), np.float32)}, "'data'"),
    ({b"data": np.zeros((20, 1, 3072), np.uint8)}, "'data'"),
    ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "no test images"),
])
def test_content_that_is_not_cifar(tmp_path, change, said):
    files = contents()
    files["test_batch"] |= change
    write_archive(tmp_path, files)
    assert said in error_of(read, tmp_path)


@pytest.mark.parametrize("names", [[b"one"] * 9, b"ten", [0] * 10])
def test_class_names_that_are_none(tmp_path, names):
    files = contents()
    files["batches.meta"][b"label_names"] = names
    write_archive(tmp_path, files)
    assert "label_names" in error_of(read, tmp_path)


def test_a_pickle_that_is_no_dict(tmp_path):
    write_archive(tmp_path, contents() | {"test_batch": pickle_as_python2([1, 2])})
    assert "holds list" in error_of(read, tmp_path)

# --- hostile pickles


class _Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _hostile(marker: pathlib.Path) -> dict[str, bytes]:
    """Pickles that would leave a file at `marker`, read one, or ask for a terabyte."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    np.save(marker.with_suffix(".npy"), np.zeros(2))
    text = str(marker).encode()
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    terabyte = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    bomb = b"(lp0\n" + b"".join(b"(lp%d\n(g%d\ng%d\ne" % (i, i - 1, i - 1) for i in range(1, 40))
    return {
        "os.system": pickle.dumps({b"data": _Calls(os.system, command)}, 2),
        "posix.system in a list": pickle.dumps({b"labels": [_Calls(os.system, command)]}, 4),
        "eval": pickle.dumps(_Calls(builtins.eval, code), 2),
        "exec": pickle.dumps(_Calls(builtins.exec, code), 0),
        "inst": b"(S'touch %s'\nios\nsystem\n." % text,
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93V" + command.encode() + b"\n\x85R.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93\x85R.",
        "newline in the name": b"\x80\x04\x8c\x05a\nb\x1b[\x8c\x03c\nd\x93)R.",
        "getattr": b"c__builtin__\ngetattr\ncos\nS'system'\n\x86R.",
        "numpy.load": pickle.dumps(_Calls(np.load, str(marker.with_suffix(".npy"))), 2),
        "numpy.fromfile": pickle.dumps(_Calls(np.fromfile, "/etc/passwd", np.uint8), 2),
        "numpy.memmap": b"cnumpy\nmemmap\n(U" + bytes([len(text)]) + text + b"U\x02u1U\x02w+tR.",
        "numpy.save": b"cnumpy\nsave\n(U" + bytes([len(text)]) + text + b"K\x00tR.",
        "scalar": pickle.dumps(np.float64(1), 2),
        "object array": pickle.dumps({b"data": np.array([_Calls(os.system, command)], dtype=object)}, 2),
        "call an array": b"cnumpy\nndarray\n(" + terabyte + b"\x85tR.",
        "huge array": b"}U\x04data" + reconstruct + b"(K\x01(" + terabyte + b"M\x00\x0ct" + dtype + b"\x89U\x00tbs.",
        "huge bytes": b"}U\x04data\x8e" + (1 << 45).to_bytes(8, "little") + b"x" + b"s.",
        "huge memo": b"Nr\xff\xff\xff\x7f.",
        "list of lists of lists": b"}(U\x06labels" + bomb + b"u.",
        "persistent id": b"Pevil\n.",
        "extension": b"\x82\x01.",
        "nothing": b"",
    }


@pytest.mark.parametrize("kind", list(_hostile(pathlib.Path(os.devnull).parent / "shm" / "unused")))
@pytest.mark.parametrize("write", [write_archive, write_folder])
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path, kind, write):
    marker = tmp_path / "ran"
    write(tmp_path / "data", contents() | {"data_batch_2": _hostile(marker)[kind]})
    before = sorted(tmp_path.rglob("*"))
    assert "data_batch_2" in error_of(read, tmp_path / "data")
    assert not marker.exists()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_text_encoded_over_and_over_is_refused():
    text = b"X" + (1000).to_bytes(4, "little") + b"x" * 1000 + b"q\x000"
    encode = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR"
    assert unpickle(text + b"}I1\n" + encode + b"s.", "f") == {1: b"x" * 1000}
    many = text + b"}I1\n(" + 100 * encode + b"ls."
    assert "encodes what is no bytes" in error_of(unpickle, many, "f")


def test_the_hostile_pickles_do_run_elsewhere(tmp_path):
    pickle.loads(_hostile(tmp_path / "ran")["os.system"])
    assert (tmp_path / "ran").exists()
