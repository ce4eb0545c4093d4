"""Stage `ranks`: two processes that train together stay equal, and compute what one process does on both batches.

Two processes of parity/ranks_worker.py are joined by parity/launch.py, and run the production step in
float64, each on its own share of the production Loader's batches. Once with batch norm as it trains: what is trained
must be the same on both ranks, bit for bit. Once with constant running statistics, where an image's gradient does not
depend on the others: then the average over ranks is the gradient of the whole batch, which this process computes.
What they share beside gradients, evaluations and CTAugment's probes, must be what this process finds with rank 0's
networks. A network wider than the published ones for CIFAR-10 is narrowed to them.
B labeled images a rank, M = mu * B unlabeled ones.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from fixmatch import inputs, trainer
from fixmatch import step as algorithm
from fixmatch.checkpoint import Checkpoint, load_weights
from fixmatch.config import Config, to_yaml
from fixmatch.data.dataset import Source
from fixmatch.data.loader import Batch
from fixmatch.evaluation import evaluate
from fixmatch.scratch import scratch_folder
from parity import launch, ranks_worker
from parity.case import PUBLISHED, Case
from parity.compare import Row, compare_tensor, exact, near
from parity.small_run import short_config, small_source
from parity.subject import precision

GATE = 1e-10  # of what one process computes, over the largest element


def rows(case: Case) -> Iterator[Row]:
    """Rows of the comparison, in the order in which a fault would show."""
    config, source = _short(narrowed(case)), small_source(case)
    with scratch_folder() as folder:
        _write_task(folder, config, source)
        try:
            launch.launch(ranks_worker.__name__, folder)
        except launch.DidNotRun as error:
            yield Row("ranks/finished", np.inf, np.inf, False, str(error))
            return
        with contextlib.ExitStack() as files:
            found = [files.enter_context(safe_open(folder / f"rank-{rank}.safetensors", "numpy"))
                     for rank in range(launch.RANKS)]
            yield from _collective_rows(found)
            batches = [[Batch(*(f.get_tensor(f"batch {step}/{name}") for name in Batch._fields)) for f in found]
                       for step in range(ranks_worker.STEPS)]
            yield from _share_rows(config, source, batches)
            yield from _equal_rows(found)
            yield from _whole_rows(config, source, batches, found[0])
            yield from _shared_work_rows(config, source, batches[0], found)


def narrowed(case: Case) -> Case:
    """The case with a network no wider than the published ones for CIFAR-10, of the same depth and tensors.

    For what depends on the names and the number of a network's tensors and not on their sizes: in float64 and three
    times over a WRN-28-8 takes a minute and 5 GB.
    """
    model, published = case.config.model, PUBLISHED[case.config.model.arch]
    model = dataclasses.replace(model, width=min(model.width, published.width),
                                cardinality=min(model.cardinality, published.cardinality))
    return dataclasses.replace(case, config=dataclasses.replace(case.config, model=model))


def _short(case: Case) -> Config:
    """A few images a rank, every pseudo-label counted, and statistics that `constant` can take from one batch.

    FreeMatch's fairness term is over each rank's own images, so that no whole batch has the same.
    """
    lambda_e = {"lambda_e": 0.0} if case.config.ssl.policy == "freematch" else {}
    config = short_config(case, pathlib.Path("unused"), ranks_worker.STEPS)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, bn_momentum=0.0),
        train=dataclasses.replace(config.train, batch_size=2, mu=2, clip_grad_norm=0.0, amp="off"),
        ssl=dataclasses.replace(config.ssl, threshold=0.0, **lambda_e))


def _write_task(folder: pathlib.Path, config: Config, source: Source) -> None:
    from parity import plants  # all known bugs: the self-check does without them

    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "task.json").write_text(json.dumps({
        "num_classes": len(source.classes), "mean": source.mean, "std": source.std, "timeout": launch.TIMEOUT,
        "flip": source.flip, "plant": plants.current}), encoding="utf-8")
    save_file({"images": source.train.images, "labels": source.train.labels}, folder / "images.safetensors")


# --- what they found


def _collective_rows(found: list) -> Iterator[Row]:
    """What each function of `distributed` gives: in the order of ranks, of all of them or of rank 0 alone."""
    expected = {"int64": np.concatenate([np.arange(6).reshape(3, 2), np.arange(6).reshape(3, 2) + 10]),
                "float32": np.array([0.5, 1.5], dtype=np.float32),
                "float64": np.repeat([1 / 3, 1 + 1 / 3], 4).reshape(4, 1, 2)}
    for rank, file in enumerate(found):
        for name, array in expected.items():
            yield compare_tensor(f"rank {rank} gather/{name}", file.get_tensor(f"gather/{name}"), array, 0.0)
        yield exact(f"rank {rank} of_rank_0/float64", file.get_tensor("of_rank_0/float64"), expected["float64"][:2])
        yield exact(f"rank {rank} anywhere/flags", file.get_tensor("anywhere/flags"),
                    np.array([any(flags) for flags in ranks_worker.FLAGS]))
        yield exact(f"rank {rank} difference/seen", file.get_tensor("difference/seen"), np.array([True, False]))


def _share_rows(config: Config, source: Source, batches: list[list[Batch]]) -> Iterator[Row]:
    """The ranks' shares of a step, one after the other, are the images of one process with the whole batch."""
    whole = inputs.build_loader(dataclasses.replace(config, train=dataclasses.replace(
        config.train, batch_size=launch.RANKS * config.train.batch_size)), source, inputs.choose_split(config, source))
    for step, shares in enumerate(batches):
        for name in ("targets_x", "targets_u"):
            yield exact(f"share of step {step}/{name}", np.concatenate([getattr(share, name) for share in shares]),
                        getattr(whole.batch(step), name))
        for name in ("x", "u_w", "u_s"):
            apart = [getattr(share, name) for share in shares]
            if apart[0].size:
                yield exact(f"share of step {step}/{name} is the rank's own", np.array((apart[0] != apart[1]).any()),
                            np.array(True))


def _shared_work_rows(config: Config, source: Source, shares: list[Batch], found: list) -> Iterator[Row]:
    """Evaluations and CTAugment's probes, which the ranks share, are those of this process with rank 0's networks."""
    saved = {name.removeprefix("network "): found[0].get_tensor(name) for name in found[0].keys()  # noqa: SIM118
             if name.startswith("network ")}
    with precision("float64"):
        state = algorithm.build_state(config, len(source.classes), source.mean, source.std)
        for part, network in (("model", state.model), ("ema", state.ema.average)):
            load_weights(network, Checkpoint(saved, None).part(part))
        size, expected = config.train.eval_batch_size, {}
        for name, network in (("raw", state.model), ("ema", state.ema.average)):
            scores = evaluate(network, state.normalize, source.train, size)
            expected |= {f"evaluation/{name} {what}": a for what, a in ranks_worker.figures(scores).items()}
        expected["probe/proximity"] = np.concatenate([
            trainer.probe(state, ranks_worker.probed(share, rank))[2] for rank, share in enumerate(shares)])
    for rank, file in enumerate(found):
        for name, array in expected.items():
            yield near(f"rank {rank} {name}", file.get_tensor(name), array, GATE)


def _equal_rows(found: list) -> Iterator[Row]:
    """After every step all ranks hold the same, bit for bit."""
    names = [[name for name in file.keys() if name.startswith("checksum ")] for file in found]  # noqa: SIM118
    for name in sorted({*names[0], *names[1]}, key=_in_order):
        one, other = (file.get_tensor(name) if name in known else None
                      for file, known in zip(found, names, strict=True))
        row = exact(f"equal on all ranks: {name.removeprefix('checksum ')}", other, one)
        yield row if row.passed else row._replace(why="rank 1 has another one than rank 0", ours=None, reference=None)


def _in_order(name: str) -> tuple:
    """The order in which a fault would show: "checksum STATISTICS statistics step N PART/NAME"."""
    _, statistics, _, _, step, part = name.split("/")[0].split()
    return statistics, int(step), ranks_worker.PARTS.index(part), name


def _whole_rows(config: Config, source: Source, batches: list[list[Batch]], found) -> Iterator[Row]:
    """With constant statistics, rank 0 has what this process computes on the whole batch."""
    whole = [Batch(*map(np.concatenate, zip(*shares, strict=True))) for shares in batches]
    with precision("float64"):
        expected = {name: array for name, array in ranks_worker.steps_on(config, source, whole, "constant")
                    if ranks_worker.is_compared(name)}
    present = {name for name in found.keys() if ranks_worker.is_compared(name)}  # noqa: SIM118
    for name in [*expected, *sorted(present - expected.keys())]:
        ours = found.get_tensor(name) if name in present else None
        yield near(f"whole batch: {name}", ours, expected.get(name), GATE)
