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
from fixmatch.schedule import build_scheduler


@dataclasses.dataclass
class TrainState:
    """What a step changes."""

    model: paddle.nn.Layer
    network: paddle.nn.Layer  # `model`, or its data-parallel wrapper
    ema: EMA
    optimizer: TwoGroupSGD
    scheduler: paddle.optimizer.lr.LRScheduler
    normalize: Normalize
    scaler: paddle.amp.GradScaler  # disabled unless train.amp


def train_step(state: TrainState, batch: Batch, ssl: SSLConfig) -> FixMatchLoss:
    """One step of FixMatch on one batch; returns the losses, mask and pseudo-labels, still on the device."""
    images = state.normalize(np.concatenate([batch.x, batch.u_w, batch.u_s]))  # [B + 2M, C, H, W]
    targets_x = to_device(batch.targets_x)  # [B]

    # One joint forward: batch statistics are over all three parts, and through them the weak views get gradient too.
    logits = forward(state, images)  # [B + 2M, K]
    logits_x, logits_u_w, logits_u_s = paddle.split(logits, [len(batch.x), len(batch.u_w), len(batch.u_s)])

    losses = fixmatch_loss(logits_x, targets_x, logits_u_w, logits_u_s, ssl.threshold, ssl.temperature, ssl.lambda_u)
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
    with paddle.amp.auto_cast(enable=state.scaler.is_enable()):
        logits = state.network(images)
    return logits.astype(images.dtype)


def update(state: TrainState, loss) -> None:
    """Gradients, then in the reference's order: optimizer, schedule, EMA, clear."""
    state.scaler.scale(loss).backward()
    state.optimizer.step(state.scaler)
    state.scheduler.step()
    state.ema.update()
    state.optimizer.clear_grad()


def build_state(config: Config, num_classes: int, mean, std) -> TrainState:
    """A fresh network and everything that trains it, seeded by run.seed, on Paddle's current device."""
    def network():
        return build_model(num_classes=num_classes, **dataclasses.asdict(config.model))

    paddle.seed(config.run.seed)
    model, average = network(), network()
    optim, train = config.optim, config.train
    scheduler = build_scheduler(optim.lr, train.total_steps, optim.warmup_steps)
    optimizer = TwoGroupSGD(model, scheduler, optim.momentum, optim.weight_decay, optim.nesterov, train.clip_grad_norm)
    amp = train.amp and paddle.device.get_device().startswith("gpu")
    return TrainState(model, distributed.parallel(model), EMA(model, average, config.ema.decay), optimizer, scheduler,
                      Normalize(mean, std), paddle.amp.GradScaler(enable=amp))
