"""Bugs in the losses: pseudo-labels, mask, reduction, cross-entropy.

M unlabeled images, K classes.
"""

from collections.abc import Callable
from functools import partial

import paddle
import paddle.nn.functional as F

from fixmatch import losses
from fixmatch import step as algorithm
from parity.plants.plant import Patch, Plant


def _confident(confidence, threshold):
    return confidence >= paddle.full_like(confidence, threshold)


def _probabilities(logits, temperature):
    return F.softmax(logits / temperature, axis=1)


def _pseudo_label(patch: Patch, probabilities: Callable = _probabilities, mask: Callable = _confident,
                  detach: bool = True) -> None:
    """A pseudo_label with other probabilities(logits, temperature) or another mask(confidence, threshold)."""
    def changed(logits_u_w, threshold, temperature):
        p = probabilities(logits_u_w.detach() if detach else logits_u_w, temperature)  # [M, K]
        confidence = p.max(axis=1)
        return confidence, p.argmax(axis=1), mask(confidence, threshold).astype(p.dtype)

    patch(losses, "pseudo_label", changed)


def _threshold_on_logits(patch: Patch) -> None:
    right = losses.pseudo_label

    def changed(logits_u_w, threshold, temperature):
        confidence, labels, _ = right(logits_u_w, threshold, temperature)
        return confidence, labels, (logits_u_w.detach().max(axis=1) >= threshold).astype(confidence.dtype)

    patch(losses, "pseudo_label", changed)


def _masked_mean_of_all(losses_u, mask, logits_u_s, probabilities):
    return (losses_u * mask).mean()


def _reduction(patch: Patch, loss_u: Callable = _masked_mean_of_all, loss_x: Callable = paddle.mean,
               total: Callable = lambda lx, lu, lambda_u: lx + lambda_u * lu) -> None:
    """A fixmatch_loss with another loss_u(losses, mask, logits_u_s, probabilities), loss_x(losses) or total."""
    def changed(logits_x, targets_x, logits_u_w, logits_u_s, threshold=0.95, temperature=1.0, lambda_u=1.0,
                pseudo=None):
        per_x = losses.cross_entropy(logits_x, targets_x)
        confidence, labels, mask = pseudo or losses.pseudo_label(logits_u_w, threshold, temperature)
        per_u = losses.cross_entropy(logits_u_s, labels)  # [M]
        lx = loss_x(per_x)
        lu = loss_u(per_u, mask, logits_u_s, _probabilities(logits_u_w.detach(), temperature))
        return losses.FixMatchLoss(total(lx, lu, lambda_u), lx, lu, mask, confidence, labels)

    patch(losses, "fixmatch_loss", changed)
    patch(algorithm, "fixmatch_loss", changed)


def _cross_entropy(patch: Patch, changed: Callable) -> None:
    """A cross_entropy that is changed(right one, logits, targets)."""
    right = losses.cross_entropy
    patch(losses, "cross_entropy", lambda logits, targets: changed(right, logits, targets))


def _smoothed(right, logits, targets):
    return 0.9 * right(logits, targets) + 0.1 * (paddle.logsumexp(logits, axis=1) - logits.mean(axis=1))


def _soft_labels(losses_u, mask, logits_u_s, probabilities):
    return (-(probabilities * F.log_softmax(logits_u_s, axis=1)).sum(axis=1) * mask).mean()


PLANTS = [
    Plant("temperature-half", "loss", "pseudo-labels sharpened",
          partial(_pseudo_label, probabilities=lambda z, t: _probabilities(z, 0.5 * t))),
    Plant("threshold-value", "loss", "0.9 times the threshold",
          partial(_pseudo_label, mask=lambda c, tau: c >= 0.9 * tau)),
    Plant("threshold-exclusive", "loss", "> for >=",
          partial(_pseudo_label, mask=lambda c, tau: c > paddle.full_like(c, tau))),
    Plant("threshold-on-logits", "loss", "the largest logit against the threshold", _threshold_on_logits),
    Plant("softmax-axis", "loss", "softmax over the batch",
          partial(_pseudo_label, probabilities=lambda z, t: F.softmax(z / t, axis=0))),
    Plant("double-softmax", "loss", "softmax of a softmax",
          partial(_pseudo_label, probabilities=lambda z, t: F.softmax(_probabilities(z, t), axis=1))),
    Plant("detach-missing", "loss", "pseudo-labels stay in the graph: no effect on numbers under hard labels",
          partial(_pseudo_label, detach=False)),
    Plant("masked-mean", "loss", "mean over the confident images only",
          partial(_reduction, loss_u=lambda p, m, s, q: (p * m).sum() / m.sum().clip(min=1))),
    Plant("mask-after-mean", "loss", "mean loss times mean mask",
          partial(_reduction, loss_u=lambda p, m, s, q: (p.mean() * m).mean())),
    Plant("mask-missing", "loss", "all pseudo-labels count",
          partial(_reduction, loss_u=lambda p, m, s, q: p.mean())),
    Plant("broadcast-n-by-1", "loss", "losses [M, 1] times mask [M] make [M, M]",
          partial(_reduction, loss_u=lambda p, m, s, q: (p.unsqueeze(1) * m).mean())),
    Plant("soft-labels", "loss", "cross-entropy against the probabilities", partial(_reduction, loss_u=_soft_labels)),
    Plant("sum-of-losses", "loss", "sum over the unlabeled batch",
          partial(_reduction, loss_u=lambda p, m, s, q: (p * m).sum())),
    Plant("supervised-sum", "loss", "sum over the labeled batch", partial(_reduction, loss_x=paddle.sum)),
    Plant("lambda-u-dropped", "loss", "only the supervised term is trained",
          partial(_reduction, total=lambda lx, lu, lambda_u: lx)),
    Plant("lambda-u-squared", "loss", "the unsupervised term squared",
          partial(_reduction, total=lambda lx, lu, lambda_u: lx + (lambda_u * lu) ** 2)),
    Plant("label-smoothing", "loss", "0.1 of the mass spread over all classes",
          partial(_cross_entropy, changed=_smoothed)),
    Plant("cross-entropy-saturates", "loss", "Paddle's own cross-entropy, which stops at 64 on a CPU",
          partial(_cross_entropy, changed=lambda right, z, t: F.cross_entropy(z, t, reduction="none"))),
]
