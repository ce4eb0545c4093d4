"""From the first tensor that diverged to the likely cause, in one line."""

import fnmatch

import numpy as np

from parity.compare import Row

# (stage pattern, tensor pattern, hint); the first match counts. The planted bugs in parity/plants.py are what this was
# tried on.
_HINTS = (
    ("forward", "initial/*bn*", "batch norm must start at weight 1, bias 0, mean 0, variance 1"),
    ("forward", "initial/fc.*", "the classifier is xavier normal with bias 0"),
    ("forward", "initial/classifier.*", "the classifier is xavier normal with bias 0"),
    ("forward", "initial/*", "convolutions are kaiming normal with mode fan_out, gain sqrt(2)"),
    ("forward", "input/*", "normalization: (pixel / 255 - mean) / std, a channel"),
    ("forward", "eval activations/block1.layer.0.bn*", "batch norm's epsilon or the activation after it"),
    ("forward", "eval activations/*bn*", "batch norm's epsilon or the activation after it"),
    ("forward", "eval activations/block1.layer.0.convShortcut",
     "activate_before_residual: the shortcut of block1.layer.0 sees the activated input"),
    ("forward", "eval activations/*convShortcut",
     "only block1.layer.0 activates before the residual; later shortcuts see the raw input"),
    ("forward", "eval activations/block[23].layer.0.conv1",
     "conv1 of block2.layer.0 and block3.layer.0 sees the raw input and has the stride"),
    ("forward", "eval activations/*conv*", "stride, padding, groups, or the input of this convolution"),
    ("forward", "eval activations/fc", "what is between the final batch norm and the classifier: average pooling"),
    ("forward", "eval activations/classifier", "what is between the last block and the classifier: average pooling"),
    ("forward", "eval activations/*", "the residual sum of this block"),
    ("forward", "train activations/*", "differs in train mode only: dropout, or batch norm without batch statistics"),
    ("metric", "*/top*", "ranking of ties, or weighting of the last partial batch"),
    ("metric", "*", "the mean over all test images, the last partial batch included"),
    ("loss", "loss tie/mask", "the threshold is inclusive: mask = confidence >= threshold"),
    ("loss", "*/confidence", "pseudo-probabilities: softmax over classes of the weak logits / temperature, once"),
    ("loss", "*/pseudo_labels", "pseudo-labels are the argmax over classes of the weak views"),
    ("loss", "*/mask", "mask = (confidence >= threshold), on probabilities, compared in their own precision"),
    ("loss", "loss extreme/loss_*", "a cross-entropy that saturates (Paddle's stops at 64)"),
    ("loss", "*/loss_x", "supervised cross-entropy: mean over the batch, hard labels, no smoothing"),
    ("loss", "*/loss_u", "unsupervised cross-entropy: times the mask, mean over all mu * B images"),
    ("loss", "*/loss", "loss = loss_x + lambda_u * loss_u"),
    ("loss", "structure/*", "detach the weak logits before making pseudo-labels of them"),
    ("loss", "*gradients/logits_u_w", "the weak views' logits must get no gradient from the loss"),
    ("loss", "*", "how the loss is reduced"),
    ("backward", "*/confidence", "which logits become pseudo-labels: the joint forward, or the split of its batch"),
    ("backward", "*/pseudo_labels", "the split of the joint batch"),
    ("backward", "*/mask", "the threshold"),
    ("backward", "* losses/*", "the split of the joint batch into labeled, weak and strong"),
    ("backward", "*gradients/*", "the backward pass of this layer"),
    ("optimizer", "*momentum/*bn*", "batch norm and bias parameters are not decayed (names with 'bn' or 'bias')"),
    ("optimizer", "*momentum/*bias", "batch norm and bias parameters are not decayed (names with 'bn' or 'bias')"),
    ("optimizer", "round 0 momentum/*", "weight decay of the decayed group (L2, added to the gradient), or clipping"),
    ("optimizer", "round 0 weights/*", "Nesterov, the learning rate, or when it is stepped"),
    ("optimizer", "*momentum/*", "momentum coefficient, or gradients that were not cleared"),
    ("optimizer", "*weights/*", "Nesterov, the learning rate, or when it is stepped"),
    ("schedule", "*warm-up/first steps", "warm-up and cosine count optimizer steps, from 0"),
    ("schedule", "*", "lr(t) = lr * max(0, cos(7 pi t / (16 T)))"),
    ("ema", "*running_*", "buffers are copied from the live model, not averaged and not skipped"),
    ("ema", "*", "decay of the average, without warm-up"),
    ("augment", "operations/*", "this operation's range, or Cutout's side, colour or clamping, which follows each"),
    ("augment", "views/weak", "flip first, then reflection padding, then crop"),
    ("augment", "views/strong", "order of flip, crop, RandAugment, Cutout"),
    ("augment", "draws/magnitude*", "magnitudes are 1..9, uniform"),
    ("augment", "draws/applied", "each operation is applied with probability 1/2"),
    ("augment", "draws/*", "what is drawn at random"),
    ("augment", "split/labels a class", "the split is balanced: num_labeled / num_classes of each class"),
    ("augment", "split/*", "unlabeled images include the labeled ones"),
    ("augment", "normalization/*", "mean and standard deviation of this data set"),
    ("train", "* lr/*", "the scheduler is stepped once, after each optimizer step"),
    ("train", "*losses/*", "which logits the loss is given: the joint forward and its split"),
    ("train", "*gradients/*", "one joint forward: batch statistics over all three parts, gradient through them"),
    ("train", "*momentum/*", "gradients are cleared after each step"),
    ("train", "*buffers/*", "one joint forward updates the running statistics once a step"),
    ("train", "*ema/*", "the average is updated after the optimizer step"),
    ("train", "*activations/*", "the joint forward pass"),
)


def hint_for(stage: str, row: Row) -> str:
    """The likely cause of the first divergence of a stage."""
    measured = _running_statistics(row) if "running_" in row.tensor and stage != "ema" else ""
    if measured:
        return measured
    for stage_pattern, tensor_pattern, hint in _HINTS:
        if fnmatch.fnmatchcase(stage, stage_pattern) and fnmatch.fnmatchcase(row.tensor, tensor_pattern):
            return "likely " + hint
    return "no known cause fits"


def _running_statistics(row: Row) -> str:
    """Batch norm's buffers: tells an inverted momentum from another one and from a biased variance."""
    if row.ours is None or row.reference is None or row.why:
        return ""
    if row.relative > 0.05:
        return "likely BN momentum inverted (paddle = 1 - torch)"
    if row.tensor.endswith("running_var"):
        ratio = np.median(row.ours / row.reference)
        if abs(ratio - 1) < 2e-3:
            return "likely the biased batch variance is averaged (Paddle's CPU kernel), not the unbiased one"
    return "likely BN momentum (paddle 0.999 = torch 0.001)"
