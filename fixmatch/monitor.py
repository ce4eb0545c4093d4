"""What a run shows and keeps of its steps: a bar or lines, metrics.jsonl, VisualDL.

Accuracies are percent, the mask rate is a fraction, rates are images a second over all ranks.
"""

import collections
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from fixmatch import distributed
from fixmatch.config import Config, to_dict
from fixmatch.curves import RESULTS, late, points
from fixmatch.diagnosis import RECENT, diagnose
from fixmatch.files import write_atomic
from fixmatch.log import LOGGER
from fixmatch.metrics import Window, as_json, commonest_class
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
    """

    def __init__(self, folder: pathlib.Path | None, config: Config, first_step: int = 0, world_size: int = 1,
                 classes: Sequence[str] = ()):
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
        self.first_step, self.started = first_step, self.since
        self.scaler: LossScaler | None = None  # of float16 training, whose skipped steps are told
        self.bar = None
        if folder is None:
            return
        drop_later_lines(folder / "metrics.jsonl", first_step)
        self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, closed in close()
        from visualdl import LogWriter  # takes a second to import, so only where it is used

        self.vdl = LogWriter(logdir=str(folder / "vdl"))
        for tag in late(len(classes)):
            self.vdl.add_scalar(tag, math.nan, first_step)  # its page leaves these out
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def record(self, step: int, losses, batch, lr: float, waited: float) -> None:
        """Takes note of one finished step; `waited` is the seconds it stood waiting for its batch."""
        self.window.add(step, losses, batch)
        self.waited += waited
        self.images += self.world_size * (len(batch.x) + len(batch.u_w) + len(batch.u_s))
        if self.bar is not None:
            self.bar.update(1)
        now = time.perf_counter()
        line_due = step % self.log_every == 0 or step == self.first_step + 1
        late = now - self.shown > (_REFRESH if self.bar is not None else _PATIENCE)
        if line_due or self.late(step, late):
            self.window.flush()
            self.shown = time.perf_counter()
            if self.folder is not None:
                self._show(step, lr, line_due or self.bar is None)
        if line_due and self.folder is not None:
            self._keep(step, lr, losses)

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
            done = step - self.first_step
            left = (time.perf_counter() - self.started) / done * (self.total_steps - step)
            parts = "" if self.supervised else (f"loss_x {m['loss_x']:.4f}  loss_u {m['loss_u']:.4f}  "
                                                f"mask {m['mask']:.3f}  ")
            scale = self.scaler.state() if self.scaler else {}
            skipped = f"scale {scale['scale']:g}, {scale['skipped']} steps skipped  " if scale else ""
            LOGGER.info(f"step {step}/{self.total_steps}  loss {m['loss']:.4f}  {parts}lr {lr:.5f}  {skipped}"
                        f"{self._rate():.0f} img/s  left {duration(left)}",
                        extra={"behind_bar": self.bar is not None})

    def _keep(self, step: int, lr: float, losses) -> None:
        """Writes the averages since the last line, and starts anew."""
        elapsed = time.perf_counter() - self.since
        line = {"kind": "train", "step": step, **self.window.averages(), "lr": lr, "images_per_second": self._rate(),
                "data_wait": self.waited / elapsed}
        if self.scaler:
            scale = self.scaler.state()
            line |= {"loss_scale": scale["scale"], "skipped_steps": scale["skipped"]}
        if not self.supervised:
            line |= commonest_class(losses)
            self.vdl.add_histogram("ssl/confidence", losses.confidence.numpy(), step, buckets=20)
        self._write(line)
        self.recent.append(line)
        self.window.clear()
        self.waited = self.images = 0.0
        self.since = time.perf_counter()

    def record_evaluation(self, step: int, found: dict, top1: dict) -> None:
        """Keeps {"raw": Scores, "ema": Scores} of a step, and says them beside the best so far."""
        if self.folder is None:
            return
        self._write({"kind": "eval", "step": step, **{name: scores.to_dict() for name, scores in found.items()}})
        LOGGER.info(f"eval {step}/{self.total_steps}  {describe(found)}  |  EMA best {top1['ema']['best']:.2f} %, "
                    f"mean of last 20 {top1['ema']['mean_last_20']:.2f} %")
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
        """Puts the preview picture, uint8 [H, W, 3], and the configuration as hyper-parameters into VisualDL.

        Its table of hyper-parameters takes a dot in a name for a path and shows nothing, and a bool or None crashes it.
        """
        self.vdl.add_image("views/original_weak_strong", preview, 0, dataformats="HWC")
        hparams = {f"{section}/{key}": value if type(value) in (float, str) or _fits_a_page(value) else str(value)
                   for section, keys in to_dict(self.config).items() for key, value in keys.items()}
        self.vdl.add_hparams(hparams, list(RESULTS))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.folder is not None:
            self.vdl.close()
            self.metrics.close()

    def _write(self, line: dict) -> None:
        line = as_json(line)
        print(json.dumps(line, allow_nan=False), file=self.metrics, flush=True)
        for tag, value in points(line, len(self.classes)).items():
            self.vdl.add_scalar(tag, value, line["step"])


def _fits_a_page(value) -> bool:
    """Whether VisualDL's records can hold this value as an integer."""
    return type(value) is int and abs(value) < 2**31


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


def drop_later_lines(path: pathlib.Path, step: int) -> None:
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
