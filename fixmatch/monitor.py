"""What a run shows and keeps: progress on the terminal, metrics.jsonl, VisualDL, train.log.

Losses stay on the device until they are shown, so that a step does not wait for the host. Accuracies are percent, the
mask rate is a fraction.
"""

import json
import math
import pathlib
import sys
import time

import numpy as np
import paddle
from tqdm import tqdm

from fixmatch.config import Config, to_dict
from fixmatch.files import write_atomic
from fixmatch.normalize import to_device

# Of one step's row on the device: losses, and fractions of the unlabeled images: confident, of known class, of these
# rightly pseudo-labeled, and the same two of the confident ones.
_COLUMNS = ("loss", "loss_x", "loss_u", "mask", "known", "right", "confident_known", "confident_right")
_REFRESH = 1.0  # seconds between updates of the bar
_PATIENCE = 30.0  # seconds between plain lines, where log_every steps take longer


class NonFinite(ArithmeticError):
    """A loss became NaN or infinite."""

    def __init__(self, step: int, metric: str, value: float):
        super().__init__(f"{metric} is {value} at step {step}")


class Monitor:
    """Of rank 0; other ranks keep one with `folder` None, which only checks that the losses are finite.

    Args:
        folder: the run folder.
        total_steps: of the whole run.
        first_step: steps already done; what metrics.jsonl holds beyond them is dropped.
        log_every: steps between lines in metrics.jsonl and VisualDL.
        world_size: ranks that train; the rates are of all of them.
    """

    def __init__(self, folder: pathlib.Path | None, total_steps: int, first_step: int, log_every: int,
                 world_size: int = 1):
        self.folder, self.total_steps, self.log_every, self.world_size = folder, total_steps, log_every, world_size
        self.pending: list[tuple[int, paddle.Tensor]] = []  # rows still on the device
        self.rows: list[np.ndarray] = []  # since the last line
        self.waited = self.images = 0.0
        self.since = self.shown = time.perf_counter()
        self.first_step, self.started = first_step, self.since
        self.bar = self.vdl = None
        if folder is None:
            return
        _drop_later_lines(folder / "metrics.jsonl", first_step)
        self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, closed in close()
        self.log_file = open(folder / "train.log", "a", encoding="utf-8")  # noqa: SIM115, closed in close()
        from visualdl import LogWriter  # takes a second to import, so only where it is used

        self.vdl = LogWriter(logdir=str(folder / "vdl"))
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """One line for the terminal and train.log."""
        if self.folder is None:
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        print(text, file=self.log_file, flush=True)

    def record(self, step: int, losses, batch, lr: float, waited: float) -> None:
        """Takes note of one finished step; `waited` is the seconds it stood waiting for its batch."""
        self.pending.append((step, _row(losses, batch)))
        self.waited += waited
        self.images += self.world_size * (len(batch.x) + len(batch.u_w) + len(batch.u_s))
        if self.bar is not None:
            self.bar.update(1)
        now = time.perf_counter()
        line_due = step % self.log_every == 0 or step == self.first_step + 1
        if line_due or (self.bar is not None and now - self.shown > _REFRESH) or now - self.shown > _PATIENCE:
            self.flush()
            self.shown = time.perf_counter()
            if self.folder is not None:
                self._show(step, lr)
        if line_due and self.folder is not None:
            self._log_line(step, lr, losses)

    def flush(self) -> None:
        """Fetches the losses of all steps so far. Raises NonFinite at the first that is not a number."""
        if not self.pending:
            return
        fetched = paddle.stack([row for _, row in self.pending]).numpy()
        steps = [step for step, _ in self.pending]
        self.pending.clear()
        for step, row in zip(steps, fetched, strict=True):
            for name, value in zip(_COLUMNS[:3], row[:3].tolist(), strict=True):
                if not math.isfinite(value):
                    raise NonFinite(step, name, value)
        if self.folder is not None:
            self.rows.extend(fetched)

    def _averages(self) -> dict:
        """Means over the steps since the last line; impurity is the share of wrong labels among the confident ones."""
        mean = dict(zip(_COLUMNS, np.mean(self.rows, axis=0, dtype=np.float64).tolist(), strict=True))
        known, right, confident_known, confident_right = (mean.pop(name) for name in _COLUMNS[4:])
        if known:
            mean["pseudo_label_accuracy"] = 100 * right / known
            mean["impurity"] = 100 * (1 - confident_right / confident_known) if confident_known else None
        return mean

    def _rate(self) -> float:
        return self.images / max(time.perf_counter() - self.since, 1e-9)

    def _show(self, step: int, lr: float) -> None:
        m = self._averages()
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {m['loss']:.3f} mask {m['mask']:.2f} {self._rate():.0f} img/s")
            return
        done = step - self.first_step
        left = (time.perf_counter() - self.started) / done * (self.total_steps - step)
        self.say(f"step {step}/{self.total_steps}  loss {m['loss']:.4f}  loss_x {m['loss_x']:.4f}  "
                 f"loss_u {m['loss_u']:.4f}  mask {m['mask']:.3f}  lr {lr:.5f}  {self._rate():.0f} img/s  "
                 f"left {tqdm.format_interval(left)}")

    def _log_line(self, step: int, lr: float, losses) -> None:
        elapsed = time.perf_counter() - self.since
        line = {"kind": "train", "step": step, **self._averages(), "lr": lr, "images_per_second": self._rate(),
                "data_wait": self.waited / elapsed}
        self._write(line)
        for name in ("loss", "loss_x", "loss_u", "lr"):
            self._scalar(f"train/{name}", line[name], step)
        for name in ("mask", "pseudo_label_accuracy", "impurity"):
            self._scalar(f"ssl/{name}", line.get(name), step)
        for name in ("images_per_second", "data_wait"):
            self._scalar(f"time/{name}", line[name], step)
        if losses.confidence.size:
            self.vdl.add_histogram("ssl/confidence", losses.confidence.numpy(), step, buckets=20)
        self.rows.clear()
        self.waited = self.images = 0.0
        self.since = time.perf_counter()

    def record_evaluation(self, step: int, found: dict, top1: dict) -> None:
        """Keeps {"raw": Evaluation, "ema": Evaluation} of a step, and says them beside the best so far."""
        self._write({"kind": "eval", "step": step, **{name: e.to_dict() for name, e in found.items()}})
        for name, evaluation in found.items():
            for metric in ("top1", "top5", "loss"):
                self._scalar(f"eval/{name}_{metric}", getattr(evaluation, metric), step)
        self.say(f"eval {step}/{self.total_steps}  {describe(found)}  |  EMA best {top1['ema']['best']:.2f} %, "
                 f"mean of last 20 {top1['ema']['mean_last_20']:.2f} %")

    def skip(self, seconds: float) -> None:
        """Leaves `seconds` that were not spent on steps out of the rates and of the time left."""
        self.since += seconds
        self.started += seconds

    def add_run(self, config: Config, preview: np.ndarray) -> None:
        """Puts the configuration and the preview picture, uint8 [H, W, 3], into VisualDL.

        Its pages fold white space, so the configuration is a text for each section. Its table of hyper-parameters takes
        a dot in a name for a path and shows nothing, and a bool or None crashes it.
        """
        tree = to_dict(config)
        for section, keys in tree.items():
            self.vdl.add_text(f"config/{section}", ", ".join(f"{key}: {value}" for key, value in keys.items()), 0)
        self.vdl.add_image("views/original_weak_strong", preview, 0, dataformats="HWC")
        hparams = {f"{section}/{key}": value if type(value) in (int, float, str) else str(value)
                   for section, keys in tree.items() for key, value in keys.items()}
        self.vdl.add_hparams(hparams, ["eval/ema_top1", "eval/raw_top1"])

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.folder is not None:
            self.vdl.close()
            self.metrics.close()
            self.log_file.close()

    def _scalar(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            self.vdl.add_scalar(tag, value, step)

    def _write(self, line: dict) -> None:
        print(json.dumps(_finite(line), allow_nan=False), file=self.metrics, flush=True)


def describe(found: dict) -> str:
    """{"raw": Evaluation, "ema": Evaluation} in one line, as train.log and tools/eval.py show it."""
    return "  |  ".join(f"{label} top-1 {e.top1:.2f} %  top-5 {e.top5:.2f} %  loss {e.loss:.4f}"
                        for label, e in (("EMA", found["ema"]), ("raw", found["raw"])))


def _row(losses, batch):
    """The step's losses and pseudo-label counts as one small tensor, on the device: float [8], in _COLUMNS' order."""
    with paddle.no_grad():
        mask = losses.mask
        if mask.size:
            targets = to_device(batch.targets_u)
            right = (losses.pseudo_labels == targets).astype(mask.dtype)
            known = (targets >= 0).astype(mask.dtype)
            parts = [mask, known, right, known * mask, right * mask]
        else:
            parts = [paddle.zeros([1], dtype=losses.loss.dtype)] * 5
        fractions = paddle.stack(parts).mean(axis=1)
        return paddle.concat([paddle.stack([losses.loss, losses.loss_x, losses.loss_u]).detach(), fractions])


def _finite(value):
    """With None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_later_lines(path: pathlib.Path, step: int) -> None:
    """Keeps the lines up to `step`: a resumed run writes the later ones again. A torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_atomic(path, "".join(kept))
