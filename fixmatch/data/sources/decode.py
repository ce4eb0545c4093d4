"""Image files into arrays, several at a time.

Every image becomes uint8 [H, W, 3] as it would be seen on a white page: turned as its EXIF says, transparent pixels
blended with white, 16 bits a channel rounded to 8, the first frame of several. Integers of 32 bits and floating-point
numbers have no known range, so such images count as broken. Then it is scaled until it just covers H x W, smoothed
against aliasing (bilinear), and what juts out is cut off on both sides alike.
"""

import collections
import concurrent.futures
import contextlib
import errno
import functools
import itertools
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from fixmatch.data.dataset import DataError, one_line, shown
from fixmatch.runtime import physical_cores

DECODER_VERSION = 1  # raised whenever the same file would decode to other pixels, so that older caches are built anew
_LEAST_SIDE, _MOST_SIDE = 8, 224  # pixels, of a size that is taken from images of different sizes
_CHUNK_BYTES, _CHUNK_FILES = 1 << 22, 32  # what a thread decodes in one go, at most

# What Pillow may take a file for, whatever its extension says; some of its other formats run programs.
_FORMATS = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "GIF": (".gif",), "BMP": (".bmp",),
            "WEBP": (".webp",), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
            "JPEG2000": (".jp2",), "AVIF": (".avif",)}
EXTENSIONS = tuple(extension for group in _FORMATS.values() for extension in group)
_ORIENTATION = 0x0112  # the EXIF tag, and how to undo each of its values
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}
_MACHINE_ERRORS = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)  # say nothing about the image


def common_size(paths: Sequence[str], root: pathlib.Path) -> tuple[int, int]:
    """(height, width) for images whose size the user left open, from nothing but their headers.

    It is the size that all readable ones have, if it is one and both its sides have 8 pixels or more; else a square
    with the median of their shorter sides, from 8 to 224. `root` is what progress is told of.
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
    """A context that gives an iterator over all images, in their order, decoded in parts; leaving it stops the work.

    A part is (range of indices, (uint8 [n, height, width, 3], the images that can be read, and [[index, reason], ...]
    of the others)); none has indices on both sides of `cut`. `root` is what progress is told of.

    Raises:
        DataError: from the iterator, where a file cannot be read for a reason that says nothing about the image.
    """
    count, step = len(paths), max(1, min(_CHUNK_FILES, _CHUNK_BYTES // (height * width * 3)))
    aim = f"decoding to {width}x{height} pixels, {count * height * width * 3 / 1e9:.1f} GB"
    return _working(functools.partial(_decode_some, paths, height, width),
                    [*_parts(0, cut, step), *_parts(cut, count, step)], root, aim)


def _parts(first: int, end: int, step: int) -> list[range]:
    return [range(start, min(start + step, end)) for start in range(first, end, step)]


@contextlib.contextmanager
def _working(job: Callable, parts: list[range], root: pathlib.Path, aim: str) -> Iterator[Iterator[tuple]]:
    """Gives (part, job(part)) for each part, in their order; threads work on a few of them ahead."""
    threads, count = physical_cores() + 1, sum(map(len, parts))  # one more, as some wait for the disk
    Image.init()  # all of Pillow's formats, before threads look for them
    with (warnings.catch_warnings(),
          concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
          tqdm(total=count, desc=str(root), unit=" images", disable=None) as bar):
        warnings.simplefilter("ignore")  # Pillow warns of every oddity in a file
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if bar.disable:
            print(f"{root}: {count:,} images: {aim}", flush=True)
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
    """int32 [n, 2], height and width as seen; zeros where an image is broken, which decoding will tell."""
    sizes = np.zeros((len(part), 2), np.int32)
    for row, index in enumerate(part):
        with contextlib.suppress(Exception), open(paths[index], "rb") as file:  # why: see _decode_some
            image = Image.open(file, formats=_formats())
            # Of a TIFF, Pillow 13 gives the size as seen, and older ones as stored: so it is read from the tags.
            size = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
            sizes[row] = size if _orientation(image) > 4 else size[::-1]
    return sizes


def _decode_some(paths: Sequence[str], height: int, width: int, part: range) -> tuple[np.ndarray, list[list]]:
    """(uint8 [n, H, W, 3] of the images that can be read, [[index, reason], ...] of the others)."""
    images, broken = np.empty((len(part), height, width, 3), np.uint8), []
    for index in part:
        try:
            images[index - part.start - len(broken)] = _decode(paths[index], height, width)
        except MemoryError:
            raise
        except Exception as error:  # a damaged image raises almost anything, by its kind of damage
            if getattr(error, "errno", None) in _MACHINE_ERRORS:
                raise DataError(f"{shown(paths[index])}: cannot be read: {error.strerror}") from None
            broken.append([index, _reason(error)])
    return images[:len(part) - len(broken)], broken


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a format that is not known here"
    text = getattr(error, "strerror", None) or one_line(error)
    return shown(text if len(text) <= 100 else text[:97] + "...")


# --- one image


def _formats() -> list[str]:
    return [name for name in _FORMATS if name in Image.OPEN]  # AVIF came with Pillow 11.3


def _decode(path: str, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]"""
    with open(path, "rb") as file:
        image = Image.open(file, formats=_formats())
        image.load()
        turn = _TURNS.get(_orientation(image))
    image = _to_rgb(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _orientation(image: Image.Image) -> int:
    """1..8 as in EXIF; 1 where it is not said."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys():
        return 1  # Pillow would decode the image to look behind it, too
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged, in any of many ways; the pixels are still good
        return 1
    return value if value in _TURNS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" and its like, and "I", in which Pillow gives some images of 16 bits
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image.convert("RGB")


def _to_8_bits(grey: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255, rounded."""
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("32-bit pixels have no known range")
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
