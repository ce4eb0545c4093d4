"""Known bugs of how batches are made: pairs, labels, order of the images, random draws, settings."""

import dataclasses
import threading
from collections.abc import Callable

import numpy as np

from fixmatch.data import loader, split
from fixmatch.data.augment import randaugment, recipes, views
from parity.plants.plant import Patch, Plant

# Pairs and labels


def _batch(patch: Patch, change: Callable) -> None:
    """Batches with some fields changed: change(batch) -> {field: array}."""
    right = loader.Loader.batch
    patch(loader.Loader, "batch", lambda self, step: (lambda b: b._replace(**change(b)))(right(self, step)))


def strong_views_rolled(patch):
    _batch(patch, lambda b: {"u_s": np.roll(b.u_s, 1, axis=0)})


def strong_views_reversed(patch):
    _batch(patch, lambda b: {"u_s": b.u_s[::-1]})


def last_strong_view_repeated(patch):
    _batch(patch, lambda b: {"u_s": np.concatenate([b.u_s[:-1], b.u_s[:1]])})


def labels_rolled(patch):
    _batch(patch, lambda b: {"targets_x": np.roll(b.targets_x, 1)})


def labels_sorted(patch):
    _batch(patch, lambda b: {"targets_x": np.sort(b.targets_x)})


def unlabeled_targets_rolled(patch):
    _batch(patch, lambda b: {"targets_u": np.roll(b.targets_u, 1)})


def labels_int32(patch):
    _batch(patch, lambda b: {"targets_x": b.targets_x.astype(np.int32)})


def channels_swapped(patch):
    _batch(patch, lambda b: {"x": b.x[..., ::-1], "u_w": b.u_w[..., ::-1], "u_s": b.u_s[..., ::-1]})


def strong_channels_swapped(patch):
    _batch(patch, lambda b: {"u_s": b.u_s[..., ::-1]})


def images_transposed(patch):
    _batch(patch, lambda b: {name: getattr(b, name).swapaxes(1, 2) for name in ("x", "u_w", "u_s")})


def lowest_bit_lost(patch):
    _batch(patch, lambda b: {"u_w": b.u_w // 2 * 2})


def batch_one_short(patch):
    _batch(patch, lambda b: {"u_w": b.u_w[:-1], "u_s": b.u_s[:-1], "targets_u": b.targets_u[:-1]})


def _views(patch: Patch, change: Callable) -> None:
    """Other (weak, strong) views: change(images, index, plan)."""
    patch(views, "weak_and_strong", lambda images, index, plan, out=(None, None): change(images, index, plan))


def weak_index_off_by_one(patch):
    _views(patch, lambda images, index, plan: (
        views.weak(images, plan.weak, (index + 1) % len(images)), views.strong(images, plan, index)))


def strong_index_off_by_one(patch):
    _views(patch, lambda images, index, plan: (
        views.weak(images, plan.weak, index), views.strong(images, plan, (index + 1) % len(images))))


def strong_from_weak(patch):
    def changed(images, index, plan):
        weak = views.weak(images, plan.weak, index)
        return weak, randaugment.apply(weak, plan.strong_plan)

    _views(patch, changed)


def strong_plan_rolled(patch):
    _views(patch, with_rolled_plans)


def with_rolled_plans(images, index, plan):
    """Weak views as they are, strong ones of the same images but by their neighbours' plans."""
    rolled = plan.take(np.roll(np.arange(len(index)), 1))
    return views.weak(images, plan.weak, index), views.strong(images, rolled, index)


def views_swapped(patch):
    _views(patch, lambda images, index, plan: (
        views.strong(images, plan, index), views.weak(images, plan.weak, index)))


def labeled_strongly_augmented(patch):
    right = views.weak
    patch(views, "weak", lambda images, plan, index: randaugment.apply(
        right(images, plan, index), randaugment.draw(np.random.default_rng(0), len(plan.flip))))


def data_set_written_to(patch):
    right = loader.Loader.batch

    def changed(self, step):
        batch = right(self, step)
        if batch.x.shape[1:] == self.data.images.shape[1:]:
            self.data.images[self.labeled.indices(step)] = batch.x
        return batch

    patch(loader.Loader, "batch", changed)


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


def order_the_same_each_pass(patch):
    _seeds(patch, lambda s: s if len(s) == 4 else s[:2])


def order_without_seed(patch):
    _seeds(patch, lambda s: s if len(s) == 4 else [0, *s[1:]])


def _order(patch: Patch, change: Callable) -> None:
    """Another order: change(generator of the pass, items)."""
    patch(loader.Stream, "_shuffle", lambda self, which_pass: change(
        np.random.default_rng([*self.seed, which_pass]), self.items))


def not_shuffled(patch):
    _order(patch, lambda rng, items: items)


def order_shifted(patch):
    patch(loader.Stream, "_shuffle", lambda self, which_pass: np.roll(
        np.random.default_rng(self.seed).permutation(self.items), 7 * which_pass))


def shuffled_in_blocks(patch):
    _order(patch, lambda rng, items: np.concatenate([*map(rng.permutation, np.array_split(items, 4))]))


def drawn_with_replacement(patch):
    _order(patch, lambda rng, items: rng.choice(items, len(items)))


def last_images_never_shown(patch):
    _order(patch, lambda rng, items: rng.permutation(np.resize(items[:-3], len(items))))


def one_class_twice_as_often(patch):
    def changed(rng, items):
        images = np.unique(items)
        quarter = len(images) // 4
        return rng.permutation(np.where(np.isin(items, images[:quarter]), np.roll(images, quarter)[
            np.searchsorted(images, items)], items))

    _order(patch, changed)


def ranks_share_the_order(patch):
    init = loader.Stream.__init__

    def changed(self, items, batch_size, min_items, seed, rank, world_size):
        init(self, items, batch_size, min_items, seed, 0, world_size)

    patch(loader.Stream, "__init__", changed)


def ranks_overlap(patch):
    def changed(self, step):
        which_pass, position = divmod(step, self.steps_per_pass)
        start = position * self.world_size * self.batch_size + self.rank * self.batch_size // 2
        return self._order(which_pass)[start:start + self.batch_size]

    patch(loader.Stream, "indices", changed)


# Generators


def views_without_step(patch):
    _seeds(patch, lambda s: [*s[:2], 0, s[3]] if len(s) == 4 else s)


def views_repeat_after_100_steps(patch):
    _seeds(patch, lambda s: [*s[:2], s[2] % 100, s[3]] if len(s) == 4 else s)


def views_without_rank(patch):
    _seeds(patch, lambda s: s[:3] if len(s) == 4 else s)


def views_without_seed(patch):
    _seeds(patch, lambda s: [0, *s[1:]] if len(s) == 4 else s)


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


def same_flip(patch):
    _pair(patch, lambda plan: plan._replace(strong=plan.strong._replace(flip=plan.weak.flip)))


def same_crop(patch):
    _pair(patch, lambda plan: plan._replace(strong=plan.strong._replace(offset=plan.weak.offset)))


def same_crop_row(patch):
    _pair(patch, lambda plan: plan._replace(strong=plan.strong._replace(
        offset=np.stack([plan.weak.offset[:, 0], plan.strong.offset[:, 1]], axis=1))))


def one_draw_a_batch(patch):
    _pair(patch, lambda plan: plan.take(np.zeros(len(plan.weak.flip), np.int64)))


def labeled_drawn_as_unlabeled(patch):
    latest, draw, draw_weak = threading.local(), views.draw, views.draw_weak

    def changed_weak(rng, n, *args, **kwargs):
        latest.drawn = n, draw_weak(rng, n, *args, **kwargs)
        return latest.drawn[1]

    def changed(rng, n, *args, **kwargs):
        count, labeled = getattr(latest, "drawn", None) or (0, draw_weak(rng, 1, *args, **kwargs))
        plan = draw(rng, n, *args, **kwargs)
        first = np.arange(n) < count
        flip, offset = (np.resize(field, (n, *field.shape[1:])) for field in labeled)
        return plan._replace(weak=views.WeakPlan(np.where(first, flip, plan.weak.flip),
                                                 np.where(first[:, None], offset, plan.weak.offset)))

    patch(views, "draw_weak", changed_weak)
    patch(views, "draw", changed)


def crop_square(patch):
    _weak(patch, lambda rng, plan, flip: plan._replace(offset=plan.offset[:, [0, 0]]))


def crop_never_at_the_far_edge(patch):
    _weak(patch, lambda rng, plan, flip: plan._replace(
        offset=np.minimum(plan.offset, np.maximum(0, plan.offset.max(initial=0) - 1))))


def crop_central(patch):
    def changed(rng, n, size, flip=True):
        pads = [views.padding(side) for side in np.broadcast_to(size, 2)]
        return views.WeakPlan((rng.random(n) < 0.5) & flip, np.tile(pads, (n, 1)))

    patch(views, "draw_weak", changed)


def flip_in_first_half(patch):
    _weak(patch, lambda rng, plan, flip: plan._replace(
        flip=(np.arange(len(plan.flip)) < len(plan.flip) // 2) & flip))


def flip_rare(patch):
    _weak(patch, lambda rng, plan, flip: plan._replace(flip=plan.flip & (rng.random(len(plan.flip)) < 0.5)))


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


# Of _FIELDS, those that change the distribution of one draw by itself, which the stage before `data` sees.
_SHOWN_ALONE = ("last-operation-never-drawn", "second-operation-never-applied", "magnitude-of-the-operation",
                "magnitudes-small", "signs-positive", "sign-of-magnitude")
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


# Settings


def mu_ignored(patch):
    init = loader.Loader.__init__

    def changed(self, data, split, batch_size, mu, *args, **kwargs):
        init(self, data, split, batch_size, min(mu, 1), *args, **kwargs)

    patch(loader.Loader, "__init__", changed)


def strong_recipe_ignored(patch):
    patch(loader, "POLICIES", {name: recipes.POLICIES["torchssl" if name == "reference" else "reference"]
                               for name in recipes.POLICIES})


def include_labeled_inverted(patch):
    right = split.choose_split
    patch(split, "choose_split", lambda labeled, count, include_labeled=True: right(
        labeled, count, not include_labeled))


def labels_of_all_images(patch):
    init = loader.Loader.__init__

    def changed(self, data, split, *args, **kwargs):
        init(self, data, dataclasses.replace(split, labeled=np.arange(len(data))), *args, **kwargs)

    patch(loader.Loader, "__init__", changed)


def unlabeled_are_the_labeled(patch):
    init = loader.Loader.__init__

    def changed(self, data, split, *args, **kwargs):
        init(self, data, dataclasses.replace(split, unlabeled=split.labeled), *args, **kwargs)

    patch(loader.Loader, "__init__", changed)


PLANTS = [
    Plant("strong-views-rolled", "data", "the strong view of the neighbouring image", strong_views_rolled),
    Plant("strong-views-reversed", "data", "strong views in the reverse order of the weak ones", strong_views_reversed),
    Plant("last-strong-view-repeated", "data", "one strong view of the batch is that of another image",
          last_strong_view_repeated),
    Plant("labels-rolled", "data", "labels of the neighbouring image", labels_rolled),
    Plant("labels-sorted", "data", "labels in order, images not", labels_sorted),
    Plant("unlabeled-targets-rolled", "data", "true labels of the unlabeled images, for monitoring, of the neighbour",
          unlabeled_targets_rolled),
    Plant("labels-int32", "data", "labels of another type", labels_int32),
    Plant("channels-swapped", "data", "blue, green, red", channels_swapped),
    Plant("strong-channels-swapped", "data", "blue, green, red in the strong views alone", strong_channels_swapped),
    Plant("images-transposed", "data", "height and width exchanged", images_transposed),
    Plant("lowest-bit-lost", "data", "views that went through another number format", lowest_bit_lost),
    Plant("batch-one-short", "data", "one image less than configured", batch_one_short),
    Plant("weak-index-off-by-one", "augment", "the weak view of the image that follows in the data set",
          weak_index_off_by_one),
    Plant("strong-index-off-by-one", "augment", "the strong view of the image that follows in the data set",
          strong_index_off_by_one),
    Plant("strong-from-weak", "augment", "RandAugment on the weak view, without a flip and crop of its own",
          strong_from_weak),
    Plant("strong-plan-rolled", "augment", "each strong view by the plan of its neighbour", strong_plan_rolled),
    Plant("views-swapped", "augment", "the strong views in the place of the weak ones", views_swapped),
    Plant("labeled-strongly-augmented", "augment", "labeled images get RandAugment, too", labeled_strongly_augmented),
    Plant("data-set-written-to", "data", "augmentation in place, on the data set", data_set_written_to),
    Plant("batch-repeated", "data", "a batch made ahead is handed out twice", batch_repeated),
    Plant("order-the-same-each-pass", "data", "images are shuffled once for all passes", order_the_same_each_pass),
    Plant("order-without-seed", "data", "the same order of images under every seed", order_without_seed),
    Plant("not-shuffled", "data", "images in the order of the data set", not_shuffled),
    Plant("order-shifted", "data", "each pass in the order of the first, from another image on", order_shifted),
    Plant("shuffled-in-blocks", "data", "a buffer of a quarter of the data is shuffled, as streaming readers do",
          shuffled_in_blocks),
    Plant("drawn-with-replacement", "data", "each place of a pass holds any image", drawn_with_replacement),
    Plant("last-images-never-shown", "data", "the data set's last images are left out, others repeated",
          last_images_never_shown),
    Plant("one-class-twice-as-often", "data", "a quarter of the labeled images takes the place of another quarter",
          one_class_twice_as_often),
    Plant("ranks-share-the-order", "data", "every rank shows the images of rank 0", ranks_share_the_order),
    Plant("ranks-overlap", "data", "the share of a rank begins in the middle of that before", ranks_overlap),
    Plant("views-without-step", "data", "every step draws the same views", views_without_step),
    Plant("views-repeat-after-100-steps", "data", "the generator is seeded by the step modulo 100",
          views_repeat_after_100_steps),
    Plant("views-without-rank", "data", "all ranks draw the same views", views_without_rank),
    Plant("views-without-seed", "data", "every run draws the same views", views_without_seed),
    Plant("views-from-a-global-generator", "data", "a batch depends on how many were made before",
          views_from_a_global_generator),
    Plant("same-flip", "data", "the strong view is mirrored where the weak one is", same_flip),
    Plant("same-crop", "data", "the strong view is the weak one's crop", same_crop),
    Plant("same-crop-row", "data", "weak and strong crops begin in the same row", same_crop_row),
    Plant("one-draw-a-batch", "augment", "all unlabeled images of a batch are augmented alike", one_draw_a_batch),
    Plant("labeled-drawn-as-unlabeled", "augment", "labeled images get the flips and crops of the weak views",
          labeled_drawn_as_unlabeled),
    Plant("crop-square", "data", "crops move along the diagonal: one number for row and column", crop_square),
    Plant("crop-never-at-the-far-edge", "augment", "randint without its upper end", crop_never_at_the_far_edge),
    Plant("crop-central", "augment", "no crop at all", crop_central),
    Plant("flip-in-first-half", "data", "images of the second half of a batch are never mirrored", flip_in_first_half),
    Plant("flip-0.25", "augment", "mirrored with a probability of a quarter", flip_rare),
    Plant("flip-setting-inverted", "augment", "mirrored where the data set does not allow it, and not where it does",
          flip_setting_inverted),
    Plant("mu-ignored", "data", "as many unlabeled images as labeled ones", mu_ignored),
    Plant("strong-recipe-ignored", "data", "another recipe of strong views than configured", strong_recipe_ignored),
    Plant("include-labeled-inverted", "augment", "labeled images among the unlabeled against the setting",
          include_labeled_inverted),
    Plant("labels-of-all-images", "data", "labeled batches are taken from all images", labels_of_all_images),
    Plant("unlabeled-are-the-labeled", "data", "unlabeled batches hold the labeled images alone",
          unlabeled_are_the_labeled),
    *(Plant(name, "augment" if name in _SHOWN_ALONE else "data", what, _field(field, change))
      for name, (what, field, change) in _FIELDS.items()),
]
