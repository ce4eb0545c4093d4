"""What the numbers of a run mean when they look wrong: the likely reason, and the key to change.

Every rule is a pure function of lines of metrics.jsonl. Fractions are 0..1, accuracies percent, losses in nats.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fixmatch.config import Config
from fixmatch.notes import fitting_share

RECENT = 10  # so many lines of kind "train" are looked at
_EARLY = 0.05  # the share of a run in which nothing is expected of pseudo-labels
_FEW = 10  # pseudo-labels of fewer steps than these say nothing


@dataclass(frozen=True)
class Finding:
    name: str  # of the rule
    text: str  # one line: what is seen, the likely reason, what to change


@dataclass(frozen=True)
class Lines:
    """What the rules look at. K classes."""

    train: Sequence[dict]  # the last RECENT lines of kind "train", oldest first, at least one
    evaluations: Sequence[dict]  # all lines of kind "eval", oldest first, at least one
    config: Config
    classes: Sequence[str]  # K names

    @property
    def step(self) -> int:
        """That the last evaluation is of; the last line of kind "train" may be from long before it."""
        return self.evaluations[-1]["step"]

    def mean(self, key: str) -> float | None:
        """Over the steps of the recent lines that have it."""
        return _mean(self.train, key)

    def mask(self) -> float | None:
        """Its mean since the supervised start; None where there are no unlabeled images, or too few steps of them."""
        after = [line for line in self.train if not self.config.ssl.supervised_at(line["step"] - line["steps"])]
        return _mean(after, "mask") if sum(line["steps"] for line in after) >= _FEW else None


def _mean(lines: Sequence[dict], key: str) -> float | None:
    """Of `key` over the steps of the lines that have it: a line is itself the mean of line["steps"] steps."""
    having = [line for line in lines if line.get(key) is not None]
    return statistics.fmean([line[key] for line in having], [line["steps"] for line in having]) if having else None


def diagnose(train: Sequence[dict], evaluations: Sequence[dict], config: Config, classes: Sequence[str]
             ) -> list[Finding]:
    """What looks wrong in the last RECENT of the lines `train` and in all `evaluations`; mostly nothing."""
    if not train or not evaluations:
        return []
    lines = Lines(list(train)[-RECENT:], evaluations, config, classes)
    found = ((rule.__name__, rule(lines)) for rule in RULES)
    return [Finding(name, text) for name, text in found if text]


def mask_is_zero(lines: Lines) -> str | None:
    mask, ssl, total = lines.mask(), lines.config.ssl, lines.config.train.total_steps
    if mask is None or mask >= 0.01:
        return None
    step = max(lines.step, lines.train[-1]["step"])  # an unfinished run has trained on since its last evaluation
    seen = f"mask is {mask:.3f} and so is loss_u near 0: hardly a prediction reaches ssl.threshold = {ssl.threshold:g}"
    if step < ssl.supervised_steps + _EARLY * total:
        return f"{seen}; that is usual at the start (step {step:,} of {total:,})"
    return (f"{seen}, so the unlabeled images teach nothing; more steps (train.total_steps) or labels "
            "(data.num_labeled), a start on the labels alone (ssl.supervised_steps), or a lower ssl.threshold")


def ema_far_behind(lines: Lines) -> str | None:
    last, decay, total = lines.evaluations[-1], lines.config.ema.decay, lines.config.train.total_steps
    if last["raw"]["top1"] - last["ema"]["top1"] <= 10:
        return None
    seen = f"EMA top-1 is {last['ema']['top1']:.1f} %, raw {last['raw']['top1']:.1f} %"
    span = math.inf if decay == 1 else 1 / (1 - decay)
    if lines.step < 5 * span:
        return (f"{seen}: the average reaches back some 1 / (1 - ema.decay) = {span:,.0f} steps, and step "
                f"{lines.step:,} is too soon for it; for {total:,} steps ema.decay = {fitting_share(total):g} fits")
    return f"{seen}: the raw weights still rise steeply; more train.total_steps, or a lower ema.decay"


def raw_far_behind(lines: Lines) -> str | None:
    last = lines.evaluations[-1]
    if last["ema"]["top1"] - last["raw"]["top1"] <= 10 or _statistics_lag(lines):
        return None
    return (f"raw top-1 is {last['raw']['top1']:.1f} %, EMA {last['ema']['top1']:.1f} %: single steps throw the "
            "weights about, and only their average is good; a lower optim.lr, or larger train.batch_size")


def raw_loss_far_above(lines: Lines) -> str | None:
    """A test loss of 13 to 32 was seen where batch norm's statistics were those of the first steps."""
    if not _statistics_lag(lines):
        return None
    momentum, total = lines.config.model.bn_momentum, lines.config.train.total_steps
    return (f"raw test loss is {lines.evaluations[-1]['raw']['loss']:.1f}, training loss_x {lines.mean('loss_x'):.2f}: "
            f"batch norm's running statistics reach back 1 / (1 - model.bn_momentum) = {1 / (1 - momentum):,.0f} "
            f"steps, and step {lines.step:,} is too soon for them; for {total:,} steps model.bn_momentum = "
            f"{fitting_share(total):g} fits")


def _statistics_lag(lines: Lines) -> bool:
    """Whether batch norm's averages still hold their first values, and the raw test loss is worse than guessing."""
    raw, momentum = lines.evaluations[-1]["raw"]["loss"], lines.config.model.bn_momentum
    if raw is None or momentum == 1 or lines.step >= 5 / (1 - momentum):
        return False
    return raw > 2 * max(math.log(len(lines.classes)), lines.mean("loss_x"))


def pseudo_labels_of_one_class(lines: Lines) -> str | None:
    share, mask, last = lines.mean("top_class_share"), lines.mask(), lines.train[-1].get("top_class")
    most = 0.8 if len(lines.classes) > 2 else 0.95
    if share is None or last is None or mask is None or mask < 0.01 or share < most:
        return None
    name = lines.classes[last]
    return (f"{100 * share:.0f} % of the confident pseudo-labels are one class, now {name!r}: unless most unlabeled "
            "images are of it, the network has collapsed onto it; look at the labels, raise ssl.threshold or lower "
            "ssl.lambda_u or optim.lr")


def pseudo_labels_are_wrong(lines: Lines) -> str | None:
    impurity, mask = lines.mean("impurity"), lines.mask()
    if impurity is None or mask is None or mask < 0.05 or impurity < 20:
        return None
    return (f"{impurity:.0f} % of the confident pseudo-labels are wrong, and the network learns them: raise "
            "ssl.threshold, or give more labels (data.num_labeled)")


def test_loss_rises(lines: Lines) -> str | None:
    losses = [(line["ema"]["loss"], line["step"]) for line in lines.evaluations if line["ema"]["loss"] is not None]
    if len(losses) < 4:
        return None
    (least, when), (last, _), (before, _) = min(losses), losses[-1], losses[-2]
    if min(last, before) <= 1.25 * least or last - least < 0.1:
        return None
    return (f"EMA test loss rose from {least:.3f} at step {when:,} to {last:.3f}: the network becomes surer of what it "
            "has wrong; fewer train.total_steps, more labels, or a higher optim.weight_decay")


def data_is_slow(lines: Lines) -> str | None:
    wait = statistics.median(line["data_wait"] for line in lines.train)  # the first batch is waited for in any run
    if wait <= 0.1 or len(lines.train) < 3:
        return None
    threads = lines.config.runtime.data_threads
    return (f"{100 * wait:.0f} % of the time goes by waiting for batches: raise runtime.data_threads (now {threads}) "
            "where cores are idle")


RULES = (mask_is_zero, ema_far_behind, raw_far_behind, raw_loss_far_above, pseudo_labels_of_one_class,
         pseudo_labels_are_wrong, test_loss_rises, data_is_slow)
