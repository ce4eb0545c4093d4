"""What the classic check of the paper-reproduction guide compares, in set-ups in which a correct port passes.

- backward_Alignment is the published Step 3: a ResNeXt in eval mode with the running statistics of a fresh network.
- bp_align adds a WideResNet, whose activations grow from block to block with those statistics: its third loss is NaN,
  in both frameworks. So it steps in train mode, and in float64, since in float32 these five steps amplify rounding to
  2e-5, over the guide's 1e-6, and at a learning rate small enough to stay below it no wrong weight decay would show.
- forward, metric and loss are in eval mode, with running statistics that fit a fake batch.
- train_align takes FixMatch steps as the stage `train` does, in float64: in float32 they are chaotic.
"""

from collections.abc import Iterator

import numpy as np
import paddle
import torch

from fixmatch import evaluation, losses
from fixmatch import step as paddle_side
from fixmatch.checkpoint import load_weights
from fixmatch.config import Config
from parity import reference, subject
from parity.case import PUBLISHED, Case, loss_probes
from parity.mirror import losses as mirror_losses
from parity.mirror import step as torch_side
from parity.mirror.evaluation import accuracy
from parity.weights import torch_to_paddle

Pair = tuple[str, str, np.ndarray, np.ndarray]  # log, name in it, our value, the reference's

_PUBLISHED_BATCH = 64  # images of Step 3
_BATCH = 16
_MEAN, _STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the fake images are normalized already
_TRAIN_STEPS = 5


def forward_metric_loss(seeds: list[int]) -> Iterator[Pair]:
    """Logits, top-1, top-5 and cross-entropy of both networks on fake batches, and the FixMatch loss."""
    for arch in PUBLISHED:
        ours, theirs = _both_states(arch)
        _fit_statistics(ours, theirs)
        for i, seed in enumerate(seeds):
            images, labels = _fake_batch(seed)
            with torch.no_grad(), paddle.no_grad():
                a, b = ours.model(paddle.to_tensor(images)), theirs.model(torch.from_numpy(images))
                loss_a, loss_b = _cross_entropy(a, b, labels)
            found = evaluation.score(a.numpy(), labels, np.zeros(len(labels)))
            top1, top5 = accuracy(b, torch.from_numpy(labels), (1, 5))
            yield "forward", f"{arch}_logits_{i}", a.numpy(), b.numpy()
            yield "loss", f"{arch}_data_{i}_loss", loss_a.numpy(), loss_b.numpy()
            yield "metric", f"{arch}_top1_{i}", np.array(found.top1), np.array(top1)
            yield "metric", f"{arch}_top5_{i}", np.array(found.top5), np.array(top5)
    for i, seed in enumerate(seeds):
        yield from (("loss", f"fixmatch_{i}_{name}", a, b) for name, a, b in _fixmatch_losses(seed))


def backward_alignment(seeds: list[int]) -> Iterator[Pair]:
    """The published Step 3: one ResNeXt through all batches, in eval mode, at the recipe's learning rate."""
    ours, theirs = _both_states("resnext")
    ours.model.eval()
    theirs.model.eval()
    for i, (a, b) in enumerate(_supervised_steps(ours, theirs, seeds, _PUBLISHED_BATCH), start=1):
        yield "backward_Alignment", f"data_{i}_loss", a, b
        yield "bp_align", f"resnext_data_{i}_loss", a, b


def wideresnet_backward(seeds: list[int]) -> Iterator[Pair]:
    """The same steps of a WideResNet, in train mode and in float64."""
    with subject.precision("float64"), reference.precision("float64"):
        losses_of_both = list(_supervised_steps(*_both_states("wideresnet"), seeds))
    for i, (a, b) in enumerate(losses_of_both, start=1):
        yield "bp_align", f"wideresnet_data_{i}_loss", a, b


def train_alignment(seeds: list[int]) -> Iterator[Pair]:
    """The losses of free-running FixMatch steps of both networks, in float64."""
    for arch, model in PUBLISHED.items():
        case = Case(Config(model=model), 10, seeds[0])
        losses_of_steps = dict.fromkeys(range(_TRAIN_STEPS), ("losses",))
        sides = (side.train(case, "float64", losses_of_steps) for side in (subject, reference))
        for i, ((_, ours), (_, theirs)) in enumerate(zip(*sides, strict=True)):
            for name in ("loss_x", "loss_u", "loss"):
                yield "train_align", f"{arch}_step_{i}_{name}", ours[name], theirs[name]


PARTS = (forward_metric_loss, backward_alignment, wideresnet_backward, train_alignment)


def _both_states(arch: str):
    """Production's state and the mirror's, in train mode and the default dtypes, both with the mirror's fresh weights.

    Learning rate 0.03 (a cosine of 2^20 steps, which does not move in five), momentum 0.9, Nesterov, decay 5e-4 / 0.
    """
    config = Config(model=PUBLISHED[arch])
    torch.manual_seed(0)
    ours, theirs = (side.build_state(config, 10, _MEAN, _STD) for side in (paddle_side, torch_side))
    _copy_weights(ours, theirs)
    return ours, theirs


def _copy_weights(ours, theirs) -> None:
    load_weights(ours.model, torch_to_paddle({n: t.numpy().copy() for n, t in theirs.model.state_dict().items()}))


def _fit_statistics(ours, theirs) -> None:
    """Puts both networks into eval mode with the batch statistics of one fake batch as running statistics."""
    norms = [m for m in theirs.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momentum = norms[0].momentum
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        theirs.model(torch.from_numpy(_fake_batch(0)[0]))
    for norm in norms:
        norm.momentum = momentum
    _copy_weights(ours, theirs)
    ours.model.eval()
    theirs.model.eval()


def _fake_batch(seed: int, size: int = _BATCH) -> tuple[np.ndarray, np.ndarray]:
    """Images [size, 3, 32, 32] in the default dtype and int64 labels [size].

    They are the numbers that np.random.seed(seed) gives before either, as the guide has it.
    """
    images = np.random.RandomState(seed % 2**32).randn(size, 3, 32, 32).astype(paddle.get_default_dtype())
    return images, np.random.RandomState(seed % 2**32).randint(0, 10, size)


def _cross_entropy(our_logits, their_logits, labels: np.ndarray):
    """The mean over the batch on both sides, as scalars of each framework."""
    return (losses.cross_entropy(our_logits, paddle.to_tensor(labels)).mean(),
            torch.nn.functional.cross_entropy(their_logits, torch.from_numpy(labels)))


def _supervised_steps(ours, theirs, seeds: list[int], batch_size: int = _BATCH) -> Iterator[tuple]:
    """One update a batch on both sides; yields the two losses before it."""
    for images, labels in (_fake_batch(seed, batch_size) for seed in seeds):
        a, b = paddle_side.forward(ours, paddle.to_tensor(images)), theirs.model(torch.from_numpy(images))
        a, b = _cross_entropy(a, b, labels)
        yield a.numpy(), b.detach().numpy()
        paddle_side.update(ours, a)
        torch_side.update(theirs, b)


def _fixmatch_losses(seed: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, ours, the reference's) of the losses of confident and unsure logits, in float64."""
    probe = loss_probes(10, seed)["random"]
    found = losses.fixmatch_loss(*map(paddle.to_tensor, probe))
    expected = mirror_losses.fixmatch_loss(*map(torch.from_numpy, probe))
    for name in ("loss_x", "loss_u", "loss"):
        yield name, getattr(found, name).numpy(), getattr(expected, name).numpy()
