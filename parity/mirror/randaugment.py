"""RandAugment, Cutout and the weak view by Pillow and numpy, one image at a time.

The original of fixmatch/data/augment/randaugment.py and views.py. It follows plans drawn there: a plan's random numbers
are the input that both sides share. One function per operation, called with the image, the magnitude v and the sign.

Source: dataset/randaugment.py and dataset/cifar.py of kekmodel/FixMatch-pytorch.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10
GREY = (127, 127, 127)


def auto_contrast(img, v, negated):
    return ImageOps.autocontrast(img)


def brightness(img, v, negated):
    return ImageEnhance.Brightness(img).enhance(enhancement(v))


def color(img, v, negated):
    return ImageEnhance.Color(img).enhance(enhancement(v))


def contrast(img, v, negated):
    return ImageEnhance.Contrast(img).enhance(enhancement(v))


def equalize(img, v, negated):
    return ImageOps.equalize(img)


def identity(img, v, negated):
    return img


def posterize(img, v, negated):
    return ImageOps.posterize(img, int_parameter(v, 4) + 4)


def rotate(img, v, negated):
    degrees = int_parameter(v, 30)
    return img.rotate(-degrees if negated else degrees)


def sharpness(img, v, negated):
    return ImageEnhance.Sharpness(img).enhance(enhancement(v))


def shear_x(img, v, negated):
    shear = signed(float_parameter(v, 0.3), negated)
    return img.transform(img.size, Image.Transform.AFFINE, (1, shear, 0, 0, 1, 0))


def shear_y(img, v, negated):
    shear = signed(float_parameter(v, 0.3), negated)
    return img.transform(img.size, Image.Transform.AFFINE, (1, 0, 0, shear, 1, 0))


def solarize(img, v, negated):
    return ImageOps.solarize(img, 256 - int_parameter(v, 256))


def translate_x(img, v, negated):
    pixels = int(signed(float_parameter(v, 0.3), negated) * img.size[0])
    return img.transform(img.size, Image.Transform.AFFINE, (1, 0, pixels, 0, 1, 0))


def translate_y(img, v, negated):
    pixels = int(signed(float_parameter(v, 0.3), negated) * img.size[1])
    return img.transform(img.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, pixels))


OPS = (
    auto_contrast,
    brightness,
    color,
    contrast,
    equalize,
    identity,
    posterize,
    rotate,
    sharpness,
    shear_x,
    shear_y,
    solarize,
    translate_x,
    translate_y,
)


def float_parameter(v, max_v):
    return float(v) * max_v / MAX_MAGNITUDE


def int_parameter(v, max_v):
    return int(v * max_v / MAX_MAGNITUDE)


def enhancement(v):
    return float_parameter(v, 0.9) + 0.05


def signed(value, negated):
    return -value if negated else value


def cutout(img, centre):
    """A grey box around centre, (x, y) as a fraction of width and height."""
    w, h = img.size
    side = int(min(w, h) * 0.5)
    x0 = int(max(0, centre[0] * w - side / 2.0))
    y0 = int(max(0, centre[1] * h - side / 2.0))
    x1 = int(min(w, x0 + side))
    y1 = int(min(h, y0 + side))
    img = img.copy()
    ImageDraw.Draw(img).rectangle((x0, y0, x1, y1), GREY)
    return img


def apply(images, plan):
    """RandAugment and Cutout: uint8 [N, H, W, 3] and a randaugment.Plan -> uint8 [N, H, W, 3]."""
    augmented = np.empty_like(images)
    for i, image in enumerate(images):
        img = Image.fromarray(image)
        operations = zip(plan.op[i], plan.magnitude[i], plan.applied[i], plan.negated[i], strict=True)
        for op, v, applied, negated in operations:
            if applied:
                img = OPS[op](img, int(v), bool(negated))
        augmented[i] = np.asarray(cutout(img, plan.cutout[i]))
    return augmented


def weak(images, plan):
    """Flip, reflection padding and crop: uint8 [N, H, W, 3] and a views.WeakPlan -> uint8 [N, H, W, 3]."""
    height, width = images.shape[1:3]
    rows, columns = int(height * 0.125), int(width * 0.125)
    flipped = images.copy()
    for i in np.flatnonzero(plan.flip):
        flipped[i] = Image.fromarray(images[i]).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    padded = np.pad(flipped, ((0, 0), (rows, rows), (columns, columns), (0, 0)), mode="reflect")
    views = np.empty_like(images)
    for i, (top, left) in enumerate(plan.offset):
        views[i] = padded[i, top : top + height, left : left + width]
    return views


def weak_and_strong(images, plan):
    """Both views: uint8 [N, H, W, 3] and a views.ViewPlan -> (weak, strong), each uint8 [N, H, W, 3]."""
    return weak(images, plan.weak), apply(weak(images, plan.strong), plan.strong_plan)
