"""A run's own settings, with probe images in the place of its own.

B labeled images a step, M = mu * B unlabeled ones, K classes.
"""

from dataclasses import dataclass

import numpy as np

from fixmatch.config import Config
from fixmatch.data.dataset import Dataset
from fixmatch.data.loader import Loader
from fixmatch.data.split import Split, draw_split
from parity.batches import probes

FAR = 2**20  # steps that CTAugment may draw ahead of its probes, of which nobody tells it here
_SIZES = {"digits": 8, "stl10": 96}  # pixels; folder and csv: data.image_size; else 32
_NOT_MIRRORED = ("digits", "svhn")
_MOST_PIXELS, _MOST_BYTES = 96, 2**27  # of an image's side, of all probe images


@dataclass(frozen=True)
class Probe:
    """What the Loader is given, and what the configuration asks of it."""

    data: Dataset
    split: Split
    per_class: np.ndarray  # int64 [K], labels
    include_labeled: bool
    batch: int  # B
    mu: int  # 0 for supervised training
    flip: bool
    strong: str
    seed: int

    def loader(self, rank: int = 0, world_size: int = 1, seed: int | None = None) -> Loader:
        """The production Loader, made as the trainer makes it."""
        return Loader(self.data, self.split, self.batch, self.mu, self.seed if seed is None else seed, self.flip, rank,
                      world_size, strong=self.strong, ahead=FAR)

    def streams(self) -> list[tuple[str, np.ndarray, int]]:
        """(attribute of the Loader, the images that are its, batch size) of each stream that there is."""
        both = [("labeled", self.split.labeled, self.batch), ("unlabeled", self.split.unlabeled, self.batch * self.mu)]
        return both if self.mu else both[:1]


def probe(config: Config, classes: int, seed: int) -> Probe:
    """The Probe of a run.

    Kept are K, B, mu, labels a class (where that many images are there), include_labeled, strong recipe, flip, and the
    image size up to _MOST_PIXELS and _MOST_BYTES. A pass has more than four steps, and never a whole number of them.
    """
    data, batch = config.data, config.train.batch_size
    mu = config.train.mu if config.ssl.mode == "fixmatch" else 0
    images = max(500, 6 * classes, 4 * batch * mu + batch * mu // 2)
    most = images // classes // 2
    per_class = np.clip(data.labels_per_class or [data.num_labeled // classes or most] * classes, 1, most)
    size = min(_SIZES.get(data.name, data.image_size or 32), _MOST_PIXELS, int((_MOST_BYTES / images / 3)**0.5))
    labels = np.random.default_rng([seed, 8]).permutation(np.arange(images) % classes)
    split = draw_split(labels, classes, tuple(per_class.tolist()), seed, data.include_labeled)
    flip = data.name not in _NOT_MIRRORED if config.augment.flip is None else config.augment.flip
    return Probe(probes.make(labels, max(8, size)), split, per_class, data.include_labeled, batch, mu, flip,
                 config.augment.strong, seed)
