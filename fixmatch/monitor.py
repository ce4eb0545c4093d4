"""What a run shows and keeps of its steps: a bar or lines, metrics.jsonl, VisualDL.

Accuracies are percent, the mask rate is a fraction, rates are images a second over all ranks.
"""

import json
import pathlib
import sys
import time

import numpy as np
from tqdm import tqdm

from fixmatch.config import Config, to_dict
from fixmatch.files import write_atomic
from fixmatch.log import LOGGER
from fixmatch.metrics import Window, as_json

_REFRESH = 1.0  # seconds between updates of the bar
_PATIENCE = 30.0  # seconds between plain lines, where log_every steps take longer
_CURVES = {  # what VisualDL draws of a line of metrics.jsonl of kind "train": its group -> keys
    "train": ("loss", "loss_x", "loss_u", "lr"),
    "ssl": ("mask", "pseudo_label_accuracy", "impurity"),
    "time": ("images_per_second", "data_wait")}


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
        self.window = Window(keeps=folder is not None)
        self.waited = self.images = 0.0  # since the last line
        self.since = self.shown = time.perf_counter()
        self.first_step, self.started = first_step, self.since
        self.bar = None
        if folder is None:
            return
        drop_later_lines(folder / "metrics.jsonl", first_step)
        self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, closed in close()
        from visualdl import LogWriter  # takes a second to import, so only where it is used

        self.vdl = LogWriter(logdir=str(folder / "vdl"))
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def record(self, step: int, losses, batch, lr: float, waited: float) -> None:
        """Takes note of one finished step; `waited` is the seconds it stood waiting for its batch."""
        self.window.add(step, losses, batch)
        self.waited += waited
        self.images += self.world_size * (len(batch.x) + len(batch.u_w) + len(batch.u_s))
        if self.bar is not None:
            self.bar.update(1)
        now = time.perf_counter()
        line_due = step % self.log_every == 0 or step == self.first_step + 1
        bar_due = self.bar is not None and now - self.shown > _REFRESH
        if line_due or bar_due or now - self.shown > _PATIENCE:
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
            self.bar.set_postfix_str(f"loss {m['loss']:.3f} mask {m['mask']:.2f} {self._rate():.0f} img/s")
        if as_line:
            done = step - self.first_step
            left = (time.perf_counter() - self.started) / done * (self.total_steps - step)
            LOGGER.info(f"step {step}/{self.total_steps}  loss {m['loss']:.4f}  loss_x {m['loss_x']:.4f}  "
                        f"loss_u {m['loss_u']:.4f}  mask {m['mask']:.3f}  lr {lr:.5f}  {self._rate():.0f} img/s  "
                        f"left {tqdm.format_interval(left)}", extra={"behind_bar": self.bar is not None})

    def _keep(self, step: int, lr: float, losses) -> None:
        """Writes the averages since the last line, and starts anew."""
        elapsed = time.perf_counter() - self.since
        line = {"kind": "train", "step": step, **self.window.averages(), "lr": lr, "images_per_second": self._rate(),
                "data_wait": self.waited / elapsed}
        self._write(line)
        for group, names in _CURVES.items():
            for name in names:
                self._draw(f"{group}/{name}", line.get(name), step)
        if losses.confidence.size:
            self.vdl.add_histogram("ssl/confidence", losses.confidence.numpy(), step, buckets=20)
        self.window.clear()
        self.waited = self.images = 0.0
        self.since = time.perf_counter()

    def record_evaluation(self, step: int, found: dict, top1: dict) -> None:
        """Keeps {"raw": Scores, "ema": Scores} of a step, and says them beside the best so far."""
        self._write({"kind": "eval", "step": step, **{name: scores.to_dict() for name, scores in found.items()}})
        for name, scores in found.items():
            for metric in ("top1", "top5", "loss"):
                self._draw(f"eval/{name}_{metric}", getattr(scores, metric), step)
        LOGGER.info(f"eval {step}/{self.total_steps}  {describe(found)}  |  EMA best {top1['ema']['best']:.2f} %, "
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
        hparams = {f"{section}/{key}": value if type(value) in (float, str) or _fits_a_page(value) else str(value)
                   for section, keys in tree.items() for key, value in keys.items()}
        self.vdl.add_hparams(hparams, ["eval/ema_top1", "eval/raw_top1"])

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.folder is not None:
            self.vdl.close()
            self.metrics.close()

    def _draw(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            self.vdl.add_scalar(tag, value, step)

    def _write(self, line: dict) -> None:
        print(json.dumps(as_json(line), allow_nan=False), file=self.metrics, flush=True)


def _fits_a_page(value) -> bool:
    """Whether VisualDL's records can hold this value as an integer."""
    return type(value) is int and abs(value) < 2**31


def describe(found: dict) -> str:
    """{"raw": Scores, "ema": Scores} in one line, as train.log and tools/eval.py show it."""
    return "  |  ".join(f"{label} top-1 {s.top1:.2f} %  top-5 {s.top5:.2f} %  loss {s.loss:.4f}"
                        for label, s in (("EMA", found["ema"]), ("raw", found["raw"])))


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
