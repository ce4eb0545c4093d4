"""Which pseudo-labels count, and how much: FixMatch's fixed threshold, and the policies that came after it.

A policy is a pure function (own, every, index, state, ssl) -> (weight, state): from the pseudo-probabilities of this
rank's unlabeled images, those of all ranks and which images these are, it gives the weight of each pseudo-label and the
statistics for the next step. Statistics are over all ranks, so that every rank has the same.
Sources: the papers named at each policy, and microsoft/Semi-supervised-learning, semilearn/algorithms, where they leave
something open. Shapes: M unlabeled images of this rank, A of all ranks, N in the data set, K classes.
"""

from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F

from fixmatch import distributed, losses
from fixmatch.config import SSLConfig

State = dict[str, paddle.Tensor]  # what a policy keeps from step to step; a checkpoint holds it


class PseudoLabels(NamedTuple):
    confidence: paddle.Tensor  # [M] the largest pseudo-probability
    labels: paddle.Tensor  # [M] int64
    weight: paddle.Tensor  # [M] how much each counts, 0..1


def pseudo_labels(logits_x, logits_u_w, index_u: np.ndarray, state: State,
                  ssl: SSLConfig) -> tuple[PseudoLabels, State]:
    """The pseudo-labels of one step under `ssl.policy` and `ssl.align`, without gradient, and the state after it.

    Args:
        logits_x: [B, K] of the labeled images, which only `ssl.align: model` looks at.
        logits_u_w: [M, K] of the weak views.
        index_u: int64 [M], which unlabeled images they are, 0..N-1.
        state: of the step before, or `initial_state`.
        ssl: the settings.
    """
    if ssl.policy == "fixed" and ssl.align == "none":
        confidence, labels, weight = losses.pseudo_label(logits_u_w, ssl.threshold, ssl.temperature)
        return PseudoLabels(confidence, labels, weight), state
    own = F.softmax(logits_u_w.detach() / ssl.temperature, axis=1)  # [M, K]
    every = distributed.gather_tensor(own)  # [A, K]
    index = distributed.gather_tensor(paddle.to_tensor(index_u))  # [A]
    # SoftMatch weighs by the aligned probabilities, but takes the label from those of the network.
    labels = own.argmax(axis=1) if ssl.policy == "softmatch" else None
    if ssl.align != "none":
        ratio, state = _alignment(logits_x, every, state, ssl)
        own, every = _normalized(own * ratio), _normalized(every * ratio)
    weight, state = POLICIES[ssl.policy](own, every, index, state, ssl)
    return PseudoLabels(own.max(axis=1), own.argmax(axis=1) if labels is None else labels, weight), state


def fixed(own, every, index, state: State, ssl: SSLConfig):
    """FixMatch, section 2.2: a pseudo-label counts where its confidence is at least tau."""
    return _at_least(own.max(axis=1), ssl.threshold), state


def flexmatch(own, every, index, state: State, ssl: SSLConfig):
    """FlexMatch (arXiv 2110.08263), with the convex map and the warm-up: classes that are learned less get a lower bar.

    How far a class is learned is the number of unlabeled images whose last confident pseudo-label it was.
    """
    learned = paddle.gather(state["learned"], own.argmax(axis=1))  # [M]
    weight = _at_least(own.max(axis=1), ssl.threshold * learned / (2 - learned))

    confident = every.max(axis=1) >= ssl.threshold  # [A]
    size = len(state["assigned"])
    place = paddle.where(confident, index, paddle.full_like(index, size))  # the unsure go beyond the end
    longer = paddle.concat([state["assigned"], paddle.full([1], -1, "int64")])
    assigned = paddle.scatter(longer, place, every.argmax(axis=1))[:size]  # [N], -1 where there was none yet
    counts = paddle.bincount(assigned + 1, minlength=own.shape[1] + 1).astype(own.dtype)  # [1 + K], of none first
    return weight, {**state, "assigned": assigned, "learned": counts[1:] / counts.max()}


def freematch(own, every, index, state: State, ssl: SSLConfig):
    """FreeMatch (arXiv 2205.07246): one threshold that follows the mean confidence, scaled for each class."""
    labels, classes = every.argmax(axis=1), every.shape[1]
    level = _follow(state["level"], every.max(axis=1).mean(), ssl)  # []
    share = _follow(state["share"], every.mean(axis=0), ssl)  # [K] of the probability
    histogram = _follow(state["histogram"], F.one_hot(labels, classes).astype(own.dtype).mean(axis=0), ssl)  # [K]
    bar = level * share / share.max()  # [K]
    weight = _at_least(own.max(axis=1), paddle.gather(bar, own.argmax(axis=1)))
    return weight, {**state, "level": level, "share": share, "histogram": histogram}


def softmatch(own, every, index, state: State, ssl: SSLConfig):
    """SoftMatch (arXiv 2301.10921): below the mean confidence the weight falls off as a Gaussian of two deviations."""
    confidence = every.max(axis=1)
    unbiased = (confidence - confidence.mean()).square().sum() / (len(confidence) - 1)  # var() warns of other dtypes
    mean = _follow(state["mean"], confidence.mean(), ssl)  # []
    variance = _follow(state["variance"], unbiased, ssl)  # []
    below = (own.max(axis=1) - mean).clip(max=0.0)  # [M]
    return paddle.exp(-below.square() / (2 * variance / 2**2)), {**state, "mean": mean, "variance": variance}


POLICIES = {"fixed": fixed, "flexmatch": flexmatch, "freematch": freematch, "softmatch": softmatch}


def fairness(logits_u_s, weight, state: State):
    """FreeMatch's term against collapse to few classes, [] with gradient: to be added to the loss.

    It is over the strong views of this rank whose pseudo-label counts. Their mean prediction, divided by the histogram
    of their own hard predictions, is to have the distribution that the state has of the weak views. It is 0 where none
    counts.

    Args:
        logits_u_s: [M, K] of the strong views.
        weight: [M], 0 or 1.
        state: of freematch, after this step.
    """
    strong = F.softmax(logits_u_s, axis=1)  # [M, K]
    count = weight.sum().clip(min=1.0)
    mean = (strong * weight.unsqueeze(1)).sum(axis=0) / count  # [K]
    hard = F.one_hot(strong.argmax(axis=1), strong.shape[1]).astype(strong.dtype)
    histogram = (hard * weight.unsqueeze(1)).sum(axis=0) / count  # [K]
    inverse = paddle.where(histogram > 0, 1 / histogram.clip(min=1e-12), paddle.zeros_like(histogram))
    some = weight.sum() > 0
    ours = _normalized(paddle.where(some, mean * inverse, paddle.ones_like(mean)))  # no division by 0 where none counts
    wanted = _normalized(state["share"] / state["histogram"])
    return (wanted * paddle.log(ours + 1e-12)).sum() * some.astype(strong.dtype)


def with_fairness(found: losses.FixMatchLoss, logits_u_s, state: State, ssl: SSLConfig) -> losses.FixMatchLoss:
    """Adds `ssl.lambda_e` times `fairness` to the loss of freematch, and nothing to that of another policy."""
    if ssl.policy != "freematch":
        return found
    return found._replace(loss=found.loss + ssl.lambda_e * fairness(logits_u_s, found.mask, state))


def initial_state(ssl: SSLConfig, num_classes: int, num_unlabeled: int = 0,
                  label_counts: np.ndarray | None = None) -> State:
    """The state before the first step, in Paddle's default dtype.

    Args:
        num_unlabeled: N.
        label_counts: [K], how many labeled images each class has; only `ssl.align: labels` looks at it.
    """
    even = paddle.full([num_classes], 1 / num_classes)
    state = {
        "flexmatch": lambda: {"assigned": paddle.full([num_unlabeled], -1, "int64"),
                              "learned": paddle.zeros([num_classes])},
        "freematch": lambda: {"level": even[0].clone(), "share": even, "histogram": even.clone()},
        "softmatch": lambda: {"mean": even[0].clone(), "variance": paddle.ones([])}}.get(ssl.policy, dict)()
    if ssl.align != "none":
        target = {"uniform": even.clone, "model": lambda: paddle.zeros([num_classes]),
                  "labels": lambda: paddle.to_tensor(label_counts / label_counts.sum(), dtype=even.dtype)}[ssl.align]()
        state |= {"aligned_from": paddle.zeros([num_classes]), "aligned_to": target}
    return state


def class_thresholds(state: State, ssl: SSLConfig) -> paddle.Tensor | None:
    """The confidence that a pseudo-label of each class needs now, [K]; for softmatch, that of weight 1, [1].

    For the log; None for the fixed threshold, which the configuration says.
    """
    if ssl.policy == "flexmatch":
        return ssl.threshold * state["learned"] / (2 - state["learned"])
    if ssl.policy == "freematch":
        return state["level"] * state["share"] / state["share"].max()
    return state["mean"].reshape([1]) if ssl.policy == "softmatch" else None


def _alignment(logits_x, every, state: State, ssl: SSLConfig):
    """Distribution alignment (ReMixMatch, arXiv 1911.09785, section 3.1): [K] factors of the probabilities."""
    source = _follow_from_first(state["aligned_from"], every.mean(axis=0), ssl)
    target = state["aligned_to"]
    if ssl.align == "model":
        labeled = distributed.gather_tensor(F.softmax(logits_x.detach(), axis=1)).mean(axis=0)
        target = _follow_from_first(target, labeled, ssl)
    return (target + 1e-6) / (source + 1e-6), {**state, "aligned_from": source, "aligned_to": target}


def _follow(average, value, ssl: SSLConfig):
    return ssl.policy_decay * average + (1 - ssl.policy_decay) * value


def _follow_from_first(average, value, ssl: SSLConfig):
    """The same, but the first value is taken whole; zeros say that there was none yet."""
    return paddle.where(average.sum() > 0, _follow(average, value, ssl), value)


def _at_least(confidence, threshold):
    """[M] 1 where the confidence is at least the threshold, else 0."""
    if not paddle.is_tensor(threshold):
        threshold = paddle.full_like(confidence, threshold)
    return (confidence >= threshold).astype(confidence.dtype)


def _normalized(values):
    """Divided by their sum over the last axis, which is classes."""
    return values / values.sum(axis=-1, keepdim=True)
