"""The FixMatch loss. Mirrors fixmatch/losses.py.

Reference: kekmodel/FixMatch-pytorch, train.py. Shapes: B labeled images, M = mu * B unlabeled ones, K classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class FixMatchLoss(NamedTuple):
    loss: torch.Tensor  # []
    loss_x: torch.Tensor  # []
    loss_u: torch.Tensor  # []
    mask: torch.Tensor  # [M]
    confidence: torch.Tensor  # [M]
    pseudo_labels: torch.Tensor  # [M] int64


def pseudo_label(logits_u_w, threshold: float, temperature: float):
    """-> (confidence [M], pseudo_labels int64 [M], mask [M])."""
    probabilities = torch.softmax(logits_u_w.detach() / temperature, dim=-1)  # [M, K]
    confidence, pseudo_labels = torch.max(probabilities, dim=-1)
    mask = confidence.ge(threshold).to(confidence.dtype)
    return confidence, pseudo_labels, mask


def fixmatch_loss(logits_x, targets_x, logits_u_w, logits_u_s, threshold: float = 0.95, temperature: float = 1.0,
                  lambda_u: float = 1.0, pseudo=None) -> FixMatchLoss:
    """Supervised cross-entropy plus cross-entropy of the strong views against confident pseudo-labels."""
    loss_x = F.cross_entropy(logits_x, targets_x, reduction="mean")
    confidence, pseudo_labels, mask = pseudo or pseudo_label(logits_u_w, threshold, temperature)
    loss_u = (F.cross_entropy(logits_u_s, pseudo_labels, reduction="none") * mask).mean()
    return FixMatchLoss(loss_x + lambda_u * loss_u, loss_x, loss_u, mask, confidence, pseudo_labels)
