"""Whether a checkpoint of ours and a file of the reference mean the same: by logits, and by what a step makes of both.

The mirror loads the file as the reference's --resume does, and production the checkpoint as its own. One step on both
sides, with the same gradients in float64, tells whether weights, average, momentum, hyper-parameters and schedule have
arrived where they belong.
"""

from collections.abc import Iterator

import numpy as np
import paddle
import torch

from fixmatch import step as algorithm
from fixmatch.checkpoint import Checkpoint, load_weights
from fixmatch.config import Config, from_dict
from parity import subject
from parity.case import IDLE, Case
from parity.compare import Row, compare_tensor, near, raised
from parity.mirror import step as mirror
from parity.reference import precision, without_initial_values
from parity.weights import paddle_to_torch, torch_to_paddle

LOGITS_GATE = 1e-11
UPDATE_GATE = 1e-12


def meaning_rows(label: str, ours: Checkpoint, theirs: dict, config: Config) -> Iterator[Row]:
    """Logits of both sides in eval mode, and what one further step makes of both.

    Args:
        ours: a checkpoint, which production restores as --resume does.
        theirs: a file's content, which the mirror loads as the reference's --resume does.
        config: under which the mirror goes on; production takes the checkpoint's own.
    """
    classes = len(ours.manifest.classes)
    with precision("float64"), subject.precision("float64"):
        try:
            expected = _mirror_restored(theirs, config, classes)
            found = _restored(ours, classes)
            yield from _logits_rows(label, found, expected)
            yield from _step_rows(label, found, expected)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            yield raised(f"{label}/loads", error)


def _mirror_restored(content: dict, config: Config, classes: int) -> mirror.TrainState:
    with without_initial_values():
        state = mirror.build_state(config, classes, Case.mean, Case.std)
    state.model.load_state_dict(content["state_dict"], strict=True)
    state.ema.average.load_state_dict(content["ema_state_dict"], strict=True)
    state.optimizer.load_state_dict(content["optimizer"])
    state.scheduler.load_state_dict(content["scheduler"])
    return state


def _restored(saved: Checkpoint, classes: int) -> algorithm.TrainState:
    config, manifest = from_dict(saved.manifest.config, "parity"), saved.manifest
    with subject.without_initial_values():
        state = algorithm.build_state(config, classes, manifest.mean, manifest.std)
    parts = {part: {n: a.astype(np.float64) for n, a in saved.part(part).items()}
             for part in ("model", "ema", "momentum")}
    load_weights(state.model, parts["model"])
    load_weights(state.ema.average, parts["ema"])
    state.optimizer.load_state({n: paddle.to_tensor(a) for n, a in parts["momentum"].items()})
    state.scheduler.step(manifest.step)
    return state


def _logits_rows(label: str, ours: algorithm.TrainState, theirs: mirror.TrainState) -> Iterator[Row]:
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8))
    for name, one, other in (("raw", ours.model, theirs.model), ("average", ours.ema.average, theirs.ema.average)):
        one.eval()
        other.eval()
        with paddle.no_grad(), torch.no_grad():
            found, expected = one(paddle.to_tensor(images)).numpy(), other(torch.from_numpy(images)).numpy()
        yield compare_tensor(f"{label} logits/{name}", found, expected, LOGITS_GATE)


def _step_rows(label: str, ours: algorithm.TrainState, theirs: mirror.TrainState) -> Iterator[Row]:
    yield _lr_row(f"{label} further step/lr", ours, theirs)
    rng = np.random.default_rng(1)
    gradients = {n: rng.standard_normal(tuple(p.shape)) for n, p in theirs.model.named_parameters() if n not in IDLE}
    given = torch_to_paddle(gradients)
    algorithm.update(ours, sum((p * paddle.to_tensor(given[n])).sum() for n, p in ours.model.named_parameters()
                               if n in given))
    mirror.update(theirs, sum((p * torch.from_numpy(gradients[n])).sum() for n, p in theirs.model.named_parameters()
                              if n in gradients))
    yield _lr_row(f"{label} further step/next lr", ours, theirs)
    parts = {"momentum": (ours.optimizer.state(), theirs.optimizer.momentum_buffers()),
             "weights": (ours.model.state_dict(), theirs.model.state_dict()),
             "average": (ours.ema.average.state_dict(), theirs.ema.average.state_dict())}
    for part, (found, expected) in parts.items():
        if part == "momentum" and not theirs.optimizer.defaults["momentum"]:
            continue  # Torch keeps none, and Paddle a copy of the gradients
        arrays = paddle_to_torch({n: t.numpy() for n, t in found.items()})
        for name, tensor in expected.items():
            if not name.endswith("num_batches_tracked"):
                yield near(f"{label} further step {part}/{name}", arrays.get(name), tensor.detach().numpy(),
                           UPDATE_GATE)


def _lr_row(tensor: str, ours: algorithm.TrainState, theirs: mirror.TrainState) -> Row:
    expected = [group["lr"] for group in theirs.optimizer.param_groups]
    return near(tensor, np.full(len(expected), ours.scheduler.get_lr()), np.array(expected), UPDATE_GATE)
