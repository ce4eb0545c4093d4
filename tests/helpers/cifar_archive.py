"""Small CIFAR archives in the official layout: protocol-2 pickles as Python 2 wrote them, with byte-string keys."""

import io
import pathlib
import struct
import tarfile

import numpy as np

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}


def contents(name: str = "cifar10", per_class: int = 10, seed: int = 0) -> dict[str, dict]:
    """File name -> what its pickle holds. `per_class` training images a class, in five batches of CIFAR-10."""
    rng = np.random.default_rng(seed)
    num_classes = 10 if name == "cifar10" else 100
    if name == "cifar10":
        files = {f"data_batch_{i}": _batch(rng, 10, per_class // 5, b"labels") for i in range(1, 6)}
        files["test_batch"] = _batch(rng, 10, 2, b"labels")
        files["batches.meta"] = {b"num_cases_per_batch": 2 * per_class, b"label_names": _names(10), b"num_vis": 3072}
        return files
    files = {"train": _batch(rng, 100, per_class, b"fine_labels"), "test": _batch(rng, 100, 1, b"fine_labels")}
    for batch in files.values():
        batch[b"coarse_labels"] = [label // 5 for label in batch[b"fine_labels"]]
    files["meta"] = {b"fine_label_names": _names(num_classes), b"coarse_label_names": _names(20)}
    return files


def write_archive(root: pathlib.Path, files: dict[str, dict | bytes], name: str = "cifar10") -> pathlib.Path:
    """Writes root/ARCHIVE; a value that is bytes already is written as it stands."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / ARCHIVES[name]
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for file, content in files.items():
            blob = content if isinstance(content, bytes) else pickle_as_python2(content)
            member = tarfile.TarInfo(f"{FOLDERS[name]}/{file}")
            member.size = len(blob)
            archive.addfile(member, io.BytesIO(blob))
    return path


def write_folder(root: pathlib.Path, files: dict[str, dict | bytes], name: str = "cifar10") -> pathlib.Path:
    folder = root / FOLDERS[name]
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content if isinstance(content, bytes) else pickle_as_python2(content))
    return folder


def pickle_as_python2(value) -> bytes:
    return b"\x80\x02" + _python2(value) + b"."


def _batch(rng, num_classes: int, per_class: int, labels_key: bytes) -> dict:
    labels = rng.permutation(np.repeat(np.arange(num_classes), per_class)).tolist()
    rows = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return {b"batch_label": b"synthetic", labels_key: labels, b"data": rows, b"filenames": [b"x.png"] * len(labels)}


def _names(count: int) -> list[bytes]:
    return [f"class {i}".encode() for i in range(count)]


def _python2(value) -> bytes:
    match value:
        case bytes():
            short = len(value) < 256
            return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value
        case int():
            return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
        case list():
            return b"](" + b"".join(map(_python2, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_python2(k) + _python2(v) for k, v in value.items()) + b"u"
        case np.ndarray():
            return (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
                    + b"".join(map(_python2, value.shape)) + b"tcnumpy\ndtype\nU\x02" + value.dtype.str[1:].encode()
                    + b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
                    + _python2(value.tobytes()) + b"tb")
    raise TypeError(type(value))
