"""The loader: batches as a function of seed, rank and step, and nothing else."""

import threading

import numpy as np
import pytest

from fixmatch.data.dataset import Dataset
from fixmatch.data.loader import Loader, Stream
from fixmatch.data.split import Split, draw_split

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 20)).astype(np.int64)
DATA = Dataset(np.random.default_rng(1).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8), LABELS)
SPLIT = draw_split(LABELS, 10, 20, seed=0)


def loader(**changes) -> Loader:
    return Loader(**{"data": DATA, "split": SPLIT, "batch_size": 4, "mu": 3, "seed": 5, "flip": True} | changes)


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_shapes_types_and_labels():
    batch = loader().batch(0)
    assert [part.shape for part in batch] == [(4, 8, 8, 3), (4,), (12, 8, 8, 3), (12, 8, 8, 3), (12,), (12,)]
    assert [part.dtype for part in batch] == [np.uint8, np.int64, np.uint8, np.uint8, np.int64, np.int64]
    made = loader()
    assert np.array_equal(batch.targets_x, LABELS[made.labeled.indices(0)])
    assert np.array_equal(batch.targets_u, LABELS[made.unlabeled.indices(0)])
    assert np.array_equal(SPLIT.unlabeled[batch.index_u], made.unlabeled.indices(0))
    assert set(made.labeled.indices(0)) <= set(SPLIT.labeled)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_do_not_depend_on_threads_or_numpys_global_state(threads):
    np.random.seed(threads)
    found = list(loader(threads=threads).batches(0, 30))
    assert len(found) == 30
    assert all(same(batch, loader().batch(step)) for step, batch in enumerate(found))


def test_to_resume_is_to_start_at_another_step():
    whole = list(loader().batches(0, 40))
    assert all(same(a, b) for a, b in zip(whole[23:], loader(threads=2).batches(23, 40), strict=True))


def test_seeds_and_steps_differ():
    first = loader().batch(0)
    assert not same(first, loader().batch(1))
    assert not same(first, loader(seed=6).batch(0))
    assert not np.array_equal(first.u_w, first.u_s)


def test_a_loader_that_is_left_early_stops_its_threads():
    batches = loader(threads=2).batches(0, 10**6)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_a_pass_shows_every_unlabeled_image_at_most_once():
    stream = loader().unlabeled
    assert stream.steps_per_pass == 200 // 12
    one = np.concatenate([stream.indices(step) for step in range(16)])
    two = np.concatenate([stream.indices(step) for step in range(16, 32)])
    assert len(set(one)) == len(set(two)) == 16 * 12
    assert not np.array_equal(one, two)


def test_over_passes_every_image_is_shown():
    stream = loader().unlabeled
    assert set(np.concatenate([stream.indices(step) for step in range(5 * 16)])) == set(range(200))


def test_the_labeled_set_is_repeated_to_1024_steps_a_pass():
    stream = loader().labeled
    assert stream.steps_per_pass == (1024 * 4 + 19) // 20 * 20 // 4
    shown = np.concatenate([stream.indices(step) for step in range(stream.steps_per_pass)])
    assert set(np.bincount(shown)[SPLIT.labeled]) == {205}


def test_two_ranks_share_no_image_and_are_one_rank_of_twice_the_batch():
    ranks = [loader(rank=rank, world_size=2) for rank in (0, 1)]
    one = loader(batch_size=8)
    for stream in ("labeled", "unlabeled"):
        for step in range(40):
            parts = [getattr(rank, stream).indices(step) for rank in ranks]
            assert np.array_equal(np.concatenate(parts), getattr(one, stream).indices(step))
    a_pass = range(ranks[0].unlabeled.steps_per_pass)
    seen = [set(np.concatenate([rank.unlabeled.indices(step) for step in a_pass])) for rank in ranks]
    assert not seen[0] & seen[1]


def test_ranks_steps_and_seeds_augment_the_same_images_differently():
    one_image = Dataset(np.repeat(DATA.images[:1], 200, axis=0), LABELS)
    made = loader(data=one_image), loader(data=one_image, seed=6), loader(data=one_image, rank=1, world_size=2)
    batches = [made[0].batch(1), *(one.batch(0) for one in made)]
    for part in ("x", "u_w", "u_s"):
        assert len({getattr(batch, part).tobytes() for batch in batches}) == 4


def test_a_set_smaller_than_a_batch_is_repeated():
    stream = Stream(np.arange(5), batch_size=12, min_items=1, seed=(0,), rank=0, world_size=1)
    assert stream.steps_per_pass == 1
    assert np.bincount(stream.indices(0), minlength=5).max() <= 3  # five images, three times, the end dropped
    split = Split(labeled=np.arange(3), unlabeled=np.arange(5))
    assert loader(split=split).batch(7).u_w.shape == (12, 8, 8, 3)


def test_without_unlabeled_images():
    batch = loader(mu=0).batch(3)
    assert [len(part) for part in batch] == [4, 4, 0, 0, 0, 0]
    assert np.array_equal(batch.x, loader().batch(3).x)


def test_flip_off_never_mirrors():
    row = 30 * np.arange(8, dtype=np.uint8)
    rising = Dataset(np.ascontiguousarray(np.broadcast_to(row[:, None], (200, 8, 8, 3))), LABELS)

    def mirrored(flip):
        batches = (loader(data=rising, flip=flip).batch(step) for step in range(20))
        return sum((image[:, 6] < image[:, 1]).all() for batch in batches for image in batch.u_w)
    assert mirrored(False) == 0
    assert 80 < mirrored(True) < 160  # of 240


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_thread_reaches_the_caller_at_its_step(threads):
    broken = loader(threads=threads)
    make = broken.batch

    def batch(step):
        if step == 6:
            raise RuntimeError("step 6")
        return make(step)
    broken.batch = batch
    batches = broken.batches(0, 20)
    assert len([next(batches) for _ in range(6)]) == 6
    with pytest.raises(RuntimeError, match="step 6"):
        next(batches)


def test_an_index_outside_the_data_is_an_error():
    with pytest.raises(IndexError):
        loader(split=Split(labeled=np.array([200]), unlabeled=np.arange(200))).batch(0)
