"""Bugs in the loop around a right step: what it trains with, what it logs, how it evaluates, what it saves.

The step itself is left alone, so that no stage that drives the step by itself can see them.
"""

import dataclasses
import math
import types
import weakref
from functools import partial

import numpy as np
import paddle
from paddle.base import core

from fixmatch import checkpoint, monitor, run, trainer
from fixmatch import step as algorithm
from fixmatch.data.dataset import Dataset
from fixmatch.evaluation import evaluate
from fixmatch.kernels import allocator, ops
from parity.plants.plant import Patch, Plant


def _in_the_loop(patch: Patch, **changed) -> None:
    """Functions of the step as the loop alone sees them."""
    patch(trainer, "algorithm", types.SimpleNamespace(**{**vars(algorithm), **changed}))


def _other_ssl(patch: Patch, **settings) -> None:
    _in_the_loop(patch, train_step=lambda state, batch, ssl: algorithm.train_step(
        state, batch, dataclasses.replace(ssl, **settings)))


def _labels_alone(patch: Patch) -> None:
    _in_the_loop(patch, train_step=lambda state, batch, ssl: algorithm.supervised_step(state, batch))


def _supervised_start(patch: Patch, at) -> None:
    """The loop asks at(ssl, step) whether the step that follows `step` finished ones trains on the labels alone."""
    right = trainer.Trainer._step

    def changed(self, batches):
        config, mode = self.config, "none" if at(self.config.ssl, self.step) else "fixmatch"
        self.config = dataclasses.replace(config, ssl=dataclasses.replace(config.ssl, mode=mode, supervised_steps=0))
        right(self, batches)
        self.config = config

    patch(trainer.Trainer, "_step", changed)


def _batch(patch: Patch, change) -> None:
    _in_the_loop(patch, train_step=lambda state, batch, ssl: algorithm.train_step(state, change(batch), ssl))


def _labels_rolled(patch: Patch) -> None:
    _batch(patch, lambda batch: batch._replace(targets_x=np.roll(batch.targets_x, 1)))


def _strong_views_rolled(patch: Patch) -> None:
    _batch(patch, lambda batch: batch._replace(u_s=np.roll(batch.u_s, 1, axis=0)))


def _half_batch(patch: Patch) -> None:
    _batch(patch, lambda batch: batch._replace(u_w=batch.u_w[:len(batch.u_w) // 2], u_s=batch.u_s[:len(batch.u_s) // 2],
                                               targets_u=batch.targets_u[:len(batch.targets_u) // 2]))


def _after_each_step(patch: Patch, change) -> None:
    def changed(state, batch, ssl):
        losses = algorithm.train_step(state, batch, ssl)
        with paddle.no_grad():
            change(state)
        return losses

    _in_the_loop(patch, train_step=changed)


def _weights_in_half(state) -> None:
    for parameter in state.model.parameters():
        parameter.copy_(parameter.astype("float16").astype(parameter.dtype), False)


def _weights_decayed_again(state) -> None:
    for parameter in state.model.parameters():
        parameter.scale_(1 - 1e-3)


def _momentum_lost(state) -> None:
    for velocity in state.optimizer.state().values():
        velocity.zero_()


def _before_each_step(patch: Patch, change) -> None:
    def changed(state, batch, ssl):
        change(state)
        return algorithm.train_step(state, batch, ssl)

    _in_the_loop(patch, train_step=changed)


def _state(patch: Patch, change) -> None:
    """A state that is built rightly, and changed before the loop begins."""
    def changed(*args):
        state = algorithm.build_state(*args)
        with paddle.no_grad():
            change(state)
        return state

    _in_the_loop(patch, build_state=changed)


def _average_elsewhere(state) -> None:
    for parameter in state.ema.average.parameters():
        parameter.add_(paddle.full_like(parameter, 1e-3))


def _schedule_ahead(state) -> None:
    state.scheduler.step()


def _batches_from(patch: Patch, offset: int) -> None:
    right = trainer.Loader.batches
    patch(trainer.Loader, "batches", lambda self, first, last: right(self, first + offset, last + offset))


def _same_batch_again(patch: Patch) -> None:
    def changed(self, first, last):
        for _ in range(first, last):
            yield self.batch(first)

    patch(trainer.Loader, "batches", changed)


def _logged(patch: Patch, change) -> None:
    """What the loop tells the monitor: change(losses, batch, lr)."""
    right = monitor.Monitor.record

    def changed(self, step, losses, batch, lr, waited):
        right(self, step, *change(self, losses, batch, lr), waited)

    patch(monitor.Monitor, "record", changed)


def _losses_a_step_late(patch: Patch) -> None:
    def change(self, losses, batch, lr):
        before, self.planted = getattr(self, "planted", losses), losses
        return before, batch, lr

    _logged(patch, change)


def _supervised_loss_as_the_whole(patch: Patch) -> None:
    _logged(patch, lambda self, losses, batch, lr: (losses._replace(loss=losses.loss_x), batch, lr))


def _rate_a_step_late(patch: Patch) -> None:
    def change(self, losses, batch, lr):
        before, self.planted = getattr(self, "planted", lr), lr
        return losses, batch, before

    _logged(patch, change)


def _judged_by_the_neighbour(patch: Patch) -> None:
    _logged(patch, lambda self, losses, batch, lr: (
        losses, batch._replace(targets_u=np.roll(batch.targets_u, 1)), lr))


def _scored(patch: Patch, change) -> None:
    """Evaluation in the loop, as change(model, normalize, data, batch_size)."""
    patch(trainer, "evaluate", change)


def _left_in_eval_mode(patch: Patch) -> None:
    def changed(model, normalize, data, batch_size):
        scores = evaluate(model, normalize, data, batch_size)
        model.eval()
        return scores

    _scored(patch, changed)


def _training_images_scored(patch: Patch) -> None:
    right = trainer.Trainer._evaluate

    def changed(self):
        source = self.source
        self.source = dataclasses.replace(source, test=Dataset(source.train.images[:17], source.train.labels[:17]))
        right(self)
        self.source = source

    patch(trainer.Trainer, "_evaluate", changed)


def _some_images_scored(patch: Patch) -> None:
    def changed(model, normalize, data, batch_size):
        kept = slice(len(data) // batch_size * batch_size)
        return evaluate(model, normalize, Dataset(data.images[kept], data.labels[kept]), batch_size)

    _scored(patch, changed)


def _raw_scored_twice(patch: Patch) -> None:
    def changed(self):
        average, self.state.ema.average = self.state.ema.average, self.state.model
        right(self)
        self.state.ema.average = average

    right = trainer.Trainer._evaluate
    patch(trainer.Trainer, "_evaluate", changed)


def _batch_statistics_scored(patch: Patch) -> None:
    def changed(model, normalize, data, batch_size):
        buffers = [b.clone() for b in model.buffers()]
        eval_mode, model.eval = model.eval, model.train
        scores = evaluate(model, normalize, data, batch_size)
        del model.eval
        assert model.eval == eval_mode
        model.eval()
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before, False)
        return scores

    def keep_mode(model, *args):
        training = model.training
        scores = changed(model, *args)
        (model.train if training else model.eval)()
        return scores

    _scored(patch, keep_mode)


def _not_normalized_when_scored(patch: Patch) -> None:
    _scored(patch, lambda model, normalize, data, size: evaluate(
        model, lambda images: normalize(images) * normalize.std + normalize.mean, data, size))


def _saved(patch: Patch, change) -> None:
    """Checkpoints of change(arrays, manifest)."""
    right = checkpoint.save
    patch(checkpoint, "save", lambda folder, arrays, manifest, twin=None: right(
        folder, *change(arrays, manifest), twin))


def _average_saved_as_model(patch: Patch) -> None:
    _saved(patch, lambda arrays, manifest: (
        {n: arrays["ema" + n[5:]] if n.startswith("model/") else a for n, a in arrays.items()}, manifest))


def _saved_in_half(patch: Patch) -> None:
    _saved(patch, lambda arrays, manifest: (
        {n: a.astype(np.float16).astype(a.dtype) if a.dtype == np.float32 else a for n, a in arrays.items()}, manifest))


def _statistics_not_saved(patch: Patch) -> None:
    _saved(patch, lambda arrays, manifest: (
        {n: np.zeros_like(a) if n.endswith("._mean") else a for n, a in arrays.items()}, manifest))


def _without_momentum(patch: Patch) -> None:
    _saved(patch, lambda arrays, manifest: (
        {n: a for n, a in arrays.items() if not n.startswith("momentum/")}, manifest))


def _classes_turned(patch: Patch) -> None:
    _saved(patch, lambda arrays, manifest: (arrays, dataclasses.replace(manifest, classes=manifest.classes[::-1])))


def _step_off_by_one(patch: Patch) -> None:
    _saved(patch, lambda arrays, manifest: (arrays, dataclasses.replace(manifest, step=manifest.step - 1)))


def _earlier_arrays_linked(patch: Patch) -> None:
    right, written = checkpoint.save, []

    def changed(folder, arrays, manifest, twin=None):
        written.append(right(folder, arrays, manifest, written[0] if written else twin))
        return written[-1]

    patch(checkpoint, "save", changed)


def _best_is_the_last(patch: Patch) -> None:
    right = trainer.Trainer._save

    def changed(self):
        self.best = -1.0
        right(self)

    patch(trainer.Trainer, "_save", changed)


def _other_labels_a_class(patch: Patch) -> None:
    right = run.build_loader
    patch(run, "build_loader", lambda config, source, *rest: right(
        dataclasses.replace(config, train=dataclasses.replace(config.train, mu=1)), source, *rest))


def _memory_by_tensor(patch: Patch) -> None:
    """The last tensor in Python gives the memory back, which autograd may still read."""
    def changed(shape):
        nbytes = 4 * math.prod(shape)
        if nbytes < allocator.POOL_FROM:
            return paddle.empty(shape, dtype="float32")
        block = allocator._pool.take(nbytes)
        array = np.frombuffer(block, dtype=np.float32).reshape(shape)
        tensor = paddle.empty([0], dtype="float32")
        tensor.get_tensor()._share_data_with(core.from_dlpack(array.__dlpack__()))
        weakref.finalize(tensor, allocator._pool.give, block).atexit = False
        return tensor

    patch(ops, "empty", changed)


PLANTS = [
    Plant("memory-by-tensor", "run", "memory of operators' outputs is handed out again while autograd still reads it",
          _memory_by_tensor, cpu_kernels="on"),
    Plant("loop-threshold-halved", "run", "the loop trains under half the configured threshold",
          partial(_other_ssl, threshold=0.3)),
    Plant("loop-lambda-u-doubled", "run", "the loop trains under another weight of the unsupervised loss",
          partial(_other_ssl, lambda_u=2.5)),
    Plant("loop-temperature", "run", "the loop trains under another temperature", partial(_other_ssl, temperature=0.4)),
    Plant("loop-supervised-only", "run", "the loop leaves the unlabeled images out", _labels_alone),
    Plant("loop-supervised-start-left-out", "run", "unlabeled images join at the first step, whatever is configured",
          partial(_supervised_start, at=lambda ssl, step: ssl.mode == "none"),
          settings=("ssl.supervised_steps=1",)),
    Plant("loop-supervised-start-too-long", "run", "the supervised start is a step longer than configured",
          partial(_supervised_start, at=lambda ssl, step: ssl.mode == "none" or step <= ssl.supervised_steps),
          settings=("ssl.supervised_steps=1",)),
    Plant("loop-labels-rolled", "run", "the loop gives every image its neighbour's label", _labels_rolled),
    Plant("loop-strong-views-rolled", "run", "the loop pairs weak views with their neighbours' strong ones",
          _strong_views_rolled),
    Plant("loop-half-the-unlabeled", "run", "the loop trains on half of the unlabeled batch", _half_batch),
    Plant("loop-weights-float16", "run", "weights rounded to half precision after each step",
          partial(_after_each_step, change=_weights_in_half)),
    Plant("loop-weights-shrunk", "run", "weights shrunk by a thousandth after each step",
          partial(_after_each_step, change=_weights_decayed_again)),
    Plant("loop-momentum-lost", "run", "momentum set to zero after each step",
          partial(_after_each_step, change=_momentum_lost)),
    Plant("loop-ema-twice", "run", "the average updated a second time by the loop",
          partial(_after_each_step, change=lambda state: state.ema.update())),
    Plant("loop-schedule-twice", "run", "the schedule stepped a second time by the loop",
          partial(_after_each_step, change=lambda state: state.scheduler.step())),
    Plant("loop-network-in-eval-mode", "run", "the network is in eval mode while it trains",
          partial(_before_each_step, change=lambda state: state.model.eval())),
    Plant("loop-average-in-train-mode", "run", "the averaged network is in train mode",
          partial(_before_each_step, change=lambda state: state.ema.average.train())),
    Plant("loop-average-starts-elsewhere", "run", "the average does not start from the network's weights",
          partial(_state, change=_average_elsewhere)),
    Plant("loop-schedule-one-ahead", "run", "the schedule starts at its second step",
          partial(_state, change=_schedule_ahead)),
    Plant("loop-first-batch-skipped", "data", "batches one step ahead", partial(_batches_from, offset=1)),
    Plant("loop-same-batch-again", "data", "every step on the first batch", _same_batch_again),
    Plant("loop-mu-ignored", "run", "one unlabeled image for each labeled one", _other_labels_a_class),
    Plant("log-a-step-late", "run", "the losses that are logged are the step's before", _losses_a_step_late),
    Plant("log-supervised-as-loss", "run", "the supervised loss is logged as the whole", _supervised_loss_as_the_whole),
    Plant("log-rate-a-step-late", "run", "the learning rate that is logged is that of the step before",
          _rate_a_step_late),
    Plant("log-pseudo-labels-by-the-neighbour", "run", "pseudo-labels are logged as right by the neighbour's label",
          _judged_by_the_neighbour),
    Plant("evaluation-leaves-eval-mode", "run", "after an evaluation the network stays in eval mode",
          _left_in_eval_mode),
    Plant("evaluation-of-training-images", "run", "training images are scored", _training_images_scored),
    Plant("evaluation-drops-last-batch", "run", "the last partial batch of test images is not scored",
          _some_images_scored),
    Plant("evaluation-of-raw-as-ema", "run", "the raw weights are scored in place of the average", _raw_scored_twice),
    Plant("evaluation-by-batch-statistics", "run", "scored with batch statistics", _batch_statistics_scored),
    Plant("evaluation-not-normalized", "run", "test images are not normalized", _not_normalized_when_scored),
    Plant("checkpoint-average-as-model", "run", "the average saved in place of the weights", _average_saved_as_model),
    Plant("checkpoint-float16", "run", "checkpoints in half precision", _saved_in_half),
    Plant("checkpoint-without-statistics", "run", "running means saved as zero", _statistics_not_saved),
    Plant("checkpoint-without-momentum", "run", "momentum is not saved", _without_momentum),
    Plant("checkpoint-classes-turned", "run", "class names saved in another order", _classes_turned),
    Plant("checkpoint-step-off-by-one", "run", "a checkpoint says one step less", _step_off_by_one),
    Plant("checkpoint-best-is-last", "run", "the best checkpoint is the latest", _best_is_the_last),
    Plant("checkpoint-of-earlier-arrays", "run", "the arrays of the checkpoint before", _earlier_arrays_linked),
]
