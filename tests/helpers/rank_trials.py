"""One of two processes that train together in tests/test_distributed.py: `python -m rank_trials FOLDER`.

It goes through all trials in a row, because to start two processes takes longer than any of them. What it finds goes
into FOLDER/found-RANK.json. The ranks share no run folder, as on two machines: theirs are in FOLDER/rank-RANK.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys
import time
from unittest import mock

import numpy as np
import paddle.distributed as dist
from running import After

from fixmatch import checkpoint, distributed, evaluation, run, trainer
from fixmatch import step as algorithm
from fixmatch.data.dataset import Dataset
from fixmatch.normalize import Normalize
from parity.case import small_case
from parity.small_run import short_config, small_source, training_on

CASE = small_case("wideresnet", 0)
SOURCE = small_source(CASE)
RANK = dist.get_rank()


def only_on(rank: int, do):
    """`do` on that rank, nothing on the others."""
    return do if rank == RANK else lambda *_: None


def config_for(folder: pathlib.Path, name: str, steps: int = 5, **changed):
    """A short run's; `changed` are keys as section__key."""
    config = short_config(CASE, folder / f"rank-{RANK}" / name, steps)
    for key, value in changed.items():
        section, last = key.split("__")
        changed_section = dataclasses.replace(getattr(config, section), **{last: value})
        config = dataclasses.replace(config, **{section: changed_section})
    return config


def outcome(config, source=SOURCE, **options) -> list:
    """[what `train` raised and said, the digest of what this rank has trained, the seconds]."""
    started, held = time.monotonic(), []
    build = trainer.Trainer.__init__

    def keep(self, *args):
        build(self, *args)
        held.append(self)

    with training_on(source), mock.patch.object(trainer.Trainer, "__init__", keep):
        try:
            run.train(config, **options)
            said = ["", ""]
        except (Exception, KeyboardInterrupt) as error:
            said = [type(error).__name__, str(error)]
    arrays = {name: a for name, a in held[0].arrays().items() if "._" not in name} if held else {}
    return [*said, distributed.digest(arrays), time.monotonic() - started]


def figures(path: pathlib.Path) -> list[dict]:
    """What metrics.jsonl holds but for times."""
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [{key: line.get(key) for key in ("kind", "step", "loss", "loss_u", "lr", "raw", "ema")} for line in lines]


# --- the trials: each gives what JSON can hold


def resume(folder: pathlib.Path, strong: str) -> dict:
    """A run that rank 1 alone is told to stop, and that goes on, beside one that was never stopped."""
    whole, broken = (config_for(folder, f"{strong}-{name}", augment__strong=strong) for name in ("whole", "broken"))
    found = {"whole": outcome(whole)}
    found["stopped"] = outcome(broken, recorder=After(3, only_on(1, lambda: signal.raise_signal(signal.SIGTERM))))
    found["resumed"] = outcome(broken, resume=True)
    if RANK == 0:
        one, other = (checkpoint.load(pathlib.Path(c.run.dir) / "checkpoints/latest").arrays for c in (whole, broken))
        found["differing"] = sorted(name for name in one.keys() | other.keys()
                                    if name not in one or name not in other or (one[name] != other[name]).any())
        found["logs"] = [figures(pathlib.Path(c.run.dir)) for c in (whole, broken)]
    return found


def evaluation_of_one_process(folder: pathlib.Path) -> dict:
    """The scores of the run above, when a process evaluates its checkpoint alone."""
    if RANK > 0:
        return {}
    with mock.patch.object(run, "load_source", return_value=SOURCE):
        found = run.evaluate(config_for(folder, "reference-whole").run.dir)
    return {"raw": found.raw.to_dict(), "ema": found.ema.to_dict()}


class PixelsAsLogits:
    """A model without weights: the first four red pixels of an image are its logits."""

    training = False

    def eval(self):
        pass

    def __call__(self, x):
        return x[:, 0, 0, :4]


def shares(folder: pathlib.Path) -> list:
    """Whether the ranks together find the scores of one process, for test sets that cannot be shared evenly, too."""
    rng, normalize, found = np.random.default_rng(0), Normalize((0.5,) * 3, (0.5,) * 3), []
    images, labels = rng.integers(0, 256, (23, 8, 8, 3), dtype=np.uint8), rng.integers(0, 4, 23)
    for count, batch_size in ((23, 5), (20, 5), (3, 5), (6, 5), (1, 1), (23, 1)):
        arguments = PixelsAsLogits(), normalize, Dataset(images[:count], labels[:count]), batch_size
        alone = evaluation.evaluate(*arguments)
        with distributed.joined():
            found.append(evaluation.evaluate(*arguments) == alone)
    return found


def refusals(folder: pathlib.Path) -> dict:
    """What makes the ranks different, and must not be trained with."""
    changed = SOURCE.train.images.copy()
    changed[0, 0, 0, 0] ^= RANK  # one bit of one pixel
    pixels = dataclasses.replace(SOURCE, train=dataclasses.replace(SOURCE.train, images=changed))
    classes = dataclasses.replace(SOURCE, classes=SOURCE.classes[RANK:] + SOURCE.classes[:RANK])
    config = config_for(folder, "not begun")
    found = {"learning rate": outcome(config_for(folder, "not begun", optim__lr=0.03 + 0.01 * RANK)),
             "pixels": outcome(config, pixels), "classes": outcome(config, classes),
             "--resume": outcome(config, resume=RANK == 1)}
    found["left behind"] = pathlib.Path(config.run.dir).exists()
    restore = trainer.Trainer.restore

    def restore_other_momentum(self, saved):
        restore(self, saved)
        self.state.optimizer._loaded["fc.bias"] = self.state.optimizer._loaded["fc.bias"] + RANK

    with mock.patch.object(trainer.Trainer, "restore", restore_other_momentum):
        found["weights"] = outcome(config_for(folder, "reference-whole", steps=7), resume=True)
    return found


def waiting(folder: pathlib.Path, seconds: float) -> list:
    """Rank 0 takes its time: to read data, to prepare, to evaluate, and to save."""
    def slow(right):
        def changed(*args, **options):
            if RANK == 0:
                time.sleep(seconds)
            return right(*args, **options)
        return changed

    with contextlib.ExitStack() as patches:
        for owner, name in ((run, "read_inputs"), (run, "preview"), (trainer, "evaluate"), (checkpoint, "save")):
            patches.enter_context(mock.patch.object(owner, name, slow(getattr(owner, name))))
        return outcome(config_for(folder, "waiting", steps=2))


def not_a_number(folder: pathlib.Path) -> list:
    """The loss of rank 1 alone is not a number, at step 4; evaluation and log lines come later."""
    right, steps = algorithm.train_step, []

    def changed(*args):
        losses = right(*args)
        steps.append(1)
        return losses._replace(loss_x=losses.loss_x * float("nan")) if RANK == 1 and len(steps) == 4 else losses

    with mock.patch.object(algorithm, "train_step", changed):
        return outcome(config_for(folder, "nan", steps=9, run__log_every=6))


def failing(folder: pathlib.Path) -> list:
    """A full disk on rank 0, which is met while it saves; and what nobody expects, on rank 1."""
    def full(*_):
        raise OSError(28, "No space left on device", "there")

    def unexpected():
        raise ZeroDivisionError("of rank 1")

    with mock.patch.object(checkpoint, "save", full):
        found = [outcome(config_for(folder, "full"))]
    return [*found, outcome(config_for(folder, "unexpected"), recorder=After(2, only_on(1, unexpected)))]


def death(folder: pathlib.Path) -> None:
    """Rank 1 is killed in the middle of step 3, while rank 0 is in the backward pass and waits for its gradients."""
    right, steps = algorithm.update, []

    def update(*args):
        steps.append(1)
        if RANK == 1 and len(steps) == 3:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        right(*args)

    with mock.patch.object(algorithm, "update", update), training_on(SOURCE):
        run.train(config_for(folder, "dead"))


def main(folder: pathlib.Path) -> None:
    seconds = float(os.environ.get("RANK_TRIALS_WAIT", "0.5"))
    trials = {"reference": lambda: resume(folder, "reference"), "ctaugment": lambda: resume(folder, "ctaugment"),
              "alone": lambda: evaluation_of_one_process(folder), "shares": lambda: shares(folder),
              "refusals": lambda: refusals(folder), "waiting": lambda: waiting(folder, seconds),
              "not a number": lambda: not_a_number(folder), "failing": lambda: failing(folder),
              "death": lambda: death(folder)}
    (folder / f"joined-{RANK}").touch()
    found = {}
    for name, trial in trials.items():
        found[name] = trial()
        (folder / f"found-{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
