"""The loop around the step: batches, evaluations, checkpoints, signals."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np
import paddle
import paddle.nn.functional as F

from fixmatch import checkpoint, checkpoints, distributed
from fixmatch import step as algorithm
from fixmatch.arrays import as_numpy
from fixmatch.checkpoint import CheckpointError, Manifest, check_fit, load_weights
from fixmatch.config import Config
from fixmatch.data.dataset import Source
from fixmatch.data.loader import Batch, Loader, ProbedBatch
from fixmatch.evaluation import evaluate, summarize
from fixmatch.log import LOGGER
from fixmatch.metrics import COLUMNS, NonFinite
from fixmatch.models import idle_parameters
from fixmatch.normalize import to_device
from fixmatch.recorder import Recorder
from fixmatch.signals import stop_signal
from fixmatch.thresholds import class_thresholds


@paddle.no_grad()
def probe(state: algorithm.TrainState, batch: ProbedBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CTAugment's feedback: how near the averaged network comes to the labels of its probes.

    Returns:
        Of all ranks, in their order, P probes in all: the plan's operations, int64 [P, n], and levels, float64
        [P, n, 2], and the proximity of the prediction to the label, float32 [P], 0..1.
    """
    distributed.take_statistics(state.ema.average)
    probabilities = F.softmax(state.ema.average(state.normalize(batch.probes)))  # [B, K]
    labels = F.one_hot(to_device(batch.targets_x), probabilities.shape[1]).astype(probabilities.dtype)  # [B, K]
    proximity = 1 - 0.5 * (probabilities - labels).abs().sum(axis=1)  # [B]
    op, level, _ = batch.probe_plan
    return distributed.gather(op), distributed.gather(level), distributed.gather(proximity.numpy())


class Trainer:
    """The loop: steps, evaluations, checkpoints, and a stop that loses nothing.

    Args:
        config: the resolved configuration.
        source: the data set.
        loader: of this rank.
        monitor: of this rank; silent but for rank 0.
        checkpoints: the folder for latest/, step-N/ and best/, or None on ranks other than 0.
        manifest: what is known of the run before its first step; every checkpoint carries it.
    """

    def __init__(self, config: Config, source: Source, loader: Loader, monitor, checkpoints, manifest: Manifest):
        self.config, self.source, self.loader, self.monitor = config, source, loader, monitor
        self.checkpoints, self.manifest = checkpoints, manifest
        split, classes = loader.split, len(source.classes)
        counts = split.label_counts(source.train.labels, classes)
        self.state = algorithm.build_state(config, classes, source.mean, source.std, len(split.unlabeled), counts)
        monitor.scaler = self.state.scaler
        monitor.thresholds = lambda: class_thresholds(self.state.thresholds, config.ssl)
        self.step = 0
        self.saved_step = None  # the step that checkpoints/latest holds
        self.written: checkpoint.Written | None = None  # its arrays, where this session has written them
        self.evaluated_step = None  # the step that the last of `history` is from
        self.seconds = 0.0  # of training and evaluation, over all sessions, up to the last checkpoint
        self.started = 0.0  # when the run would have started, had it been one session
        self.train_seconds = 0.0  # of that, in steps and waiting for their batches
        self.history = {"raw": [], "ema": []}  # top-1 percents of all evaluations
        self.best = -1.0
        self.recorder: Recorder | None = None  # writes down the first steps
        self.on_step: Callable[[], None] | None = None  # called after every step; may raise to stop the run

    def fit(self) -> bool:
        """Trains up to train.total_steps. Returns False if a signal stopped it first; a checkpoint is then saved.

        An evaluation that is due, and that the run has not seen, is done before the next step: after a signal that is
        when the run is resumed. Raises NonFinite when a loss is no longer a number; checkpoints are then from before
        that step.
        """
        total, eval_every = self.config.train.total_steps, self.config.train.eval_every
        self.started = time.perf_counter() - self.seconds
        batches = self.loader.batches(self.step, total)
        with stop_signal() as stop, contextlib.closing(batches):
            stopping = distributed.Vote()
            while not stopping(self.step, stop.requested):
                due = self.step > 0 and (self.step % eval_every == 0 or self.step == total)
                if due and self.evaluated_step != self.step:
                    self.monitor.flush()
                    self._save()  # before the evaluation, which may take longer than a launcher waits
                    self._evaluate()
                    self._save()
                if self.step == total:
                    break
                self._step(batches)
                if self.on_step:
                    self.on_step()
        self.monitor.flush()
        if self.saved_step != self.step:
            self._save()
        return self.step == self.evaluated_step == total

    def _step(self, batches: Iterator[Batch]) -> None:
        """One step on the next batch: trained, told to CTAugment, and taken note of."""
        state, ssl, started = self.state, self.config.ssl, time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        lr = state.scheduler.get_lr()
        recording = self.recorder is not None and not self.recorder.done
        if recording:
            self.recorder.before(state, batch, self.step, lr)
        losses = (algorithm.supervised_step(state, batch) if ssl.supervised_at(self.step)
                  else algorithm.train_step(state, batch, ssl))
        if recording:
            self.recorder.after(state, losses)
        self.step += 1
        if self.loader.cta:
            self.loader.cta.update(self.step, *probe(state, batch))
        self.monitor.record(self.step, losses, batch, lr, waited)
        self.train_seconds += time.perf_counter() - started

    def _evaluate(self) -> None:
        """Scores the raw and the averaged weights, with the running statistics of rank 0."""
        self.evaluated_step = self.step
        if not len(self.source.test):  # data.test_fraction may be 0
            return
        started = time.perf_counter()
        for model in (self.state.model, self.state.ema.average):
            distributed.take_statistics(model)
        size, test = self.config.train.eval_batch_size, self.source.test
        found = {"raw": evaluate(self.state.model, self.state.normalize, test, size),
                 "ema": evaluate(self.state.ema.average, self.state.normalize, test, size)}
        for name, evaluation in found.items():
            self.history[name].append(evaluation.top1)
        ema = self.history["ema"]
        self.monitor.record_evaluation(self.step, found, self.top1(), len(ema), ema[-1] > self.best)
        self.monitor.skip(time.perf_counter() - started)

    def top1(self) -> dict:
        return {name: summarize(history) for name, history in self.history.items() if history}

    def arrays(self) -> dict[str, np.ndarray]:
        """What training has come to, as a checkpoint keeps it."""
        return {name: as_numpy(array) for name, array in self._live().items()}

    def _live(self) -> dict:
        """The same, with Paddle's tensors as they are, which the next step changes."""
        rates = self.loader.cta.state() if self.loader.cta else {}
        return self.state.tensors() | {f"augment/{name}": array for name, array in rates.items()}

    def _save(self) -> None:
        """Rank 0 saves; the others wait for it before their next step, and know of the checkpoint."""
        if self.checkpoints is None:
            self.saved_step = self.step
            return
        self.monitor.check_place()
        arrays = self._live()
        if self.monitor.window.rows:
            arrays["log/rows"] = np.stack(self.monitor.window.rows)
        twin = self.written if self.saved_step == self.step else None  # an evaluation leaves the arrays as they are
        if twin is None and not all(np.isfinite(as_numpy(a)).all() for a in arrays.values()):
            raise NonFinite(f"a weight is not finite at step {self.step}")
        self.seconds = time.perf_counter() - self.started if self.started else self.seconds
        manifest = dataclasses.replace(
            self.manifest, step=self.step, evaluated_step=self.evaluated_step, seconds=round(self.seconds, 3),
            train_seconds=round(self.train_seconds, 3), history=self.history,
            scaler=self.state.scaler.state() if self.state.scaler else {})
        if self.history["ema"] and self.history["ema"][-1] > self.best:
            self.best = self.history["ema"][-1]
            twin = checkpoint.save(self.checkpoints / "best", arrays, manifest, twin)
        if self.saved_step not in (None, self.step):
            checkpoints.keep_latest(self.checkpoints, self.saved_step)
        self.written = checkpoint.save(self.checkpoints / "latest", arrays, manifest, twin)
        self.saved_step = self.step
        checkpoints.drop_old(self.checkpoints, self.step, self.config.checkpoints.keep - 1)

    def renew_latest(self) -> None:
        """Puts the state that was restored in the place of a checkpoints/latest that could not be read."""
        if self.checkpoints is not None:
            aside = checkpoints.set_latest_aside(self.checkpoints)
            if aside:
                LOGGER.info(f"the one that cannot be read is now {aside}")
            self.saved_step = None
            self._save()

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Goes on from `saved`: weights, EMA, momentum, schedule, history, CTAugment. The loader needs no more.

        Raises CheckpointError where a name, shape or dtype is not what this network, optimizer or CTAugment has.
        """
        facts = saved.manifest
        load_weights(self.state.model, saved.part("model"))
        load_weights(self.state.ema.average, saved.part("ema"))
        self._load_momentum(saved.part("momentum"), facts.step)
        statistics = saved.part("thresholds")
        check_fit("ssl.policy", {name: t.numpy() for name, t in self.state.thresholds.items()}, statistics)
        self.state.thresholds = {name: paddle.to_tensor(a) for name, a in statistics.items()}
        if self.state.scaler and facts.scaler:  # it is empty where the run was on a CPU
            try:
                self.state.scaler.load_state(facts.scaler)
            except ValueError as error:
                raise CheckpointError(f"checkpoint.json: scaler: {error}") from None
        self.step = self.saved_step = facts.step
        self.evaluated_step = facts.evaluated_step
        self.state.scheduler.step(self.step)
        if self.loader.cta:
            self.loader.cta.restore(self.step, saved.part("augment"))
        else:
            check_fit("a run without CTAugment", {}, saved.part("augment"))
        if (rows := saved.arrays.get("log/rows")) is not None:
            check_fit("the log", {"rows": np.empty((*rows.shape[:1], len(COLUMNS)), np.float32)}, {"rows": rows})
            self.monitor.restore(rows)
        self.seconds, self.train_seconds = facts.seconds, facts.train_seconds
        self.history = facts.history
        self.best = max(self.history["ema"], default=-1.0)

    def _load_momentum(self, arrays: dict[str, np.ndarray], step: int) -> None:
        optimizer, idle = self.state.optimizer, idle_parameters(self.state.model)
        if arrays:
            check_fit("the optimizer", {n: p.numpy() for n, p in optimizer.parameters.items() if n not in idle}, arrays)
        elif step:  # of a converted file, which may have none
            LOGGER.info("the checkpoint has no momentum, so it starts from zero")
        optimizer.load_state({name: paddle.to_tensor(a) for name, a in arrays.items()})
