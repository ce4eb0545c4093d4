"""CTAugment's nineteen operations on Pillow images.

Every operation is a function of (image, level, second level, place). Levels are in [0, 1); the second one is only used
by `rescale`, and the place only by `cutout`, so the other operations swallow what they do not need.

One oddity of the official code is kept, because its published numbers rest on it: TranslateX and TranslateY move by at
most 0.3 *pixels*, which nearest-neighbour sampling rounds to none.

The operations are Pillow's, done to one image after another in the loader's threads. A library does instead of more
kernels here, since CTAugment is a variant of the paper, and some 10,000 images of 32 x 32 a second on one core are
enough for it, though that is a twentieth of the kernels' rate.

Source: libml/ctaugment.py of google-research/fixmatch.
"""

from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

_GREY = (127, 127, 127)
_FILTERS = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.BOX,
            Image.Resampling.HAMMING, Image.Resampling.NEAREST)


def _enhanced(enhancer):
    """An enhancement by a factor of 0.1..2."""
    return lambda image, level, *_: enhancer(image).enhance(0.1 + 1.9 * level)


def _blended(change):
    """A blend of the image (level 0) and the changed image (level 1)."""
    return lambda image, level, *_: Image.blend(image, change(image), level)


def _moved(coefficients):
    """An affine transform by coefficients(x), where the level makes x -0.3..0.3."""
    return lambda image, level, *_: image.transform(image.size, Image.Transform.AFFINE,
                                                    coefficients((2 * level - 1) * 0.3))


def _cutout(image, level, _, centre):
    """A square of grey around a pixel, whose side is up to half of the image's shorter one."""
    half = (1 + int(level * min(image.size) * 0.499)) // 2
    x, y = (int(place * size) for place, size in zip(centre, image.size, strict=True))
    width, height = image.size
    image.paste(_GREY, (max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half)))
    return image


def _posterize(image, level, *_):
    return ImageOps.posterize(image, 1 + int(level * 7.999))


def _rescale(image, level, method, _):
    """Up to a quarter is cut off at each border, and the rest enlarged to the image's size by one of six filters."""
    (width, height), margin = image.size, 0.25 * level
    inside = image.crop((margin * width, margin * height, width * (1 - margin), height * (1 - margin)))
    return inside.resize(image.size, _FILTERS[int(method * 5.99)])


def _rotate(image, level, *_):
    return image.rotate(round((2 * level - 1) * 45))


class Operation(NamedTuple):
    name: str
    bins: tuple[int, ...]  # how many bins the range of each parameter is cut into
    apply: Callable[..., Image.Image]  # a function of a PIL image, two levels and a place (x, y)


OPS = (
    Operation("autocontrast", (17,), _blended(ImageOps.autocontrast)),
    Operation("blur", (17,), _blended(lambda image: image.filter(ImageFilter.BLUR))),
    Operation("brightness", (17,), _enhanced(ImageEnhance.Brightness)),
    Operation("color", (17,), _enhanced(ImageEnhance.Color)),
    Operation("contrast", (17,), _enhanced(ImageEnhance.Contrast)),
    Operation("cutout", (17,), _cutout),
    Operation("equalize", (17,), _blended(ImageOps.equalize)),
    Operation("invert", (17,), _blended(ImageOps.invert)),
    Operation("identity", (), lambda image, *_: image),
    Operation("posterize", (8,), _posterize),
    Operation("rescale", (17, 6), _rescale),
    Operation("rotate", (17,), _rotate),
    Operation("sharpness", (17,), _enhanced(ImageEnhance.Sharpness)),
    Operation("shear_x", (17,), _moved(lambda x: (1, x, 0, 0, 1, 0))),
    Operation("shear_y", (17,), _moved(lambda x: (1, 0, 0, x, 1, 0))),
    Operation("smooth", (17,), _blended(lambda image: image.filter(ImageFilter.SMOOTH))),
    Operation("solarize", (17,), lambda image, level, *_: ImageOps.solarize(image, int(level * 255.999))),
    Operation("translate_x", (17,), _moved(lambda x: (1, 0, x, 0, 1, 0))),
    Operation("translate_y", (17,), _moved(lambda x: (1, 0, 0, 0, 1, x))),
)
CUTOUT = [op.name for op in OPS].index("cutout")
