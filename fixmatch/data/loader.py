"""The two endless streams of a FixMatch step, labeled and unlabeled, prepared in background threads.

A batch is a pure function of (seed, rank, step), because every step draws from a generator of its own. With CTAugment
it also depends on the rates at a fixed earlier step. So batches do not depend on the number of threads, and to resume
is to start at another step. A batch has B labeled images and M = mu * B unlabeled ones, each of H x W pixels.
"""

import collections
import concurrent.futures
import functools
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fixmatch.data.augment import ctaugment, randaugment, views
from fixmatch.data.augment.recipes import POLICIES
from fixmatch.data.dataset import Dataset, one_line
from fixmatch.data.split import Split
from fixmatch.log import LOGGER

EXPAND_STEPS = 1024  # the labeled set is repeated until a pass lasts this many steps (the reference's "expand labels")
_LABELED_ORDER, _UNLABELED_ORDER, _AUGMENTATION = range(3)  # each has a random stream of its own, so named in its seed


class LoaderError(RuntimeError):
    """A batch that could not be made; the message is one line."""


class Batch(NamedTuple):
    """What one training step sees."""

    x: np.ndarray  # uint8 [B, H, W, 3] labeled images, weakly augmented
    targets_x: np.ndarray  # int64 [B]
    u_w: np.ndarray  # uint8 [M, H, W, 3] unlabeled images, weak views
    u_s: np.ndarray  # uint8 [M, H, W, 3] the same images, strong views
    targets_u: np.ndarray  # int64 [M] their true labels, for monitoring only
    index_u: np.ndarray = np.empty(0, np.int64)  # int64 [M] which unlabeled images they are, 0..N-1


class ProbedBatch(NamedTuple):
    """What one training step with CTAugment sees: the fields of a Batch, and a probe of every labeled image."""

    x: np.ndarray
    targets_x: np.ndarray
    u_w: np.ndarray
    u_s: np.ndarray
    targets_u: np.ndarray
    index_u: np.ndarray
    probes: np.ndarray  # uint8 [B, H, W, 3], x further augmented
    probe_plan: ctaugment.Plan  # what was done to make probes of x


class Stream:
    """Endless shuffled passes over `items`, as indices of images, batch by batch.

    The items are repeated until a pass has at least `min_items` of them, and the end of a pass that fills no batch is
    dropped. All ranks share one shuffled order, made from `seed`, and take its batches in turn.
    """

    def __init__(self, items: np.ndarray, batch_size: int, min_items: int, seed: tuple, rank: int, world_size: int):
        repeats = -(-max(min_items, batch_size * world_size) // len(items))
        self.items = np.tile(items, repeats)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.steps_per_pass = len(self.items) // (batch_size * world_size)
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def indices(self, step: int) -> np.ndarray:
        """The images of this rank at `step`, int64 [batch_size]."""
        which_pass, position = divmod(step, self.steps_per_pass)
        start = (position * self.world_size + self.rank) * self.batch_size
        return self._order(which_pass)[start:start + self.batch_size]

    def _shuffle(self, which_pass: int) -> np.ndarray:
        return np.random.default_rng([*self.seed, which_pass]).permutation(self.items)


class Loader:
    """The labeled and unlabeled batches of one rank.

    Args:
        data: the training images.
        split: which of them are labeled and which unlabeled.
        batch_size: B.
        mu: M / B; 0 gives batches without unlabeled images.
        seed: of every random draw made here.
        flip: whether views may be mirrored.
        rank: which of the processes that train together this one is, 0..world_size-1.
        world_size: how many processes train together.
        threads: how many threads prepare batches; the batches do not depend on it.
        ahead: how many batches are kept ready.
        strong: the recipe of the strong views, a name in POLICIES.

    Attributes:
        cta: the CTAugment that strong views are drawn from, which is to be told of the probes after every step. It is
            None with another recipe, and without unlabeled images.
    """

    def __init__(self, data: Dataset, split: Split, batch_size: int, mu: int, seed: int, flip: bool, rank: int = 0,
                 world_size: int = 1, threads: int = 1, ahead: int = 4, strong: str = "reference"):
        self.data, self.split, self.flip, self.seed, self.rank = data, split, flip, seed, rank
        self.threads, self.ahead = threads, ahead
        self.labeled = Stream(split.labeled, batch_size, batch_size * world_size * EXPAND_STEPS, (seed, _LABELED_ORDER),
                              rank, world_size)
        self.unlabeled = Stream(split.unlabeled, batch_size * mu, 1, (seed, _UNLABELED_ORDER), rank,
                                world_size) if mu else None
        self._position = np.full(len(data), -1)  # of an image in split.unlabeled
        self._position[split.unlabeled] = np.arange(len(split.unlabeled))
        self.policy = POLICIES[strong]()
        self.cta = ctaugment.CTAugment(lag=ahead) if strong == "ctaugment" and mu else None

    def batch(self, step: int) -> Batch | ProbedBatch:
        """The batch of `step`, which counts from 0."""
        rng = np.random.default_rng([self.seed, _AUGMENTATION, step, self.rank])
        labeled = self.labeled.indices(step)
        unlabeled = self.unlabeled.indices(step) if self.unlabeled else np.empty(0, dtype=np.int64)
        images, size = self.data.images, self.data.images.shape[1:3]
        x = views.weak(images, views.draw_weak(rng, len(labeled), size, self.flip), labeled)
        policy = self.cta.policy(step) if self.cta else self.policy
        u_w, u_s = views.weak_and_strong(images, unlabeled, views.draw(rng, len(unlabeled), size, self.flip, policy))
        batch = Batch(x, self.data.labels[labeled], u_w, u_s, self.data.labels[unlabeled], self._position[unlabeled])
        if not self.cta:
            return batch
        plan = ctaugment.draw_probe(rng, len(labeled))
        return ProbedBatch(*batch, randaugment.apply(x, plan), plan)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch | ProbedBatch]:
        """Gives the batches of steps first_step..last_step-1 in order, made ahead in background threads."""
        with concurrent.futures.ThreadPoolExecutor(self.threads, thread_name_prefix="loader") as pool:
            ready = collections.deque()
            try:
                for step in range(first_step, last_step):
                    ready.append(pool.submit(self._made, step))
                    if len(ready) > self.ahead:
                        yield ready.popleft().result()
                while ready:
                    yield ready.popleft().result()
            finally:
                for future in ready:
                    future.cancel()

    def _made(self, step: int) -> Batch | ProbedBatch:
        """The batch of `step`, in a background thread. What fails there is raised by `batches` as one line."""
        try:
            return self.batch(step)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            LOGGER.info(traceback.format_exc(), extra={"behind_bar": True})  # for train.log
            raise LoaderError(f"the batch of step {step + 1} could not be made ({type(error).__name__}: "
                              f"{one_line(error)}); train.log has the traceback") from error
