"""The classic check of the paper-reproduction guide: .npy pairs and diff logs that reprod_log reads.

It is no verdict: a mean difference below 1e-6 is asked of float32 numbers, which reversed batch-norm momentum and a
transposed array both pass. The verdict is the stages' own. Every set-up here is one in which a correct port passes:

- backward_Alignment is the published Step 3: a ResNeXt in eval mode with the running statistics of a fresh network.
- bp_align adds a WideResNet, whose activations grow from block to block with those statistics, to 1e6 in its logits.
  It steps in train mode, at a learning rate at which float32 does not amplify rounding.
- forward, metric and loss are in eval mode, with running statistics that fit a fake batch.
- train_align takes FixMatch steps as the stage `train` does, in float64: in float32 they are chaotic.
"""

import contextlib
import io
import logging
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import paddle
import torch
from reprod_log import ReprodDiffHelper, ReprodLogger

from fixmatch import evaluate, losses
from fixmatch import step as paddle_side
from fixmatch.checkpoint import load_weights
from fixmatch.config import Config, OptimConfig
from parity import reference, subject
from parity.case import PUBLISHED, Case, loss_probes
from parity.mirror import losses as mirror_losses
from parity.mirror import step as torch_side
from parity.mirror.evaluate import accuracy
from parity.weights import torch_to_paddle

Pair = tuple[str, str, np.ndarray, np.ndarray]  # log, name in it, our value, the reference's

LOGS = {  # the pairs of a log are in <name>_paddle.npy and <name>_torch.npy
    "forward": "forward_diff.log", "metric": "metric_diff.log", "loss": "loss_diff.log",
    "backward_Alignment": "diff_backward_Alignment_model.txt", "bp_align": "bp_align_diff.log",
    "train_align": "train_align_diff.log",
}
THRESHOLD = 1e-6  # of the guide, on the mean difference
_BATCH = 64
_MEAN, _STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the fake images are normalized already
_CALM_RATE = 1e-3  # a thirtieth of the recipe's
_TRAIN_STEPS = 5


def forward_metric_loss(seeds: list[int]) -> Iterator[Pair]:
    """Logits, top-1, top-5 and cross-entropy of both networks on fake batches, and the FixMatch loss of fake logits."""
    for arch in PUBLISHED:
        ours, theirs = _both_states(arch)
        _fit_statistics(ours, theirs)
        for i, seed in enumerate(seeds):
            images, labels = _fake_batch(seed)
            with torch.no_grad(), paddle.no_grad():
                a, b = ours.model(paddle.to_tensor(images)), theirs.model(torch.from_numpy(images))
                yield "loss", f"{arch}_data_{i}_loss", *_cross_entropy(a, b, labels)
            yield "forward", f"{arch}_logits_{i}", a.numpy(), b.numpy()
            found = evaluate.score(a.numpy(), labels, np.zeros(len(labels)))
            top1, top5 = accuracy(b, torch.from_numpy(labels), (1, 5))
            yield "metric", f"{arch}_top1_{i}", found.top1, top1
            yield "metric", f"{arch}_top5_{i}", found.top5, top5
    for i, seed in enumerate(seeds):
        yield from (("loss", f"fixmatch_{i}_{name}", a, b) for name, a, b in _fixmatch_losses(seed))


def backward_alignment(seeds: list[int]) -> Iterator[Pair]:
    """The published Step 3: one ResNeXt through all batches, eval mode, fresh statistics, the recipe's learning rate."""
    ours, theirs = _both_states("resnext")
    ours.model.eval()
    theirs.model.eval()
    for i, (a, b) in enumerate(_supervised_steps(ours, theirs, seeds), start=1):
        yield "backward_Alignment", f"data_{i}_loss", a, b
        yield "bp_align", f"resnext_data_{i}_loss", a, b


def wideresnet_backward(seeds: list[int]) -> Iterator[Pair]:
    """The same steps of a WideResNet, in train mode and at a thirtieth of the learning rate."""
    for i, (a, b) in enumerate(_supervised_steps(*_both_states("wideresnet", _CALM_RATE), seeds), start=1):
        yield "bp_align", f"wideresnet_data_{i}_loss", a, b


def train_alignment(seeds: list[int]) -> Iterator[Pair]:
    """The losses of free-running FixMatch steps of both networks, in float64."""
    for arch, model in PUBLISHED.items():
        case = Case(Config(model=model), 10, seeds[0])
        sides = (side.train(case, "float64", _TRAIN_STEPS, ("losses",)) for side in (subject, reference))
        for i, ((_, ours), (_, theirs)) in enumerate(zip(*sides, strict=True)):
            for name in ("loss_x", "loss_u", "loss"):
                yield "train_align", f"{arch}_step_{i}_{name}", ours[name], theirs[name]


PARTS = (forward_metric_loss, backward_alignment, wideresnet_backward, train_alignment)


def write(folder: pathlib.Path, seeds: Iterable[int], parts=PARTS) -> str:
    """Writes the .npy pairs and the log of every check that these parts belong to; returns a summary."""
    folder.mkdir(parents=True, exist_ok=True)
    loggers: dict[str, tuple[ReprodLogger, ReprodLogger]] = {}
    for part in parts:
        for log, name, *values in part(list(seeds)):
            for logger, value in zip(loggers.setdefault(log, (ReprodLogger(), ReprodLogger())), values, strict=True):
                logger.add(name, np.atleast_1d(value))
    said = []
    for log, (ours, theirs) in loggers.items():
        ours.save(str(folder / f"{log}_paddle.npy"))
        theirs.save(str(folder / f"{log}_torch.npy"))
        said.append(f"{log}: {_report(folder, log)}")
    return "\n".join([*said, f"written to {folder}; they are no verdict"])


def _report(folder: pathlib.Path, log: str) -> str:
    """Lets reprod_log compare a pair and write its log; returns the last line of it."""
    helper = ReprodDiffHelper()
    helper.compare_info(*(helper.load_info(str(folder / f"{log}_{side}.npy")) for side in ("torch", "paddle")))
    with _handlers_of_its_own():
        helper.report(path=str(folder / LOGS[log]), diff_threshold=THRESHOLD)
    return (folder / LOGS[log]).read_text().splitlines()[-1].split("INFO: ")[-1]


@contextlib.contextmanager
def _handlers_of_its_own() -> Iterator[None]:
    """Takes back what reprod_log does to the root logger: handlers that every later report would write to, too."""
    logger = logging.getLogger("root")
    handlers, level = logger.handlers, logger.level
    logger.handlers = []
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers = handlers
        logger.setLevel(level)


def _both_states(arch: str, learning_rate: float = OptimConfig.lr):
    """Production's state and the mirror's, float32, train mode, both with the mirror's fresh weights."""
    config = Config(model=PUBLISHED[arch], optim=OptimConfig(lr=learning_rate))
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


def _fake_batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [64, 3, 32, 32] and int64 [64]: the numbers of np.random.seed(seed) before each, as in the guide."""
    images = np.random.RandomState(seed % 2**32).randn(_BATCH, 3, 32, 32).astype(np.float32)
    return images, np.random.RandomState(seed % 2**32).randint(0, 10, _BATCH)


def _cross_entropy(our_logits, their_logits, labels: np.ndarray):
    """The mean over the batch on both sides, as scalars of each framework."""
    return (losses.cross_entropy(our_logits, paddle.to_tensor(labels)).mean(),
            torch.nn.functional.cross_entropy(their_logits, torch.from_numpy(labels)))


def _supervised_steps(ours, theirs, seeds: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One update a batch on both sides; yields the losses before it."""
    for images, labels in map(_fake_batch, seeds):
        a, b = paddle_side.forward(ours, paddle.to_tensor(images)), theirs.model(torch.from_numpy(images))
        a, b = _cross_entropy(a, b, labels)
        yield a.numpy(), b.detach().numpy()
        paddle_side.update(ours, a)
        torch_side.update(theirs, b)


def _fixmatch_losses(seed: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, ours, the reference's) of the losses of confident and unsure float32 logits."""
    x, targets, u_w, u_s = loss_probes(10, seed)["random"]
    logits = [a.astype(np.float32) for a in (x, u_w, u_s)]
    a, b = ([tensor(array) for array in (logits[0], targets, *logits[1:])]
            for tensor in (paddle.to_tensor, torch.from_numpy))
    found, expected = losses.fixmatch_loss(*a), mirror_losses.fixmatch_loss(*b)
    for name in ("loss_x", "loss_u", "loss"):
        yield name, getattr(found, name).numpy(), getattr(expected, name).numpy()
