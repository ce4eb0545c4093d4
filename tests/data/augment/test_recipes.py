"""The other recipes of RandAugment against plain Pillow, written the way their code bases have it, and by hand."""

import numpy as np
import pytest
from images import SIZES, pixels, random_images
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from fixmatch.data.augment import randaugment, views
from fixmatch.data.augment.google import Google, GooglePlan
from fixmatch.data.augment.recipes import POLICIES
from fixmatch.data.augment.torchssl import TorchSSL, TorchSSLPlan
from fixmatch.data.dataset import Dataset
from fixmatch.data.loader import Loader
from fixmatch.data.split import Split
from fixmatch.preview import preview
from parity.mirror import randaugment as pillow

ENHANCERS = {"Brightness": ImageEnhance.Brightness, "Color": ImageEnhance.Color, "Contrast": ImageEnhance.Contrast,
             "Sharpness": ImageEnhance.Sharpness}
OBLONG = ((8, 11), (33, 20), (48, 64))  # height, width


# Pillow's side


def affine(image, *coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


def google_operation(image, name, v, negated):
    """One operation on an RGBA image."""
    sign, scale = -1 if negated else 1, min(1, min(image.size) / 32)
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image.convert("RGB")).convert("RGBA")
        case "Equalize":
            return ImageOps.equalize(image.convert("RGB")).convert("RGBA")
        case "Posterize":
            return ImageOps.posterize(image.convert("RGB"), 4 - int(v * 4 / 10)).convert("RGBA")
        case "Solarize":
            return ImageOps.solarize(image.convert("RGB"), 256 - int(v * 256 / 10)).convert("RGBA")
        case "Rotate":
            return image.rotate(sign * int(v * 30 / 10))
        case "ShearX":
            return affine(image, 1, sign * v * 0.3 / 10, 0, 0, 1, 0)
        case "ShearY":
            return affine(image, 1, 0, 0, sign * v * 0.3 / 10, 1, 0)
        case "TranslateX":
            return affine(image, 1, 0, sign * int(v * scale), 0, 1, 0)
        case "TranslateY":
            return affine(image, 1, 0, 0, 0, 1, sign * int(v * scale))
        case "Identity":
            return image
    return ENHANCERS[name](image).enhance(v * 1.8 / 10 + 0.1)


def google(images, plan):
    results = np.empty_like(images)
    for i, array in enumerate(images):
        image = Image.fromarray(array).convert("RGBA")
        for op, v, applied, negated in zip(*(field[i].tolist() for field in plan[:4]), strict=True):
            if applied:
                image = google_operation(image, randaugment.OPS[op], v, negated)
        rgba = np.array(image)
        result = rgba[..., :3]
        result[rgba[..., 3] == 0] = 127
        (height, width), (x, y) = result.shape[:2], plan.cutout[i]
        half = int(16 * min(1, min(height, width) / 32)) // 2
        column, row = int(x * width), int(y * height)
        result[max(0, row - half):row + half, max(0, column - half):column + half] = 127
        results[i] = result
    return results


def torchssl_operation(image, name, level):
    signed = -0.3 + 0.6 * level
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Posterize":
            return ImageOps.posterize(image, int(4 + 4 * level))
        case "Solarize":
            return ImageOps.solarize(image, 256 * level)
        case "Rotate":
            return image.rotate(-30 + 60 * level)
        case "ShearX":
            return affine(image, 1, signed, 0, 0, 1, 0)
        case "ShearY":
            return affine(image, 1, 0, 0, signed, 1, 0)
        case "TranslateX":
            return affine(image, 1, 0, signed * image.size[0], 0, 1, 0)
        case "TranslateY":
            return affine(image, 1, 0, 0, 0, 1, signed * image.size[1])
        case "Identity":
            return image
    return ENHANCERS[name](image).enhance(0.05 + (0.95 - 0.05) * level)


def torchssl(images, plan):
    results = np.empty_like(images)
    for i, array in enumerate(images):
        image = Image.fromarray(array)
        for op, level in zip(plan.op[i].tolist(), plan.level[i].tolist(), strict=True):
            image = torchssl_operation(image, randaugment.OPS[op], level)
        (width, height), side = image.size, plan.side[i] * image.size[0]
        x, y = (int(max(0, place * size - side / 2)) for place, size in zip(plan.cutout[i], image.size, strict=True))
        box = x, y, min(width, x + side), min(height, y + side)
        image = image.copy()
        ImageDraw.Draw(image).rectangle(box, (125, 123, 114))
        results[i] = np.asarray(image)
    return results


# Against Pillow


@pytest.mark.parametrize(("policy", "original"), [(Google, google), (TorchSSL, torchssl)], ids=["google", "torchssl"])
@pytest.mark.parametrize("size", [*((size, size) for size in SIZES), *OBLONG], ids=str)
def test_random_plans_equal_pillow(policy, original, size):
    rng = np.random.default_rng(size)
    count = 2000 if size == (32, 32) else 300 if max(size) < 100 else 30
    images, plan = random_images(rng, count, size), policy().draw(rng, count)
    np.testing.assert_array_equal(randaugment.apply(images, plan), original(images, plan))


@pytest.mark.parametrize("first", randaugment.OPS)
def test_every_pair_of_googles_operations_equals_pillow(first):
    """Above all what becomes of the transparent border that the first one leaves."""
    others, magnitudes = np.arange(14), np.arange(1, 10)
    second, v = (grid.ravel() for grid in np.meshgrid(others, magnitudes))
    n = len(v)
    rng = np.random.default_rng(0)
    plan = GooglePlan(op=np.stack([np.full(n, randaugment.OPS.index(first)), second], axis=1),
                      magnitude=np.stack([v, rng.permutation(v)], axis=1), applied=np.ones((n, 2), bool),
                      negated=rng.random((n, 2)) < 0.5, cutout=np.full((n, 2), 0.999))
    images = random_images(rng, n, (32, 32))
    np.testing.assert_array_equal(randaugment.apply(images, plan), google(images, plan))


@pytest.mark.parametrize("name", randaugment.OPS)
@pytest.mark.parametrize("size", [(32, 32), (8, 13)], ids=str)
def test_every_operation_of_torchssl_over_its_range_equals_pillow(name, size):
    level = np.concatenate([np.linspace(0, 0.999, 97), [0.25, 0.5, 0.75, 1 / 3]])  # with ties and the identity
    shape = (len(level), 1)
    plan = TorchSSLPlan(np.full(shape, randaugment.OPS.index(name)), level[:, None], np.full((len(level), 2), 0.9),
                        np.linspace(1e-9, 0.4999, len(level)))
    images = random_images(np.random.default_rng(1), len(level), size)
    np.testing.assert_array_equal(randaugment.apply(images, plan), torchssl(images, plan))


@pytest.mark.parametrize("name", POLICIES)
def test_views_are_the_weak_view_and_then_the_recipe(name):
    rng = np.random.default_rng(0)
    images, index = random_images(rng, 20, (24, 40)), rng.integers(20, size=60)
    plan = views.draw(np.random.default_rng(1), 60, (24, 40), policy=POLICIES[name]())
    weak, strong = views.weak_and_strong(images, index, plan)
    expected = pillow.weak(images[index], plan.weak), pillow.weak(images[index], plan.strong)
    np.testing.assert_array_equal(weak, expected[0])
    np.testing.assert_array_equal(strong, randaugment.apply(expected[1], plan.strong_plan))
    half = views.strong(images, plan.take(np.s_[20:50]), index[20:50])
    np.testing.assert_array_equal(half, strong[20:50])


@pytest.mark.parametrize("name", POLICIES)
def test_no_images_give_no_views(name):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    plan = views.draw(np.random.default_rng(0), 0, 8, policy=POLICIES[name]())
    assert views.strong(images, plan, np.arange(0)).shape == (0, 8, 8, 3)


# By hand


def google_plan(*operations, cutout=(0.999, 0.999)):
    """Of operations (name, v), applied to one image."""
    names, v = zip(*operations, strict=True)
    shape = (1, len(v))
    return GooglePlan(np.array([[randaugment.OPS.index(name) for name in names]]), np.array([v]), np.ones(shape, bool),
                      np.zeros(shape, bool), np.array([cutout]))


def test_googles_enhancements_go_beyond_the_image():
    image = pixels(np.tile([100, 50], (32, 16)))
    bright = randaugment.apply(image, google_plan(("Brightness", 9)))[0, 0, :2, 0]
    assert bright.tolist() == [172, 86]  # 0.1 + 0.18 * 9 = 1.72
    dark = randaugment.apply(image, google_plan(("Brightness", 1)))[0, 0, :2, 0]
    assert dark.tolist() == [28, 14]


@pytest.mark.parametrize(("v", "kept"), [(1, 0b11110000), (3, 0b11100000), (5, 0b11000000), (9, 0b10000000)])
def test_google_posterizes_harder(v, kept):
    image = np.full((1, 32, 32, 3), 255, np.uint8)
    assert randaugment.apply(image, google_plan(("Posterize", v)))[0, 0, 0, 0] == kept


def test_google_fills_with_grey_unless_an_operation_goes_through_rgb():
    image = np.full((1, 32, 32, 3), 200, np.uint8)
    moved = randaugment.apply(image, google_plan(("TranslateX", 9)))[0, 0, :, 0]
    assert moved.tolist() == [200] * 23 + [127] * 9
    bright = randaugment.apply(image, google_plan(("TranslateX", 9), ("Brightness", 1)))[0, 0, :, 0]
    assert bright.tolist() == [56] * 23 + [127] * 9  # transparent black stays transparent
    poster = randaugment.apply(image, google_plan(("TranslateX", 9), ("Posterize", 9)))[0, 0, :, 0]
    assert poster.tolist() == [128] * 23 + [0] * 9  # and is black once the alpha channel is gone
    twice = randaugment.apply(image, google_plan(("TranslateX", 9), ("TranslateX", 2)))[0, 0, :, 0]
    assert twice.tolist() == [200] * 21 + [127] * 11


@pytest.mark.parametrize(("size", "moved", "cut"), [(8, 2, 4), (16, 4, 8), (32, 9, 16), (96, 9, 16)])
def test_googles_pixels_are_those_of_cifar_and_fewer_in_smaller_images(size, moved, cut):
    image = np.full((1, size, size, 3), 200, np.uint8)
    result = randaugment.apply(image, google_plan(("TranslateX", 9)))[0]
    assert (result[0] == 127).all(axis=-1).sum() == moved
    result = randaugment.apply(image, google_plan(("Identity", 9), cutout=(0.5, 0.5)))[0]
    assert (result == 127).all(axis=-1).sum() == cut**2


@pytest.mark.parametrize(("centre", "box"), [  # (top, left, bottom, right), bottom and right exclusive
    ((0.5, 0.5), (8, 8, 24, 24)),
    ((0.0, 0.0), (0, 0, 8, 8)),  # less at the border, unlike in the reference
    ((0.999, 0.25), (0, 23, 16, 32)),
])
def test_googles_cutout(centre, box):
    top, left, bottom, right = box
    expected = np.zeros((1, 32, 32, 3), np.uint8)
    expected[:, top:bottom, left:right] = 127
    plan = google_plan(("Identity", 1), cutout=centre)
    np.testing.assert_array_equal(randaugment.apply(np.zeros_like(expected), plan), expected)


def torchssl_plan(name, level, side=1e-9, cutout=(0.999, 0.999)):
    return TorchSSLPlan(np.array([[randaugment.OPS.index(name)]]), np.array([[level]]), np.array([cutout]),
                        np.array([side]))


@pytest.mark.parametrize(("name", "level", "expected"), [
    ("Brightness", 0.5, [50, 25]),  # 0.05 + 0.45
    ("Posterize", 0.2, [96, 48]),  # 4 bits
    ("Posterize", 0.8, [100, 50]),  # 7 bits: an even number stays
    ("Solarize", 0.39, [155, 50]),  # 256 * 0.39 = 99.84: 100 is above
    ("Solarize", 0.391, [100, 50]),  # 100.096: it is below
    ("TranslateX", 0.5, [100, 50]),
    ("TranslateX", 0.527, [50, 100]),  # 0.3 * 0.054 * 32 = 0.518 pixels, which is one
])
def test_torchssl_by_hand(name, level, expected):
    image = pixels(np.tile([100, 50], (32, 16)))
    assert randaugment.apply(image, torchssl_plan(name, level))[0, 0, :2, 0].tolist() == expected


@pytest.mark.parametrize(("side", "box"), [  # (top, left, bottom, right), bottom and right exclusive
    (0.25, (12, 12, 21, 21)),  # 8 pixels, Pillow's rectangle one more
    (0.3, (11, 11, 21, 21)),  # 9.6: from int(11.2) to int(20.6), inclusive
    (1e-9, (15, 15, 16, 16)),  # from int(15.99...)
])
def test_torchssls_cutout_is_of_any_side_and_brown(side, box):
    top, left, bottom, right = box
    expected = np.zeros((1, 32, 32, 3), np.uint8)
    expected[:, top:bottom, left:right] = 125, 123, 114
    plan = torchssl_plan("Identity", 0, side, (0.5, 0.5))
    np.testing.assert_array_equal(randaugment.apply(np.zeros_like(expected), plan), expected)


# Plans


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_a_class_with_one_interface(name):
    images = random_images(np.random.default_rng(0), 5, (16, 16))
    assert isinstance(POLICIES[name], type)
    plan, again = (POLICIES[name]().draw(np.random.default_rng(1), 5) for _ in range(2))
    assert type(plan) is type(again)
    part = plan.take(np.array([3, 1]))
    assert type(part) is type(plan)
    flip, corner = np.array([True, False]), np.array([[0, 0], [1, -2]])
    views_of_part = part.render(images, np.array([3, 1]), flip, corner)
    assert (views_of_part.dtype, views_of_part.shape) == (np.uint8, (2, 16, 16, 3))
    flips, corners = np.array([0, 0, 0, 1, 0], bool), np.array([[0, 0], [1, -2], [0, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(views_of_part, again.render(images, np.arange(5), flips, corners)[[3, 1]])


def test_google_draws_what_the_reference_draws():
    drawn, expected = (policy.draw(np.random.default_rng(0), 100) for policy in (Google(), randaugment))
    assert isinstance(drawn, GooglePlan)
    assert isinstance(drawn.take(np.arange(5)), GooglePlan)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_torchssl_draws_are_uniform():
    plan = TorchSSL().draw(np.random.default_rng(0), 50_000)
    assert plan.op.shape == plan.level.shape == (50_000, 3)
    counts = np.bincount(plan.op.ravel(), minlength=14)
    assert np.abs(counts - 150_000 / 14).max() < 5 * np.sqrt(150_000 / 14)
    for values, high in ((plan.level, 1), (plan.cutout, 1), (plan.side, 0.5)):
        counts, _ = np.histogram(values, 10, (0, high))
        assert counts.sum() == values.size
        assert np.abs(counts - values.size / 10).max() < 5 * np.sqrt(values.size / 10)


@pytest.mark.parametrize("name", POLICIES)
def test_the_loader_and_the_preview_show_the_recipe(name):
    """The same crops as the reference's, other strong views; and without unlabeled images no difference at all."""
    rng = np.random.default_rng(0)
    data = Dataset(rng.integers(0, 256, (50, 12, 12, 3), dtype=np.uint8), np.repeat(np.arange(10), 5))
    split = Split(labeled=np.arange(20), unlabeled=np.arange(50))
    ours, reference = (Loader(data, split, 8, 7, 3, True, strong=strong).batch(0) for strong in (name, "reference"))
    assert all(np.array_equal(a, b) for a, b in zip(ours[:3], reference[:3], strict=True))
    assert np.array_equal(ours.u_s, reference.u_s) == (name == "reference")
    alone = Loader(data, split, 8, 0, 3, True, strong=name).batch(0)
    assert len(alone) == 6
    assert len(alone.u_s) == 0
    shown, expected = (np.split(preview(data, True, 0, strong), 3) for strong in (name, "reference"))
    assert np.array_equal(shown[:2], expected[:2])
    assert np.array_equal(shown[2], expected[2]) == (name == "reference")
