"""The two endless streams of a FixMatch step, labeled and unlabeled, prepared in background threads.

A batch is a pure function of (seed, rank, step), and with CTAugment of its rates at a fixed earlier step: every step
draws from a generator of its own. So the order does not depend on the number of threads, and to resume is to start at
another step. B labeled images, M = mu * B unlabeled ones.
"""

import collections
import concurrent.futures
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fixmatch.data.augment import ctaugment, randaugment, views
from fixmatch.data.augment.recipes import POLICIES
from fixmatch.data.dataset import Dataset
from fixmatch.data.split import Split

EXPAND_STEPS = 1024  # the labeled set is repeated to last this many steps a pass (the reference's "expand labels")
_LABELED_ORDER, _UNLABELED_ORDER, _AUGMENTATION = range(3)  # one random stream each


class Batch(NamedTuple):
    x: np.ndarray  # uint8 [B, H, W, 3] labeled images, weakly augmented
    targets_x: np.ndarray  # int64 [B]
    u_w: np.ndarray  # uint8 [M, H, W, 3] unlabeled images, weak views
    u_s: np.ndarray  # uint8 [M, H, W, 3] the same images, strong views
    targets_u: np.ndarray  # int64 [M] their true labels, for monitoring only


class ProbedBatch(NamedTuple):
    """A Batch for CTAugment: with a probe of every labeled image."""

    x: np.ndarray
    targets_x: np.ndarray
    u_w: np.ndarray
    u_s: np.ndarray
    targets_u: np.ndarray
    probes: np.ndarray  # uint8 [B, H, W, 3], x further augmented
    probe_plan: ctaugment.Plan  # and how


class Stream:
    """Endless shuffled passes over `items`, repeated to at least `min_items` a pass; a pass's ragged end is dropped.

    All ranks share one shuffled order and take its batches in turn.
    """

    def __init__(self, items: np.ndarray, batch_size: int, min_items: int, seed: tuple, rank: int, world_size: int):
        repeats = -(-max(min_items, batch_size * world_size) // len(items))
        self.items = np.tile(items, repeats)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.steps_per_pass = len(self.items) // (batch_size * world_size)
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def indices(self, step: int) -> np.ndarray:
        """int64 [batch_size], the images of this rank at `step`."""
        which_pass, position = divmod(step, self.steps_per_pass)
        start = (position * self.world_size + self.rank) * self.batch_size
        return self._order(which_pass)[start:start + self.batch_size]

    def _shuffle(self, which_pass: int) -> np.ndarray:
        return np.random.default_rng([*self.seed, which_pass]).permutation(self.items)


class Loader:
    """Labeled and unlabeled batches of one rank.

    Args:
        data: the training images.
        split: which of them are labeled and which unlabeled.
        batch_size: B.
        mu: M / B; 0 for batches without unlabeled images.
        seed: of every random draw made here.
        flip: whether views may be mirrored.
        strong: the recipe of the strong views, a name in POLICIES.
        threads: that prepare batches ahead; the batches do not depend on it.
        ahead: batches kept ready.

    Attributes:
        cta: the CTAugment that strong views are drawn from, to be told of the probes after every step; else None.
    """

    def __init__(self, data: Dataset, split: Split, batch_size: int, mu: int, seed: int, flip: bool, rank: int = 0,
                 world_size: int = 1, threads: int = 1, ahead: int = 4, strong: str = "reference"):
        self.data, self.flip, self.seed, self.rank = data, flip, seed, rank
        self.threads, self.ahead = threads, ahead
        self.labeled = Stream(split.labeled, batch_size, batch_size * world_size * EXPAND_STEPS, (seed, _LABELED_ORDER),
                              rank, world_size)
        self.unlabeled = Stream(split.unlabeled, batch_size * mu, 1, (seed, _UNLABELED_ORDER), rank,
                                world_size) if mu else None
        self.strong = strong
        self.cta = ctaugment.CTAugment(lag=ahead) if strong == "ctaugment" and mu else None

    def batch(self, step: int) -> Batch:
        """The batch of `step`, 0-based."""
        rng = np.random.default_rng([self.seed, _AUGMENTATION, step, self.rank])
        labeled = self.labeled.indices(step)
        unlabeled = self.unlabeled.indices(step) if self.unlabeled else np.empty(0, dtype=np.int64)
        images, size = self.data.images, self.data.images.shape[1:3]
        x = views.weak(images, views.draw_weak(rng, len(labeled), size, self.flip), labeled)
        policy = self.cta.policy(step) if self.cta else POLICIES[self.strong]
        u_w, u_s = views.weak_and_strong(images, unlabeled, views.draw(rng, len(unlabeled), size, self.flip, policy))
        batch = Batch(x, self.data.labels[labeled], u_w, u_s, self.data.labels[unlabeled])
        if not self.cta:
            return batch
        plan = ctaugment.draw_probe(rng, len(labeled))
        return ProbedBatch(*batch, randaugment.apply(x, plan), plan)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps first_step..last_step-1 in order, made ahead in background threads."""
        with concurrent.futures.ThreadPoolExecutor(self.threads, thread_name_prefix="loader") as pool:
            ready = collections.deque()
            try:
                for step in range(first_step, last_step):
                    ready.append(pool.submit(self.batch, step))
                    if len(ready) > self.ahead:
                        yield ready.popleft().result()
                while ready:
                    yield ready.popleft().result()
            finally:
                for future in ready:
                    future.cancel()
