"""The first batches of the very Loader that is about to train, on the run's own images."""

import contextlib
from collections.abc import Iterator

import numpy as np

from fixmatch.config import Config
from fixmatch.data.dataset import Source
from fixmatch.data.loader import Loader
from fixmatch.data.split import Split
from parity.batches import contents, order
from parity.batches.watch import watched
from parity.compare import Row

_PIXELS = 2**19  # of each kind of view and batch that are compared with Pillow's: 512 images of 32 x 32


def rows_of_run(loader: Loader, source: Source, split: Split, config: Config, first_step: int = 0,
                steps: int = 3, world_size: int = 1) -> Iterator[Row]:
    """What `loader` gives for `steps` steps from `first_step` on, and one pass of both its streams.

    Asks the loader for batches as the trainer does and leaves it as it was. Everything that is expected comes from the
    source, the split and the configuration; the loader's own word is taken for what it draws (`rows` has proven how)
    and for which images its streams name, each of which is then checked against the pixels and the split.

    Args:
        source: with `flip` as the run has it, the setting augment.flip included.
        steps: with CTAugment at most as many as the loader prepares ahead.
        world_size: how many processes train together; the loader is that of rank 0.
    """
    labels, mu = source.train.labels, config.train.mu if config.ssl.mode == "fixmatch" else 0
    most = max(32, _PIXELS // (source.train.images[0].size // 3))
    batch, size = config.train.batch_size, source.train.images.shape[1:3]
    yield from order.split(split, labels, _labels_a_class(config, len(source.classes), labels),
                           config.data.include_labeled, whole=not config.data.split_file)
    yield from _ranks(loader, split, batch, mu, world_size)
    with contextlib.closing(loader.batches(first_step, first_step + steps)) as ahead:
        for step, trained in enumerate(ahead, start=first_step):
            made, drawn = watched(loader, step)
            found = [*contents.shapes(made, drawn, batch, batch * mu, size, config.augment.strong)]
            if all(row.passed for row in found):
                labeled = loader.labeled.indices(step)
                unlabeled = loader.unlabeled.indices(step) if mu else np.empty(0, np.int64)
                found += contents.labels(made, labels[labeled], labels[unlabeled])
                found.append(contents.numbers(made, unlabeled, split.unlabeled))
                found += contents.pictures(made, drawn, source.train.images, labeled, unlabeled, most)
                flipped = [plan.flip.any() for plan in (*drawn.labeled, *(w for p in drawn.unlabeled for w in p[:2]))]
                found.append(contents.exact("draws/flips as allowed", source.flip or not any(flipped),
                                            "views are mirrored, which these images may not be"))
            found.append(order.same("order/the batch that is trained on", trained, made))
            yield from (row._replace(tensor=f"{row.tensor} of step {step}") for row in found)


def _labels_a_class(config: Config, classes: int, labels: np.ndarray) -> np.ndarray | None:
    """int64 [K], as the configuration asks; None where a file or the data set's own fold says which are labeled."""
    data = config.data
    if data.split_file or data.fold is not None:
        return None
    if data.labels_per_class:
        return np.array(data.labels_per_class)
    return np.full(classes, data.num_labeled // classes) if data.num_labeled else np.bincount(
        labels[labels >= 0], minlength=classes)


def _ranks(loader: Loader, split: Split, batch: int, mu: int, world_size: int) -> Iterator[Row]:
    """The loader is rank 0's, and the shares of all ranks together make passes over the split's images."""
    streams = {name: stream for name in ("labeled", "unlabeled") if (stream := getattr(loader, name))}
    for name, stream in streams.items():
        yield contents.exact(f"ranks/{name} share", (stream.rank, stream.world_size) == (0, world_size),
                             f"is rank {stream.rank}'s of {stream.world_size} and not rank 0's of {world_size}")
    yield contents.exact("ranks/augmentation", loader.rank == 0, f"draws as rank {loader.rank}, not 0")
    every = {name: [type(stream)(np.unique(stream.items), stream.batch_size, len(stream.items), stream.seed, rank,
                                 stream.world_size) if rank != stream.rank else stream
                    for rank in range(stream.world_size)] for name, stream in streams.items()}
    for name, ranks in every.items():
        yield from order.passes(name, ranks, getattr(split, name), batch * (mu if name == "unlabeled" else 1))
