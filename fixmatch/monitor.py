"""What a run shows and keeps of its steps: a bar or lines, metrics.jsonl, evaluation.json, VisualDL.

Accuracies are percent, the mask rate is a fraction, rates are images a second over all ranks.
"""

import collections
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from fixmatch import distributed, metrics_file
from fixmatch.config import Config
from fixmatch.curves import BINS, Curves
from fixmatch.diagnosis import RECENT, diagnose
from fixmatch.evaluation import METRICS, Evaluations
from fixmatch.log import LOGGER
from fixmatch.metrics import Window, as_json, commonest_class
from fixmatch.metrics_file import MetricsFile
from fixmatch.scaler import LossScaler

_REFRESH = 1.0  # seconds between updates of the bar
_PATIENCE = 30.0  # seconds between plain lines, where log_every steps take longer


class Monitor:
    """Of rank 0; other ranks keep one with `folder` None, which gives rank 0 their losses.

    Args:
        folder: the run folder.
        config: of the run.
        first_step: steps already done; what metrics.jsonl holds beyond them is dropped.
        world_size: ranks that train; the rates are of all of them.
        classes: K names.
        evaluated_step: the last evaluation that the checkpoint knows of; later ones are done again.
    """

    def __init__(self, folder: pathlib.Path | None, config: Config, first_step: int = 0, world_size: int = 1,
                 classes: Sequence[str] = (), evaluated_step: int = 0):
        self.folder, self.config, self.world_size, self.classes = folder, config, world_size, classes
        self.total_steps, self.log_every = config.train.total_steps, config.run.log_every
        self.supervised = config.ssl.mode == "none"
        self.window = Window(keeps=folder is not None, supervised=self.supervised)
        self.recent = collections.deque(maxlen=RECENT)  # lines of kind "train" of this session
        self.evaluations = []  # lines of kind "eval" of this session
        self.said = set()  # names of the rules that have spoken
        self.waited = self.images = 0.0  # since the last line
        self.late = distributed.Vote()  # whether a line is due for its time, on all ranks at once
        self.since = self.shown = time.perf_counter()
        self.session_first = first_step + 1  # builds what later steps find built: the time left is judged after it
        self.started = self.since
        self.scaler: LossScaler | None = None  # of float16 training, whose skipped steps are told
        self.thresholds = lambda: None  # what a pseudo-label of each class needs now, under a policy that moves it
        self.bar = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        self.metrics = MetricsFile(path, first_step, evaluated_step)
        self.curves = Curves(folder / "vdl", len(classes), (line for _, line in metrics_file.read(path)))
        self.kept = Evaluations(folder / "evaluation.json", evaluated_step)
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def record(self, step: int, losses, batch, lr: float, waited: float) -> None:
        """Takes note of one finished step; `waited` is the seconds it stood waiting for its batch."""
        self.window.add(step, losses, batch)
        self.waited += waited
        self.images += self.world_size * (len(batch.x) + 2 * losses.mask.size)  # two views of each unlabeled image
        if self.bar is not None:
            self.bar.update(1)
        now = time.perf_counter()
        line_due = step % self.log_every == 0 or step in (1, self.total_steps)
        first = step == self.session_first  # a resumed run, too, soon shows that it works
        late = now - self.shown > (_REFRESH if self.bar is not None else _PATIENCE)
        if line_due or first or self.late(step, late):
            self.window.flush()
            self.shown = time.perf_counter()
            if self.folder is not None:
                self._show(step, lr, line_due or first or self.bar is None)
        if line_due and self.folder is not None:
            self._keep(step, lr, losses)
        if first:
            self.started = time.perf_counter()

    def flush(self) -> None:
        """Raises NonFinite where a loss of the steps so far is not a number."""
        self.window.flush()

    def _rate(self) -> float:
        return self.images / max(time.perf_counter() - self.since, 1e-9)

    def _show(self, step: int, lr: float, as_line: bool) -> None:
        m = self.window.averages()
        if self.bar is not None:
            mask = "" if self.supervised else f"mask {m['mask']:.2f} "
            self.bar.set_postfix_str(f"loss {m['loss']:.3f} {mask}{self._rate():.0f} img/s")
        if as_line:
            done, to_do = (self.config.images(first, last) for first, last in
                           ((self.session_first, step), (step, self.total_steps)))
            left = f"  left {duration((time.perf_counter() - self.started) / done * to_do)}" if done else ""
            parts = "" if self.supervised else (f"loss_x {m['loss_x']:.4f}  loss_u {m['loss_u']:.4f}  "
                                                f"mask {m['mask']:.3f}  ")
            scale = self.scaler.state() if self.scaler else {}
            skipped = f"scale {scale['scale']:g}, {scale['skipped']} steps skipped  " if scale else ""
            LOGGER.info(f"step {step}/{self.total_steps}  loss {m['loss']:.4f}  {parts}lr {lr:.5f}  {skipped}"
                        f"{self._rate():.0f} img/s{left}",
                        extra={"behind_bar": self.bar is not None})

    def _keep(self, step: int, lr: float, losses) -> None:
        """Writes the averages of the steps since the last line, and how many they are, and starts anew."""
        elapsed = time.perf_counter() - self.since
        line = {"kind": "train", "step": step, "steps": len(self.window.rows), **self.window.averages(), "lr": lr,
                "images_per_second": self._rate(), "data_wait": self.waited / elapsed}
        if self.scaler:
            scale = self.scaler.state()
            line |= {"loss_scale": scale["scale"], "skipped_steps": scale["skipped"]}
        if not self.supervised:
            line |= commonest_class(losses)
            if (bars := self.thresholds()) is not None:
                line |= {"threshold": float(bars.mean()), "class_thresholds": [round(bar, 4) for bar in bars.tolist()]}
            line["confidence"] = np.histogram(losses.confidence.numpy(), BINS)[0].tolist()
        self._write(line)
        self.recent.append(line)
        self.window.clear()
        self.waited = self.images = 0.0
        self.since = time.perf_counter()

    def record_evaluation(self, step: int, found: dict, top1: dict, evaluated: int, is_best: bool) -> None:
        """Keeps {"raw": Scores, "ema": Scores} of a step, and says them beside those so far, `evaluated` in all."""
        if self.folder is None:
            return
        figures = {name: scores.to_dict() for name, scores in found.items()}
        self.kept.add({"step": step, **figures}, is_best)
        self._write({"kind": "eval", "step": step, **{
            name: {metric: of_one[metric] for metric in METRICS} for name, of_one in figures.items()}})
        LOGGER.info(f"eval {step}/{self.total_steps}  {describe(found)}  |  EMA best {top1['ema']['best']:.2f} %, "
                    f"mean of the last {min(20, evaluated)} {top1['ema']['mean_last_20']:.2f} %")
        self.evaluations.append(as_json({"step": step} | {name: {"top1": scores.top1, "loss": scores.loss}
                                                          for name, scores in found.items()}))
        for finding in diagnose(self.recent, self.evaluations, self.config, self.classes):
            if finding.name not in self.said:
                LOGGER.info(f"note: {finding.text}")
                self.said.add(finding.name)

    def skip(self, seconds: float) -> None:
        """Leaves `seconds` that were not spent on steps out of the rates and of the time left."""
        self.since += seconds
        self.started += seconds

    def add_run(self, preview: np.ndarray) -> None:
        """Puts the preview picture, uint8 [H, W, 3], and the configuration into VisualDL."""
        self.curves.add_run(self.config, preview)

    def restore(self, rows: np.ndarray) -> None:
        """Takes up the rows of the steps since the last line, float32 [n, 8], as the checkpoint kept them."""
        if self.folder is not None:
            self.window.rows.extend(rows)

    def check_place(self) -> None:
        """Raises OSError where the run folder is no longer there; to be called before anything is saved in it."""
        if self.folder is not None:
            self.metrics.check_place()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.folder is not None:
            self.curves.close()
            self.metrics.close()

    def _write(self, line: dict) -> None:
        line = as_json({**line, "time": round(time.time(), 3)})
        self.metrics.write(line)
        self.curves.draw(line)


def describe(found: dict) -> str:
    """{"raw": Scores, "ema": Scores} in one line, as train.log and tools/eval.py show it."""
    return "  |  ".join(f"{label} top-1 {s.top1:.2f} %" + f"  top-5 {s.top5:.2f} %" * (len(s.per_class) > 5)
                        + f"  loss {s.loss:.4f}" for label, s in (("EMA", found["ema"]), ("raw", found["raw"])))


def duration(seconds: float) -> str:
    """A time to wait in its two largest units, such as "190 d 15 h" or "2 min 05 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
