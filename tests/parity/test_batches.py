"""Stage `data`: it passes on the Loader as it is, catches every planted bug by name, and its figures are right."""

import dataclasses
import fnmatch
import json
import math
import threading

import numpy as np
import pytest
from running import first_of
from scipy import stats

from fixmatch.config import Config, from_dict
from fixmatch.data.augment import views
from fixmatch.data.dataset import Dataset
from fixmatch.data.loader import Loader
from fixmatch.data.split import Split
from fixmatch.inputs import choose_split, read_data
from parity import batches, plants
from parity.batches import draws, order, probes, settings, watch
from parity.case import Case

PLANTS = {name: bug for name, bug in plants.PLANTS.items() if bug.kind == "batches"}
RECIPES = ("reference", "google", "torchssl", "ctaugment")


def config(**keys) -> Config:
    """Small batches of digits, which may be mirrored here; section__key=value."""
    keys = {"train__batch_size": 8, "train__mu": 7, "augment__flip": True} | keys
    return from_dict({}, "test", [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in keys.items()])


def rows(seed: int = 0, thorough: bool = False, classes: int = 10, **keys) -> list:
    return [*batches.rows(Case(config(**keys), classes, seed), thorough)]


def first_failed(**keys):
    """The first row that fails, with nothing done after it; None if all pass."""
    return next((row for row in batches.rows(Case(config(**keys), 10), thorough=False) if not row.passed), None)


def failed(found) -> list[str]:
    return [row.tensor for row in found if not row.passed]


# The row that has to name the fault first.
NAMED = {
    "strong-views-rolled": "views/strong of step 0", "strong-views-reversed": "views/strong of step 0",
    "last-strong-view-repeated": "views/strong of step 0", "strong-channels-swapped": "views/strong of step 0",
    "strong-index-off-by-one": "views/strong of step 0", "strong-from-weak": "views/strong of step 0",
    "strong-plan-rolled": "views/strong of step 0",
    "labels-rolled": "labels/of labeled images", "labels-sorted": "labels/of labeled images",
    "unlabeled-targets-rolled": "labels/of unlabeled images", "weak-index-off-by-one": "labels/of unlabeled images",
    "channels-swapped": "views/labeled views are flipped crops*",
    "images-transposed": "views/labeled views are flipped crops*",
    "labeled-strongly-augmented": "views/labeled views are flipped crops*",
    "data-set-written-to": "views/labeled views are flipped crops*",
    "lowest-bit-lost": "views/unlabeled views are flipped crops*",
    "views-swapped": "views/unlabeled views are flipped crops*",
    "labels-int32": "shapes/targets_x", "batch-one-short": "shapes/u_w", "mu-ignored": "shapes/u_w",
    "strong-recipe-ignored": "shapes/strong recipe",
    "batch-repeated": "order/batch 3 of those made ahead",
    "include-labeled-inverted": "split/labeled images are unlabeled too",
    "labels-of-all-images": "order/labeled images equally often in pass 0",
    "unlabeled-are-the-labeled": "order/unlabeled images equally often in pass 0",
    "drawn-with-replacement": "order/labeled images equally often in pass 0",
    "last-images-never-shown": "order/labeled images equally often in pass 0",
    "one-class-twice-as-often": "order/labeled images equally often in pass 0",
    "ranks-share-the-order": "order/labeled images equally often in pass 0, two ranks",
    "ranks-overlap": "order/labeled images equally often in pass 0, two ranks",
    "order-the-same-each-pass": "order/labeled images in another order in pass 1*",
    "order-without-seed": "order/labeled images in another order under another seed",
    "not-shuffled": "order/labeled images shuffled",
    "order-shifted": "draws/an image's place in a pass x in the next independent",
    "shuffled-in-blocks": "draws/an image's place in a pass x which it is independent",
    "views-without-step": "draws/steps differ", "views-repeat-after-100-steps": "draws/steps differ",
    "views-without-rank": "draws/ranks differ", "views-without-seed": "draws/seeds differ",
    "views-from-a-global-generator": "order/a batch depends on seed, rank and step alone",
    "same-flip": "draws/weak flip x strong flip independent",
    "same-crop": "draws/weak crop * x strong crop * independent",
    "same-crop-row": "draws/weak crop row x strong crop row independent",
    "one-draw-a-batch": "draws/* of one image x the next independent",
    "labeled-drawn-as-unlabeled": "draws/labeled * x weak * of the same batch independent",
    "crop-square": "draws/* crop row x * crop column independent",
    "crop-never-at-the-far-edge": "draws/* crop * uniform", "crop-central": "draws/* crop * uniform",
    "flip-in-first-half": "draws/* flip x place in the batch independent",
    "flip-0.25": "draws/* flip uniform", "flip-setting-inverted": "draws/* flip uniform",
    "operations-equal": "draws/operation 1 x operation 2 independent",
    "operations-never-equal": "draws/operation 1 x operation 2 independent",
    "last-operation-never-drawn": "draws/operation ? uniform",
    "second-operation-never-applied": "draws/applied 2 uniform",
    "applied-together": "draws/applied 1 x applied 2 independent",
    "applied-never-both": "draws/applied 1 x applied 2 independent",
    "magnitude-of-the-operation": "draws/operation ? x magnitude ? independent",
    "magnitudes-equal": "draws/magnitude 1 x magnitude 2 independent",
    "magnitudes-small": "draws/magnitude ? uniform",
    "signs-positive": "draws/sign ? uniform",
    "sign-of-applied": "draws/applied ? x sign ? independent",
    "sign-of-magnitude": "draws/magnitude ? x sign ? independent",
    "sign-of-both-applied": "draws/flips, applied and signs together",
    "cutout-on-the-diagonal": "draws/Cutout x x Cutout y independent",
    "cutout-central": "draws/Cutout ? uniform", "cutout-inside": "draws/Cutout ? uniform",
    "cutout-tied": "draws/Cutout ? of one image x the next independent",
    "cutout-of-the-operation": "draws/operation 1 x Cutout x independent",
}


@pytest.mark.parametrize("name", first_of([*PLANTS][::2] + [*PLANTS][1::2], 30))  # of neighbours in the table one each
def test_a_planted_bug_is_caught_and_named(name):
    with plants.planted(name):
        found = first_failed()
    assert found is not None
    assert fnmatch.fnmatchcase(found.tensor, NAMED[name]), (found.tensor, found.why)
    assert found.relative > 0
    assert found.why or found.absolute


def test_there_is_a_name_for_every_plant_and_all_are_of_this_stage():
    assert PLANTS.keys() == NAMED.keys()
    assert len(PLANTS) >= 60
    assert {plant.stage for plant in PLANTS.values()} == {"data", "augment"}  # the stage before sees some by itself


def test_flips_where_they_are_not_allowed():
    assert not failed(rows(augment__flip=None))
    with plants.planted("flip-setting-inverted"):
        found = failed(rows(augment__flip=None))
    assert found == ["draws/labeled flip, not allowed", "draws/unlabeled flip, not allowed"]


@pytest.mark.parametrize(("seed", "thorough"), [(0, False), (1, False), (2, False), (0, True)])
def test_the_loader_as_it_is_passes(seed, thorough):
    found = rows(seed, thorough)
    assert not failed(found)
    assert len(found) == len({row.tensor for row in found}) > 200
    assert max(row.relative for row in found) == 0.0


@pytest.mark.parametrize("keys", [
    *({"augment__strong": name} for name in RECIPES), {"ssl__mode": "none"}, {"data__include_labeled": False},
    {"data__labels_per_class": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)}, {"data__name": "folder", "data__image_size": 57},
    *(pytest.param(keys, marks=pytest.mark.long) for keys in (
        {"data__num_labeled": 0}, {"train__batch_size": 1, "train__mu": 1},
        {"train__batch_size": 3, "train__mu": 2, "data__name": "cifar10"},
        {"data__name": "folder", "data__image_size": 512}))])
def test_other_settings_pass(keys):
    assert not failed(rows(**keys))


def test_a_hundred_classes_pass():
    assert not failed(rows(classes=100, data__name="cifar100", data__num_labeled=400))


@pytest.mark.parametrize("strong", ["google", "torchssl", "ctaugment"])
@pytest.mark.parametrize("name", ["strong-views-rolled", "strong-from-weak", "labels-rolled", "same-flip"])
def test_other_recipes_are_proven_as_far_as_they_go(name, strong):
    with plants.planted(name):
        found = first_failed(augment__strong=strong)
    assert fnmatch.fnmatchcase(found.tensor, NAMED[name])


# The statistics


def test_uniform_by_hand():
    found = draws.uniform(draws.Column(np.repeat([0, 1, 2], [10, 20, 30])[None], 3))
    assert found.p == pytest.approx(math.exp(-5), rel=1e-12)  # chi-square (100 + 0 + 100) / 20 = 10 on 2 degrees
    assert found.effect == pytest.approx(math.sqrt(10 / 60 / 2))
    assert found.observed.tolist() == [10, 20, 30]
    assert draws.uniform(draws.Column(np.array([[0, 1, 2]]), 2)).p == 0.0  # 2 is no value of it
    assert draws.uniform(draws.Column(np.array([[0, 1, -1]]), 2)).p == 0.0


def test_independent_by_hand():
    one, other = np.repeat([0, 0, 1, 1], [30, 10, 10, 30]), np.repeat([0, 1, 0, 1], [30, 10, 10, 30])
    found = draws.independent(draws.Column(one[None], 2), draws.Column(other[None], 2))
    assert found.p == pytest.approx(math.erfc(math.sqrt(10)), rel=1e-9)  # 4 * 10^2 / 20 = 20 on 1 degree of freedom
    assert found.effect == pytest.approx(0.5)
    assert found.observed.tolist() == [[30, 10], [10, 30]]
    assert found.expected.tolist() == [[20, 20], [20, 20]]
    constant = draws.Column(np.zeros((1, 80), np.int64), 2)
    assert draws.independent(constant, draws.Column(other[None], 2)).p == 1.0


def test_agrees_with_scipy_on_a_larger_table():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 5, (3, 400)), rng.integers(0, 7, (3, 400))
    table = stats.contingency.crosstab(one.ravel(), other.ravel()).count
    expected = table.sum(axis=1)[:, None] * table.sum(axis=0) / 1200
    p = stats.chi2.sf(((table - expected) ** 2 / expected).sum(), 24)
    assert draws.independent(draws.Column(one, 5), draws.Column(other, 7)).p == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize("freedom", [1, 2, 13, 63, 168, 5000])
def test_chance_agrees_with_scipy(freedom):
    for statistic in freedom * np.array([0.01, 0.5, 1, 1.2, 2]) + np.array([0, 1, 10, 50, 300]):
        expected = stats.chi2.sf(statistic, freedom)
        assert draws._by_chance(statistic, freedom) == pytest.approx(expected, rel=1e-10, abs=1e-300)


def test_columns_together():
    columns = [draws.Column(np.array([[0, 1, 1]]), 2), draws.Column(np.array([[2, 0, 1]]), 3)]
    assert draws.together(columns).codes.tolist() == [[2, 3, 4]]
    assert draws.together(columns).count == 6


def test_the_gate_and_what_it_catches_are_as_stated():
    """FALSE_ALARM over all rows; among 10^5 draws a share of 0.513 fails with 99 %, as does 1.3 % on the diagonal."""
    rng = np.random.default_rng(0)
    gate = draws.FALSE_ALARM / 300
    many = [draws.Column(np.array([[0, 1]]), 2)] * 300
    assert all(row.passed for row in draws.judged({str(i): lambda c=c: draws.uniform(c) for i, c in enumerate(many)}))

    def shares(p):
        return [draws.uniform(draws.Column((rng.random((1, 100_000)) < p).astype(np.int64), 2)).p for _ in range(200)]

    assert np.mean(np.array(shares(0.513)) < gate) > 0.95
    assert min(shares(0.5)) > 1e-5
    tied = []
    for _ in range(200):
        one = rng.integers(0, 2, (1, 100_000))
        other = np.where(rng.random(one.shape) < 0.513, one, 1 - one)
        tied.append(draws.independent(draws.Column(one, 2), draws.Column(other, 2)).p)
    assert np.mean(np.array(tied) < gate) > 0.95


def test_a_row_that_fails_says_p_gate_and_how_strongly():
    tied = draws.Column(np.arange(4000)[None] % 2, 2)
    fair = draws.Column(np.random.default_rng(0).integers(0, 2, (1, 4000)), 2)
    found = [*draws.judged({"fair": lambda: draws.uniform(fair), "tied": lambda: draws.independent(tied, tied)})]
    assert [(row.tensor, row.passed) for row in found] == [("draws/tied", False), ("draws/fair", True)]
    assert found[0].relative == pytest.approx(1.0)
    assert found[0].why.endswith("gate 5e-07; 4,000 draws")
    assert (found[1].absolute, found[1].relative) == (0.0, 0.0)


# Probe images


@pytest.mark.parametrize("size", [8, 9, 32, 57, 96])
def test_every_weak_view_can_be_read(size):
    data = probes.make(np.arange(300) * 211 % 65536, size)
    rng = np.random.default_rng(0)
    plan, index = views.draw_weak(rng, 500, size), rng.integers(0, 300, 500)
    read = probes.read(views.weak(data.images, plan, index), data)
    for found, right in zip(read, (index, data.labels[index], plan.flip, plan.offset), strict=True):
        assert np.array_equal(found, right)


def test_what_is_no_weak_view_cannot_be_read():
    data = probes.make(np.arange(300), 16)
    shown = data.images[:50].copy()
    changed = shown.copy()
    changed[:, 3, 4, 2] += 1
    mixed = np.concatenate([shown[:, :8], shown[::-1, 8:]], axis=1)
    for wrong in (shown[..., ::-1], shown.swapaxes(1, 2), shown[:, ::-1], shown // 2 * 2, changed, mixed, 255 - shown):
        assert (probes.read(wrong, data).index < 0).mean() > 0.9
    assert np.array_equal(probes.read(shown, data).index, np.arange(50))


# Orders


def test_coverage_by_hand():
    items = np.arange(3)
    right = np.array([0, 1, 2, 2, 1, 0, 1, 0])  # repeated three times, nine places, cut to two steps of four
    assert order.coverage("", right, items, least=7, block=4).passed
    for wrong in ([0, 1, 2, 2, 1, 0, 1, 1], [0, 1, 2, 2, 1, 0, 1, 3], right[:-1]):
        assert not order.coverage("", np.array(wrong), items, least=7, block=4).passed


def test_the_split_by_hand():
    labels = np.array([0, 0, 1, 1, -1])
    found = Split(labeled=np.array([0, 2]), unlabeled=np.arange(5))
    assert not failed(order.split(found, labels, np.array([1, 1]), True, whole=True))
    assert failed(order.split(found, labels, np.array([1, 1]), False, whole=True)) == [
        "split/labeled images are not unlabeled too", "split/unlabeled"]
    wrong = Split(labeled=np.array([0, 4]), unlabeled=np.arange(4))
    assert failed(order.split(wrong, np.array([0, 0, 1, 1, 1]), np.array([1, 1]), True, whole=False)) == [
        "split/labeled images are unlabeled too"]
    assert not next(order.split(wrong, labels, None, True, whole=False)).passed  # its class is not known


# Recording


def test_only_the_calling_thread_is_watched_and_afterwards_nobody():
    run = settings.probe(config(), 10, 0)
    right = views.draw, views.draw_weak, views.weak, views.weak_and_strong
    seen = {}

    class Beside(Loader):
        def batch(self, step):
            thread = threading.Thread(target=lambda: seen.update(beside=run.loader().batch(1)))
            thread.start()
            thread.join()
            return super().batch(step)

    beside = Beside(run.data, run.split, run.batch, run.mu, run.seed, run.flip)
    (batch,), (drawn,) = watch.drawn_only(beside, [0])
    assert (len(drawn.labeled), len(drawn.unlabeled)) == (1, 1)
    assert not batch.u_w.size
    assert order.same("", seen["beside"], run.loader().batch(1)).passed
    assert right == (views.draw, views.draw_weak, views.weak, views.weak_and_strong)


def test_a_plan_that_is_changed_in_place_after_it_was_drawn_shows(monkeypatch):
    right = views.weak_and_strong

    def changed(images, index, plan):
        plan.strong.offset[:] = 0
        return right(images, index, plan)

    monkeypatch.setattr(views, "weak_and_strong", changed)
    assert failed(rows())[0] == "views/strong of step 0"


# The run's own loader


def of_run(change=None, rank: int = 0, world_size: int = 1, first_step: int = 0, made_with=None, processes: int = 1,
           **keys) -> list[str]:
    """Failed rows for a loader made by `made_with`, or by the configuration; change(source, split) -> the same."""
    asked = config(**keys)
    made = made_with or asked
    source = read_data(asked)
    split = choose_split(asked, source)
    data, used = change(source.train, split) if change else (source.train, split)
    mu = made.train.mu if made.ssl.mode == "fixmatch" else 0
    loader = Loader(data, used, made.train.batch_size, mu, asked.run.seed, source.flip, rank, world_size,
                    strong=made.augment.strong)
    before = loader.batch(first_step)
    found = [*batches.rows_of_run(loader, source, split, asked, first_step, world_size=processes)]
    assert order.same("", before, loader.batch(first_step)).passed
    assert len(found) > 25
    return failed(found)


@pytest.mark.parametrize("keys", [
    {}, {"augment__flip": None}, {"ssl__mode": "none"}, {"data__include_labeled": False}, {"data__num_labeled": 0},
    *({"augment__strong": name} for name in RECIPES)])
def test_a_run_on_digits_passes(keys):
    assert of_run(**keys) == []


def test_a_run_of_two_processes_passes():
    assert of_run(world_size=2, processes=2) == []
    assert of_run(processes=2)[0] == "ranks/labeled share"


def test_a_run_that_is_resumed_passes():
    assert of_run(first_step=1234) == []


def test_a_run_on_cifar_passes(cifar10_root):
    keys = {"data__name": "cifar10", "data__root": str(cifar10_root), "data__download": False}
    assert of_run(**keys, augment__flip=None) == []
    assert of_run(**keys, train__batch_size=64) == []  # more unlabeled images a step than there are


@pytest.mark.parametrize("name", [
    "strong-views-rolled", "last-strong-view-repeated", "strong-from-weak", "labels-rolled", "unlabeled-targets-rolled",
    "views-swapped", "lowest-bit-lost", "batch-one-short", "batch-repeated", "mu-ignored", "strong-recipe-ignored",
    "labels-of-all-images", "unlabeled-are-the-labeled", "drawn-with-replacement", "not-shuffled",
    "one-class-twice-as-often", "images-transposed", "weak-index-off-by-one", "labeled-strongly-augmented"])
def test_a_planted_bug_shows_in_the_run(name):
    with plants.planted(name):
        found = of_run()
    assert found
    if name.startswith("strong-views"):
        assert found[0] == "views/strong of step 0"


def test_a_loader_of_other_data_split_or_settings_shows():
    def shifted(data, split):
        return Dataset(data.images, np.roll(data.labels, 1)), split

    def other_images(data, split):
        return Dataset(np.roll(data.images, 1, axis=0), data.labels), split

    def other_split(data, split):
        return data, dataclasses.replace(split, labeled=split.labeled + 1)

    assert of_run(shifted)[0] == "labels/of labeled images of step 0"
    assert of_run(other_images)[0] == "views/x of step 0"
    assert of_run(other_split)[0] == "order/labeled images equally often in pass 0"
    assert of_run(made_with=config(train__batch_size=4)) != []
    assert of_run(made_with=config(augment__strong="google"))[0] == "shapes/strong recipe of step 0"
    assert of_run(rank=1, world_size=2)[:3] == ["ranks/labeled share", "ranks/unlabeled share", "ranks/augmentation"]
