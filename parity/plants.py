"""Known bugs of FixMatch ports, each as a change to the production code, to see whether the proof catches it.

A plant names the stage that has to catch it. `planted` puts one in for the length of a with block.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F

from fixmatch import ema, losses, optimizer, schedule
from fixmatch import step as algorithm
from fixmatch.data import split
from fixmatch.data.augment import randaugment, views
from fixmatch.data.sources import cifar
from fixmatch.models import layers, resnext, wideresnet
from parity import stages
from parity.case import Case

Patch = Callable[[object, str, object], None]  # (owner, attribute, value), undone at the end


class Plant(NamedTuple):
    name: str
    stage: str  # the first stage that must fail
    what: str
    put_in: Callable[[Patch], None]


PLANTS: dict[str, Plant] = {}


def plant(name: str, stage: str, what: str):
    def register(put_in):
        PLANTS[name] = Plant(name, stage, what, put_in)
        return put_in
    return register


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Puts the bug of this name into the production code; None puts in nothing."""
    undo: list[tuple[object, str, object]] = []

    def patch(owner, attribute, value):
        undo.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    try:
        if name is not None:
            PLANTS[name].put_in(patch)
        randaugment.table.cache_clear()
        yield
    finally:
        for owner, attribute, value in reversed(undo):
            setattr(owner, attribute, value)
        randaugment.table.cache_clear()


# Model


def _bn_momentum(patch: Patch, change: Callable[[float], float]) -> None:
    update = layers.BatchNorm2D._update_running_statistics

    def changed(self, *args, **kwargs):
        right, self.momentum = self.momentum, change(self.momentum)
        update(self, *args, **kwargs)
        self.momentum = right

    patch(layers.BatchNorm2D, "_update_running_statistics", changed)


@plant("bn-momentum-inverted", "forward", "the reference's 0.001 given to Paddle, as share of the old value")
def _(patch):
    _bn_momentum(patch, lambda m: 1 - m)


@plant("bn-momentum-default", "forward", "Paddle's default of 0.9")
def _(patch):
    _bn_momentum(patch, lambda m: 0.9)


@plant("bn-running-variance-biased", "forward", "what Paddle's CPU kernel averages")
def _(patch):
    update = layers.BatchNorm2D._update_running_statistics
    patch(layers.BatchNorm2D, "_update_running_statistics",
          lambda self, mean, variance, count: update(self, mean, variance * ((count - 1) / count), count))


@plant("bn-epsilon-1e-3", "forward", "the official code's epsilon")
def _(patch):
    patch(layers, "BN_EPSILON", 1e-3)


@plant("bn-epsilon-1e-6", "forward", "a smaller epsilon")
def _(patch):
    patch(layers, "BN_EPSILON", 1e-6)


def _activation(patch: Patch, activation) -> None:
    patch(wideresnet, "ACTIVATION", activation)
    patch(resnext, "ACTIVATION", activation)


@plant("activation-slope-0.01", "forward", "LeakyReLU's default slope")
def _(patch):
    _activation(patch, ("leaky_relu", 0.01))


@plant("activation-slope-0.2", "forward", "twice the slope")
def _(patch):
    _activation(patch, ("leaky_relu", 0.2))


@plant("activation-relu", "forward", "ReLU")
def _(patch):
    _activation(patch, ("leaky_relu", 0.0))


def _before_residual(patch: Patch, everywhere: bool) -> None:
    init = wideresnet.BasicBlock.__init__

    def changed(self, in_channels, out_channels, stride, activate_before_residual):
        init(self, in_channels, out_channels, stride, everywhere)

    patch(wideresnet.BasicBlock, "__init__", changed)


@plant("activate-before-residual-missing", "forward", "the first block's shortcut sees the raw input")
def _(patch):
    _before_residual(patch, False)


@plant("activate-before-residual-everywhere", "forward", "all stages' shortcuts see the activated input")
def _(patch):
    _before_residual(patch, True)


@plant("conv1-pre-activated", "forward", "the activated input feeds conv1 in every block, as in the official code")
def _(patch):
    def changed(self, x):
        activated = self.bn1(x)
        if not self.equal_in_out and self.activate_before_residual:
            x = activated
        out = self.conv2(self.bn2(self.conv1(activated)))
        return out + (x if self.equal_in_out else self.convShortcut(x))

    patch(wideresnet.BasicBlock, "forward", changed)


@plant("stride-on-conv2", "forward", "the second convolution of a block halves the resolution")
def _(patch):
    init = wideresnet.BasicBlock.__init__

    def changed(self, *args):
        init(self, *args)
        self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride

    patch(wideresnet.BasicBlock, "__init__", changed)


@plant("final-bn-missing", "forward", "no batch norm before the pooling")
def _(patch):
    init = wideresnet.WideResNet.__init__

    def changed(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.bn1.forward = lambda x: layers.activate(x, self.bn1.activation)

    patch(wideresnet.WideResNet, "__init__", changed)


@plant("max-pool", "forward", "global maximum instead of average")
def _(patch):
    patch(wideresnet, "global_average_pool", lambda x: x.max([2, 3]))


@plant("dropout", "forward", "dropout between a block's convolutions")
def _(patch):
    bn2_then_dropout = layers.BatchNorm2D.forward

    def changed(self, x):
        return F.dropout(bn2_then_dropout(self, x), 0.3, training=self.training)

    patch(layers.BatchNorm2D, "forward", changed)


@plant("shortcut-pooled", "forward", "the projection halves the resolution by pooling, not by its stride")
def _(patch):
    init = wideresnet.BasicBlock.__init__

    def changed(self, *args):
        init(self, *args)
        if not self.equal_in_out and self.convShortcut.stride == 2:
            shortcut = self.convShortcut
            shortcut.stride = 1
            plain = shortcut.forward
            shortcut.forward = lambda x: F.avg_pool2d(plain(x), 2)

    patch(wideresnet.BasicBlock, "__init__", changed)


@plant("residual-missing", "forward", "blocks without their shortcut")
def _(patch):
    patch(wideresnet.BasicBlock, "forward", lambda self, x: self.conv2(self.bn2(self.conv1(self.bn1(x)))))


def _conv_init(patch: Patch, fill: Callable) -> None:
    init = layers.Conv2D.__init__

    def changed(self, *args, **kwargs):
        init(self, *args, **kwargs)
        fill(self.weight)

    for module in (layers, wideresnet, resnext):
        patch(module.Conv2D, "__init__", changed)


@plant("init-fan-in", "forward", "kaiming normal over fan_in, Paddle's default")
def _(patch):
    _conv_init(patch, lambda w: paddle.nn.init.kaiming_normal_(w, mode="fan_in", nonlinearity="relu"))


@plant("init-uniform", "forward", "Paddle's own initial distribution of a convolution")
def _(patch):
    _conv_init(patch, lambda w: paddle.nn.init.uniform_(w, -0.05, 0.05))


# Optimizer and schedule


def _optimizer(patch: Patch, **changes) -> None:
    """Builds TwoGroupSGD with some arguments changed: a value, or a function of the right one."""
    right = optimizer.TwoGroupSGD
    names = ("momentum", "weight_decay", "nesterov", "clip_grad_norm")

    def changed(model, learning_rate, *args):
        settings = dict(zip(names, args, strict=True))
        for name, change in changes.items():
            settings[name] = change(settings[name]) if callable(change) else change
        return right(model, learning_rate, **settings)

    patch(algorithm, "TwoGroupSGD", changed)


@plant("no-nesterov", "optimizer", "plain momentum")
def _(patch):
    _optimizer(patch, nesterov=False)


@plant("momentum-0.95", "optimizer", "another momentum coefficient")
def _(patch):
    _optimizer(patch, momentum=0.95)


@plant("weight-decay-doubled", "optimizer", "twice the coefficient")
def _(patch):
    _optimizer(patch, weight_decay=lambda w: 2 * w)


@plant("weight-decay-on-all", "optimizer", "one group for everything")
def _(patch):
    patch(optimizer, "decays", lambda name: True)


@plant("weight-decay-on-none", "optimizer", "no decay at all")
def _(patch):
    patch(optimizer, "decays", lambda name: False)


@plant("weight-decay-on-bn", "optimizer", "only names with 'bias' are left out")
def _(patch):
    patch(optimizer, "decays", lambda name: "bias" not in name)


@plant("weight-decay-by-param-name", "optimizer", "groups filtered by Paddle's own names, such as batch_norm2d_0.w_0")
def _(patch):
    init = optimizer.TwoGroupSGD.__init__

    def changed(self, model, *args, **kwargs):
        names = {name: p.name for name, p in model.named_parameters()}
        right = optimizer.decays
        optimizer.decays = lambda name: right(names[name])
        try:
            init(self, model, *args, **kwargs)
        finally:
            optimizer.decays = right

    patch(optimizer.TwoGroupSGD, "__init__", changed)


@plant("weight-decay-decoupled", "optimizer", "weights shrunk beside the update, as in AdamW")
def _(patch):
    _optimizer(patch, weight_decay=0.0)
    step = optimizer.TwoGroupSGD.step

    def changed(self, *args):
        with paddle.no_grad():
            for name, p in self.parameters.items():
                if optimizer.decays(name):
                    p.scale_(1 - self.optimizers[0].get_lr() * 5e-4)
        step(self, *args)

    patch(optimizer.TwoGroupSGD, "step", changed)


@plant("gradient-clipping", "optimizer", "gradients clipped by their norm")
def _(patch):
    _optimizer(patch, clip_grad_norm=0.1)


@plant("gradients-not-cleared", "optimizer", "gradients of all steps add up")
def _(patch):
    patch(optimizer.TwoGroupSGD, "clear_grad", lambda self: None)


@plant("gradients-cleared-to-zero", "optimizer", "parameters without a gradient get one of zero, and with it momentum")
def _(patch):
    patch(optimizer.TwoGroupSGD, "clear_grad", lambda self: [o.clear_grad(set_to_zero=True) for o in self.optimizers])
    step = optimizer.TwoGroupSGD.step

    def changed(self, *args):
        for p in self.parameters.values():
            if p.grad is None:
                (p * 0.0).sum().backward()
        step(self, *args)

    patch(optimizer.TwoGroupSGD, "step", changed)


@plant("lr-off-by-one", "optimizer", "the scheduler is stepped before the optimizer")
def _(patch):
    def changed(state, loss):
        loss.backward()
        state.scheduler.step()
        state.optimizer.step()
        state.ema.update()
        state.optimizer.clear_grad()

    patch(algorithm, "update", changed)


@plant("lr-stepped-twice", "optimizer", "once for each of the two optimizers")
def _(patch):
    update = algorithm.update

    def changed(state, loss):
        update(state, loss)
        state.scheduler.step()

    patch(algorithm, "update", changed)


def _schedule(patch: Patch, factor: Callable[[int, int, int], float]) -> None:
    patch(schedule, "cosine_7_16", factor)


@plant("lr-per-epoch", "schedule", "the cosine moves every 1024 steps only")
def _(patch):
    right = schedule.cosine_7_16
    _schedule(patch, lambda step, total, warmup=0: right(step // 1024 * 1024, total, warmup))


@plant("cosine-1-2", "schedule", "half a cosine, down to 0")
def _(patch):
    right = schedule.cosine_7_16
    _schedule(patch, lambda step, total, warmup=0: right(step, total, warmup) if step < warmup else float(
        np.cos(np.pi / 2 * (step - warmup) / max(1, total - warmup))))


@plant("cosine-full", "schedule", "(1 + cos(pi t / T)) / 2, the common schedule")
def _(patch):
    right = schedule.cosine_7_16
    _schedule(patch, lambda step, total, warmup=0: right(step, total, warmup) if step < warmup else float(
        (1 + np.cos(np.pi * (step - warmup) / max(1, total - warmup))) / 2))


@plant("warmup-in-epochs", "schedule", "warm-up steps counted as epochs of 1024")
def _(patch):
    right = schedule.cosine_7_16
    _schedule(patch, lambda step, total, warmup=0: right(step, total, warmup * 1024))


@plant("lr-constant", "schedule", "no schedule")
def _(patch):
    _schedule(patch, lambda step, total, warmup=0: 1.0)


# Loss


def _loss(patch: Patch, changed: Callable) -> None:
    patch(losses, "fixmatch_loss", changed)
    patch(algorithm, "fixmatch_loss", changed)


def _pseudo_label(patch: Patch, probabilities: Callable | None = None, mask: Callable | None = None) -> None:
    """pseudo_label with other probabilities (logits, T) or another mask (confidence, threshold)."""
    def changed(logits_u_w, threshold, temperature):
        p = (probabilities or (lambda z, t: F.softmax(z / t, axis=1)))(logits_u_w.detach(), temperature)
        confidence = p.max(axis=1)
        m = (mask or (lambda c, tau: c >= paddle.full_like(c, tau)))(confidence, threshold)
        return confidence, p.argmax(axis=1), m.astype(p.dtype)

    patch(losses, "pseudo_label", changed)


@plant("temperature-half", "loss", "pseudo-labels sharpened")
def _(patch):
    _pseudo_label(patch, lambda z, t: F.softmax(z / (0.5 * t), axis=1))


@plant("threshold-value", "loss", "0.9 times the threshold")
def _(patch):
    _pseudo_label(patch, mask=lambda c, tau: c >= 0.9 * tau)


@plant("threshold-exclusive", "loss", "> for >=")
def _(patch):
    _pseudo_label(patch, mask=lambda c, tau: c > paddle.full_like(c, tau))


@plant("threshold-on-logits", "loss", "the largest logit against the threshold")
def _(patch):
    right = losses.pseudo_label

    def changed(logits_u_w, threshold, temperature):
        confidence, labels, _ = right(logits_u_w, threshold, temperature)
        return confidence, labels, (logits_u_w.detach().max(axis=1) >= threshold).astype(confidence.dtype)

    patch(losses, "pseudo_label", changed)


@plant("softmax-axis", "loss", "softmax over the batch")
def _(patch):
    _pseudo_label(patch, lambda z, t: F.softmax(z / t, axis=0))


@plant("double-softmax", "loss", "softmax of a softmax")
def _(patch):
    _pseudo_label(patch, lambda z, t: F.softmax(F.softmax(z / t, axis=1), axis=1))


@plant("detach-missing", "loss", "pseudo-labels stay in the graph: no effect on numbers under hard labels")
def _(patch):
    def changed(logits_u_w, threshold, temperature):
        p = F.softmax(logits_u_w / temperature, axis=1)
        confidence = p.max(axis=1)
        return confidence, p.argmax(axis=1), (confidence >= paddle.full_like(confidence, threshold)).astype(p.dtype)

    patch(losses, "pseudo_label", changed)


def _reduction(patch: Patch, loss_u: Callable | None = None, loss_x: Callable | None = None,
               total: Callable | None = None) -> None:
    """fixmatch_loss with another loss_u(losses, mask, logits_u_s, probabilities), loss_x(losses) or total."""
    def changed(logits_x, targets_x, logits_u_w, logits_u_s, threshold=0.95, temperature=1.0, lambda_u=1.0):
        per_x = losses.cross_entropy(logits_x, targets_x)
        confidence, labels, mask = losses.pseudo_label(logits_u_w, threshold, temperature)
        per_u = losses.cross_entropy(logits_u_s, labels)
        probabilities = F.softmax(logits_u_w.detach() / temperature, axis=1)
        lx = (loss_x or (lambda p: p.mean()))(per_x)
        lu = (loss_u or (lambda p, m, s, q: (p * m).mean()))(per_u, mask, logits_u_s, probabilities)
        loss = (total or (lambda a, b, lam: a + lam * b))(lx, lu, lambda_u)
        return losses.FixMatchLoss(loss, lx, lu, mask, confidence, labels)

    _loss(patch, changed)


@plant("masked-mean", "loss", "mean over the confident images only")
def _(patch):
    _reduction(patch, lambda p, m, s, q: (p * m).sum() / m.sum().clip(min=1))


@plant("mask-after-mean", "loss", "mean loss times mean mask")
def _(patch):
    _reduction(patch, lambda p, m, s, q: (p.mean() * m).mean())


@plant("mask-missing", "loss", "all pseudo-labels count")
def _(patch):
    _reduction(patch, lambda p, m, s, q: p.mean())


@plant("broadcast-n-by-1", "loss", "losses [M, 1] times mask [M] make [M, M]")
def _(patch):
    _reduction(patch, lambda p, m, s, q: (p.unsqueeze(1) * m).mean())


@plant("soft-labels", "loss", "cross-entropy against the probabilities")
def _(patch):
    _reduction(patch, lambda p, m, s, q: (-(q * F.log_softmax(s, axis=1)).sum(axis=1) * m).mean())


@plant("sum-of-losses", "loss", "sum over the unlabeled batch")
def _(patch):
    _reduction(patch, lambda p, m, s, q: (p * m).sum())


@plant("supervised-sum", "loss", "sum over the labeled batch")
def _(patch):
    _reduction(patch, loss_x=lambda p: p.sum())


@plant("lambda-u-dropped", "loss", "only the supervised term is trained")
def _(patch):
    _reduction(patch, total=lambda lx, lu, lam: lx)


@plant("lambda-u-squared", "loss", "the unsupervised term squared")
def _(patch):
    _reduction(patch, total=lambda lx, lu, lam: lx + (lam * lu) ** 2)


@plant("label-smoothing", "loss", "0.1 of the mass spread over all classes")
def _(patch):
    right = losses.cross_entropy
    patch(losses, "cross_entropy",
          lambda z, t: 0.9 * right(z, t) + 0.1 * (paddle.logsumexp(z, axis=1) - z.mean(axis=1)))


@plant("cross-entropy-saturates", "loss", "Paddle's own cross-entropy, which stops at 64 on a CPU")
def _(patch):
    patch(losses, "cross_entropy", lambda z, t: F.cross_entropy(z, t, reduction="none"))


# Batch


@plant("weak-and-strong-swapped", "backward", "pseudo-labels from the strong views")
def _(patch):
    right = losses.fixmatch_loss
    patch(algorithm, "fixmatch_loss", lambda x, t, w, s, *rest: right(x, t, s, w, *rest))


def _joint_forward(patch: Patch, changed: Callable) -> None:
    """Replaces the joint forward pass by changed(forward, state, images, B, M)."""
    forward, train_step = algorithm.forward, algorithm.train_step

    def changed_step(state, batch, ssl):
        sizes = len(batch.x), len(batch.u_w)
        algorithm.forward = lambda s, images: changed(forward, s, images, *sizes)
        try:
            return train_step(state, batch, ssl)
        finally:
            algorithm.forward = forward

    patch(algorithm, "train_step", changed_step)


@plant("strided-chunk", "backward", "weak and strong logits taken from alternating rows")
def _(patch):
    def changed(forward, state, images, b, m):
        z = forward(state, images)
        return paddle.concat([z[:b], z[b::2], z[b + 1::2]])

    _joint_forward(patch, changed)


@plant("eval-mode-pseudo-labels", "backward", "weak logits from running statistics")
def _(patch):
    def changed(forward, state, images, b, m):
        state.model.eval()
        with paddle.no_grad():
            weak = forward(state, images[b:b + m])
        state.model.train()
        z = forward(state, paddle.concat([images[:b], images[b + m:]]))
        return paddle.concat([z[:b], weak, z[b:]])

    _joint_forward(patch, changed)


@plant("no-grad-weak-branch", "backward", "the weak views get no gradient through the batch statistics")
def _(patch):
    def changed(forward, state, images, b, m):
        joint = forward(state, images)
        with paddle.no_grad():
            weak = forward(state, images)[b:b + m]
        z = forward(state, paddle.concat([images[:b], images[b + m:]]))
        return paddle.concat([z[:b], weak, z[b:]]) + 0.0 * joint

    _joint_forward(patch, changed)


@plant("separate-forwards", "backward", "one forward pass for each part, with batch statistics of its own")
def _(patch):
    def changed(forward, state, images, b, m):
        return paddle.concat([forward(state, part) for part in paddle.split(images, [b, m, m])])

    _joint_forward(patch, changed)


def _interleave(x, size):
    return x.reshape([-1, size, *x.shape[1:]]).swapaxes(0, 1).reshape(x.shape)


@plant("interleave-not-undone", "backward", "logits left in the interleaved order")
def _(patch):
    _joint_forward(patch, lambda forward, state, images, b, m: forward(state, _interleave(images, 2 * (m // b) + 1)))


@plant("interleave-undone-wrongly", "backward", "interleaved a second time instead of its inverse")
def _(patch):
    def changed(forward, state, images, b, m):
        parts = 2 * (m // b) + 1
        return _interleave(forward(state, _interleave(images, parts)), parts)

    _joint_forward(patch, changed)


# EMA


@paddle.no_grad()
def _ema_update(self, decay=None, buffers="copied"):
    decay = self.decay if decay is None else decay
    for average, live in self.parameters:
        average.scale_(decay).add_(live * (1.0 - decay))
    for average, live in self.buffers:
        if buffers == "copied":
            average.copy_(live, False)
        elif buffers == "averaged":
            average.scale_(decay).add_(live * (1.0 - decay))


@plant("ema-buffers-skipped", "ema", "running statistics of the average never move")
def _(patch):
    patch(ema.EMA, "update", lambda self: _ema_update(self, buffers="skipped"))


@plant("ema-buffers-averaged", "ema", "running statistics averaged like weights")
def _(patch):
    patch(ema.EMA, "update", lambda self: _ema_update(self, buffers="averaged"))


@plant("ema-decay", "ema", "0.99 of the decay")
def _(patch):
    patch(ema.EMA, "update", lambda self: _ema_update(self, self.decay * 0.99))


@plant("ema-warmup", "ema", "decay min(d, (1 + t) / (10 + t))")
def _(patch):
    def changed(self):
        self.count = getattr(self, "count", 0) + 1
        _ema_update(self, min(self.decay, (1 + self.count) / (10 + self.count)))

    patch(ema.EMA, "update", changed)


@plant("ema-before-step", "train", "the average lags one step behind")
def _(patch):
    def changed(state, loss):
        loss.backward()
        state.ema.update()
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.clear_grad()

    patch(algorithm, "update", changed)


@plant("bn-momentum-inverted-and-ema-buffers-averaged", "forward", "two bugs that cancel in the averaged statistics")
def _(patch):
    PLANTS["bn-momentum-inverted"].put_in(patch)
    PLANTS["ema-buffers-averaged"].put_in(patch)


# Metric


@plant("last-batch-dropped", "metric", "the last partial test batch is left out")
def _(patch):
    from fixmatch import evaluate

    right = evaluate.evaluate

    def changed(model, normalize, data, batch_size):
        keep = len(data) // batch_size * batch_size
        return right(model, normalize, type(data)(data.images[:keep], data.labels[:keep]), batch_size)

    patch(evaluate, "evaluate", changed)


@plant("ties-rank-last", "metric", "of equal logits the last class ranks first")
def _(patch):
    from fixmatch import evaluate

    right = evaluate.score
    patch(evaluate, "score",
          lambda logits, labels, values: right(logits[:, ::-1], logits.shape[1] - 1 - labels, values))


# Data


@plant("wrong-mean", "augment", "ImageNet's mean for CIFAR-10")
def _(patch):
    _statistics(patch, mean=(0.485, 0.456, 0.406))


@plant("wrong-std", "augment", "the mean of the images' own deviations, a common mistake for CIFAR-10")
def _(patch):
    _statistics(patch, std=(0.2023, 0.1994, 0.2010))


def _statistics(patch: Patch, **changes) -> None:
    layouts = cifar._LAYOUTS
    patch(cifar, "_LAYOUTS", {**layouts, "cifar10": dataclasses.replace(layouts["cifar10"], **changes)})


def _crop(patch: Patch, mode: str = "reflect", crop_first: bool = False) -> None:
    """Weak and strong views through numpy, with another padding or order."""
    def changed_weak(images, plan, index=None, out=None):
        picked = images if index is None else images[index]
        pad = views.padding(picked.shape[1])
        result = np.empty_like(picked)
        for i, image in enumerate(picked):
            flip = (lambda a: a[:, ::-1]) if plan.flip[i] else (lambda a: a)
            top, left = plan.offset[i]
            padded = np.pad(image if crop_first else flip(image), ((pad, pad), (pad, pad), (0, 0)), mode=mode)
            view = padded[top:top + image.shape[0], left:left + image.shape[1]]
            result[i] = flip(view) if crop_first else view
        return result

    def changed_strong(images, plan, index=None, out=None):
        return randaugment.apply(changed_weak(images, plan.strong, index), plan.strong_plan)

    patch(views, "weak", changed_weak)
    patch(views, "strong", changed_strong)


@plant("zero-padding", "augment", "black instead of reflected borders")
def _(patch):
    _crop(patch, mode="constant")


@plant("crop-before-flip", "augment", "another order of the weak view")
def _(patch):
    _crop(patch, crop_first=True)


def _draw(patch: Patch, change: Callable) -> None:
    right = randaugment.draw
    patch(randaugment, "draw", lambda rng, n, *args: change(rng, right(rng, n, *args)))


@plant("magnitude-up-to-10", "augment", "v drawn from 1..10")
def _(patch):
    _draw(patch, lambda rng, plan: plan._replace(magnitude=rng.integers(1, 11, plan.magnitude.shape)))


@plant("always-applied", "augment", "no probability of 1/2 for each operation")
def _(patch):
    _draw(patch, lambda rng, plan: plan._replace(applied=np.ones_like(plan.applied)))


@plant("cutout-side", "augment", "half the side")
def _(patch):
    _cutout_box(patch, lambda box: np.concatenate([box[:, :2], np.minimum(box[:, 2:], box[:, :2] + 8)], axis=1))


@plant("cutout-exclusive", "augment", "the far edge of the box left out")
def _(patch):
    _cutout_box(patch, lambda box: np.concatenate([box[:, :2], np.minimum(box[:, 2:], box[:, :2] + 16)], axis=1))


@plant("cutout-missing", "augment", "no Cutout")
def _(patch):
    _cutout_box(patch, np.zeros_like)


def _cutout_box(patch: Patch, change: Callable) -> None:
    right = randaugment.cutout_box
    patch(randaugment, "cutout_box", lambda *args: change(right(*args)))


@plant("cutout-colour", "augment", "black instead of grey")
def _(patch):
    apply = randaugment.apply

    def changed(images, plan):
        result = apply(images, plan)
        boxes = randaugment.cutout_box(plan.cutout, *images.shape[1:3])
        for image, (top, left, bottom, right) in zip(result, boxes, strict=True):
            image[top:bottom, left:right] = 0
        return result

    patch(randaugment, "apply", changed)


def _effect(patch: Patch, wanted: str, change: Callable[[int], int]) -> None:
    """An operation with its magnitude changed."""
    right = randaugment.reference_effect
    patch(randaugment, "reference_effect", lambda name, magnitude, *rest: right(
        name, change(magnitude) if name.startswith(wanted) else magnitude, *rest))


@plant("translate-range", "augment", "translations of up to 9 / 10 more")
def _(patch):
    _effect(patch, "Translate", lambda v: v + 3)


@plant("rotate-range", "augment", "one magnitude more of rotation")
def _(patch):
    _effect(patch, "Rotate", lambda v: v + 1)


@plant("solarize-range", "augment", "solarize counted from the other end")
def _(patch):
    _effect(patch, "Solarize", lambda v: 10 - v)


@plant("enhancement-range", "augment", "brightness, contrast, colour and sharpness one magnitude up")
def _(patch):
    for name in ("Brightness", "Color", "Contrast", "Sharpness"):
        _effect(patch, name, lambda v: v + 1)


@plant("split-not-by-class", "augment", "labels drawn from all images at once")
def _(patch):
    def changed(labels, num_classes, num_labeled, seed, include_labeled=True):
        labeled = np.sort(np.random.default_rng(seed).choice(len(labels), num_labeled, replace=False))
        return split.Split(labeled, np.arange(len(labels)))

    patch(split, "draw_split", changed)


@plant("labeled-removed-from-unlabeled", "augment", "unlabeled images without the labeled ones")
def _(patch):
    right = split.draw_split
    patch(split, "draw_split", lambda labels, k, n, seed, include_labeled=True: right(labels, k, n, seed, False))


# Score


class Outcome(NamedTuple):
    plant: Plant
    caught_in: str  # stage, or "" if it went through
    tensor: str
    size: str
    hint: str

    @property
    def localised(self) -> bool:
        return self.caught_in == self.plant.stage


def score(case: Case) -> Iterator[Outcome]:
    """Runs the stages in the order of diagnosis under every plant, up to the first that diverges."""
    every = stages.stages()
    recorded = {name: [*stage.reference(case)] for name, stage in every.items()}
    for bug in PLANTS.values():
        outcome = Outcome(bug, "", "", "", "")
        with planted(bug.name):
            for name, stage in every.items():
                result = stages.run_stage(stage, case, recorded[name], keep_going=False)
                if not result.passed:
                    row = result.first_divergence
                    outcome = Outcome(bug, name, row.tensor, row.why or f"{row.relative:.1e}", result.hint)
                    break
        yield outcome


def print_score(json_file: pathlib.Path | None, false_alarm_seeds: int = 20) -> int:
    """All plants on a WRN-10-2, then the unplanted code over seeds on both networks. Returns an exit code."""
    from parity.cli import small_case, write

    started = time.perf_counter()
    outcomes = []
    print(f"{'plant':<46} {'caught in':<10} {'expected':<10} first divergence")
    for outcome in score(small_case("wideresnet", 0)):
        outcomes.append(outcome)
        mark = "" if outcome.localised else "   <- " + ("another stage" if outcome.caught_in else "MISSED")
        print(f"{outcome.plant.name:<46} {outcome.caught_in or '-':<10} {outcome.plant.stage:<10} {outcome.tensor} "
              f"{outcome.size}{mark}", flush=True)
    alarms = []
    for arch in ("wideresnet", "resnext"):
        for seed in range(false_alarm_seeds):
            for name, stage in stages.stages().items():
                if not stages.run_stage(stage, small_case(arch, seed), keep_going=False).passed:
                    alarms.append(f"{arch} seed {seed} stage {name}")
    total, caught = len(outcomes), sum(bool(o.caught_in) for o in outcomes)
    localised = sum(o.localised for o in outcomes)
    print(f"MUTATION SCORE {caught}/{total} caught ({100 * caught / total:.1f} %), {localised}/{total} localised "
          f"({100 * localised / total:.1f} %), {len(alarms)} false alarms in {2 * false_alarm_seeds} clean runs, "
          f"{time.perf_counter() - started:.0f} s")
    for alarm in alarms:
        print(f"false alarm: {alarm}")
    if json_file:
        write(json_file, json.dumps({
            "plants": total, "caught": caught, "localised": localised, "false_alarms": alarms,
            "outcomes": [{"plant": o.plant.name, "expected": o.plant.stage, "caught_in": o.caught_in,
                          "tensor": o.tensor, "size": o.size, "hint": o.hint} for o in outcomes]}, indent=1) + "\n")
    return 0 if caught >= 0.98 * total and localised >= 0.98 * total and not alarms else 1
