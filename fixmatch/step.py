"""One FixMatch step (arXiv 2001.07685, algorithm 1) and what it changes; nothing of the loop around it.

parity/mirror/step.py stands beside this file line for line, in Torch.
Reference: kekmodel/FixMatch-pytorch, train.py. Shapes: B labeled images, M = mu * B unlabeled ones, K classes, C H W.
"""

import dataclasses

import numpy as np
import paddle

from fixmatch import distributed
from fixmatch.config import Config, SSLConfig
from fixmatch.data.loader import Batch
from fixmatch.ema import EMA
from fixmatch.losses import FixMatchLoss, cross_entropy, fixmatch_loss
from fixmatch.models import build_model
from fixmatch.normalize import Normalize, to_device
from fixmatch.optimizer import TwoGroupSGD
from fixmatch.runtime import mixed_precision
from fixmatch.scaler import LossScaler
from fixmatch.schedule import build_scheduler
from fixmatch.thresholds import State, initial_state, pseudo_labels, with_fairness


@dataclasses.dataclass
class TrainState:
    """What a step changes."""

    model: paddle.nn.Layer
    network: paddle.nn.Layer  # `model`, or its data-parallel wrapper
    ema: EMA
    optimizer: TwoGroupSGD
    scheduler: paddle.optimizer.lr.LRScheduler
    normalize: Normalize
    amp: str | None  # "float16" or "bfloat16": what convolutions and products are computed in; None: float32
    scaler: LossScaler | None  # with float16 alone: the range of bfloat16 is that of float32
    thresholds: State  # of ssl.policy; empty for the fixed one

    def tensors(self) -> dict[str, paddle.Tensor]:
        """model/NAME, ema/NAME, momentum/NAME and thresholds/NAME, as they are: the next step changes them."""
        parts = {"model": self.model.state_dict(), "ema": self.ema.average.state_dict(),
                 "momentum": self.optimizer.state(), "thresholds": self.thresholds}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def train_step(state: TrainState, batch: Batch, ssl: SSLConfig) -> FixMatchLoss:
    """One step of FixMatch on one batch; returns the losses, mask and pseudo-labels, still on the device."""
    images = state.normalize(np.concatenate([batch.x, batch.u_w, batch.u_s]))  # [B + 2M, C, H, W]
    targets_x = to_device(batch.targets_x)  # [B]

    # One joint forward: batch statistics are over all three parts, and through them the weak views get gradient too.
    logits = forward(state, images)  # [B + 2M, K]
    logits_x, logits_u_w, logits_u_s = paddle.split(logits, [len(batch.x), len(batch.u_w), len(batch.u_s)])

    pseudo, state.thresholds = pseudo_labels(logits_x, logits_u_w, batch.index_u, state.thresholds, ssl)
    losses = fixmatch_loss(logits_x, targets_x, logits_u_w, logits_u_s, ssl.threshold, ssl.temperature, ssl.lambda_u,
                           pseudo)
    losses = with_fairness(losses, logits_u_s, state.thresholds, ssl)
    update(state, losses.loss)
    return losses


def supervised_step(state: TrainState, batch: Batch) -> FixMatchLoss:
    """The baseline: the same step on the labeled images alone."""
    logits_x = forward(state, state.normalize(batch.x))  # [B, K]
    loss = cross_entropy(logits_x, to_device(batch.targets_x)).mean()
    update(state, loss)
    none = paddle.zeros([0], dtype=loss.dtype)
    return FixMatchLoss(loss, loss, paddle.zeros_like(loss), none, none, paddle.zeros([0], dtype="int64"))


def forward(state: TrainState, images):
    with autocast(state.amp):
        logits = state.network(images)
    return logits.astype(images.dtype)


def autocast(amp: str | None):
    """Mixed precision as the reference has it: level O1, each operator in the dtype that it can stand."""
    return paddle.amp.auto_cast(enable=amp is not None, dtype=amp or "float16", level="O1")


def update(state: TrainState, loss) -> None:
    """Gradients, then in the reference's order: optimizer, schedule, EMA, clear.

    Gradients that overflow float16 skip the optimizer alone. So does the reference, where apex leaves out the one call
    of optimizer.step: its schedule moves on, and its average takes in the weights once more, which have not moved.
    """
    skip = backward(state, loss)
    state.optimizer.step(skip)
    state.scheduler.step()
    state.ema.update()
    state.optimizer.clear_grad()


def backward(state: TrainState, loss):
    """The gradients of the loss. Returns whether they overflowed, bool [1] on the device; None where they cannot."""
    if state.scaler is None:
        loss.backward()
        return None
    state.scaler.scaled(loss).backward()
    return state.scaler.unscale(state.optimizer.parameters.values())


def build_state(config: Config, num_classes: int, mean, std, num_unlabeled: int = 0,
                label_counts: np.ndarray | None = None) -> TrainState:
    """A fresh network and everything that trains it, seeded by run.seed, on Paddle's current device.

    Args:
        num_unlabeled, label_counts: how many unlabeled images there are, and how many labels of each class, [K]; some
            policies other than the fixed one need them.
    """
    paddle.seed(config.run.seed)
    model = build_model(num_classes=num_classes, **config.model.network())
    optim, train = config.optim, config.train
    scheduler = build_scheduler(optim.lr, train.total_steps, optim.warmup_steps)
    optimizer = TwoGroupSGD(model, scheduler, optim.momentum, optim.weight_decay, optim.nesterov, train.clip_grad_norm)
    amp = mixed_precision(train.amp)
    return TrainState(model, distributed.parallel(model), EMA(model, config.ema.decay), optimizer, scheduler,
                      Normalize(mean, std), amp, LossScaler() if amp == "float16" else None,
                      initial_state(config.ssl, num_classes, num_unlabeled, label_counts))
