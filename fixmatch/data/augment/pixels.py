"""The compiled pixel work: crop, flip, RandAugment's operations and Cutout, on one image after another.

Every function below works in place on one image stored flat, uint8 [H*W*3] in row, column, channel order, so that an
image of CIFAR's size stays in the first-level cache from the crop to the Cutout. Each equals its Pillow counterpart
byte for byte; a C file named in a docstring is Pillow's (src/libImaging). That is why there is no `fastmath`: a blend
is one float32 product and one float32 sum, each rounded.

Three rules keep the first call short when nothing is cached. There is one compiled function, `_render`, with one
signature, into which the others are inlined before type inference. No slice assignment, min, max or abs is used, each
of which numba compiles apart. And no range(3) stands around a loop over the image, which LLVM would unroll. All of the
pixel work is in this file because numba notices a changed source only in the file of the function it cached.
"""

import numba
import numpy as np

from fixmatch.jit import remembered

# The codes of the operations. Each comment says what the operation finds in its row of `param`, float64 [6].
IDENTITY = 0
AUTOCONTRAST = 1
EQUALIZE = 2
POSTERIZE = 3  # bit mask
SOLARIZE = 4  # threshold; this value and those above it are inverted
BRIGHTNESS = 5  # factor
CONTRAST = 6  # factor
COLOR = 7  # factor
SHARPNESS = 8  # factor
AFFINE = 9  # the six coefficients in 16.16 fixed point, see `affine`


# Rewrites would fuse whole-array expressions, of which there are none here. NumPy's error model leaves out the check
# for division by 0.
_OPTIONS = {"nogil": True, "no_rewrites": True, "error_model": "numpy"}


def _compile(function):
    return remembered(numba.njit, function, **_OPTIONS)


_inline = numba.njit(inline="always", **_OPTIONS)


def render(images, index, flip, corner, code, param, box):
    """Makes one view per index: a crop of images[index], flipped or not, then the operations, then Cutout.

    The GIL is released, so that threads can share a batch by slices.

    Args:
        images: uint8 [D, H, W, 3], C-contiguous (anything else is copied on every call); they are never written to.
        index: int64 [N], which image each view shows.
        flip: bool [N], whether the image is mirrored left to right before cropping.
        corner: int64 [N, 2], (top, left) of the H x W window, less than H and W either way. Outside of its borders, the
            image is continued by reflection.
        code: int64 [N, n], the operations in the order of application, each one of the constants above.
        param: float64 [N, n, 6], the parameters of the operations.
        box: int64 [N, 4], Cutout's (top, left, bottom, right), bottom and right exclusive; empty boxes change nothing.

    Returns:
        new uint8 [N, H, W, 3]

    Raises:
        IndexError: an index lies outside 0..D-1.
    """
    count, (height, width) = len(index), images.shape[1:3]
    out = np.empty((count, height, width, 3), np.uint8)
    if count == 0:
        return out
    if np.min(index) < 0 or np.max(index) >= len(images):
        raise IndexError(f"index runs from {np.min(index)} to {np.max(index)}, but there are {len(images)} images")
    _render(
        _read_only(images, np.uint8).reshape(len(images), -1),
        _read_only(index, np.int64),
        _read_only(flip, np.bool_),
        _read_only(corner, np.int64),
        _read_only(code, np.int64),
        _read_only(param, np.float64),
        _read_only(box, np.int64),
        out.reshape(count, -1),
        height,
        width,
        np.empty(height * width * 3, np.uint8),
        np.empty(3 * 256, np.int32),
        np.empty(3 * 256, np.uint8),
    )
    return out


def load():
    """Loads the machine code, which else happens at the first image."""
    one = np.zeros(1, np.int64)
    render(np.zeros((1, 1, 1, 3), np.uint8), one, *no_motion(1), *no_operations(1))


def no_motion(count):
    """The flip and corner of `count` views that show their image as it is."""
    return np.zeros(count, bool), np.zeros((count, 2), np.int64)


def no_operations(count):
    """The code, param and box of `count` views without operations and Cutout."""
    return np.empty((count, 0), np.int64), np.empty((count, 0, 6)), np.zeros((count, 4), np.int64)


def _read_only(array, dtype):
    """A read-only view. Numba compiles anew for every mix of writable and read-only arguments, so all are read-only."""
    view = np.ascontiguousarray(array, dtype).view()
    view.flags.writeable = False
    return view


@_inline
def reflect(position, size):
    """A position outside 0..size-1, mirrored at the border pixel without repeating it (numpy.pad's mode "reflect")."""
    if position < 0:
        position = -position
    if position >= size:
        position = 2 * (size - 1) - position
    return position


@_inline
def crop(source, image, height, width, flip, top, left):
    """Flips, pads by reflection and crops: copies a height x width window of `source` into `image`."""
    for y in range(height):
        row = reflect(top + y, height) * width
        for x in range(width):
            column = reflect(left + x, width)
            if flip:
                column = width - 1 - column
            for c in range(3):
                image[3 * (y * width + x) + c] = source[3 * (row + column) + c]


@_inline
def look_up(image, table):
    """Replaces every value by a lookup table's, which has 256 entries a channel, uint8 [3*256] (Point.c)."""
    for i in range(0, image.size, 3):
        for c in range(3):
            image[i + c] = table[256 * c + image[i + c]]


@_inline
def autocontrast(image, table):
    """Fills the table of PIL.ImageOps.autocontrast: a channel's darkest value becomes 0, its brightest 255."""
    for c in range(table.size // 256):
        low, high = 255, 0
        for i in range(c, image.size, 3):
            if image[i] < low:
                low = image[i]
            if image[i] > high:
                high = image[i]
        scale = 255.0 / (high - low) if high > low else 1.0
        offset = -low * scale if high > low else 0.0
        for value in range(low, high + 1):
            table[256 * c + value] = np.int64(value * scale + offset)


@_inline
def equalize(image, counts, table):
    """Fills the table of PIL.ImageOps.equalize, a channel's cumulative histogram in steps of a 255th."""
    for i in range(counts.size):
        counts[i] = 0
    for i in range(0, image.size, 3):
        for c in range(3):
            counts[256 * c + image[i + c]] += 1
    for c in range(table.size // 256):
        last = 255
        while counts[256 * c + last] == 0:
            last -= 1
        step = (image.size // 3 - counts[256 * c + last]) // 255
        level = step // 2
        for value in range(last + 1):
            equalized = level // step if step else value
            table[256 * c + value] = equalized if equalized < 255 else 255
            level += counts[256 * c + value]


@_inline
def posterize(table, mask):
    """Fills the table of PIL.ImageOps.posterize, which keeps the bits of `mask`."""
    for i in range(table.size):
        table[i] = i & mask


@_inline
def solarize(table, threshold):
    """Fills the table of PIL.ImageOps.solarize, which inverts the values from `threshold` upwards."""
    for i in range(table.size):
        value = i & 255
        table[i] = value if value < threshold else 255 - value


@_inline
def blend(degenerate, value, factor):
    """Blends as Blend.c does in float32: from `degenerate` (factor 0) to `value` (factor 1) and on, then truncates."""
    mixed = np.float32(degenerate) + factor * (np.float32(value) - np.float32(degenerate))
    if mixed < np.float32(0):
        mixed = np.float32(0)
    if mixed > np.float32(255):
        mixed = np.float32(255)
    return np.uint8(mixed)


@_inline
def blend_grey(table, grey, factor):
    """Fills the table of PIL.ImageEnhance.Brightness (`grey` is 0) and Contrast (`grey` is the mean grey)."""
    for i in range(table.size):
        table[i] = blend(grey, i & 255, factor)


@_inline
def luma(image, i):
    """The grey value of the pixel at i, ITU-R 601 in 16-bit fixed point (L24 in Convert.c)."""
    return (19595 * image[i] + 38470 * image[i + 1] + 7471 * image[i + 2] + 0x8000) >> 16


@_inline
def mean_grey(image):
    """The mean of the grey image, rounded as PIL.ImageEnhance.Contrast rounds it."""
    total = 0
    for i in range(0, image.size, 3):
        total += luma(image, i)
    return np.int64(total / (image.size // 3) + 0.5)


@_inline
def color(image, factor):
    """Blends the image with its grey version, as PIL.ImageEnhance.Color does."""
    for i in range(0, image.size, 3):
        grey = luma(image, i)
        for c in range(3):
            image[i + c] = blend(grey, image[i + c], factor)


@_inline
def sharpness(image, scratch, height, width, factor):
    """Blends with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, as PIL.ImageEnhance.Sharpness does (Filter.c).

    The border stays as it is. Pillow rounds a float32 sum of products. The exact mean is at least 1/26 away from a tie,
    so the order of summation is free.
    """
    for i in range(image.size):
        scratch[i] = image[i]
    # Indices are unsigned because LLVM vectorizes the loop only without numba's test for negative indices.
    row, pixel = np.uint64(3 * width), np.uint64(3)
    for y in range(np.uint64(1), np.uint64(height - 1)):
        for i in range(y * row + pixel, y * row + row - pixel):
            total = np.float32(4) * np.float32(scratch[i])
            for k in (i - row, i, i + row):
                total += np.float32(scratch[k - pixel]) + np.float32(scratch[k]) + np.float32(scratch[k + pixel])
            smooth = np.int32(total * np.float32(1 / 13) + np.float32(0.5))
            image[i] = blend(smooth, scratch[i], factor)


@_inline
def affine(image, scratch, height, width, coefficients):
    """Transforms the image affinely, with nearest neighbours and black outside (affine_fixed in Geometry.c).

    The pixel (x, y) comes from column (a0*x + a1*y + a2) >> 16 and row (a3*x + a4*y + a5) >> 16, where `coefficients`
    are a0..a5.
    """
    a0, a1, a2 = np.int64(coefficients[0]), np.int64(coefficients[1]), np.int64(coefficients[2])
    a3, a4, a5 = np.int64(coefficients[3]), np.int64(coefficients[4]), np.int64(coefficients[5])
    for i in range(image.size):
        scratch[i] = image[i]
    for y in range(height):
        for x in range(width):
            column = (a0 * x + a1 * y + a2) >> 16
            row = (a3 * x + a4 * y + a5) >> 16
            to = 3 * (y * width + x)
            if 0 <= column < width and 0 <= row < height:
                at = 3 * (row * width + column)
                for c in range(3):
                    image[to + c] = scratch[at + c]
            else:
                for c in range(3):
                    image[to + c] = 0


@_inline
def cutout(image, width, top, left, bottom, right):
    """Paints a box of grey 127."""
    for y in range(top, bottom):
        for i in range(3 * (y * width + left), 3 * (y * width + right)):
            image[i] = 127


@_compile
def _render(images, index, flip, corner, code, param, box, out, height, width, scratch, counts, table):
    """What `render` says, on flat images, uint8 [D, H*W*3] into [N, H*W*3], with room for one image and its tables."""
    for i in range(index.size):
        image = out[i]
        crop(images[index[i]], image, height, width, flip[i], corner[i, 0], corner[i, 1])
        for j in range(code.shape[1]):
            op = code[i, j]
            value = param[i, j, 0]
            if op == AFFINE:
                affine(image, scratch, height, width, param[i, j])
            elif op == SHARPNESS:
                sharpness(image, scratch, height, width, np.float32(value))
            elif op == COLOR:
                color(image, np.float32(value))
            elif op != IDENTITY:
                if op == AUTOCONTRAST:
                    autocontrast(image, table)
                elif op == EQUALIZE:
                    equalize(image, counts, table)
                elif op == POSTERIZE:
                    posterize(table, np.int64(value))
                elif op == SOLARIZE:
                    solarize(table, np.int64(value))
                else:
                    blend_grey(table, mean_grey(image) if op == CONTRAST else 0, np.float32(value))
                look_up(image, table)
        cutout(image, width, box[i, 0], box[i, 1], box[i, 2], box[i, 3])
