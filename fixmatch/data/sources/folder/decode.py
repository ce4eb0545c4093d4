"""Many image files into arrays, several at a time, in their order."""

import collections
import concurrent.futures
import contextlib
import errno
import functools
import itertools
import logging
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fixmatch.data.dataset import DataError, one_line, shown
from fixmatch.data.sources.folder.image import CONVERT_HEIC, decode_image, read_size
from fixmatch.runtime import physical_cores

_LEAST_SIDE, _MOST_SIDE = 8, 224  # pixels, of a size that is taken from images of different sizes
_CHUNK_BYTES, _CHUNK_FILES = 1 << 22, 32  # the most that a thread decodes in one go
_MACHINE_ERRORS = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)  # say nothing about the image

_log = logging.getLogger(__name__)


def common_size(paths: Sequence[str], root: pathlib.Path) -> tuple[int, int]:
    """(height, width) for images whose size the user left open, from nothing but their headers.

    It is the size that all readable images have, if it is one and both its sides have 8 pixels or more. Otherwise it is
    a square with the median of their shorter sides, from 8 to 224. `root` names the data set in progress messages.
    """
    parts = _parts(0, len(paths), _CHUNK_FILES)
    with _working(functools.partial(_read_sizes, paths), parts, root, "reading their sizes") as results:
        sizes = np.concatenate([sizes for _, sizes in results])
    sizes = sizes[sizes[:, 0] > 0]
    if len(sizes) and (sizes == sizes[0]).all() and sizes[0].min() >= _LEAST_SIDE:
        return int(sizes[0, 0]), int(sizes[0, 1])
    side = int(np.median(sizes.min(axis=1))) if len(sizes) else 0
    return (min(max(side, _LEAST_SIDE), _MOST_SIDE),) * 2


def decoding(paths: Sequence[str], cut: int, height: int, width: int,
             root: pathlib.Path) -> contextlib.AbstractContextManager[Iterator[tuple]]:
    """A context that gives an iterator over all images, in their order, decoded in parts. Leaving it stops the work.

    A part is (range of indices, (uint8 [n, height, width, 3], the images that can be read, and [[index, reason], ...]
    of the others)). No part has indices on both sides of `cut`. `root` names the data set in progress messages.

    Raises:
        DataError: a file cannot be read for a reason that says nothing about the image; the iterator raises it.
    """
    count, step = len(paths), max(1, min(_CHUNK_FILES, _CHUNK_BYTES // (height * width * 3)))
    aim = f"decoding to {width}x{height} pixels, {count * height * width * 3 / 1e9:.1f} GB"
    return _working(functools.partial(decode_some, paths, height, width),
                    [*_parts(0, cut, step), *_parts(cut, count, step)], root, aim)


def _parts(first: int, end: int, step: int) -> list[range]:
    return [range(start, min(start + step, end)) for start in range(first, end, step)]


@contextlib.contextmanager
def _working(job: Callable, parts: list[range], root: pathlib.Path, aim: str) -> Iterator[Iterator[tuple]]:
    """A context that gives (part, job(part)) for each part, in their order; threads work on a few of them ahead."""
    threads, count = physical_cores() + 1, sum(map(len, parts))  # there is one more, as some wait for the disk
    _log.info("%s: %s images: %s", root, f"{count:,}", aim)
    Image.init()  # finds all of Pillow's formats before threads look for them
    with (warnings.catch_warnings(),
          concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
          tqdm(total=count, desc=str(root), unit=" images", disable=None, delay=1) as bar):
        warnings.simplefilter("ignore")  # Pillow warns of every oddity in a file
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        pending = ((part, pool.submit(job, part)) for part in parts)
        waiting = collections.deque(itertools.islice(pending, 2 * threads))

        def results() -> Iterator[tuple]:
            while waiting:
                part, future = waiting.popleft()
                yield part, future.result()
                bar.update(len(part))
                waiting.extend(itertools.islice(pending, 1))

        try:
            yield results()
        finally:
            for _, future in waiting:
                future.cancel()


def _read_sizes(paths: Sequence[str], part: range) -> np.ndarray:
    """The heights and widths of a part, int32 [n, 2]; zeros where an image is broken, which decoding will tell."""
    sizes = np.zeros((len(part), 2), np.int32)
    for row, index in enumerate(part):
        with contextlib.suppress(Exception):  # why it is any exception is said in decode_some
            sizes[row] = read_size(paths[index])
    return sizes


def decode_some(paths: Sequence[str], height: int, width: int, part: range) -> tuple[np.ndarray, list[list]]:
    """(uint8 [n, H, W, 3] of the images of a part that can be read, [[index, reason], ...] of the others)."""
    images, broken = np.empty((len(part), height, width, 3), np.uint8), []
    for index in part:
        try:
            images[index - part.start - len(broken)] = decode_image(paths[index], height, width)
        except MemoryError:
            raise
        except Exception as error:  # a damaged image raises almost anything, by its kind of damage
            if getattr(error, "errno", None) in _MACHINE_ERRORS:
                raise DataError(f"{shown(paths[index])}: cannot be read: {error.strerror}") from None
            broken.append([index, reason_of(error, paths[index])])
    return images[:len(part) - len(broken)], broken


def reason_of(error: Exception, path: str = "") -> str:
    """Why an image is broken, in about 100 characters that can be printed; `path` is its file's, if it has one."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a format that is not known here" + (f"; {CONVERT_HEIC}" if _is_heic(path) else "")
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, which would take too much memory; scale it down"
    text = getattr(error, "strerror", None) or one_line(error)
    return shown(text if len(text) <= 100 else text[:97] + "...")


def _is_heic(path: str) -> bool:
    """By its name, or by what is in it: some telephones call such photos .jpg."""
    if path.lower().endswith((".heic", ".heif")):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(12)[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1")
    except OSError:
        return False
