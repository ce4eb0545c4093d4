"""Whether an exported model computes what its checkpoint does, on test images of the run's own data set.

Shapes: N images of H x W pixels, K classes.
"""

import dataclasses
import itertools
import pathlib
from dataclasses import dataclass

import numpy as np

from fixmatch.config import Config
from fixmatch.data import DataError, load_source
from fixmatch.inference import Facts, Run
from fixmatch.selfcheck import SelfCheckFailed

TOLERANCE = 1e-4  # of each probability; a slope that is lost on the way changes them by 0.03 and more
_COMPARED = 500  # test images, at most
_BATCH = 32


@dataclass(frozen=True)
class Sample:
    """Images that an export is compared on."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    labels: np.ndarray | None  # int64 [N]; None where they are random
    what: str  # how many of what, for messages


def choose_sample(config: Config, facts: Facts) -> Sample:
    """Test images of the run's data set, evenly spaced; seeded random ones where those are not there."""
    data = dataclasses.replace(config.data, download=False)
    try:
        test = load_source(data).test
        if not len(test):
            raise DataError(f"{data.root}: has none")
        if tuple(test.images.shape[1:3]) != facts.image_size:
            raise DataError(f"its images are {test.images.shape[2]}x{test.images.shape[1]} pixels now")
    except DataError as error:
        images = random_images(facts)
        return Sample(images, None, f"{len(images)} random images, as the test images cannot be read ({error})")
    count = min(len(test), _COMPARED)
    chosen = np.linspace(0, len(test) - 1, count).round().astype(np.int64)
    return Sample(np.ascontiguousarray(test.images[chosen]), test.labels[chosen],
                  f"{'all ' if count == len(test) else f'{count} of the '}{len(test):,} test images of {data.name}")


def random_images(facts: Facts, count: int = 100) -> np.ndarray:
    """uint8 [count, H, W, 3]: a coarse pattern and noise, in shares that differ from image to image."""
    rng, (height, width) = np.random.default_rng(0), facts.image_size
    coarse = rng.random((count, 4, 4, 3))[:, np.arange(height) * 4 // height][:, :, np.arange(width) * 4 // width]
    share = rng.random((count, 1, 1, 1))
    return (255 * (share * coarse + (1 - share) * rng.random(coarse.shape))).round().astype(np.uint8)


def in_batches(run: Run, images: np.ndarray) -> np.ndarray:
    """Probabilities float32 [N, K], by batches of 1, of _BATCH and of what is left, since any size is to work."""
    cuts = [0, *range(1, len(images), _BATCH), len(images)]
    return np.concatenate([run(images[start:end]) for start, end in itertools.pairwise(cuts)])


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


@dataclass(frozen=True)
class Comparison:
    """Of a model that would become `out`, with what the checkpoint computes."""

    out: pathlib.Path
    sample: Sample
    expected: np.ndarray  # float32 [N, K]

    def with_run(self, runtime: str, run: Run) -> np.ndarray:
        """What `run` computes of the sample. Raises SelfCheckFailed where it is something else."""
        found = in_batches(run, self.sample.images)
        worst = _difference(found, self.expected)
        if not worst <= TOLERANCE:  # so that NaN is refused, too
            raise SelfCheckFailed(f"{self.out}: not written: {runtime} gives probabilities that differ from the "
                                  f"checkpoint's by {worst:.1e}, more than {TOLERANCE:.0e}")
        return found

    def to_json(self, found: dict[str, np.ndarray]) -> dict:
        """What an export says of it."""
        return {"images": self.sample.what, "tolerance": TOLERANCE,
                "largest_difference": {name: _difference(run, self.expected) for name, run in found.items()}}
