"""One FixMatch step. Mirrors fixmatch/step.py, line for line.

Reference: kekmodel/FixMatch-pytorch, train.py. Shapes: B labeled images, M = mu * B unlabeled ones, K classes, C H W.
"""

import dataclasses

import numpy as np
import torch

from parity.mirror.ema import EMA
from parity.mirror.losses import FixMatchLoss, fixmatch_loss
from parity.mirror.models import build_model
from parity.mirror.normalize import Normalize
from parity.mirror.optimizer import TwoGroupSGD
from parity.mirror.scaler import LossScaler
from parity.mirror.schedule import build_scheduler
from parity.mirror.thresholds import State, initial_state, pseudo_labels, with_fairness


@dataclasses.dataclass
class TrainState:
    """What a step changes."""

    model: torch.nn.Module
    ema: EMA
    optimizer: TwoGroupSGD
    scheduler: torch.optim.lr_scheduler.LRScheduler
    normalize: Normalize
    thresholds: State
    scaler: LossScaler | None = None  # of float16 alone


def interleave(x, size: int):
    """The reference mixes the three parts before the forward pass, so that chunks on several GPUs see all of them."""
    return x.reshape([-1, size, *x.shape[1:]]).transpose(0, 1).reshape([-1, *x.shape[1:]])


def de_interleave(x, size: int):
    """The inverse of `interleave`."""
    return x.reshape([size, -1, *x.shape[1:]]).transpose(0, 1).reshape([-1, *x.shape[1:]])


def train_step(state: TrainState, batch, ssl) -> FixMatchLoss:
    """One step of FixMatch on one batch, in train mode."""
    images = state.normalize(np.concatenate([batch.x, batch.u_w, batch.u_s]))  # [B + 2M, C, H, W]
    targets_x = torch.from_numpy(batch.targets_x)  # [B]

    parts = 2 * (len(batch.u_w) // len(batch.x)) + 1
    logits = de_interleave(state.model(interleave(images, parts)), parts)  # [B + 2M, K]
    logits_x = logits[:len(batch.x)]
    logits_u_w, logits_u_s = logits[len(batch.x):].chunk(2)

    pseudo, state.thresholds = pseudo_labels(logits_x, logits_u_w, batch.index_u, state.thresholds, ssl)
    losses = fixmatch_loss(logits_x, targets_x, logits_u_w, logits_u_s, ssl.threshold, ssl.temperature, ssl.lambda_u,
                           pseudo)
    losses = with_fairness(losses, logits_u_s, state.thresholds, ssl)
    update(state, losses.loss)
    return losses


def update(state: TrainState, loss) -> None:
    """Gradients, then in the reference's order: optimizer, schedule, EMA, clear."""
    skip = backward(state, loss)
    if not skip:
        state.optimizer.step()
    state.scheduler.step()
    state.ema.update()
    state.model.zero_grad()


def backward(state: TrainState, loss) -> bool:
    """The gradients of the loss. Returns whether they overflowed."""
    if state.scaler is None:
        loss.backward()
        return False
    state.scaler.scaled(loss).backward()
    return state.scaler.unscale(state.model.parameters())


def build_state(config, num_classes: int, mean, std, num_unlabeled: int = 0,
                label_counts: np.ndarray | None = None) -> TrainState:
    """A fresh network and everything that trains it."""
    model = build_model(num_classes=num_classes, **config.model.network())
    optim = config.optim
    optimizer = TwoGroupSGD(model, optim.lr, optim.momentum, optim.weight_decay, optim.nesterov)
    scheduler = build_scheduler(optimizer, config.train.total_steps, optim.warmup_steps)
    return TrainState(model, EMA(model, config.ema.decay), optimizer, scheduler, Normalize(mean, std),
                      initial_state(config.ssl, num_classes, num_unlabeled, label_counts))
