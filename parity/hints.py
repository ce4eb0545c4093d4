"""From the first tensor that diverged to the likely cause, in one line."""

import fnmatch

import numpy as np

from parity.compare import Row
from parity.goldens import undigested

# (stage pattern, tensor pattern, cause); the first match counts. The planted bugs in parity/plants/ are what this was
# tried on.
_HINTS = (
    ("forward", "initial/*bn*", "batch norm that does not start at weight 1, bias 0, mean 0, variance 1"),
    ("forward", "initial/fc.*", "a classifier that is not xavier normal with bias 0"),
    ("forward", "initial/classifier.*", "a classifier that is not xavier normal with bias 0"),
    ("forward", "initial/*", "convolutions that are not kaiming normal with mode fan_out, gain sqrt(2)"),
    ("forward", "input/*", "a normalization other than (pixel / 255 - mean) / std, a channel"),
    ("forward", "eval activations/block1.layer.0.bn*", "batch norm's epsilon or the activation after it"),
    ("forward", "eval activations/*bn*", "batch norm's epsilon or the activation after it"),
    ("forward", "eval activations/block1.layer.0.convShortcut",
     "activate_before_residual: a shortcut of block1.layer.0 that does not see the activated input"),
    ("forward", "eval activations/*convShortcut",
     "a shortcut after block1.layer.0 that does not see the raw input"),
    ("forward", "eval activations/block[23].layer.0.conv1",
     "conv1 of block2.layer.0 or block3.layer.0 without the raw input or without the stride"),
    ("forward", "eval activations/*conv*", "stride, padding, groups, or the input of this convolution"),
    ("forward", "eval activations/fc", "a pooling other than the average before the classifier"),
    ("forward", "eval activations/classifier", "a pooling other than the average before the classifier"),
    ("forward", "eval activations/logits", "a network that returns other than what its classifier gives"),
    ("forward", "eval activations/*", "the residual sum of this block"),
    ("forward", "train activations/*", "dropout, or batch norm without batch statistics: only train mode differs"),
    ("metric", "*/top*", "ranking of ties, or weighting of the last partial batch"),
    ("metric", "summary/*", "a summary that is not of all evaluations, or not of the last 20"),
    ("metric", "*", "a mean that is not over all test images, the last partial batch included"),
    ("loss", "policy *fairness/*", "FreeMatch's fairness term, or its gradient"),
    ("loss", "policy *", "how ssl.policy or ssl.align makes this of probabilities, or how its statistics move"),
    ("loss", "loss tie/mask", "an exclusive threshold, where mask = confidence >= threshold"),
    ("loss", "*/confidence", "pseudo-probabilities other than one softmax over classes of weak logits / temperature"),
    ("loss", "*/pseudo_labels", "pseudo-labels other than the argmax over classes of the weak views"),
    ("loss", "*/mask", "a mask other than confidence >= threshold, on probabilities, in their own precision"),
    ("loss", "loss extreme/loss_*", "a cross-entropy that saturates (Paddle's stops at 64)"),
    ("loss", "*/loss_x", "a supervised cross-entropy other than the batch mean with hard labels, no smoothing"),
    ("loss", "*/loss_u", "an unsupervised cross-entropy not times the mask, or not a mean over all mu * B images"),
    ("loss", "*/loss", "a sum other than loss_x + lambda_u * loss_u"),
    ("loss", "structure/*", "pseudo-labels made of weak logits that were not detached"),
    ("loss", "*gradients/logits_u_w", "a loss through which the weak views' logits get a gradient"),
    ("loss", "*", "how the loss is reduced"),
    ("backward", "* activations/*", "the joint forward (which images it sees, their order, train mode), or this layer"),
    ("backward", "*/confidence", "which logits become pseudo-labels, or the temperature that the step passes on"),
    ("backward", "*/pseudo_labels", "the split of the joint batch"),
    ("backward", "*/mask", "the threshold"),
    ("backward", "* losses/loss", "what is added to loss_x + lambda_u * loss_u, such as FreeMatch's fairness term"),
    ("backward", "* losses/*", "the split of the joint batch into labeled, weak and strong"),
    ("backward", "*gradients/*", "the backward pass of this layer"),
    ("optimizer", "*momentum/*bn*", "weight decay on batch norm or bias parameters (names with 'bn' or 'bias')"),
    ("optimizer", "*momentum/*bias", "weight decay on batch norm or bias parameters (names with 'bn' or 'bias')"),
    ("optimizer", "round 0 momentum/*", "weight decay of the decayed group (L2, added to the gradient), or clipping"),
    ("optimizer", "round 0 weights/*", "Nesterov, the learning rate, or when it is stepped"),
    ("optimizer", "*momentum/*", "momentum coefficient, or gradients that were not cleared"),
    ("optimizer", "*weights/*", "Nesterov, the learning rate, or when it is stepped"),
    ("scaler", "*/scale", "how the loss scale starts, shrinks, grows, is bounded or is restored"),
    ("scaler", "*/good_steps", "how steps without an overflow are counted, or restored"),
    ("scaler", "*/skipped", "how skipped steps are counted, or restored"),
    ("scaler", "*/lr", "a schedule that an overflow holds back: the reference's goes on"),
    ("scaler", "* ema/*", "an average that an overflow holds back: the reference's goes on"),
    ("scaler", "*", "gradients not divided by the scale, or an overflow that moves weights or momentum"),
    ("schedule", "*warm-up/first steps", "warm-up or cosine that does not count optimizer steps, from 0"),
    ("schedule", "*", "a schedule other than lr(t) = lr * max(0, cos(7 pi t / (16 T)))"),
    ("ema", "*buffers/*", "running statistics of the live model: the share of a step, or whether a layer updates them"),
    ("ema", "*running_*", "buffers that are averaged or skipped, not copied from the live model"),
    ("ema", "*", "the decay of the average, a warm-up of it, when it is updated, or which weights it copies"),
    ("augment", "operations*", "this operation's range, or Cutout's side, colour or clamping, which follows each"),
    ("augment", "views*/weak", "another order than flip, reflection padding, crop"),
    ("augment", "views*/strong", "order of flip, crop, RandAugment, Cutout"),
    ("augment", "draws/magnitude*", "magnitudes that are not uniform over 1..9"),
    ("augment", "draws/applied", "operations that are not applied with probability 1/2"),
    ("augment", "draws/*", "what is drawn at random"),
    ("augment", "split/labels a class", "a split without num_labeled / num_classes of each class"),
    ("augment", "split/distinct*", "labels drawn with replacement"),
    ("augment", "split/images labeled*", "labels that are not drawn from all images of a class alike"),
    ("augment", "split/*", "unlabeled images without the labeled ones"),
    ("augment", "normalization/*", "mean and standard deviation of this data set"),
    ("train", "* lr/*", "a scheduler that is not stepped once, after each optimizer step"),
    ("train", "*losses/*", "the logits that the loss is given: the joint forward and its split"),
    ("train", "*gradients/*", "batch statistics that are not over one joint forward, or gradient not through them"),
    ("train", "*momentum/*", "gradients that are not cleared after each step"),
    ("train", "*buffers/*", "running statistics that are not updated once a step, by one joint forward"),
    ("train", "*ema/*", "an average that is not updated once a step, after the optimizer"),
    ("train", "*activations/*", "the joint forward pass"),
    ("config", "*", "a setting of this recipe that is not the published one"),
    ("data", "shapes/*", "batch size, mu, dtype or strong recipe other than configured"),
    ("data", "split/*", "a split other than configured"),
    ("data", "labels/*", "labels that do not belong to their images"),
    ("data", "views/* views are *", "views that show something else than flipped crops of the data's images"),
    ("data", "views/strong*", "strong views that are not of the image of their weak view, or not as their plan says"),
    ("data", "views/*", "views that are not what Pillow makes of the same plan"),
    ("data", "order/*batch*", "a batch that depends on more than seed, rank and step, or changes while it waits"),
    ("data", "order/*", "images that are not shown equally often, in a new order each pass, ranks apart"),
    ("data", "ranks/*", "the share of the batches that this rank takes"),
    ("data", "draws/rates *", "rates of CTAugment other than those that a fixed number of steps before has left"),
    ("data", "draws/* differ", "a random generator that is not seeded by seed, rank and step"),
    ("data", "draws/* independent", "two random draws that depend on each other"),
    ("data", "draws/*", "a random draw with another distribution"),
    ("operators", "joint forward/*", "a batch that goes through the network in parts: batch norm is over all of it"),
    ("operators", "* gradient*", "the backward pass of this operator, as it trains: its kernel or its fallback"),
    ("operators", "*/running *", "the update of the running statistics in the precision that trains"),
    ("operators", "*/batch *", "the batch statistics of this operator, as it trains"),
    ("operators", "*in eval mode", "evaluation of this layer: running statistics, epsilon or activation"),
    ("operators", "*", "this operator, as it trains: its kernel, its fallback, or what chooses between them"),
    ("run", "batch of step*", "a loop that trains on other batches than the Loader's of these steps"),
    ("run", "initial/*", "how fresh weights are drawn"),
    ("run", "restored/*", "what a resumed run takes from its checkpoint"),
    ("run", "start/*", "an average that does not start from the network's weights"),
    ("run", "* mode/model trains", "a network left in eval mode"),
    ("run", "* mode/*", "an averaged network in train mode"),
    ("run", "* lr/*", "a schedule that does not start at step 0 or is not stepped once a step"),
    ("run", "* losses/mask", "another threshold or temperature than configured"),
    ("run", "* losses/*", "a loop that trains under other settings than configured, another loss, or operators that "
     "compute roughly: runtime.cpu_kernels=off takes others"),
    ("run", "* gradients/*", "the backward pass in the precision that trains"),
    ("run", "* buffers/*", "running statistics in the precision that trains"),
    ("run", "* momentum/*", "the optimizer in the precision that trains, or a loop that touches its state"),
    ("run", "* weights/*", "the optimizer in the precision that trains, or a loop that touches the weights"),
    ("run", "* ema/*", "an average that is not updated once a step, or by another decay"),
    ("run", "logged*", "figures that are logged and are not those of the step"),
    ("run", "evaluated*", "evaluation: mode, weights, images or normalization of what is scored"),
    ("run", "checkpoint*", "a checkpoint that does not hold the state that was live"),
    ("run", "result*", "a result that is not that of the evaluations"),
    ("resume", "stopped/*", "a signal that is not obeyed after the step, or a checkpoint of another step"),
    ("resume", "logged*", "steps that are repeated, left out or other after a resume: data, schedule or state"),
    ("resume", "best/step", "the best evaluation so far, forgotten or never beaten"),
    ("resume", "* momentum/*", "momentum that is not restored"),
    ("resume", "* ema/*", "an average that is not restored"),
    ("resume", "* manifest/*", "history or step that is not restored"),
    ("resume", "*", "state that is not restored"),
    ("convert", "*", "a conversion that does not keep this"),
    ("ranks", "rank * evaluation/*", "how ranks share the test images, or whose running statistics they evaluate with"),
    ("ranks", "rank * probe/*", "whose running statistics CTAugment's probes are classified with"),
    ("ranks", "rank * of_rank_0/*", "what a resumed rank is given of rank 0's checkpoint"),
    ("ranks", "rank * difference/*", "the comparison of what ranks start from"),
    ("ranks", "*", "ranks that do not average gradients, or do not start alike"),
    ("reference", "*", "a misunderstanding of the reference that both sides share, which only its own figures show"),
)


def hint_for(stage: str, row: Row) -> str:
    """The likely cause of the first divergence of a stage."""
    if row.tensor.startswith("stage/"):
        return "likely production code that cannot do this at all"
    measured = _running_statistics(row) if "running_" in row.tensor and stage in ("forward", "train") else ""
    measured = measured or (_scaled(row) if "gradients/" in row.tensor else "")
    if measured:
        return measured
    tensor = undigested(row.tensor)
    for stage_pattern, tensor_pattern, hint in _HINTS:
        if fnmatch.fnmatchcase(stage, stage_pattern) and fnmatch.fnmatchcase(tensor, tensor_pattern):
            return "likely " + hint
    return "no known cause fits"


def _running_statistics(row: Row) -> str:
    """Batch norm's buffers: tells an inverted momentum from another one and from a biased variance."""
    if row.ours is None or row.reference is None or row.why:
        return ""
    if row.tensor.endswith("running_mean") and row.ours.min() > 0 > row.reference.min():
        return "likely the batch mean and variance are exchanged"
    if row.relative > 0.05:
        return "likely BN momentum inverted (paddle = 1 - torch)"
    if row.tensor.endswith("running_var"):
        ratio = np.median(row.ours / row.reference)
        if abs(ratio - 1) < 2e-3:
            return "likely the biased batch variance is averaged (Paddle's CPU kernel), not the unbiased one"
    return "likely BN momentum (paddle 0.999 = torch 0.001)"


def _scaled(row: Row) -> str:
    """A gradient that is a multiple of the right one: the fault is in the loss that is trained, not in this layer."""
    if row.ours is None or row.reference is None or row.why or not np.square(row.reference).sum():
        return ""
    factor = float((row.ours * row.reference).sum() / np.square(row.reference).sum())
    rest = np.abs(row.ours - factor * row.reference).max()
    return (f"likely the loss that is trained is {factor:.3g} times the loss"
            if factor and rest < 1e-6 * np.abs(row.ours).max() else "")
