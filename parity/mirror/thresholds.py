"""The policies of pseudo-labels. Mirrors fixmatch/thresholds.py, for one process.

Sources: the papers, and microsoft/Semi-supervised-learning, semilearn/algorithms. Shapes: M unlabeled images of a step,
N in the data set, K classes.
"""

from typing import NamedTuple

import numpy as np
import torch

from parity.mirror import losses

State = dict[str, torch.Tensor]


class PseudoLabels(NamedTuple):
    confidence: torch.Tensor  # [M]
    labels: torch.Tensor  # [M] int64
    weight: torch.Tensor  # [M] 0..1


def pseudo_labels(logits_x, logits_u_w, index_u: np.ndarray, state: State, ssl) -> tuple[PseudoLabels, State]:
    """The pseudo-labels of one step, and the state after it."""
    if ssl.policy == "fixed" and ssl.align == "none":
        confidence, labels, weight = losses.pseudo_label(logits_u_w, ssl.threshold, ssl.temperature)
        return PseudoLabels(confidence, labels, weight), state
    state = {name: tensor.clone() for name, tensor in state.items()}
    q = torch.softmax(logits_u_w.detach() / ssl.temperature, dim=-1)
    aligned = q if ssl.align == "none" else _align(q, logits_x, state, ssl)
    confidence, best = aligned.max(dim=-1)
    weight = POLICIES[ssl.policy](aligned, torch.from_numpy(index_u), state, ssl)
    return PseudoLabels(confidence, q.argmax(dim=-1) if ssl.policy == "softmatch" else best, weight), state


def fixed(q, index, state: State, ssl):
    return q.max(dim=-1).values.ge(ssl.threshold).to(q.dtype)


def flexmatch(q, index, state: State, ssl):
    """FlexMatch, algorithm 1: the bar from the statistics so far, then the statistics with this batch."""
    confidence, best = q.max(dim=-1)
    beta = state["learned"][best]
    weight = confidence.ge(ssl.threshold * (beta / (2.0 - beta))).to(q.dtype)
    for image, label, sure in zip(index.tolist(), best.tolist(), confidence.ge(ssl.threshold).tolist(), strict=True):
        if sure:
            state["assigned"][image] = label
    counts = torch.stack([(state["assigned"] == k).sum() for k in range(-1, q.shape[1])]).to(q.dtype)
    if counts[1:].sum() > 0:
        state["learned"] = counts[1:] / max(counts)
    return weight


def freematch(q, index, state: State, ssl):
    """FreeMatch: self-adaptive global and local thresholds, with this batch in them."""
    confidence, best = q.max(dim=-1)
    hits = torch.bincount(best, minlength=q.shape[1]).to(q.dtype)
    _move(state, "level", confidence.mean(), ssl)
    _move(state, "share", q.mean(dim=0), ssl)
    _move(state, "histogram", hits / hits.sum(), ssl)
    modulation = state["share"] / torch.max(state["share"])
    return confidence.ge(state["level"] * modulation[best]).to(q.dtype)


def softmatch(q, index, state: State, ssl):
    """SoftMatch: a truncated Gaussian of the confidence, with n_sigma 2."""
    confidence = q.max(dim=-1).values
    _move(state, "mean", confidence.mean(), ssl)
    _move(state, "variance", torch.var(confidence, unbiased=True), ssl)
    distance = torch.clamp(confidence - state["mean"], max=0.0)
    return torch.exp(-(distance**2) / (2 * state["variance"] / 4))


POLICIES = {"fixed": fixed, "flexmatch": flexmatch, "freematch": freematch, "softmatch": softmatch}


def fairness(logits_u_s, weight, state: State):
    """FreeMatch's self-adaptive fairness, [], to be added to the loss."""
    chosen = weight.bool()
    if not chosen.any():
        return torch.zeros([], dtype=logits_u_s.dtype)
    strong = torch.softmax(logits_u_s[chosen], dim=-1)
    hits = torch.bincount(strong.detach().argmax(dim=-1), minlength=strong.shape[1]).to(strong.dtype)
    inverse = torch.where(hits > 0, hits.sum() / hits, torch.zeros_like(hits))
    wanted, found = state["share"] / state["histogram"], strong.mean(dim=0) * inverse
    return (wanted / wanted.sum() * torch.log(found / found.sum() + 1e-12)).sum()


def with_fairness(found: losses.FixMatchLoss, logits_u_s, state: State, ssl) -> losses.FixMatchLoss:
    """Adds the fairness term to the loss of freematch."""
    if ssl.policy != "freematch":
        return found
    return found._replace(loss=found.loss + ssl.lambda_e * fairness(logits_u_s, found.mask, state))


def initial_state(ssl, num_classes: int, num_unlabeled: int = 0, label_counts: np.ndarray | None = None) -> State:
    """The state before the first step, in Torch's default dtype."""
    even = torch.ones(num_classes) / num_classes
    state: State = {}
    if ssl.policy == "flexmatch":
        state = {"assigned": torch.full([num_unlabeled], -1), "learned": torch.zeros(num_classes)}
    elif ssl.policy == "freematch":
        state = {"level": torch.tensor(1.0 / num_classes), "share": even.clone(), "histogram": even.clone()}
    elif ssl.policy == "softmatch":
        state = {"mean": torch.tensor(1.0 / num_classes), "variance": torch.tensor(1.0)}
    if ssl.align != "none":
        state["aligned_from"] = torch.zeros(num_classes)
        state["aligned_to"] = torch.zeros(num_classes) if ssl.align == "model" else even
    if ssl.align == "labels":
        state["aligned_to"] = torch.tensor(label_counts / label_counts.sum(), dtype=even.dtype)
    return state


def bars(before: State, after: State, ssl, num_classes: int):
    """The confidence that a pseudo-label of each class needs in a step, [K]; None where weights are continuous."""
    if ssl.policy == "flexmatch":
        return ssl.threshold * before["learned"] / (2 - before["learned"])
    if ssl.policy == "freematch":
        return after["level"] * after["share"] / after["share"].max()
    return torch.full([num_classes], ssl.threshold) if ssl.policy == "fixed" else None


def _align(q, logits_x, state: State, ssl):
    """Distribution alignment: towards a target, away from what the network predicts on the whole."""
    moving = {"aligned_from": q.mean(dim=0)}
    if ssl.align == "model":
        moving["aligned_to"] = torch.softmax(logits_x.detach(), dim=-1).mean(dim=0)
    for name, value in moving.items():
        if state[name].any():
            _move(state, name, value, ssl)
        else:
            state[name] = value
    scaled = q * (state["aligned_to"] + 1e-6) / (state["aligned_from"] + 1e-6)
    return scaled / scaled.sum(dim=-1, keepdim=True)


def _move(state: State, name: str, value, ssl) -> None:
    state[name] = ssl.policy_decay * state[name] + (1 - ssl.policy_decay) * value
