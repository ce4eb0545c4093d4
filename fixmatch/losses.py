"""The FixMatch loss (arXiv 2001.07685, section 2.2), as pure functions on logits.

Reference: kekmodel/FixMatch-pytorch, train.py. Shapes: B labeled images, M = mu * B unlabeled ones, K classes.
"""

from typing import NamedTuple

import paddle
import paddle.nn.functional as F


class FixMatchLoss(NamedTuple):
    loss: paddle.Tensor  # [] loss_x + lambda_u * loss_u
    loss_x: paddle.Tensor  # [] supervised
    loss_u: paddle.Tensor  # [] unsupervised, before lambda_u
    mask: paddle.Tensor  # [M] how much the pseudo-label counts, 0..1, in the logits' dtype
    confidence: paddle.Tensor  # [M] the largest pseudo-probability
    pseudo_labels: paddle.Tensor  # [M] int64


def cross_entropy(logits, targets):
    """-log softmax(logits)[targets], one value an image: logits [N, K], targets int64 [N] -> [N].

    Written out because Paddle's cross_entropy and log_softmax saturate at 64 on a CPU, and Torch's do not.
    """
    picked = paddle.take_along_axis(logits, targets.unsqueeze(1), axis=1).squeeze(1)  # [N]
    return paddle.logsumexp(logits, axis=1) - picked


def pseudo_label(logits_u_w, threshold: float, temperature: float):
    """-> (confidence [M], pseudo_labels int64 [M], mask [M]) of the weak views' logits [M, K], without gradient."""
    probabilities = F.softmax(logits_u_w.detach() / temperature, axis=1)  # [M, K]
    confidence, pseudo_labels = probabilities.max(axis=1), probabilities.argmax(axis=1)
    mask = (confidence >= paddle.full_like(confidence, threshold)).astype(confidence.dtype)
    return confidence, pseudo_labels, mask


def fixmatch_loss(logits_x, targets_x, logits_u_w, logits_u_s, threshold: float = 0.95, temperature: float = 1.0,
                  lambda_u: float = 1.0, pseudo=None) -> FixMatchLoss:
    """Supervised cross-entropy plus cross-entropy of the strong views against confident pseudo-labels.

    Args:
        logits_x: [B, K] of the labeled images, weakly augmented.
        targets_x: int64 [B], classes 0..K-1.
        logits_u_w: [M, K] of the unlabeled images' weak views; detached here.
        logits_u_s: [M, K] of their strong views, in the same order.
        threshold: tau, the least confidence, inclusive, for a pseudo-label to count.
        temperature: T; labels are hard, so it moves only the mask.
        lambda_u: weight of the unsupervised term.
        pseudo: (confidence, labels, weight), [M] each, by another policy than the threshold: fixmatch/thresholds.py.

    The unsupervised mean is over all M images, not over the confident ones.
    """
    loss_x = cross_entropy(logits_x, targets_x).mean()
    confidence, pseudo_labels, mask = pseudo or pseudo_label(logits_u_w, threshold, temperature)
    loss_u = (cross_entropy(logits_u_s, pseudo_labels) * mask).mean()
    return FixMatchLoss(loss_x + lambda_u * loss_u, loss_x, loss_u, mask, confidence, pseudo_labels)
