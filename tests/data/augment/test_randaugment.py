"""RandAugment, Cutout and the two views: byte for byte against Pillow, by hand, and how plans are drawn."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from images import SIZES, pixels, random_images

from fixmatch.data.augment import pixels as kernels
from fixmatch.data.augment import randaugment, views
from parity.mirror import randaugment as pillow

OBLONG = ((8, 11), (33, 20))  # height, width
PAIRS = int(os.environ.get("FIXMATCH_TEST_PAIRS", 20_000))  # random images with random plans, over all sizes
SHARES = {(8, 8): 0.1, (16, 16): 0.1, (32, 32): 0.7, (33, 20): 0.05, (48, 64): 0.03, (96, 96): 0.015, (224, 224): 0.005}
NOWHERE = (0.999, 0.999)  # a Cutout centre that leaves most of the image alone


def sample_images(height, width):
    """uint8 [8, H, W, 3]: a photograph-like image and odd ones."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / (4 + c) + y / 7) * np.cos(y / (3 + c)) for c in range(3)]
    photo = np.clip(np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
    constant_channel = photo.copy()
    constant_channel[:, :, 1] = 77
    return np.stack(
        [
            photo,
            np.full_like(photo, (200, 3, 90)),
            np.zeros_like(photo),
            np.full_like(photo, 255),
            constant_channel,
            rng.choice(np.array([60, 61], np.uint8), photo.shape),
            rng.choice(np.array([0, 255], np.uint8), photo.shape),
            rng.integers(0, 256, photo.shape, dtype=np.uint8),
        ]
    )


def plan_of(name, magnitude, negated=False, n_images=1, cutout=NOWHERE):
    """The plan that applies one operation to every image."""
    shape = (n_images, 1)
    return randaugment.Plan(
        op=np.full(shape, randaugment.OPS.index(name)),
        magnitude=np.full(shape, magnitude),
        applied=np.ones(shape, bool),
        negated=np.full(shape, negated),
        cutout=np.tile(cutout, (n_images, 1)),
    )


def augment(image, name, magnitude, negated=False):
    """One operation on uint8 [1, H, W, 3], without Cutout."""
    code, param, _ = randaugment.pixel_operations(plan_of(name, magnitude, negated), *image.shape[1:3])
    still = np.zeros(1, bool), np.zeros((1, 2), np.int64)
    return kernels.render(image, np.arange(1), *still, code, param, np.zeros((1, 4), np.int64))


# Against Pillow


def test_the_two_sides_list_the_same_operations():
    assert [op.__name__.replace("_", "") for op in pillow.OPS] == [name.lower() for name in randaugment.OPS]
    assert len(randaugment.OPS) == 14


@pytest.mark.parametrize("name", randaugment.OPS)
@pytest.mark.parametrize("size", [*((size, size) for size in SIZES), *OBLONG], ids=str)
def test_every_operation_equals_pillow(name, size):
    images = sample_images(*size)
    if max(size) > 100:
        images = images[[0, 7]]
    for magnitude in range(1, 10):
        for negated in (False, True):
            plan = plan_of(name, magnitude, negated, len(images), cutout=(magnitude / 10, 0.2))
            np.testing.assert_array_equal(
                randaugment.apply(images, plan), pillow.apply(images, plan), err_msg=f"{magnitude=} {negated=}"
            )


@pytest.mark.parametrize("size", SHARES, ids=str)
def test_many_random_pairs_equal_pillow(size):
    """FIXMATCH_TEST_PAIRS says how many."""
    left, chunk, differing = round(PAIRS * SHARES[size]), 0, 0
    while left > 0:
        rng = np.random.default_rng([*size, chunk])
        images = random_images(rng, min(left, 500), size)
        plan = randaugment.draw(rng, len(images))
        differing += np.count_nonzero(randaugment.apply(images, plan) != pillow.apply(images, plan))
        left, chunk = left - len(images), chunk + 1
    assert differing == 0


@st.composite
def images_and_plans(draw):
    height, width = draw(st.integers(8, 40)), draw(st.integers(8, 40))
    low, high = sorted((draw(st.integers(0, 255)), draw(st.integers(0, 255))))
    n = draw(st.integers(1, 4))
    n_images = 2

    def array(dtype, elements):
        return draw(hnp.arrays(dtype, (n_images, n), elements=elements))

    plan = randaugment.Plan(
        op=array(np.int64, st.integers(0, 13)),
        magnitude=array(np.int64, st.integers(1, 9)),
        applied=array(np.bool_, st.booleans()),
        negated=array(np.bool_, st.booleans()),
        cutout=draw(hnp.arrays(np.float64, (n_images, 2), elements=st.floats(0, 1, exclude_max=True))),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.integers(low, high + 1, (n_images, height, width, 3), dtype=np.uint8), plan


@settings(max_examples=300, deadline=None)
@given(images_and_plans())
def test_random_plans_equal_pillow(images_and_plan):
    images, plan = images_and_plan
    np.testing.assert_array_equal(randaugment.apply(images, plan), pillow.apply(images, plan))


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (17, 31), (32, 32)], ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_every_crop_equals_pillow(size, flip):
    height, width = size
    corners = [(y, x) for y in range(2 * (height // 8) + 1) for x in range(2 * (width // 8) + 1)]
    plan = views.WeakPlan(np.full(len(corners), flip), np.array(corners))
    images = np.random.default_rng(0).integers(0, 256, (len(corners), *size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(views.weak(images, plan, np.arange(len(images))), pillow.weak(images, plan))


@pytest.mark.parametrize("size", SIZES)
def test_both_views_equal_pillow(size):
    images = sample_images(size, size)
    index = np.random.default_rng(0).integers(len(images), size=40)
    plan = views.draw(np.random.default_rng(size), 40, size)
    weak, strong = views.weak_and_strong(images, index, plan)
    expected_weak, expected_strong = pillow.weak_and_strong(images[index], plan)
    np.testing.assert_array_equal(weak, expected_weak)
    np.testing.assert_array_equal(strong, expected_strong)


# By hand


def test_autocontrast_stretches_50_to_101_over_the_whole_range():
    image = pixels([[50, 75], [90, 101]])  # 255 / 51 = 5 per grey level
    np.testing.assert_array_equal(augment(image, "AutoContrast", 1), pixels([[0, 125], [200, 255]]))


def test_brightness_scales_and_truncates():
    np.testing.assert_array_equal(augment(pixels([[255, 10]]), "Brightness", 1), pixels([[35, 1]]))  # 0.14: 35.7, 1.4
    np.testing.assert_array_equal(augment(pixels([[255, 10]]), "Brightness", 9), pixels([[219, 8]]))  # 0.86: 219.3, 8.6


def test_color_moves_towards_the_luma():
    image = np.array([[[[100, 0, 0]]]], np.uint8)  # luma 0.299 * 100 = 29.9, rounded to 30
    np.testing.assert_array_equal(augment(image, "Color", 5), [[[[65, 15, 15]]]])


def test_contrast_moves_towards_the_mean_grey():
    np.testing.assert_array_equal(augment(pixels([[0, 200]]), "Contrast", 5), pixels([[50, 150]]))


def test_equalize_clips_the_last_step():
    image = pixels(np.repeat([[10, 20]], 512, axis=0))  # step (1024 - 512) // 255 = 2: (1 // 2, (1 + 512) // 2 = 256)
    np.testing.assert_array_equal(augment(image, "Equalize", 1), pixels(np.repeat([[0, 255]], 512, axis=0)))


def test_equalize_leaves_small_images_alone():
    image = sample_images(9, 9)[:1]  # 81 pixels are fewer than 255
    np.testing.assert_array_equal(augment(image, "Equalize", 1), image)


@pytest.mark.parametrize(
    ("magnitude", "value", "kept"),
    [(1, 0b11111111, 0b11110000), (9, 0b11111111, 0b11111110), (5, 0b01110111, 0b01110100)],
)
def test_posterize_masks_low_bits(magnitude, value, kept):
    assert augment(pixels([[value]]), "Posterize", magnitude)[0, 0, 0, 0] == kept


def test_sharpness_blends_with_the_smoothed_inside():
    image = np.zeros((5, 5), np.uint8)
    image[2, 2] = 130  # smoothed: 5/13 of it in the middle, 1/13 around
    expected = np.zeros((5, 5), np.uint8)
    expected[1:4, 1:4] = 5
    expected[2, 2] = 90
    np.testing.assert_array_equal(augment(pixels(image), "Sharpness", 5), pixels(expected))


def test_shear_moves_each_row_by_a_multiple():
    image = pixels([[1, 2, 3, 4]] * 8)
    sheared = augment(image, "ShearX", 9)[0, :, :, 0]  # 0.27 * (y + 1/2) columns, rounded
    np.testing.assert_array_equal(sheared[0], [1, 2, 3, 4])
    np.testing.assert_array_equal(sheared[2], [2, 3, 4, 0])
    np.testing.assert_array_equal(sheared[7], [3, 4, 0, 0])


@pytest.mark.parametrize(("magnitude", "threshold"), [(1, 231), (5, 128), (9, 26)])
def test_solarize_inverts_from_the_threshold(magnitude, threshold):
    image = pixels([[0, threshold - 1, threshold, 255]])
    expected = pixels([[0, threshold - 1, 255 - threshold, 0]])
    np.testing.assert_array_equal(augment(image, "Solarize", magnitude), expected)


def test_translate_by_one_pixel():
    image = sample_images(32, 32)[:1]
    left, right = augment(image, "TranslateX", 2), augment(image, "TranslateX", 2, negated=True)  # int(0.06 * 32) = 1
    np.testing.assert_array_equal(left[:, :, :-1], image[:, :, 1:])
    np.testing.assert_array_equal(right[:, :, 1:], image[:, :, :-1])
    assert not left[:, :, -1].any()
    assert not right[:, :, 0].any()
    up = augment(image, "TranslateY", 9)  # int(0.27 * 32) = 8
    np.testing.assert_array_equal(up[:, :-8], image[:, 8:])
    assert not up[:, -8:].any()


@pytest.mark.parametrize(
    ("centre", "box"),  # (top, left, bottom, right), bottom and right exclusive
    [
        ((0.5, 0.5), (8, 8, 25, 25)),  # inclusive rectangle: 17 x 17
        ((0.0, 0.0), (0, 0, 17, 17)),  # the far corner is counted from the clamped one
        ((0.5, 0.0), (0, 8, 17, 25)),
        ((0.99, 0.99), (23, 23, 32, 32)),
        ((0.75, 0.5), (8, 16, 25, 32)),  # far corner at 32: outside
    ],
)
def test_cutout_box(centre, box):
    top, left, bottom, right = box
    expected = np.zeros((1, 32, 32, 3), np.uint8)
    expected[:, top:bottom, left:right] = 127
    plan = plan_of("Identity", 1, cutout=centre)
    np.testing.assert_array_equal(randaugment.apply(np.zeros_like(expected), plan), expected)


def test_weak_view_reflects_at_the_border():
    image = pixels(np.arange(64).reshape(8, 8))
    up_and_right = views.WeakPlan(np.array([False]), np.array([[0, 2]]))  # by one pixel each, which is the padding
    view = views.weak(image, up_and_right, np.arange(1))[0, :, :, 0]
    np.testing.assert_array_equal(view[0], [9, 10, 11, 12, 13, 14, 15, 14])  # row 1 above row 0, column 6 after 7
    np.testing.assert_array_equal(view[1], [1, 2, 3, 4, 5, 6, 7, 6])


def test_flip_comes_before_the_crop():
    image = pixels(np.arange(64).reshape(8, 8))
    view = views.weak(image, views.WeakPlan(np.array([True]), np.array([[1, 2]])), np.arange(1))[0, 0, :, 0]
    np.testing.assert_array_equal(view, [6, 5, 4, 3, 2, 1, 0, 1])


def test_blend_above_one_is_clipped():
    param = np.full((1, 1, 6), 1.5)
    box, still = np.zeros((1, 4), np.int64), (np.zeros(1, bool), np.zeros((1, 2), np.int64))
    code = np.full((1, 1), kernels.BRIGHTNESS)
    view = kernels.render(pixels([[0, 101, 200]]), np.arange(1), *still, code, param, box)
    np.testing.assert_array_equal(view, pixels([[0, 151, 255]]))


# Plans


def test_draw_is_uniform():
    plan = randaugment.draw(np.random.default_rng(0), 50_000)
    either = False, True
    for field, values in zip(plan, (range(14), range(1, 10), either, either), strict=False):
        assert field.shape == (50_000, 2)
        found, counts = np.unique(field, return_counts=True)
        assert list(found) == list(values)
        expected = 100_000 / len(found)
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert plan.cutout.shape == (50_000, 2)
    assert plan.cutout.min() >= 0
    assert plan.cutout.max() < 1
    assert np.abs(plan.cutout.mean(axis=0) - 0.5).max() < 0.01
    assert abs(np.corrcoef(plan.applied.ravel(), plan.negated.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(plan.op[:, 0], plan.op[:, 1])[0, 1]) < 0.03


def test_draw_obeys_n_and_m():
    plan = randaugment.draw(np.random.default_rng(0), 1000, n=3, m=4)
    assert plan.op.shape == (1000, 3)
    assert set(plan.magnitude.ravel()) == {1, 2, 3}


def flat(plan):
    """Every array of a nested plan."""
    return [array for part in plan for array in (flat(part) if isinstance(part, tuple) else [part])]


def test_draw_depends_on_the_seed_alone():
    one, same, other = (flat(views.draw(np.random.default_rng(seed), 100, 32)) for seed in (3, 3, 4))
    assert len(one) == 9
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_weak_and_strong_views_are_drawn_apart():
    plan = views.draw(np.random.default_rng(0), 1000, 32)
    assert not np.array_equal(plan.weak.flip, plan.strong.flip)
    assert not np.array_equal(plan.weak.offset, plan.strong.offset)


@pytest.mark.parametrize(
    ("size", "last"), [(8, (2, 2)), (15, (2, 2)), (32, (8, 8)), (224, (56, 56)), ((16, 96), (4, 24))]
)
def test_offsets_cover_the_padding(size, last):
    plan = views.draw_weak(np.random.default_rng(0), 20_000, size)
    assert tuple(plan.offset.min(axis=0)) == (0, 0)
    assert tuple(plan.offset.max(axis=0)) == last
    assert abs(plan.flip.mean() - 0.5) < 0.02


def test_flip_off_never_flips_and_moves_nothing_else():
    with_flip = views.draw(np.random.default_rng(0), 1000, 32)
    without = views.draw(np.random.default_rng(0), 1000, 32, flip=False)
    assert with_flip.weak.flip.any()
    assert not without.weak.flip.any()
    assert not without.strong.flip.any()
    np.testing.assert_array_equal(with_flip.strong.offset, without.strong.offset)
    np.testing.assert_array_equal(with_flip.strong_plan.op, without.strong_plan.op)


# Batches


def test_a_slice_of_the_plan_gives_the_slice_of_the_result():
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    plan = randaugment.draw(np.random.default_rng(1), 64)
    whole = randaugment.apply(images, plan)
    np.testing.assert_array_equal(randaugment.apply(images[10:30], plan.take(np.s_[10:30])), whole[10:30])
    np.testing.assert_array_equal(randaugment.apply(images[::-3], plan.take(np.s_[::-3])), whole[::-3])


def test_threads_share_a_batch():
    images = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    index = np.random.default_rng(1).integers(100, size=800)
    plan = views.draw(np.random.default_rng(2), 800, 32)

    def work(part):
        return views.weak_and_strong(images, index[part], plan.take(part))

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(work, [slice(i, i + 50) for i in range(0, 800, 50)]))
    weak, strong = (np.concatenate(of_parts) for of_parts in zip(*parts, strict=True))
    expected_weak, expected_strong = views.weak_and_strong(images, index, plan)
    np.testing.assert_array_equal(weak, expected_weak)
    np.testing.assert_array_equal(strong, expected_strong)


def test_a_read_only_memory_map_is_read_in_place(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    index, plan = np.array([3, 19, 3]), views.draw(np.random.default_rng(1), 3, 16)
    np.testing.assert_array_equal(views.strong(mapped, plan, index), views.strong(images, plan, index))
    assert np.shares_memory(kernels._read_only(mapped, np.uint8), mapped)
    assert len(kernels._render.signatures) == 1  # each further one would cost its compilation again


def test_the_input_is_left_alone():
    images = sample_images(32, 32)
    before = images.copy()
    randaugment.apply(images, randaugment.draw(np.random.default_rng(0), len(images)))
    views.weak_and_strong(images, np.arange(len(images)), views.draw(np.random.default_rng(0), len(images), 32))
    np.testing.assert_array_equal(images, before)


def test_no_images_give_no_views():
    images = sample_images(32, 32)
    weak, strong = views.weak_and_strong(images, np.arange(0), views.draw(np.random.default_rng(0), 0, 32))
    assert weak.shape == strong.shape == (0, 32, 32, 3)


@pytest.mark.parametrize("index", [-1, 8])
def test_an_index_outside_the_images_is_an_error(index):
    with pytest.raises(IndexError, match=f"runs from {index} to {index}, but there are 8 images"):
        views.weak(sample_images(8, 8), views.draw_weak(np.random.default_rng(0), 1, 8), np.array([index]))


def test_kernels_compile_where_nothing_can_be_cached():
    scope = {}
    exec("def double(x):\n    return 2 * x", scope)  # a function without a file: numba has no directory for it either
    assert kernels._compile(scope["double"])(21) == 42
