"""Stage `run`: the production run itself, from its configuration to its result, on few and small images.

`fixmatch.run.train` is called as a user's command calls it, on the device, in the precision and with the operators of
the configuration; only the data set, the batch and the number of steps are small. Its first steps are recorded and
recomputed by the mirror (parity/recording.py); then what it logged, how it scored its test images, and what its
checkpoints hold is compared with the recording. B labeled images, M = mu * B unlabeled ones, K classes.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import tempfile
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import load_file

from fixmatch import checkpoint, inputs, run
from fixmatch.config import Config
from fixmatch.data.dataset import Dataset, Source
from fixmatch.data.split import Split
from fixmatch.recorder import Recorder
from parity import recording
from parity.case import Case
from parity.compare import Row
from parity.mirror import step as algorithm
from parity.mirror.evaluation import accuracy
from parity.reference import precision
from parity.weights import paddle_to_torch

STEPS = 3
TEST_IMAGES = 17
LOGGED_GATE = 1e-6  # what is logged is the float32 number that was trained on, averaged over one step
UNDECIDED = 1e-3  # logits so near to each other rank by rounding


def rows(case: Case) -> Iterator[Row]:
    """Rows of a dry run of `case`, in the order in which a fault would show."""
    with tempfile.TemporaryDirectory(prefix="fixmatch-parity-") as scratch:
        folder = pathlib.Path(scratch)
        config, source = short_config(case.config, case.num_classes, folder / "run"), small_source(case)
        with training_on(source):
            run.train(config, recorder=Recorder(folder / "recording", STEPS))
        after = [load_file(folder / f"recording/step-{step}.safetensors") for step in range(STEPS)]
        yield from batch_rows(config, source, inputs.choose_split(config, source), after)
        yield from recording.rows(folder / "recording", config, case.num_classes, source.mean, source.std)
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        yield from _logged_rows([line for line in lines if line["kind"] == "train"], after)
        evaluations = [line for line in lines if line["kind"] == "eval"]
        yield recording.exact("evaluated/steps", np.array([line["step"] for line in evaluations]), np.array([2, 3]))
        for line in evaluations:
            yield from _score_rows(line, config, source, after[line["step"] - 1])
        yield from _checkpoint_rows(folder / "run", source, after, evaluations)


@contextlib.contextmanager
def training_on(source: Source) -> Iterator[None]:
    """Production runs read `source` in the place of their data set, and are silent."""
    with mock.patch.object(inputs, "load_source", return_value=source), contextlib.redirect_stdout(io.StringIO()):
        yield


def short_config(config: Config, num_classes: int, folder: pathlib.Path) -> Config:
    """The configuration with a batch, a data set and a number of steps that take seconds."""
    train, optim = config.train, config.optim
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(folder), log_every=1),
        data=dataclasses.replace(config.data, num_labeled=num_classes, labels_per_class=(), split_file="", fold=None),
        train=dataclasses.replace(train, batch_size=min(train.batch_size, 4), mu=min(train.mu, 3), total_steps=STEPS,
                                  eval_every=2, eval_batch_size=7),
        optim=dataclasses.replace(optim, warmup_steps=min(optim.warmup_steps, 2)),
        parity=dataclasses.replace(config.parity, enabled=False))


def small_source(case: Case) -> Source:
    """Coloured blobs under noise, a few of each class, whose mean colour tells the class."""
    rng, k, size = np.random.default_rng([case.seed, 8]), case.num_classes, case.image_size
    labels = np.concatenate([np.arange(k).repeat(3), rng.integers(0, k, TEST_IMAGES)])
    blobs = rng.integers(0, 256, (k, 2, 2, 3))[labels].repeat(size // 2, axis=1).repeat(size // 2, axis=2)
    images = np.clip(blobs + rng.integers(-40, 41, (len(labels), size, size, 3)), 0, 255).astype(np.uint8)
    train, test = slice(None, -TEST_IMAGES), slice(-TEST_IMAGES, None)
    return Source(case.config.data.name, tuple(f"class {i}" for i in range(k)), Dataset(images[train], labels[train]),
                  Dataset(images[test], labels[test]), case.mean, case.std, flip=case.config.augment.flip is not False)


def batch_rows(config: Config, source: Source, split: Split, after: list[dict], first_step: int = 0) -> Iterator[Row]:
    """The recorded steps were trained on the Loader's batches of just these steps."""
    loader = inputs.build_loader(config, source, split)
    for step, arrays in enumerate(after, start=first_step):
        trained = recording.part(arrays, "batch")
        for name, expected in loader.batch(step)._asdict().items():
            if isinstance(expected, np.ndarray):
                yield recording.exact(f"batch of step {step}/{name}", trained.get(name), expected)


def _logged_rows(lines: list[dict], after: list[dict]) -> Iterator[Row]:
    """What was logged is what was trained."""
    yield recording.exact("logged/steps", np.array([line["step"] for line in lines]), np.arange(1, STEPS + 1))
    for line, arrays in zip(lines, after, strict=True):
        for name in ("loss", "loss_x", "loss_u"):
            yield recording.near(f"logged step {line['step']}/{name}", np.array(line[name]),
                                 arrays[f"losses/{name}"].astype(np.float64), LOGGED_GATE)
        mask = arrays["losses/mask"]
        yield recording.near(f"logged step {line['step']}/mask", np.array(line["mask"]),
                             np.array(mask.mean(dtype=np.float64) if mask.size else 0.0), LOGGED_GATE)


def _score_rows(line: dict, config: Config, source: Source, after: dict) -> Iterator[Row]:
    """The mirror scores the recorded raw and averaged weights on the same test images."""
    with precision("float64"), torch.no_grad():
        state = algorithm.build_state(config, len(source.classes), source.mean, source.std)
        images, targets = state.normalize(source.test.images), torch.from_numpy(source.test.labels)
        for part, name in (("model", "raw"), ("ema", "ema")):
            given = paddle_to_torch(recording.part(after, part))
            state.model.load_state_dict({n: torch.from_numpy(a) for n, a in given.items()})
            state.model.eval()
            logits = state.model(images)
            loss = torch.nn.functional.cross_entropy(logits, targets)
            label = f"evaluated step {line['step']} {name}"
            yield recording.near(f"{label}/loss", np.array(line[name]["loss"]), loss.numpy(), recording.LOSS_GATE)
            gaps = logits.sort(dim=1).values.diff(dim=1).min(dim=1).values
            undecided = 100.0 * float((gaps < UNDECIDED).double().mean())
            for k, expected in zip((1, 5), accuracy(logits, targets, (1, 5)), strict=True):
                found = np.array(line[name][f"top{k}"])
                apart = abs(float(found) - expected)
                yield Row(f"{label}/top{k}", apart, apart, apart <= undecided + 1e-9, "", found, np.array(expected))


def _checkpoint_rows(folder: pathlib.Path, source: Source, after: list[dict], evaluations: list[dict]) -> Iterator[Row]:
    """A checkpoint holds the state that was live when it was saved, and says what it is of."""
    best = max(evaluations, key=lambda line: line["ema"]["top1"])["step"]  # of equal ones the first
    for which, step in (("latest", STEPS), ("best", best)):
        saved = checkpoint.load(folder / "checkpoints" / which)
        live = {n: a for n, a in after[step - 1].items() if n.split("/")[0] in ("model", "ema", "momentum")}
        for name in [*live, *(n for n in saved.arrays if n not in live and not n.startswith("augment/"))]:
            yield recording.exact(f"checkpoint {which}/{name}", saved.arrays.get(name), live.get(name))
        yield recording.exact(f"checkpoint {which}/step", np.array(saved.manifest.step), np.array(step))
    history = {name: [line[name]["top1"] for line in evaluations] for name in ("raw", "ema")}
    latest = checkpoint.load(folder / "checkpoints/latest").manifest
    facts = {"history": latest.history == history, "classes": tuple(latest.classes) == source.classes,
             "mean": tuple(latest.mean) == tuple(source.mean), "std": tuple(latest.std) == tuple(source.std)}
    for name, right in facts.items():
        yield recording.exact(f"checkpoint latest/{name}", np.array(right), np.array(True))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    yield recording.near("result/top1", np.array(result["top1"]["ema"]["last"]), np.array(history["ema"][-1]), 1e-12)
