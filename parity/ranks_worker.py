"""One of the processes of stage `ranks`: `python -m parity.ranks_worker FOLDER`, in the environment of a rank.

FOLDER holds what parity/ranks.py has written: config.yaml, task.json and images.safetensors. Into it the rank writes
joined-RANK and, once done, rank-RANK.safetensors: its batches, what `distributed` gave it, scores, a checksum of every
tensor after each step, and on rank 0 the tensors themselves that are compared with one process's.
"""

import contextlib
import faulthandler
import json
import pathlib
import sys
import zlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import paddle
from safetensors.numpy import load_file, save_file

from fixmatch import distributed, inputs, process, trainer
from fixmatch import step as algorithm
from fixmatch.config import Config, load_config
from fixmatch.data.augment import ctaugment
from fixmatch.data.dataset import Dataset, Source
from fixmatch.data.loader import Batch, Loader, ProbedBatch
from fixmatch.evaluation import Scores
from fixmatch.models.layers import BatchNorm2D
from fixmatch.runtime import select_device

STEPS = 3
PARTS = ("start", "gradients", "momentum", "weights", "average", "thresholds")  # start: the weights before the step
FLAGS = ((False, False), (True, False), (False, True), (True, True))  # of the two ranks, that `anywhere` is asked about


def main(folder: pathlib.Path) -> None:
    process.end_with_parent()
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    faulthandler.dump_traceback_later(task["timeout"], exit=True)  # no rank stays behind, whoever died before it
    select_device("cpu")
    paddle.set_default_dtype("float64")
    with _planted(task["plant"]), distributed.joined() as (rank, world_size):
        (folder / f"joined-{rank}").touch()
        config, source = load_config(folder / "config.yaml"), _source(folder, task)
        loader = inputs.build_loader(config, source, inputs.choose_split(config, source), rank, world_size)
        batches = [loader.batch(step) for step in range(STEPS)]
        found = {f"batch {step}/{name}": a for step, batch in enumerate(batches)
                 for name, a in Batch(*batch[:6])._asdict().items()}
        found |= _collectives(rank)
        found |= _shared_work(config, source, loader, rank)
        for statistics in ("batch", "constant"):
            for name, array in steps_on(config, source, batches, statistics):
                found[f"checksum {name}"] = np.array(zlib.crc32(array))
                if rank == 0 and is_compared(name):
                    found[name] = array
        save_file(found, folder / f"rank-{rank}.safetensors")


def steps_on(config: Config, source: Source, batches: list[Batch], statistics: str) -> Iterator[tuple]:
    """Trains on `batches`, and gives ("STATISTICS statistics step N PART/NAME", array) of every parameter.

    Beside the parameters it gives the statistics of ssl.policy, as PART thresholds.

    Args:
        statistics: "batch": batch norm as it trains; "constant": with running statistics that do not change, so that
            an image's gradient does not depend on the others.
    """
    split, classes = inputs.choose_split(config, source), len(source.classes)
    counts = split.label_counts(source.train.labels, classes)
    state = algorithm.build_state(config, classes, source.mean, source.std, len(split.unlabeled), counts)
    state.model.train()
    if statistics == "constant":
        _fix_statistics(state, source)
    gradients = _note_gradients(state)
    parameters = dict(state.model.named_parameters())
    for step, batch in enumerate(batches):
        for name, tensor in parameters.items():
            yield f"{statistics} statistics step {step} start/{name}", np.ascontiguousarray(tensor)
        if config.ssl.mode == "fixmatch":
            algorithm.train_step(state, batch, config.ssl)
        else:
            algorithm.supervised_step(state, batch)
        found = gradients, state.optimizer.state(), state.model.state_dict(), state.ema.average.state_dict()
        for part, tensors in zip(PARTS[1:-1], found, strict=True):
            for name in parameters:
                if name in tensors:
                    yield f"{statistics} statistics step {step} {part}/{name}", np.ascontiguousarray(tensors[name])
        for name, tensor in state.thresholds.items():
            yield f"{statistics} statistics step {step} {PARTS[-1]}/{name}", np.ascontiguousarray(tensor)


def is_compared(name: str) -> bool:
    """Whether this tensor is held to one process's: the first gradients, and what three steps have come to."""
    return name.startswith(("constant statistics step 0 gradients/",
                            *(f"constant statistics step {STEPS - 1} {part}/" for part in PARTS[2:])))


def _fix_statistics(state: algorithm.TrainState, source: Source) -> None:
    """Those of the first training images, as a configuration with bn_momentum = 0 keeps them."""
    with paddle.no_grad():
        state.model(state.normalize(source.train.images[:16]))
    for layer in state.model.sublayers():
        if isinstance(layer, BatchNorm2D):
            layer.eval()


def _note_gradients(state: algorithm.TrainState) -> dict[str, paddle.Tensor]:
    """A dict that holds the gradients of the last update, as the optimizer was given them."""
    gradients, step = {}, state.optimizer.step

    def step_and_note(*args):
        gradients.clear()
        gradients.update({n: p.grad.clone() for n, p in state.model.named_parameters() if p.grad is not None})
        return step(*args)

    state.optimizer.step = step_and_note
    return gradients


def _collectives(rank: int) -> dict[str, np.ndarray]:
    mine = {"int64": np.arange(6).reshape(3, 2) + 10 * rank, "float32": np.array([rank + 0.5], dtype=np.float32),
            "float64": np.full([2, 1, 2], rank + 1 / 3)}
    found = {f"gather/{name}": distributed.gather(array) for name, array in mine.items()}
    found["of_rank_0/float64"] = distributed.of_rank_0({"": mine["float64"]})[""]
    found["anywhere/flags"] = np.array([distributed.anywhere(flags[rank]) for flags in FLAGS])
    found["difference/seen"] = np.array([distributed.difference(facts) is not None for facts in (
        {"same": 1, "other": rank}, {"same": "a", "also": [1, 2]})])
    return found


def _shared_work(config: Config, source: Source, loader: Loader, rank: int) -> dict[str, np.ndarray]:
    """What the production loop finds after two steps: scores and CTAugment's feedback, and on rank 0 its networks."""
    monitor = mock.Mock()  # is told the scores
    loop = trainer.Trainer(config, source, loader, monitor, None, None)
    with contextlib.closing(loader.batches(0, 2)) as batches:
        loop._step(batches)
        loop._step(batches)
    networks = {f"network {name}": a.copy() for name, a in loop.arrays().items()}  # with this rank's statistics
    found = {"probe/proximity": trainer.probe(loop.state, probed(loader.batch(0), rank))[2]}
    loop._evaluate()
    for name, scores in monitor.record_evaluation.call_args.args[1].items():
        found |= {f"evaluation/{name} {figure}": array for figure, array in figures(scores).items()}
    return found | (networks if rank == 0 else {})


def probed(batch: Batch, rank: int) -> ProbedBatch:
    """The batch of a rank with its labeled images as the probes, and some plan."""
    plan = ctaugment.draw_probe(np.random.default_rng(rank), len(batch.x))
    return ProbedBatch(*batch[:6], batch.x, plan)


def figures(scores: Scores) -> dict[str, np.ndarray]:
    return {"top1": np.array(scores.top1), "confusion": np.array(scores.confusion), "loss": np.array(scores.loss)}


def _source(folder: pathlib.Path, task: dict) -> Source:
    arrays = load_file(folder / "images.safetensors")
    train = Dataset(arrays["images"], arrays["labels"])
    return Source("parity", tuple(map(str, range(task["num_classes"]))), train, train, task["mean"], task["std"],
                  task["flip"])


def _planted(name: str | None):
    """The bug that stage `ranks` is tried on: one that is put into the process that launches does not reach this."""
    if name is None:
        return contextlib.nullcontext()
    from parity.plants import planted

    return planted(name)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
