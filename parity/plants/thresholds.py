"""Bugs in the policies of pseudo-labels, each on a run under the policy that has it."""

from collections.abc import Callable
from functools import partial

import numpy as np
import paddle
import paddle.nn.functional as F

from fixmatch import step as algorithm
from fixmatch import thresholds, trainer
from fixmatch.data.loader import Loader
from fixmatch.losses import pseudo_label
from parity.plants.plant import Patch, Plant

FLEX, FREE, SOFT = (("ssl.policy=flexmatch",), ("ssl.policy=freematch", "ssl.lambda_e=0.5"), ("ssl.policy=softmatch",))


def _policy(patch: Patch, name: str, change: Callable) -> None:
    """Policy `name` with change(right one, own, every, index, state, ssl) in its place."""
    right = thresholds.POLICIES[name]
    patch(thresholds, "POLICIES", {**thresholds.POLICIES, name: lambda *args: change(right, *args)})


def _bar_after_update(right, own, every, index, state, ssl):
    _, state = right(own, every, index, state, ssl)
    return right(own, every, index, state, ssl)[0], state


def _bar_before_update(right, own, every, index, state, ssl):
    bar = state["level"] * state["share"] / state["share"].max()
    weight = (own.max(axis=1) >= paddle.gather(bar, own.argmax(axis=1))).astype(own.dtype)
    return weight, right(own, every, index, state, ssl)[1]


def _linear_map(right, own, every, index, state, ssl):
    learned = paddle.gather(state["learned"], own.argmax(axis=1))
    return (own.max(axis=1) >= ssl.threshold * learned).astype(own.dtype), right(own, every, index, state, ssl)[1]


def _no_warm_up(right, own, every, index, state, ssl):
    weight, state = right(own, every, index, state, ssl)
    return weight, {**state, "learned": state["learned"] / state["learned"].max().clip(min=1e-12)}


def _unsure_remembered(right, own, every, index, state, ssl):
    sure = paddle.full_like(every, 0.0) + 2 * F.one_hot(every.argmax(axis=1), every.shape[1]).astype(every.dtype)
    return right(own, every, index, state, ssl)[0], right(own, sure, index, state, ssl)[1]


def _first_label_kept(right, own, every, index, state, ssl):
    weight, new = right(own, every, index, state, ssl)
    return weight, {**new, "assigned": paddle.where(state["assigned"] >= 0, state["assigned"], new["assigned"])}


def _places_instead_of_images(right, own, every, index, state, ssl):
    return right(own, every, paddle.arange(len(index)), state, ssl)


def _local_not_normalized(right, own, every, index, state, ssl):
    _, state = right(own, every, index, state, ssl)
    bar = paddle.gather(state["level"] * state["share"], own.argmax(axis=1))
    return (own.max(axis=1) >= bar).astype(own.dtype), state


def _histogram_of_probabilities(right, own, every, index, state, ssl):
    weight, new = right(own, every, index, state, ssl)
    return weight, {**new, "histogram": new["share"]}


def _one_deviation(right, own, every, index, state, ssl):
    weight, state = right(own, every, index, state, ssl)
    return weight ** 0.25, state  # exp(-d^2 / (2 var)) is the fourth root of exp(-d^2 / (2 var / 4))


def _biased_variance(right, own, every, index, state, ssl):
    weight, new = right(own, every, index, state, ssl)
    moved, count = new["variance"] - ssl.policy_decay * state["variance"], len(every)
    return weight, {**new, "variance": new["variance"] - moved / count}


def _both_sides(right, own, every, index, state, ssl):
    _, new = right(own, every, index, state, ssl)
    distance = own.max(axis=1) - new["mean"]
    return paddle.exp(-distance.square() / (new["variance"] / 2)), new


def _statistics_of_the_first_half(right, own, every, index, state, ssl):
    half = len(every) // 2
    return right(own, every[:half], index[:half], state, ssl)


def _fairness(patch: Patch, change: Callable) -> None:
    right = thresholds.fairness
    patch(thresholds, "fairness", lambda logits, weight, state: change(right, logits, weight, state))


def _alignment(patch: Patch, change: Callable) -> None:
    """The factors of distribution alignment and its state by change(right one, logits_x, every, state, ssl)."""
    right = thresholds._alignment
    patch(thresholds, "_alignment", lambda *args: change(right, *args))


def _towards_the_network(right, logits_x, every, state, ssl):
    ratio, state = right(logits_x, every, state, ssl)
    return 1 / ratio, state


def _state_before(right, logits_x, every, state, ssl):
    ratio, new = right(logits_x, every, state, ssl)
    before = (state["aligned_to"] + 1e-6) / (state["aligned_from"] + 1e-6)
    return (before if float(state["aligned_from"].sum()) > 0 else ratio), new


def _label_of_the_aligned(patch: Patch) -> None:
    right = thresholds.pseudo_labels

    def changed(logits_x, logits_u_w, index, state, ssl):
        found, new = right(logits_x, logits_u_w, index, state, ssl)
        q = F.softmax(logits_u_w.detach(), axis=1)
        ratio, _ = thresholds._alignment(logits_x, q, state, ssl)
        return found._replace(labels=(q * ratio).argmax(axis=1)), new

    patch(thresholds, "pseudo_labels", changed)
    patch(algorithm, "pseudo_labels", changed)


def _policy_ignored(patch: Patch) -> None:
    patch(algorithm, "pseudo_labels", lambda x, weak, index, state, ssl: (
        thresholds.PseudoLabels(*pseudo_label(weak, ssl.threshold, ssl.temperature)), state))


def _fairness_left_out(patch: Patch) -> None:
    patch(algorithm, "with_fairness", lambda found, *rest: found)


def _state_thrown_away(patch: Patch) -> None:
    right = thresholds.pseudo_labels
    patch(algorithm, "pseudo_labels", lambda x, weak, index, state, ssl: (right(x, weak, index, state, ssl)[0], state))


def _index_of_the_neighbour(patch: Patch) -> None:
    right = Loader.batch

    def changed(self, step):
        batch = right(self, step)
        return batch._replace(index_u=np.roll(batch.index_u, 1))

    patch(Loader, "batch", changed)


def _state_not_restored(patch: Patch) -> None:
    right = trainer.Trainer.restore

    def changed(self, saved):
        fresh = dict(self.state.thresholds)
        right(self, saved)
        self.state.thresholds = fresh

    patch(trainer.Trainer, "restore", changed)


def _plant(name: str, what: str, put_in: Callable, settings: tuple[str, ...], stage: str = "loss") -> Plant:
    return Plant(name, stage, what, put_in, settings=settings)


def _in_policy(policy: str, change: Callable) -> Callable:
    return partial(_policy, name=policy, change=change)


PLANTS = [
    _plant("flexmatch-bar-after-update", "the bar already knows this batch",
           _in_policy("flexmatch", _bar_after_update), FLEX),
    _plant("flexmatch-linear-map", "tau * beta for tau * beta / (2 - beta)", _in_policy("flexmatch", _linear_map),
           FLEX),
    _plant("flexmatch-no-warm-up", "images without a label do not count", _in_policy("flexmatch", _no_warm_up), FLEX),
    _plant("flexmatch-unsure-remembered", "every pseudo-label is remembered",
           _in_policy("flexmatch", _unsure_remembered), FLEX),
    _plant("flexmatch-first-label-kept", "an image keeps its first label", _in_policy("flexmatch", _first_label_kept),
           FLEX),
    _plant("flexmatch-places-instead-of-images", "labels are remembered by the place in the batch",
           _in_policy("flexmatch", _places_instead_of_images), FLEX),
    _plant("freematch-bar-before-update", "the bar does not know this batch",
           _in_policy("freematch", _bar_before_update), FREE),
    _plant("freematch-local-not-normalized", "P for P / max(P)", _in_policy("freematch", _local_not_normalized), FREE),
    _plant("freematch-histogram-of-probabilities", "mean probabilities for the histogram of labels",
           _in_policy("freematch", _histogram_of_probabilities), FREE),
    _plant("freematch-statistics-of-half", "half of the batch", _in_policy("freematch", _statistics_of_the_first_half),
           FREE),
    _plant("freematch-fairness-subtracted", "the fairness term with the other sign",
           partial(_fairness, change=lambda right, logits, weight, state: -right(logits, weight, state)), FREE),
    _plant("freematch-fairness-over-all", "the fairness term over unsure images, too",
           partial(_fairness, change=lambda right, logits, weight, state: right(
               logits, paddle.ones_like(weight), state)), FREE),
    _plant("freematch-fairness-without-gradient", "the fairness term is detached",
           partial(_fairness, change=lambda right, logits, weight, state: right(
               logits.detach(), weight, state) + 0.0 * logits.sum()), FREE),
    _plant("freematch-fairness-left-out", "the step forgets the fairness term", _fairness_left_out, FREE, "backward"),
    _plant("softmatch-one-deviation", "n_sigma 1", _in_policy("softmatch", _one_deviation), SOFT),
    _plant("softmatch-biased-variance", "variance over M", _in_policy("softmatch", _biased_variance), SOFT),
    _plant("softmatch-both-sides", "confident images weigh less, too", _in_policy("softmatch", _both_sides), SOFT),
    _plant("softmatch-label-of-the-aligned", "pseudo-labels of the aligned probabilities", _label_of_the_aligned,
           (*SOFT, "ssl.align=uniform")),
    _plant("align-towards-the-network", "the ratio is upside down", partial(_alignment, change=_towards_the_network),
           ("ssl.align=uniform",)),
    _plant("align-statistics-after", "the state before this batch is used",
           partial(_alignment, change=_state_before), ("ssl.align=model", "ssl.policy_decay=0.5")),
    _plant("policy-ignored", "the step uses the fixed threshold whatever the policy", _policy_ignored, FLEX,
           "backward"),
    _plant("policy-state-thrown-away", "every step starts from the first state", _state_thrown_away, FREE, "train"),
    _plant("policy-index-of-the-neighbour", "unlabeled images are remembered under their neighbour's number",
           _index_of_the_neighbour, FLEX, "data"),
    _plant("policy-state-not-restored", "a resumed run forgets the statistics", _state_not_restored, SOFT, "resume"),
]
