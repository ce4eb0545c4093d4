"""One image file into an array.

Every image becomes uint8 [H, W, 3] as it would be seen on a white page: it is turned as its EXIF says, transparent
pixels are blended with white, 16 bits a channel are rounded to 8, and of several frames the first is taken. Integers of
32 bits and floating-point numbers have no known range, so such images are errors. Then the image is scaled until it
just covers H x W, smoothed against aliasing (bilinear), and what juts out is cut off on both sides alike.
"""

import numpy as np
from PIL import Image, ImageOps

DECODER_VERSION = 1  # raised whenever the same file would decode to other pixels, so that older caches are built anew

# What Pillow may take a file for, whatever its extension says. Some of Pillow's other formats run programs.
_FORMATS = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "GIF": (".gif",), "BMP": (".bmp",),
            "WEBP": (".webp",), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
            "JPEG2000": (".jp2",), "AVIF": (".avif",)}
EXTENSIONS = tuple(extension for group in _FORMATS.values() for extension in group)
CONVERT_HEIC = "convert HEIC photos to JPEG or PNG"
_ORIENTATION = 0x0112  # the EXIF tag that says how an image is to be turned
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}


def decode_image(path: str, height: int, width: int) -> np.ndarray:
    """The image in a file, uint8 [height, width, 3].

    A damaged image raises almost anything, by its kind of damage.
    """
    with open(path, "rb") as file:
        return to_pixels(Image.open(file, formats=_formats()), height, width)


def to_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The same of an image that Pillow has opened or made."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    image = _to_rgb(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def read_size(path: str) -> tuple[int, int]:
    """(height, width) of the image in a file as it is seen, in pixels, from nothing but its header.

    A damaged image raises almost anything, as above.
    """
    with open(path, "rb") as file:
        image = Image.open(file, formats=_formats())
        # Pillow 13 gives the size of a TIFF as it is seen, and older ones as it is stored; the tags give it as stored.
        width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
        return (width, height) if _orientation(image) > 4 else (height, width)


def _formats() -> list[str]:
    """The formats that this Pillow knows, of which AVIF came with Pillow 11.3."""
    return [name for name in _FORMATS if name in Image.OPEN]


def _orientation(image: Image.Image) -> int:
    """How the image is turned, 1..8 as in EXIF; 1 where that is not said."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys():
        return 1  # without this test, Pillow would decode the image to look for EXIF behind it
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the EXIF is damaged in any of many ways, but the pixels are still good
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
    """Grey levels 0..65535 rounded to 0..255, uint8. Raises ValueError for others."""
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("32-bit pixels have no known range")
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
