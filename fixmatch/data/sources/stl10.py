"""STL-10 from the official binary archive or its unpacked folder (Coates, Ng and Lee 2011).

5,000 labeled and 8,000 test images of ten classes, and 100,000 images of no known class. Each is 96x96 pixels, stored
as three colour planes, column by column. They are read straight from the archive, and only a memory-mapped copy in the
order that the trainer wants is kept (fixmatch/data/sources/cache.py), which takes 3.1 GB on disk and none in memory.
"""

import contextlib
import functools
import hashlib
import logging
import pathlib
import tarfile
from collections.abc import Callable, Iterator

import numpy as np
from tqdm import tqdm

from fixmatch.data.dataset import DataError, Dataset, Source, one_line
from fixmatch.data.sources.cache import cached_images
from fixmatch.data.sources.download import TAR_ERRORS, locate, md5_of
from fixmatch.data.sources.writer import Writer

_HOST = "https://ai.stanford.edu/~acoates/stl10/"
_ARCHIVE, _FOLDER, _MD5 = "stl10_binary.tar.gz", "stl10_binary", "91f7769df0f17e558f3565bffb0c7dfb"
_SIDE, _NUM_CLASSES, _NUM_FOLDS = 96, 10, 10
_IMAGE_BYTES = 3 * _SIDE * _SIDE
_CHUNK = 64  # images that are copied at once
# The most images that a file may hold, in the order of the cache, and the most bytes that each of the other files has.
_MOST = {"train_X.bin": 5_000, "unlabeled_X.bin": 100_000, "test_X.bin": 8_000}
_LARGEST = {"train_y.bin": 5_000, "test_y.bin": 8_000, "class_names.txt": 1 << 12, "fold_indices.txt": 1 << 20}

_log = logging.getLogger(__name__)


def load_stl10(root: str, allow_download: bool = True) -> Source:
    """Reads STL-10 from root/stl10_binary/, root/stl10_binary.tar.gz, or from `root` itself if it is one of the two.

    The training images are uint8 [105000, 96, 96, 3]: first the 5,000 labeled ones (0..9), then the 100,000 unlabeled
    ones (-1). The test images are [8000, 96, 96, 3]. `folds` are the ten of the data set, int64 [1000] each, indices of
    labeled images. Mean and std are no constants: they are computed from all training images that are there, labeled or
    not.

    Smaller archives of the same layout are read, too. The first call needs some minutes and 3.1 GB of disk space.

    Raises:
        DataError: nothing is there and it is not to be downloaded, a file is damaged or not STL-10's, or there is no
            room for the cache.
    """
    base = pathlib.Path(root)
    place = locate(base, "stl10", _ARCHIVE, _FOLDER, "train_X.bin", _HOST, _MD5, allow_download)
    images, facts = cached_images(base if base.is_dir() else base.parent, "stl10", _fingerprint(place),
                                  functools.partial(_build, place))
    if facts["official"] is False:
        _log.info("%s: not the official archive (its MD5 differs); read all the same", place)
    cut, labeled = facts["num_train"], facts["labels"]
    labels = np.full(cut, -1, dtype=np.int64)
    labels[:len(labeled)] = labeled
    test = Dataset(images[cut:], np.array(facts["test_labels"], dtype=np.int64))
    folds = tuple(np.array(fold, dtype=np.int64) for fold in facts["folds"])
    return Source("stl10", tuple(facts["classes"]), Dataset(images[:cut], labels), test, tuple(facts["mean"]),
                  tuple(facts["std"]), flip=True, folds=folds)


def _fingerprint(place: pathlib.Path) -> str:
    """The hex digest of sizes and times of what is read. Of the content, every start would wait for 3 GB."""
    files = [place / name for name in (*_MOST, *_LARGEST)] if place.is_dir() else [place]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _build(place: pathlib.Path, writer: Writer) -> dict:
    """Checks every file against the others, writes the images, and returns what else the source consists of."""
    with _opened(place) as (streams, files):
        counts = {name: _count(place, name, size) for name, (size, _) in streams.items()}
        labels, test_labels = (_parse_labels(place, name, files[name], counts[images]) for name, images in (
            ("train_y.bin", "train_X.bin"), ("test_y.bin", "test_X.bin")))
        facts = {"classes": _parse_names(place, files["class_names.txt"]), "labels": labels,
                 "test_labels": test_labels, "folds": _parse_folds(place, files["fold_indices.txt"], len(labels)),
                 "num_train": counts["train_X.bin"] + counts["unlabeled_X.bin"]}
        total = sum(counts.values())
        writer.begin(_SIDE, _SIDE, total)
        _log.info("%s: copying %s images, %.1f GB", place, f"{total:,}", total * _IMAGE_BYTES / 1e9)
        with tqdm(total=total, desc="stl10", unit=" images", disable=None) as bar:
            for name in _MOST:
                for images in _images(place, name, counts[name], streams[name][1]):
                    writer.append(images, counted=name != "test_X.bin")
                    bar.update(len(images))
    with _reading(place):
        official = None if place.is_dir() else md5_of(place) == _MD5
    return {**facts, **writer.statistics(), "official": official}


@contextlib.contextmanager
def _reading(place: pathlib.Path) -> Iterator[None]:
    """A context that turns what may go wrong while files are read into a DataError that says so."""
    try:
        yield
    except DataError:
        raise
    except TAR_ERRORS as error:
        fix = "; unpack the archive" if place.is_dir() else " or not a tar archive; delete it and download it"
        raise DataError(f"{place}: damaged{fix} again ({one_line(error)})") from None


@contextlib.contextmanager
def _opened(place: pathlib.Path) -> Iterator[tuple[dict, dict[str, bytes]]]:
    """A context that gives ({image file: (bytes, how to open it)}, {other file: content}).

    An archive is read as it stands. Raises DataError if a file is missing or too large.
    """
    streams, files = {}, {}
    with contextlib.ExitStack() as stack:
        with _reading(place):
            entries = _in_folder(place) if place.is_dir() else _in_archive(
                stack.enter_context(tarfile.open(place, "r:*")))
            for name, size, open_it in entries:
                if name in _MOST:
                    streams[name] = size, open_it
                elif size <= _LARGEST[name]:  # read in passing, as to go back in a compressed archive is to start over
                    with open_it() as file:
                        files[name] = file.read()
                else:
                    raise DataError(f"{place}: {name}: {size:,} bytes are more than the {_LARGEST[name]:,} of STL-10")
        for name in (*_MOST, *_LARGEST):
            if name not in streams and name not in files:
                raise DataError(f"{place}: not the {_ARCHIVE} archive: it has no {_FOLDER}/{name}")
        yield streams, files


def _in_folder(folder: pathlib.Path) -> Iterator[tuple[str, int, Callable]]:
    """Gives name, bytes and how to open it for each of STL-10's files in an unpacked folder."""
    for name in (*_MOST, *_LARGEST):
        if (folder / name).is_file():
            yield name, (folder / name).stat().st_size, functools.partial(open, folder / name, "rb")


def _in_archive(archive: tarfile.TarFile) -> Iterator[tuple[str, int, Callable]]:
    """Gives name, bytes and how to open it for each of STL-10's files in an archive."""
    for member in archive:
        folder, _, name = member.name.rpartition("/")
        if member.isfile() and folder == _FOLDER and (name in _MOST or name in _LARGEST):
            yield name, member.size, functools.partial(archive.extractfile, member)


def _images(place: pathlib.Path, name: str, count: int, open_it: Callable) -> Iterator[np.ndarray]:
    """Gives the images of one file, uint8 [n, 96, 96, 3] at a time."""
    with _reading(place), open_it() as stream:
        for start in range(0, count, _CHUNK):
            n = min(_CHUNK, count - start)
            blob = stream.read(n * _IMAGE_BYTES)
            if len(blob) < n * _IMAGE_BYTES:
                raise DataError(f"{place}: {name} ends early; get it again")
            planes = np.frombuffer(blob, np.uint8).reshape(n, 3, _SIDE, _SIDE)  # image, colour, column, row
            yield np.ascontiguousarray(planes.transpose(0, 3, 2, 1))


def _count(place: pathlib.Path, name: str, size: int) -> int:
    """How many images a file of `size` bytes holds. Raises DataError for sizes that STL-10's files do not have."""
    count, rest = divmod(size, _IMAGE_BYTES)
    if rest or count > _MOST[name] or (count == 0 and name != "unlabeled_X.bin"):
        raise DataError(f"{place}: {name}: {size:,} bytes are not 1 to {_MOST[name]:,} images of {_IMAGE_BYTES:,}; "
                        "get the archive again")
    return count


def _parse_labels(place: pathlib.Path, name: str, blob: bytes, count: int) -> list[int]:
    """The labels 0..9, which the file has as bytes 1..10. Raises DataError for anything else."""
    if len(blob) != count:
        raise DataError(f"{place}: {name}: {len(blob):,} labels for {count:,} images; get the archive again")
    for i, label in enumerate(blob):
        if not 1 <= label <= _NUM_CLASSES:
            raise DataError(f"{place}: {name}: image {i} has the label {label}, expected 1..{_NUM_CLASSES}")
    return [label - 1 for label in blob]


def _parse_names(place: pathlib.Path, blob: bytes) -> list[str]:
    """The names of the ten classes. Raises DataError for another number of names."""
    names = blob.decode("utf-8", "replace").split()
    if len(names) != _NUM_CLASSES:
        raise DataError(f"{place}: class_names.txt: {len(names)} names, expected {_NUM_CLASSES}")
    return names


def _parse_folds(place: pathlib.Path, blob: bytes, num_labeled: int) -> list[list[int]]:
    """The ten folds, one list of indices from each line; they count from 0. Raises DataError for anything else."""
    folds = [line.split() for line in blob.splitlines() if line.strip()]
    if len(folds) != _NUM_FOLDS:
        raise DataError(f"{place}: fold_indices.txt: {len(folds)} lines, expected {_NUM_FOLDS}")
    for number, fold in enumerate(folds):
        indices = [int(word) for word in fold if word.isdigit() and len(word) <= 7]
        if len(indices) < len(fold) or max(indices) >= num_labeled or len(set(indices)) < len(indices):
            raise DataError(f"{place}: fold_indices.txt: fold {number}: expected distinct numbers in "
                            f"0..{num_labeled - 1}")
        folds[number] = indices
    return folds
