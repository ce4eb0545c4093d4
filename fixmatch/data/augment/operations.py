"""RandAugment's operations as the compiled kernels take them: a code and up to six parameters each.

Every recipe of RandAugment uses these fourteen operations and differs in their arguments only. `operation` takes the
argument that Pillow's function would be called with, and what the kernels make of it equals Pillow's result byte for
byte. H and W are an image's height and width.
"""

import math

from fixmatch.data.augment import pixels

OPS = (
    "AutoContrast",
    "Brightness",
    "Color",
    "Contrast",
    "Equalize",
    "Identity",
    "Posterize",
    "Rotate",
    "Sharpness",
    "ShearX",
    "ShearY",
    "Solarize",
    "TranslateX",
    "TranslateY",
)


def operation(name, value, height, width):
    """The kernel code of an operation of OPS, and its parameters (a tuple of at most six numbers).

    Args:
        name: one of OPS.
        value: the argument that Pillow's function takes: the factor of an enhancement, the bits that Posterize keeps,
            the degrees of a rotation, the slope of a shear, the threshold of Solarize, the pixels of a translation.
            It may be a fraction wherever Pillow takes one. AutoContrast, Equalize and Identity do not use it.
        height, width: H and W of the images, which a rotation needs.
    """
    match name:
        case "AutoContrast":
            return pixels.AUTOCONTRAST, ()
        case "Brightness":
            return pixels.BRIGHTNESS, (value,)
        case "Color":
            return pixels.COLOR, (value,)
        case "Contrast":
            return pixels.CONTRAST, (value,)
        case "Equalize":
            return pixels.EQUALIZE, ()
        case "Identity":
            return pixels.IDENTITY, ()
        case "Posterize":
            return pixels.POSTERIZE, (256 - 2 ** (8 - value),)
        case "Rotate":
            return pixels.AFFINE, rotation(value, height, width)
        case "Sharpness":
            return pixels.SHARPNESS, (value,)
        case "ShearX":
            return pixels.AFFINE, fixed_point(1, value, 0, 0, 1, 0)
        case "ShearY":
            return pixels.AFFINE, fixed_point(1, 0, 0, value, 1, 0)
        case "Solarize":
            return pixels.SOLARIZE, (math.ceil(value),)
        case "TranslateX":
            return pixels.AFFINE, fixed_point(1, 0, whole_pixels(value), 0, 1, 0)
        case "TranslateY":
            return pixels.AFFINE, fixed_point(1, 0, 0, 0, 1, whole_pixels(value))


def rotation(degrees, height, width):
    """The fixed-point coefficients of a counter-clockwise rotation about the centre (PIL.Image.Image.rotate)."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return fixed_point(cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)


def fixed_point(a0, a1, a2, a3, a4, a5):
    """Affine coefficients in 16.16 fixed point, moved to pixel centres (affine_fixed in Pillow's Geometry.c).

    The pixel (x, y) of the result comes from (a0*x + a1*y + a2, a3*x + a4*y + a5) of the source. Pillow takes another
    path where a1 = a3 = 0. Translations by whole pixels are the only such case here, and the result is the same.
    """
    a2 += a0 * 0.5 + a1 * 0.5
    a5 += a3 * 0.5 + a4 * 0.5
    return tuple(math.floor(a * 65536.0 + 0.5) for a in (a0, a1, a2, a3, a4, a5))


def whole_pixels(distance):
    """The whole pixels that Pillow's nearest-neighbour translation by `distance` pixels moves an image."""
    return math.floor(distance + 0.5)
