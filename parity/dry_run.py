"""Stage `run`: the production run itself, from its configuration to its result, on few and small images.

`fixmatch.run.train` is called as a user's command calls it, on the device, in the precision and with the operators of
the configuration; only the data set, the batch and the number of steps are small. Its first steps are recorded and
recomputed by the mirror (parity/recording.py); then what it logged, how it scored its test images, and what its
checkpoints hold is compared with the recording. B labeled images, M = mu * B unlabeled ones, K classes.
"""

import gc
import json
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import paddle
import torch

from fixmatch import checkpoint, inputs, run
from fixmatch.arrays import as_numpy, fingerprint
from fixmatch.config import Config
from fixmatch.data.dataset import Source
from fixmatch.data.split import Split
from fixmatch.recorder import Recorder
from fixmatch.runtime import arithmetic
from fixmatch.scratch import scratch_folder
from parity import recording
from parity.case import Case
from parity.compare import Reading, Row, exact, near, same_print
from parity.mirror.evaluation import accuracy
from parity.mirror.schedule import cosine_7_16
from parity.reference import precision
from parity.small_run import short_config, small_source, training_on
from parity.weights import part

LOGGED_GATE = 1e-6  # what is logged is the float32 number that was trained on, averaged over one step


class _Judged(Recorder):
    """Hands each step to the mirror as it happens, of a large network the last one; of what a step leaves behind it
    writes the state alone.

    Args:
        folder: for the states.
        steps: how many are judged.
        evaluated: after which of them the run evaluates.
        case, config, source: what is run.
    """

    def __init__(self, folder: pathlib.Path, steps: int, evaluated: list[int], case: Case, config: Config,
                 source: Source):
        super().__init__(folder, steps)
        self.evaluated, self.source, self.large = evaluated, source, case.large
        self.mirror = recording.Mirror(config, case.num_classes, source.mean, source.std)
        self.rows: list[Row] = []
        self.seen: list[dict[str, np.ndarray]] = []  # batch and losses of each step
        self.left: Mapping[str, np.ndarray] = {}  # the state that the latest step has left behind
        self.prints: dict[int, dict[str, str]] = {}  # fingerprints of the state after so many steps, where evaluated
        self.scores: dict[int, dict[str, dict]] = {}  # the mirror's after so many steps

    def _keep(self, name: str, state: dict[str, paddle.Tensor], given: dict[str, np.ndarray]) -> None:
        arrays = {**given, **state}
        now = Reading(arrays, lambda n: as_numpy(arrays[n]))
        if name == "start":
            self.rows += recording.start_rows(now)
            if self.large:  # only the last step will be judged
                return
        else:
            if self.left:
                self.rows += recording.step_rows(self.mirror, self.left, now, self.facts[-1], forward=True)
            self.seen.append({n: a for n, a in given.items() if not n.startswith("gradient/")})
        if len(self.facts) in self.evaluated:
            self.prints[len(self.facts)] = {n: fingerprint(now[n]) for n in state}
            self.scores[len(self.facts)] = _scores(self.mirror, now, self.source)
        if not self.done:
            self._write(name, state)
            self.left = recording.Arrays(self.folder / f"{name}.safetensors")


def rows(case: Case, thorough: bool = True) -> Iterator[Row]:
    """Rows of a dry run of `case`, in the order in which a fault would show.

    Args:
        thorough: three steps and not two, which are enough for one that has momentum and comes after an evaluation. A
            large network takes two with one evaluation.
    """
    steps, eval_every = (2, 2) if case.large else (3, 2) if thorough else (2, 1)
    evaluated = [step for step in range(1, steps + 1) if step % eval_every == 0 or step == steps]
    with scratch_folder() as folder:
        config, source = short_config(case, folder / "run", steps, eval_every), small_source(case)
        recorder = _Judged(folder / "recording", steps, evaluated, case, config, source)
        with training_on(source):
            run.train(config, recorder=recorder)
        gc.collect()  # what trained, which knows itself in a circle
        yield exact("recorded/steps", np.array(len(recorder.facts)), np.array(steps))
        yield from batch_rows(config, source, inputs.choose_split(config, source), recorder.seen)
        yield from recorder.rows
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        yield from _logged_rows([line for line in lines if line["kind"] == "train"], config, recorder.seen)
        evaluations = [line for line in lines if line["kind"] == "eval"]
        yield exact("evaluated/steps", np.array([line["step"] for line in evaluations]), np.array(evaluated))
        for line in evaluations:
            yield from _score_rows(line, recorder.scores[line["step"]])
        yield from _checkpoint_rows(folder / "run", source, recorder.prints, evaluations)


def batch_rows(config: Config, source: Source, split: Split, after: list[dict], first_step: int = 0,
               world_size: int = 1) -> Iterator[Row]:
    """The recorded steps were trained on the Loader's batches of just these steps."""
    loader = inputs.build_loader(config, source, split, 0, world_size)
    for step, arrays in enumerate(after, start=first_step):
        trained = part(arrays, "batch")
        for name, expected in loader.batch(step)._asdict().items():
            if isinstance(expected, np.ndarray):
                yield exact(f"batch of step {step}/{name}", trained.get(name), expected)


def _logged_rows(lines: list[dict], config: Config, after: list[dict]) -> Iterator[Row]:
    """What was logged is what was trained, and how right the pseudo-labels were; one line a step."""
    yield exact("logged/steps", np.array([line["step"] for line in lines]), np.arange(1, len(after) + 1))
    for step, (line, arrays) in enumerate(zip(lines, after, strict=True)):
        optim, mask = config.optim, arrays["losses/mask"]
        expected = {"lr": optim.lr * cosine_7_16(step, config.train.total_steps, optim.warmup_steps)}
        expected |= {name: arrays[f"losses/{name}"].astype(np.float64) for name in ("loss", "loss_x")}
        if mask.size:
            expected |= {"loss_u": arrays["losses/loss_u"].astype(np.float64), "mask": mask.mean(dtype=np.float64)}
            right = arrays["losses/pseudo_labels"] == arrays["batch/targets_u"]
            expected["pseudo_label_accuracy"] = 100 * right.mean()
            expected["impurity"] = 100 * (1 - right[mask == 1].mean()) if mask.any() else None
        for name, value in expected.items():
            found, value = (np.array(-1.0 if number is None else number) for number in (line[name], value))
            floor = 100.0 if name in ("pseudo_label_accuracy", "impurity") else 0.0
            yield near(f"logged step {line['step']}/{name}", found, value, LOGGED_GATE, floor)


def _scores(mirror: recording.Mirror, state: Mapping[str, np.ndarray], source: Source) -> dict[str, dict[str, float]]:
    """How the mirror's network scores raw and averaged weights on the test images: {"raw" or "ema": scores}.

    Scores are loss, top1, top5, and the percentage of images of which rounding decides.
    """
    targets, found = torch.from_numpy(source.test.labels), {}
    for prefix, name in (("model", "raw"), ("ema", "ema")):
        with precision("float64"), torch.no_grad():
            logits = mirror.network(state, prefix).eval()(mirror.normalized(source.test.images))
            gaps = logits.sort(dim=1).values.diff(dim=1).min(dim=1).values
            undecided = 100.0 * float((gaps < _gates().undecided).double().mean())
            top1, top5 = accuracy(logits, targets, (1, 5))
            loss = float(torch.nn.functional.cross_entropy(logits, targets))
        found[name] = {"loss": loss, "top1": top1, "top5": top5, "undecided": undecided}
    return found


def _gates() -> recording.Gates:
    return recording.GATES[arithmetic(amp=None)]  # no mixed precision where test images are scored


def _score_rows(line: dict, scores: dict[str, dict[str, float]]) -> Iterator[Row]:
    """What was logged of an evaluation is what the mirror found."""
    for name, expected in scores.items():
        label = f"evaluated step {line['step']} {name}"
        yield near(f"{label}/loss", np.array(line[name]["loss"]), np.array(expected["loss"]), _gates().loss)
        for k in ("top1", "top5"):
            apart = abs(line[name][k] - expected[k])
            yield Row(f"{label}/{k}", apart, apart, apart <= expected["undecided"] + 1e-9, "", np.array(line[name][k]),
                      np.array(expected[k]))


def _checkpoint_rows(folder: pathlib.Path, source: Source, live: dict[int, dict[str, str]],
                     evaluations: list[dict]) -> Iterator[Row]:
    """A checkpoint holds the state that was live after its step, by its fingerprints, and says what it is of."""
    best = max(evaluations, key=lambda line: line["ema"]["top1"])["step"]  # of equal ones the first
    prints: dict[int, dict[str, str]] = {}  # by file, since the two checkpoints may share one
    for which, step in (("best", best), ("latest", max(live))):
        saved = checkpoint.load(folder / "checkpoints" / which)
        file = next((folder / "checkpoints" / which).glob("arrays-*")).stat().st_ino
        if file not in prints:
            prints[file] = {n: fingerprint(a) for n, a in saved.arrays.items() if not n.startswith("augment/")}
        found = prints[file]
        for name in [*live[step], *(n for n in found if n not in live[step])]:
            yield same_print(f"checkpoint {which}/{name}", found.get(name), live[step].get(name), "not what was live")
        yield exact(f"checkpoint {which}/step", np.array(saved.manifest.step), np.array(step))
    history = {name: [line[name]["top1"] for line in evaluations] for name in ("raw", "ema")}
    latest = saved.manifest
    facts = {"history": latest.history == history, "classes": tuple(latest.classes) == source.classes,
             "mean": tuple(latest.mean) == tuple(source.mean), "std": tuple(latest.std) == tuple(source.std)}
    for name, right in facts.items():
        yield exact(f"checkpoint latest/{name}", np.array(right), np.array(True))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    yield near("result/top1", np.array(result["top1"]["ema"]["last"]), np.array(history["ema"][-1]), 1e-12)
