"""What a user should know before a run trains: the images of each class, and whether so few steps are enough.

Pure functions; run.py says what they return.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fixmatch.config import OWN_IMAGES, Config
from fixmatch.data.dataset import Source, shown
from fixmatch.data.split import Split
from fixmatch.report.figures import interval

_CLASSES_SHOWN = 20  # so many classes are listed; of more the extremes are named
_SHARES = (0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.5, 0.0)  # what fitting_share chooses from
# A moving average with the share d remembers 1 / (1 - d) steps. After 5 times as many, 0.7 % of it is its first value,
# which for the average of the weights is noise. Running statistics may hold a little more of theirs, 0 and 1: with 2.5
# times as many, 8 %, configs/digits.yaml reaches what its header says.
_EMA_SPANS, _BN_SPANS = 5, 2.5


@dataclass(frozen=True)
class Counts:
    """Images of each class, {name: number}."""

    labeled: dict[str, int]
    test: dict[str, int]


def counts(source: Source, split: Split) -> Counts:
    classes = [shown(name) for name in source.classes]
    found = (np.bincount(labels, minlength=len(classes)).tolist()
             for labels in (source.train.labels[split.labeled], source.test.labels))
    return Counts(*(dict(zip(classes, numbers, strict=True)) for numbers in found))


def before_training(config: Config, source: Source, split: Split) -> Iterator[str]:
    """The lines to say of this run: of the user's own images their classes, and a warning where steps are too few."""
    if config.data.name in OWN_IMAGES[1]:
        found = counts(source, split)
        yield describe_classes(found)
        if len(source.test):
            yield describe_test(found.test)
    if not config.model.init and (warning := short_run(config)):
        yield warning


def describe_classes(found: Counts) -> str:
    """How many images each class has, in one line."""
    if len(found.labeled) <= _CLASSES_SHOWN:
        each = ", ".join(f"{name}: {labeled} + {found.test[name]}" for name, labeled in found.labeled.items())
        return f"images of each class (labeled + test): {each}"
    return (f"{len(found.labeled)} classes, with {_extremes(found.labeled)} labeled and {_extremes(found.test)} test "
            "images")


def describe_test(test: dict[str, int]) -> str:
    """How exact an accuracy on so many test images is, in one line."""
    total, least, most = sum(test.values()), min(test.values()), max(test.values())
    low, high = interval(90.0, total)
    each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return (f"accuracy is measured on {total:,} test images, {each} a class: 90 % would mean {low:.1f} to {high:.1f} % "
            "(95 % interval)")


def fitting_share(steps: int) -> float:
    """The largest usual ema.decay or model.bn_momentum that fits a run of so many steps."""
    return next(share for share in _SHARES if share == 0 or steps >= round(_EMA_SPANS / (1 - share)))


def short_run(config: Config) -> str | None:
    """A warning that names values that fit, where a run ends before its averages have forgotten how they began."""
    steps, fits = config.train.total_steps, fitting_share(config.train.total_steps)
    late = {"ema.decay": (config.ema.decay, _EMA_SPANS), "model.bn_momentum": (config.model.bn_momentum, _BN_SPANS)}
    late = {name: share for name, (share, spans) in late.items()
            if share == 1 or (share > 0 and steps < round(spans / (1 - share)))}
    if not late:
        return None
    given = " and ".join(f"{name}={share:g}" for name, share in late.items())
    better = " ".join(f"{name}={fits:g}" for name in late)
    return (f"warning: {steps:,} steps are few for {given}: the average{'s' * (len(late) > 1)} will still hold much of "
            f"the initial values, and accuracies will be low; this fits: -o {better}")


def _extremes(found: dict[str, int]) -> str:
    least, most = min(found, key=found.get), max(found, key=found.get)
    return f"{found[least]} ({least}) to {found[most]} ({most})"
