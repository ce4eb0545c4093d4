"""A configuration for a folder of the user's own images that fits them, this machine and the time there is.

`fixmatch init` writes it. What it chooses: the largest images and the deepest network with which a run in that time
still has enough steps, from the measured time of a step.
"""

import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import psutil

from fixmatch.config import Config, from_dict
from fixmatch.config_docs import yaml_value
from fixmatch.data.dataset import Dataset
from fixmatch.data.loader import Loader
from fixmatch.data.sources.folder.decode import common_size
from fixmatch.data.sources.folder.listing import Listing
from fixmatch.data.sources.folder.scan import scan_folder
from fixmatch.data.sources.folder.table import scan_tables
from fixmatch.data.split import choose_split
from fixmatch.notes import fitting_share
from fixmatch.step import build_state, train_step

_SIDES = (32, 48, 64, 96, 128)  # pixels that larger images may be scaled to; 32 is the size of CIFAR's
_DEPTHS = (10, 16, 28)  # of a WideResNet of width 2
FEWEST = {10: 1500, 16: 7500, 28: 7500}  # steps that a network of this depth should have; more for deeper ones
_BYTES = 1.5e6  # of memory for each image of 32 x 32 in a step, for each of depth / 6 blocks; see README's table
_EVALUATIONS = 10  # of a run
_START = 0.1  # share of the time for a start on the labels alone; see docs/results.md
_SPARE = 0.9  # share of the time that is planned with: checkpoints, the preview and the report take some, too
_WARM_UP, _TIMED = 2, 3  # steps


@dataclass(frozen=True)
class Images:
    """What is known of the images before they are decoded."""

    name: str  # folder or csv, as data.name takes it
    root: pathlib.Path
    classes: int  # K
    labeled: int  # images, without those that will be held out
    unlabeled: int  # images that pseudo-labels can be made for: all training images
    test: int
    size: tuple[int, int]  # height and width that all have, or the side of a square that fits them
    test_fraction: float | None  # None where there are test images of their own


@dataclass(frozen=True)
class Rung:
    """One of the choices, from the cheapest on."""

    side: int | None  # pixels of a square; None leaves the images' own size
    depth: int


@dataclass(frozen=True)
class Choice:
    """What is written into the configuration, and the measured time of a step."""

    rung: Rung
    steps: int
    seconds: float  # a step with unlabeled images


def look(root: pathlib.Path) -> Images:
    """Lists the images and reads their sizes. Raises DataError where they cannot be trained on."""
    name = "csv" if root.is_file() or (root / "train.csv").is_file() else "folder"
    train = root if root.is_file() else root / "train.csv"
    listing: Listing = scan_folder(root) if name == "folder" else scan_tables(train)
    listing.labels()  # raises what is missing
    fraction = None
    if not listing.tested:
        fraction = 0.2 if np.bincount(listing.labels()[0] + 1)[1:].min() > 1 else 0.0
        listing = listing.with_test(listing.choose_test(fraction, 0)) if fraction else listing
    labels, test = listing.labels()
    return Images(name, root, len(listing.classes), int((labels >= 0).sum()), len(labels), len(test),
                  common_size(listing, listing.root), fraction)


def settings(images: Images, rung: Rung, on_gpu: bool, steps: int = 10**6) -> dict:
    """The settings of a rung, as a tree for `from_dict`."""
    batch = max(1, min(64, images.labeled))
    mu = max(1, min(7 if on_gpu else 2, images.unlabeled // batch))
    share = fitting_share(steps)
    data = {"name": images.name, "root": str(images.root.absolute()), "num_labeled": 0, "image_size": rung.side}
    if images.test_fraction is not None:
        data["test_fraction"] = images.test_fraction
    return {"data": data, "model": {"depth": rung.depth, "width": 2, "bn_momentum": share},
            "train": {"total_steps": steps, "batch_size": batch, "mu": mu,
                      "eval_every": max(1, steps // _EVALUATIONS)},
            "ssl": {"supervised_steps": int(_supervised_share(mu) * steps)}, "ema": {"decay": share}}


def _supervised_share(mu: int) -> float:
    """Of the steps of a run, those of the start. Each takes 1 / (1 + 2 mu) of the time of the others."""
    ratio = _START / (1 - _START) * (1 + 2 * mu)
    return ratio / (1 + ratio)


def choose(images: Images, minutes: float, on_gpu: bool, seconds_of: Callable[[Config, tuple[int, int]], float],
           memory: float) -> Choice:
    """Climbs from the cheapest choice as far as enough steps fit into the time.

    Args:
        seconds_of: measures a step of a configuration with images of (height, width).
        memory: bytes that a step may take.
    """
    chosen, cost = None, 0.0
    for rung in rungs(images.size):
        config = from_dict(settings(images, rung, on_gpu), "init")
        height, width = (rung.side, rung.side) if rung.side else images.size
        mu = config.train.mu
        count = config.train.batch_size * (1 + 2 * mu)
        dearer, cost = cost, height * width * rung.depth  # what a step takes grows about so
        if chosen and (_BYTES * count * cost / 6 / 1024 > memory or
                       _steps(minutes, chosen.seconds * cost / dearer, images, count, mu) < FEWEST[rung.depth] / 1.5):
            break  # it would not fit by far, so it is not even tried
        seconds = seconds_of(config, (height, width))
        steps = _steps(minutes, seconds, images, count, mu)
        if chosen and steps < FEWEST[rung.depth]:
            break
        chosen = Choice(rung, steps, seconds)
    return chosen


def rungs(size: tuple[int, int]) -> Iterator[Rung]:
    """Larger images first, then deeper networks, as small images lose more than a deep network gains."""
    sides = [side for side in _SIDES if side < min(size)]
    if max(size) <= 2 * _SIDES[-1]:
        sides.append(None)
    yield from (Rung(side, _DEPTHS[0]) for side in sides)
    yield from (Rung(sides[-1], depth) for depth in _DEPTHS[1:])


def _steps(minutes: float, seconds: float, images: Images, count: int, mu: int) -> int:
    """Steps for the time, with two leading digits, if one with unlabeled images, of `count`, takes `seconds`.

    An evaluation scores each test image twice, forward only.
    """
    evaluations = _EVALUATIONS * 2 * images.test * seconds / count / 3
    mean = seconds * (1 - _supervised_share(mu) * 2 * mu / (1 + 2 * mu))
    steps = max(1, int(_SPARE * (60 * minutes - evaluations) / mean))
    unit = 10 ** max(0, len(str(steps)) - 2)
    return steps // unit * unit


def measure(classes: int) -> Callable[[Config, tuple[int, int]], float]:
    """A function that gives the median seconds of a step of a configuration, on random images, data included."""
    def seconds_of(config: Config, size: tuple[int, int]) -> float:
        labels = np.arange(max(64, classes)) % classes
        pixels = np.random.default_rng(0).integers(0, 256, (len(labels), *size, 3), np.uint8)
        loader = Loader(Dataset(pixels, labels), choose_split(np.arange(len(labels)), len(labels)),
                        config.train.batch_size, config.train.mu, config.run.seed, flip=True)
        state, times = build_state(config, classes, (0.5,) * 3, (0.5,) * 3), []
        batches = loader.batches(0, _WARM_UP + _TIMED)
        for _ in range(_WARM_UP + _TIMED):
            started = time.perf_counter()
            train_step(state, next(batches), config.ssl).loss.item()
            times.append(time.perf_counter() - started)
        return statistics.median(times[_WARM_UP:])
    return seconds_of


def memory() -> float:
    """Bytes that a step may take: half of what the machine has."""
    return psutil.virtual_memory().total / 2


def describe_minutes(minutes: float) -> str:
    return f"about {minutes:g} minute{'s' * (minutes != 1)}"


def write(images: Images, choice: Choice, minutes: float, on_gpu: bool, command: str) -> str:
    """The configuration as YAML, with the reason for each choice."""
    tree = settings(images, choice.rung, on_gpu, choice.steps)
    model, train, data = tree["model"], tree["train"], tree["data"]
    size, span = choice.rung.side or "null", 1 / (1 - tree["ema"]["decay"])
    reason = ("so much of each class's labeled images is held out to measure the accuracy" if images.test_fraction else
              "0: no accuracy is measured, since a class has one labeled image only")
    test = "" if images.test_fraction is None else f"  test_fraction: {images.test_fraction:g}  # {reason}\n"
    return f"""\
#   {command}
# {images.classes} classes, {images.labeled:,} labeled, {images.unlabeled:,} training and {images.test:,} test images.
# Made for a run of {describe_minutes(minutes)} on a machine where a step took {choice.seconds:.3f} s.
# The meaning of every key: fixmatch train -c THIS_FILE --print-config
data:
  name: {data["name"]}
  root: {yaml_value(data["root"])}
  num_labeled: 0  # every label there is
  image_size: {size}  # pixels a side; null: {images.size[1]}x{images.size[0]}. Larger ones show more and take longer
{test}augment:
  flip: true  # false for digits, signs or text, of which the mirror image is another thing
model:
  depth: {model["depth"]}  # 10, 16, 22 or 28: deeper networks learn more, in more steps that take longer
  width: 2
  bn_momentum: {model["bn_momentum"]:g}  # fits the steps as ema.decay does
train:
  total_steps: {choice.steps}  # what fits into the time
  batch_size: {train["batch_size"]}
  mu: {train["mu"]}  # unlabeled images for each labeled one
  eval_every: {train["eval_every"]}  # a tenth of the run
ssl:
  supervised_steps: {tree["ssl"]["supervised_steps"]}  # on the labels alone, a tenth of the time
ema:
  decay: {tree["ema"]["decay"]:g}  # averages over {span:,.0f} steps; a run should have 5 times as many
"""
