"""Data sources, download and split: what is read right, and what is refused without running anything."""

import builtins
import hashlib
import http.server
import json
import os
import pathlib
import pickle
import tarfile
import threading

import numpy as np
import pytest
from cifar_archive import contents, pickle_as_python2, write_archive, write_folder

from fixmatch.data import DataError
from fixmatch.data.sources import cifar
from fixmatch.data.sources import download as download_module
from fixmatch.data.sources.cifar import load_cifar
from fixmatch.data.sources.digits import load_digits
from fixmatch.data.sources.download import download
from fixmatch.data.split import choose_split, draw_split, load_split, save_split


def error_of(call, *arguments) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


def read(root, name="cifar10"):
    return load_cifar(name, str(root), False)


# --- CIFAR


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


def test_an_unofficial_archive_is_read_and_said(cifar10_root, capsys):
    read(cifar10_root)
    assert "not the official archive" in capsys.readouterr().out


def test_nothing_there_and_no_download(tmp_path):
    assert "data.download" in error_of(read, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


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
    assert cifar._unpickle(text + b"}I1\n" + encode + b"s.", "f") == {1: b"x" * 1000}
    many = text + b"}I1\n(" + 100 * encode + b"ls."
    assert "encodes what is no bytes" in error_of(cifar._unpickle, many, "f")


def test_the_hostile_pickles_do_run_elsewhere(tmp_path):
    pickle.loads(_hostile(tmp_path / "ran")["os.system"])
    assert (tmp_path / "ran").exists()


# --- download


class _Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path. `mode`: ranges, no ranges, cut (half of what is asked), missing."""

    content, mode = os.urandom(0), "ranges"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ranges = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/file"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.mode != "no ranges" else 0
        if server.mode == "missing":
            return self.send_error(404)
        if start and start >= len(server.content):
            return self.send_error(416)
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if server.mode == "cut" else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download_module, "_CHUNK", 1 << 14)
    server = _Server()
    server.content = np.random.default_rng(0).bytes(300_000)
    server.md5 = hashlib.md5(server.content).hexdigest()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_reports_progress_and_leaves_the_file_alone(server, tmp_path, capsys):
    target = tmp_path / "new/file"
    download(server.url, target, server.md5)
    assert target.read_bytes() == server.content
    assert os.listdir(target.parent) == ["file"]
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 11
    assert lines[-1] == "file: 0.3 of 0.3 MB"


def test_a_cut_connection_keeps_the_part_and_the_next_call_resumes_it(server, tmp_path):
    target, part = tmp_path / "file", tmp_path / "file.part"
    server.mode = "cut"
    assert "150,000 of 300,000" in error_of(download, server.url, target, server.md5)
    assert part.read_bytes() == server.content[:150_000]
    server.mode = "ranges"
    download(server.url, target, server.md5)
    assert server.ranges == [None, "bytes=150000-"]
    assert target.read_bytes() == server.content
    assert not part.exists()


def test_a_server_without_ranges_starts_over(server, tmp_path):
    (tmp_path / "file.part").write_bytes(server.content[:1000])
    server.mode = "no ranges"
    download(server.url, tmp_path / "file", server.md5)
    assert (tmp_path / "file").read_bytes() == server.content


def test_a_part_that_is_complete_is_taken(server, tmp_path):
    (tmp_path / "file.part").write_bytes(server.content)
    download(server.url, tmp_path / "file", server.md5)  # the server answers 416
    assert (tmp_path / "file").read_bytes() == server.content


@pytest.mark.parametrize("size", [1000, 300_000, 400_000])
def test_a_part_of_another_file_is_discarded(server, tmp_path, size):
    (tmp_path / "file.part").write_bytes(b"x" * size)
    assert "MD5" in error_of(download, server.url, tmp_path / "file", server.md5)
    assert os.listdir(tmp_path) == []
    download(server.url, tmp_path / "file", server.md5)
    assert (tmp_path / "file").read_bytes() == server.content


@pytest.mark.parametrize("mode", ["wrong", "cut", "missing"])
def test_a_bad_download_never_replaces_a_file(server, tmp_path, mode):
    target = tmp_path / "file"
    target.write_bytes(b"good")
    server.mode = mode
    assert str(target) in error_of(download, server.url, target, "0" * 32)
    assert target.read_bytes() == b"good"


def test_no_server(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as closed:
        port = closed.server_address[1]
    assert "refused" in error_of(download, f"http://127.0.0.1:{port}/file", tmp_path / "new/file", "0" * 32)
    assert os.listdir(tmp_path) == []


def test_a_missing_archive_is_downloaded_and_checked(server, tmp_path, monkeypatch):
    server.content = write_archive(tmp_path / "there", contents()).read_bytes()
    monkeypatch.setattr(cifar, "_HOST", server.url + "/")
    assert "MD5" in error_of(load_cifar, "cifar10", str(tmp_path / "here"), True)
    assert list((tmp_path / "here").iterdir()) == []


# --- digits


def test_digits():
    source = load_digits()
    assert (source.train.images.shape, source.test.images.shape) == ((1297, 8, 8, 3), (500, 8, 8, 3))
    assert source.train.images.dtype == np.uint8
    assert source.train.images.min() == 0
    assert source.train.images.max() == 255
    assert (source.train.images[..., 0] == source.train.images[..., 2]).all()
    assert np.bincount(source.train.labels).min() > 100
    assert not source.flip
    normal = (source.train.images / 255 - source.mean) / source.std
    assert abs(normal.mean()) < 1e-9
    assert abs(normal.std() - 1) < 1e-9


def test_digits_test_images_are_not_among_the_training_images():
    source = load_digits()
    test = {image.tobytes() for image in source.test.images}
    assert not test & {image.tobytes() for image in source.train.images}


def test_digits_are_the_same_every_time():
    np.random.seed(1)
    first = load_digits()
    np.random.seed(2)
    assert np.array_equal(first.train.images, load_digits().train.images)


# --- split

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 30))


def test_a_split_is_balanced_sorted_and_distinct():
    split = draw_split(LABELS, 10, 40, seed=1)
    assert np.bincount(LABELS[split.labeled]).tolist() == [4] * 10
    assert (np.diff(split.labeled) > 0).all()
    assert np.array_equal(split.unlabeled, np.arange(300))


def test_a_split_depends_on_its_seed_alone():
    first = draw_split(LABELS, 10, 40, seed=1)
    np.random.seed(99)
    assert draw_split(LABELS, 10, 40, seed=1).sha256() == first.sha256()
    assert draw_split(LABELS, 10, 40, seed=2).sha256() != first.sha256()


def test_without_the_labeled_images_the_unlabeled_are_the_rest():
    split = draw_split(LABELS, 10, 40, seed=1, include_labeled=False)
    assert sorted([*split.labeled, *split.unlabeled]) == list(range(300))


@pytest.mark.parametrize(("num_labeled", "said"), [(41, "nearest: 40"), (5, "nearest: 10"), (310, "which has 30")])
def test_a_split_that_cannot_be(num_labeled, said):
    message = error_of(draw_split, LABELS, 10, num_labeled, 0)
    assert message.startswith(f"data.num_labeled: {num_labeled} ")
    assert said in message


def test_a_split_with_a_count_for_each_class():
    counts = (1, 2, 3, 4, 5, 6, 7, 8, 9, 30)
    split = draw_split(LABELS, 10, counts, seed=1)
    assert np.bincount(LABELS[split.labeled]).tolist() == list(counts)
    assert "10 classes" in error_of(draw_split, LABELS, 10, (4, 4), 0)
    for wrong in ((0, *counts[1:]), (*counts[:9], 31)):
        assert error_of(draw_split, LABELS, 10, wrong, 0).startswith("data.labels_per_class: ")


def test_images_of_unknown_class_are_unlabeled_only():
    labels = np.where(np.arange(300) % 2, LABELS, -1)
    split = draw_split(labels, 10, 0, seed=1)  # every label there is
    assert np.array_equal(split.labeled, np.flatnonzero(labels >= 0))
    assert len(split.unlabeled) == 300
    assert (labels[draw_split(labels, 10, 20, seed=1).labeled] >= 0).all()
    labels[labels == 7] = -1
    assert "class 7" in error_of(draw_split, labels, 10, 0, 1)


def test_a_split_file_with_unknown_labels_is_refused(tmp_path):
    labels = np.where(np.arange(300) % 2, LABELS, -1)
    save_split(choose_split(np.arange(4), 300), tmp_path / "split.json", "folder", labels)
    assert "class is not known" in error_of(load_split, tmp_path / "split.json", "folder", labels, 4)


def test_a_split_that_leaves_nothing_unlabeled():
    assert "include_labeled" in error_of(draw_split, LABELS, 10, 300, 0, False)


@pytest.fixture
def split_file(tmp_path):
    save_split(draw_split(LABELS, 10, 40, seed=1), tmp_path / "split.json", "digits", LABELS)
    return tmp_path / "split.json"


def test_a_split_file_gives_the_split_back(split_file):
    split = load_split(split_file, "digits", LABELS, 40)
    assert split.sha256() == draw_split(LABELS, 10, 40, seed=1).sha256()
    assert split.labeled.dtype == np.int64


def test_a_split_file_for_other_data_or_settings_is_refused(split_file):
    swapped = LABELS.copy()
    i, j = np.flatnonzero(LABELS == 0)[0], np.flatnonzero(LABELS == 1)[0]
    swapped[[i, j]] = swapped[[j, i]]
    for said, *arguments in (("cifar10", "cifar10", LABELS, 40), ("299", "digits", LABELS[:-1], 40),
                             ("another order", "digits", swapped, 40), ("num_labeled is 50", "digits", LABELS, 50)):
        assert said in error_of(load_split, split_file, *arguments)


def _resealed(content: dict) -> dict:
    from fixmatch.data.split import Split

    seal = Split(np.array(content["labeled"]), np.array(content["unlabeled"])).sha256()
    return content | {"sha256": seal}


@pytest.mark.parametrize(("change", "said"), [
    (lambda c: c | {"labeled": [c["labeled"][0] + 1, *c["labeled"][1:]]}, "edited or damaged"),
    (lambda c: _resealed(c | {"labeled": [300, *c["labeled"][1:]]}), "distinct and in 0..299"),
    (lambda c: _resealed(c | {"labeled": [-1, *c["labeled"][1:]]}), "distinct and in 0..299"),
    (lambda c: _resealed(c | {"unlabeled": [1, 1]}), "distinct and in 0..299"),
    (lambda c: _resealed(c | {"unlabeled": []}), "distinct and in 0..299"),
    (lambda c: c | {"labeled": "abc"}, "not a split file"),
    (lambda c: c | {"labeled": [1 << 70]}, "not a split file"),
    (lambda c: c | {"labeled": [[1], [2, 3]]}, "not a split file"),
    (lambda c: {k: v for k, v in c.items() if k != "sha256"}, "not a split file"),
    (lambda c: [c], "not a split file"),
    (lambda c: None, "not a split file"),
])
def test_a_damaged_split_file_is_refused(split_file, change, said):
    split_file.write_text(json.dumps(change(json.loads(split_file.read_text()))))
    assert said in error_of(load_split, split_file, "digits", LABELS, 40)


def test_a_split_file_that_is_no_json_or_not_there(split_file, tmp_path):
    assert "cannot be read" in error_of(load_split, tmp_path / "none.json", "digits", LABELS, 40)
    assert "cannot be read" in error_of(load_split, tmp_path, "digits", LABELS, 40)
    split_file.write_bytes(b"\xff\xfe{")
    assert "not a split file" in error_of(load_split, split_file, "digits", LABELS, 40)
    split_file.write_text("[" * 100_000)
    assert "not a split file" in error_of(load_split, split_file, "digits", LABELS, 40)
