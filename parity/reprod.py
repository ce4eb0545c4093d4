"""The classic check of the paper-reproduction guide: .npy pairs and diff logs that reprod_log reads.

Five fake batches in eval mode for each network, as people know it. It is no verdict: a correct port shows loss
differences above the guide's 1e-6, and reversed batch-norm momentum passes. The verdict is the stages' float64 one.
"""

import contextlib
import io
import pathlib

import numpy as np
import paddle
import torch
from reprod_log import ReprodDiffHelper, ReprodLogger

import fixmatch.models
import parity.mirror.models
from fixmatch import optimizer as paddle_optimizer
from fixmatch.evaluate import score
from fixmatch.losses import cross_entropy
from parity.mirror import optimizer as torch_optimizer
from parity.mirror.evaluate import accuracy
from parity.weights import torch_to_paddle

STAGES = ("forward", "metric", "loss", "bp_align", "train_align")
_NETWORKS = {"wideresnet": {"depth": 28, "width": 2}, "resnext": {"depth": 28, "width": 4, "cardinality": 4}}
_BATCH = 4
_TRAIN_STEPS = 5


def write(folder: pathlib.Path, seeds) -> str:
    """Writes <stage>_paddle.npy, <stage>_torch.npy and <stage>_diff.log for all stages; returns a summary."""
    folder.mkdir(parents=True, exist_ok=True)
    loggers = {(stage, side): ReprodLogger() for stage in STAGES for side in ("paddle", "torch")}
    for arch, shape in _NETWORKS.items():
        for stage, name, ours, theirs in _pairs(arch, shape, seeds):
            loggers[stage, "paddle"].add(f"{arch}_{name}", np.atleast_1d(ours).astype(np.float32))
            loggers[stage, "torch"].add(f"{arch}_{name}", np.atleast_1d(theirs).astype(np.float32))
    for (stage, side), logger in loggers.items():
        logger.save(str(folder / f"{stage}_{side}.npy"))
    said = []
    for stage in STAGES:
        helper = ReprodDiffHelper()
        infos = [helper.load_info(str(folder / f"{stage}_{side}.npy")) for side in ("torch", "paddle")]
        helper.compare_info(*infos)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            helper.report(path=str(folder / f"{stage}_diff.log"), diff_threshold=1e-6)
        said.append(f"{stage}: {(folder / f'{stage}_diff.log').read_text().splitlines()[-1].split('INFO: ')[-1]}")
    return "\n".join([*said, f"written to {folder}; they are no verdict"])


def _pairs(arch: str, shape: dict, seeds):
    """(stage, name, our value, the reference's value), from the same weights and fake batches."""
    torch.manual_seed(0)
    theirs = _with_fitting_statistics(parity.mirror.models.build_model(arch, 10, **shape))
    ours = fixmatch.models.build_model(arch, 10, **shape)
    ours.eval()
    weights = torch_to_paddle({n: t.numpy().copy() for n, t in theirs.state_dict().items()})
    ours.set_state_dict({n: paddle.to_tensor(a) for n, a in weights.items()})
    our_sgd, their_sgd = paddle_optimizer.TwoGroupSGD(ours, 0.03), torch_optimizer.TwoGroupSGD(theirs, 0.03)
    for i, seed in enumerate(seeds):
        images, labels = _fake_batch(seed)
        with torch.no_grad(), paddle.no_grad():
            a, b = ours(paddle.to_tensor(images)).numpy(), theirs(torch.from_numpy(images)).numpy()
        yield "forward", f"logits_{i}", a, b
        found = score(a, labels, np.zeros(len(labels)))
        top1, top5 = accuracy(torch.from_numpy(b), torch.from_numpy(labels), (1, 5))
        yield "metric", f"top1_{i}", found.top1, top1
        yield "metric", f"top5_{i}", found.top5, top5
        yield "loss", f"data_{i}_loss", *_losses(ours, theirs, images, labels)
    for i, seed in enumerate(seeds):
        yield "bp_align", f"data_{i}_loss", *_step(ours, theirs, our_sgd, their_sgd, *_fake_batch(seed))
    ours.train()
    theirs.train()
    for i in range(_TRAIN_STEPS):
        batch = _fake_batch(seeds[i % len(seeds)])
        yield "train_align", f"step_{i}_loss", *_step(ours, theirs, our_sgd, their_sgd, *batch)


def _with_fitting_statistics(model):
    """In eval mode, with running statistics of one fake batch: those of a fresh network explode in 28 layers."""
    normalizations = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momentum = normalizations[0].momentum
    for layer in normalizations:
        layer.momentum = 1.0
    with torch.no_grad():
        model(torch.from_numpy(_fake_batch(0)[0]))
    for layer in normalizations:
        layer.momentum = momentum
    return model.eval()


def _fake_batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((_BATCH, 3, 32, 32)).astype(np.float32), rng.integers(0, 10, _BATCH)


def _losses(ours, theirs, images, labels):
    with torch.no_grad(), paddle.no_grad():
        a = cross_entropy(ours(paddle.to_tensor(images)), paddle.to_tensor(labels)).mean()
        b = torch.nn.functional.cross_entropy(theirs(torch.from_numpy(images)), torch.from_numpy(labels))
    return a.numpy(), b.numpy()


def _step(ours, theirs, our_sgd, their_sgd, images, labels):
    """Loss, backward and one update on both sides; the losses before it."""
    a = cross_entropy(ours(paddle.to_tensor(images)), paddle.to_tensor(labels)).mean()
    b = torch.nn.functional.cross_entropy(theirs(torch.from_numpy(images)), torch.from_numpy(labels))
    a.backward()
    b.backward()
    our_sgd.step()
    their_sgd.step()
    our_sgd.clear_grad()
    their_sgd.zero_grad()
    return a.detach().numpy(), b.detach().numpy()
