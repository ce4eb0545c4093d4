"""Known bugs of how batches are made: pairs, labels, order of the images, random draws, settings.

Each is caught in stage `data`. They are apart from parity.plants.PLANTS, whose stages are others.
"""

import dataclasses
import threading
from collections.abc import Callable

import numpy as np

from fixmatch.data import loader, split
from fixmatch.data.augment import randaugment, recipes, views
from parity.plants import Patch, Plant

PLANTS: dict[str, Plant] = {}


def plant(name: str, what: str):
    def register(put_in):
        PLANTS[name] = Plant(name, "data", what, put_in)
        return put_in
    return register


# Pairs and labels


def _batch(patch: Patch, change: Callable) -> None:
    """Batches with some fields changed: change(batch) -> {field: array}."""
    right = loader.Loader.batch
    patch(loader.Loader, "batch", lambda self, step: (lambda b: b._replace(**change(b)))(right(self, step)))


@plant("strong-views-rolled", "the strong view of the neighbouring image")
def strong_views_rolled(patch):
    _batch(patch, lambda b: {"u_s": np.roll(b.u_s, 1, axis=0)})


@plant("strong-views-reversed", "strong views in the reverse order of the weak ones")
def strong_views_reversed(patch):
    _batch(patch, lambda b: {"u_s": b.u_s[::-1]})


@plant("last-strong-view-repeated", "one strong view of the batch is that of another image")
def last_strong_view_repeated(patch):
    _batch(patch, lambda b: {"u_s": np.concatenate([b.u_s[:-1], b.u_s[:1]])})


@plant("labels-rolled", "labels of the neighbouring image")
def labels_rolled(patch):
    _batch(patch, lambda b: {"targets_x": np.roll(b.targets_x, 1)})


@plant("labels-sorted", "labels in order, images not")
def labels_sorted(patch):
    _batch(patch, lambda b: {"targets_x": np.sort(b.targets_x)})


@plant("unlabeled-targets-rolled", "true labels of the unlabeled images, for monitoring, of the neighbour")
def unlabeled_targets_rolled(patch):
    _batch(patch, lambda b: {"targets_u": np.roll(b.targets_u, 1)})


@plant("labels-int32", "labels of another type")
def labels_int32(patch):
    _batch(patch, lambda b: {"targets_x": b.targets_x.astype(np.int32)})


@plant("channels-swapped", "blue, green, red")
def channels_swapped(patch):
    _batch(patch, lambda b: {"x": b.x[..., ::-1], "u_w": b.u_w[..., ::-1], "u_s": b.u_s[..., ::-1]})


@plant("strong-channels-swapped", "blue, green, red in the strong views alone")
def strong_channels_swapped(patch):
    _batch(patch, lambda b: {"u_s": b.u_s[..., ::-1]})


@plant("images-transposed", "height and width exchanged")
def images_transposed(patch):
    _batch(patch, lambda b: {name: getattr(b, name).swapaxes(1, 2) for name in ("x", "u_w", "u_s")})


@plant("lowest-bit-lost", "views that went through another number format")
def lowest_bit_lost(patch):
    _batch(patch, lambda b: {"u_w": b.u_w // 2 * 2})


@plant("batch-one-short", "one image less than configured")
def batch_one_short(patch):
    _batch(patch, lambda b: {"u_w": b.u_w[:-1], "u_s": b.u_s[:-1], "targets_u": b.targets_u[:-1]})


def _views(patch: Patch, change: Callable) -> None:
    """Other (weak, strong) views: change(images, index, plan)."""
    patch(views, "weak_and_strong", lambda images, index, plan, out=(None, None): change(images, index, plan))


@plant("weak-index-off-by-one", "the weak view of the image that follows in the data set")
def weak_index_off_by_one(patch):
    _views(patch, lambda images, index, plan: (
        views.weak(images, plan.weak, (index + 1) % len(images)), views.strong(images, plan, index)))


@plant("strong-index-off-by-one", "the strong view of the image that follows in the data set")
def strong_index_off_by_one(patch):
    _views(patch, lambda images, index, plan: (
        views.weak(images, plan.weak, index), views.strong(images, plan, (index + 1) % len(images))))


@plant("strong-from-weak", "RandAugment on the weak view, without a flip and crop of its own")
def strong_from_weak(patch):
    def changed(images, index, plan):
        weak = views.weak(images, plan.weak, index)
        return weak, randaugment.apply(weak, plan.strong_plan)

    _views(patch, changed)


@plant("strong-plan-rolled", "each strong view by the plan of its neighbour")
def strong_plan_rolled(patch):
    _views(patch, with_rolled_plans)


def with_rolled_plans(images, index, plan):
    """Weak views as they are, strong ones of the same images but by their neighbours' plans."""
    rolled = plan.take(np.roll(np.arange(len(index)), 1))
    return views.weak(images, plan.weak, index), views.strong(images, rolled, index)


@plant("views-swapped", "the strong views in the place of the weak ones")
def views_swapped(patch):
    _views(patch, lambda images, index, plan: (
        views.strong(images, plan, index), views.weak(images, plan.weak, index)))


@plant("labeled-strongly-augmented", "RandAugment on the labeled images, too")
def labeled_strongly_augmented(patch):
    right = views.weak
    patch(views, "weak", lambda images, plan, index=None, out=None: randaugment.apply(
        right(images, plan, index, out), randaugment.draw(np.random.default_rng(0), len(plan.flip))))


@plant("data-set-written-to", "augmentation in place, on the data set")
def data_set_written_to(patch):
    right = loader.Loader.batch

    def changed(self, step):
        batch = right(self, step)
        if batch.x.shape[1:] == self.data.images.shape[1:]:
            self.data.images[self.labeled.indices(step)] = batch.x
        return batch

    patch(loader.Loader, "batch", changed)


@plant("batch-repeated", "a batch made ahead is handed out twice")
def batch_repeated(patch):
    right = loader.Loader.batches

    def changed(self, first_step, last_step):
        last = None
        for step, batch in enumerate(right(self, first_step, last_step)):
            last = last if step % 3 == 2 else batch
            yield last

    patch(loader.Loader, "batches", changed)


# Order of the images


class Numpy:
    """numpy, but with random.default_rng(change(seed))."""

    def __init__(self, change: Callable[[list], list]):
        self.random, self.change = self, change

    def __getattr__(self, name):
        return getattr(np, name)

    def default_rng(self, seed):
        return np.random.default_rng(self.change(list(seed)))


def _seeds(patch: Patch, change: Callable[[list], list]) -> None:
    """Generators of the loader from other seeds: [seed, 0 or 1, pass] of an order, [seed, 2, step, rank] of views."""
    patch(loader, "np", Numpy(change))


@plant("order-the-same-each-pass", "images are shuffled once for all passes")
def order_the_same_each_pass(patch):
    _seeds(patch, lambda s: s if len(s) == 4 else s[:2])


@plant("order-without-seed", "the same order of images under every seed")
def order_without_seed(patch):
    _seeds(patch, lambda s: s if len(s) == 4 else [0, *s[1:]])


def _order(patch: Patch, change: Callable) -> None:
    """Another order: change(generator of the pass, items)."""
    patch(loader.Stream, "_shuffle", lambda self, which_pass: change(
        np.random.default_rng([*self.seed, which_pass]), self.items))


@plant("not-shuffled", "images in the order of the data set")
def not_shuffled(patch):
    _order(patch, lambda rng, items: items)


@plant("order-shifted", "each pass in the order of the first, from another image on")
def order_shifted(patch):
    patch(loader.Stream, "_shuffle", lambda self, which_pass: np.roll(
        np.random.default_rng(self.seed).permutation(self.items), 7 * which_pass))


@plant("shuffled-in-blocks", "a buffer of a quarter of the data is shuffled, as streaming readers do")
def shuffled_in_blocks(patch):
    _order(patch, lambda rng, items: np.concatenate([*map(rng.permutation, np.array_split(items, 4))]))


@plant("drawn-with-replacement", "each place of a pass holds any image")
def drawn_with_replacement(patch):
    _order(patch, lambda rng, items: rng.choice(items, len(items)))


@plant("last-images-never-shown", "the data set's last images are left out, others repeated")
def last_images_never_shown(patch):
    _order(patch, lambda rng, items: rng.permutation(np.resize(items[:-3], len(items))))


@plant("one-class-twice-as-often", "a quarter of the labeled images takes the place of another quarter")
def one_class_twice_as_often(patch):
    def changed(rng, items):
        images = np.unique(items)
        quarter = len(images) // 4
        return rng.permutation(np.where(np.isin(items, images[:quarter]), np.roll(images, quarter)[
            np.searchsorted(images, items)], items))

    _order(patch, changed)


@plant("ranks-share-the-order", "every rank shows the images of rank 0")
def ranks_share_the_order(patch):
    init = loader.Stream.__init__

    def changed(self, items, batch_size, min_items, seed, rank, world_size):
        init(self, items, batch_size, min_items, seed, 0, world_size)

    patch(loader.Stream, "__init__", changed)


@plant("ranks-overlap", "the share of a rank begins in the middle of that before")
def ranks_overlap(patch):
    def changed(self, step):
        which_pass, position = divmod(step, self.steps_per_pass)
        start = position * self.world_size * self.batch_size + self.rank * self.batch_size // 2
        return self._order(which_pass)[start:start + self.batch_size]

    patch(loader.Stream, "indices", changed)


# Generators


@plant("views-without-step", "every step draws the same views")
def views_without_step(patch):
    _seeds(patch, lambda s: [*s[:2], 0, s[3]] if len(s) == 4 else s)


@plant("views-repeat-after-100-steps", "the generator is seeded by the step modulo 100")
def views_repeat_after_100_steps(patch):
    _seeds(patch, lambda s: [*s[:2], s[2] % 100, s[3]] if len(s) == 4 else s)


@plant("views-without-rank", "all ranks draw the same views")
def views_without_rank(patch):
    _seeds(patch, lambda s: s[:3] if len(s) == 4 else s)


@plant("views-without-seed", "every run draws the same views")
def views_without_seed(patch):
    _seeds(patch, lambda s: [0, *s[1:]] if len(s) == 4 else s)


@plant("views-from-a-global-generator", "a batch depends on how many were made before")
def views_from_a_global_generator(patch):
    shared = np.random.default_rng(0)
    right = views.draw
    patch(views, "draw", lambda rng, *args, **kwargs: right(shared, *args, **kwargs))


# Flip and crop


def _weak(patch: Patch, change: Callable) -> None:
    """Another flip and crop of every view: change(rng, plan, flip)."""
    right = views.draw_weak
    patch(views, "draw_weak", lambda rng, n, size, flip=True: change(rng, right(rng, n, size, flip), flip))


def _pair(patch: Patch, change: Callable) -> None:
    """Another plan of both views: change(plan)."""
    right = views.draw
    patch(views, "draw", lambda *args, **kwargs: change(right(*args, **kwargs)))


@plant("same-flip", "the strong view is mirrored where the weak one is")
def same_flip(patch):
    _pair(patch, lambda plan: plan._replace(strong=plan.strong._replace(flip=plan.weak.flip)))


@plant("same-crop", "the strong view is the weak one's crop")
def same_crop(patch):
    _pair(patch, lambda plan: plan._replace(strong=plan.strong._replace(offset=plan.weak.offset)))


@plant("same-crop-row", "weak and strong crops begin in the same row")
def same_crop_row(patch):
    _pair(patch, lambda plan: plan._replace(strong=plan.strong._replace(
        offset=np.stack([plan.weak.offset[:, 0], plan.strong.offset[:, 1]], axis=1))))


@plant("one-draw-a-batch", "all unlabeled images of a batch are augmented alike")
def one_draw_a_batch(patch):
    _pair(patch, lambda plan: plan.take(np.zeros(len(plan.weak.flip), np.int64)))


@plant("labeled-drawn-as-unlabeled", "labeled images get the flips and crops of the weak views")
def labeled_drawn_as_unlabeled(patch):
    latest, draw, draw_weak = threading.local(), views.draw, views.draw_weak

    def changed_weak(rng, n, *args, **kwargs):
        latest.drawn = n, draw_weak(rng, n, *args, **kwargs)
        return latest.drawn[1]

    def changed(rng, n, *args, **kwargs):
        count, labeled = latest.drawn
        plan = draw(rng, n, *args, **kwargs)
        first = np.arange(n) < count
        flip, offset = (np.resize(field, (n, *field.shape[1:])) for field in labeled)
        return plan._replace(weak=views.WeakPlan(np.where(first, flip, plan.weak.flip),
                                                 np.where(first[:, None], offset, plan.weak.offset)))

    patch(views, "draw_weak", changed_weak)
    patch(views, "draw", changed)


@plant("crop-square", "crops move along the diagonal: one number for row and column")
def crop_square(patch):
    _weak(patch, lambda rng, plan, flip: plan._replace(offset=plan.offset[:, [0, 0]]))


@plant("crop-never-at-the-far-edge", "randint without its upper end")
def crop_never_at_the_far_edge(patch):
    _weak(patch, lambda rng, plan, flip: plan._replace(
        offset=np.minimum(plan.offset, np.maximum(0, plan.offset.max(initial=0) - 1))))


@plant("crop-central", "no crop at all")
def crop_central(patch):
    def changed(rng, n, size, flip=True):
        pads = [views.padding(side) for side in np.broadcast_to(size, 2)]
        return views.WeakPlan((rng.random(n) < 0.5) & flip, np.tile(pads, (n, 1)))

    patch(views, "draw_weak", changed)


@plant("flip-in-first-half", "images of the second half of a batch are never mirrored")
def flip_in_first_half(patch):
    _weak(patch, lambda rng, plan, flip: plan._replace(
        flip=(np.arange(len(plan.flip)) < len(plan.flip) // 2) & flip))


@plant("flip-0.25", "mirrored with a probability of a quarter")
def flip_rare(patch):
    _weak(patch, lambda rng, plan, flip: plan._replace(flip=plan.flip & (rng.random(len(plan.flip)) < 0.5)))


@plant("flip-setting-inverted", "mirrored where the data set does not allow it, and not where it does")
def flip_setting_inverted(patch):
    right = views.draw_weak
    patch(views, "draw_weak", lambda rng, n, size, flip=True: right(rng, n, size, not flip))


# RandAugment and Cutout


def _strong(patch: Patch, change: Callable) -> None:
    """Another plan of RandAugment: change(rng, plan) -> {field: array}."""
    right = randaugment.draw
    patch(randaugment, "draw", lambda rng, n, *args: (lambda plan: plan._replace(**change(rng, plan)))(
        right(rng, n, *args)))


def _field(name: str, change: Callable) -> Callable:
    return lambda patch: _strong(patch, lambda rng, plan: {name: change(plan)})


_FIELDS = {
    "operations-equal": ("both operations are the same", "op", lambda p: p.op[:, [0, 0]]),
    "operations-never-equal": ("drawn without replacement", "op", lambda p: np.stack(
        [p.op[:, 0], (p.op[:, 0] + 1 + p.op[:, 1] % 13) % 14], axis=1)),
    "last-operation-never-drawn": ("TranslateY is never taken", "op", lambda p: p.op % 13),
    "second-operation-never-applied": ("one operation instead of two", "applied", lambda p: p.applied & [True, False]),
    "applied-together": ("both operations or neither", "applied", lambda p: p.applied[:, [0, 0]]),
    "applied-never-both": ("the second one only where the first is not", "applied", lambda p: np.stack(
        [p.applied[:, 0], ~p.applied[:, 0]], axis=1)),
    "magnitude-of-the-operation": ("the magnitude follows from the operation", "magnitude", lambda p: p.op % 9 + 1),
    "magnitudes-equal": ("one magnitude for both operations", "magnitude", lambda p: p.magnitude[:, [0, 0]]),
    "magnitudes-small": ("magnitudes 1..8", "magnitude", lambda p: np.minimum(p.magnitude, 8)),
    "signs-positive": ("no operation is negated", "negated", lambda p: np.zeros_like(p.negated)),
    "sign-of-applied": ("one random number says whether an operation is applied and negated", "negated",
                        lambda p: p.applied),
    "sign-of-magnitude": ("strong operations are negated, weak ones are not", "negated", lambda p: p.magnitude > 5),
    "sign-of-both-applied": ("the second sign is the exclusive or of three others", "negated", lambda p: np.stack(
        [p.negated[:, 0], p.negated[:, 0] ^ p.applied[:, 0] ^ p.applied[:, 1]], axis=1)),
    "cutout-on-the-diagonal": ("one random number for x and y", "cutout", lambda p: p.cutout[:, [0, 0]]),
    "cutout-central": ("always in the middle", "cutout", lambda p: np.full_like(p.cutout, 0.5)),
    "cutout-tied": ("one place for all images of a batch", "cutout",
                    lambda p: np.broadcast_to(p.cutout[:1], p.cutout.shape).copy()),
    "cutout-inside": ("never where the border cuts it off", "cutout", lambda p: 0.25 + p.cutout / 2),
    "cutout-of-the-operation": ("Cutout's place follows from the first operation", "cutout", lambda p: np.stack(
        [(p.op[:, 0] + p.cutout[:, 0]) / 14, p.cutout[:, 1]], axis=1)),
}
for _name, (_what, _changed, _change) in _FIELDS.items():
    plant(_name, _what)(_field(_changed, _change))


# Settings


@plant("mu-ignored", "as many unlabeled images as labeled ones")
def mu_ignored(patch):
    init = loader.Loader.__init__

    def changed(self, data, split, batch_size, mu, *args, **kwargs):
        init(self, data, split, batch_size, min(mu, 1), *args, **kwargs)

    patch(loader.Loader, "__init__", changed)


@plant("strong-recipe-ignored", "another recipe of strong views than configured")
def strong_recipe_ignored(patch):
    patch(loader, "POLICIES", {name: recipes.TorchSSL if name == "reference" else randaugment
                               for name in recipes.POLICIES})


@plant("include-labeled-inverted", "labeled images are unlabeled ones where they should not be, and the reverse")
def include_labeled_inverted(patch):
    right = split.choose_split
    patch(split, "choose_split", lambda labeled, count, include_labeled=True: right(
        labeled, count, not include_labeled))


@plant("labels-of-all-images", "labeled batches are taken from all images")
def labels_of_all_images(patch):
    init = loader.Loader.__init__

    def changed(self, data, split, *args, **kwargs):
        init(self, data, dataclasses.replace(split, labeled=np.arange(len(data))), *args, **kwargs)

    patch(loader.Loader, "__init__", changed)


@plant("unlabeled-are-the-labeled", "unlabeled batches hold the labeled images alone")
def unlabeled_are_the_labeled(patch):
    init = loader.Loader.__init__

    def changed(self, data, split, *args, **kwargs):
        init(self, data, dataclasses.replace(split, unlabeled=split.labeled), *args, **kwargs)

    patch(loader.Loader, "__init__", changed)
