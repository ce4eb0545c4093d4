"""Stage `ranks`: two processes that train together stay equal, and compute what one process does on both batches.

Two processes of parity/ranks_worker.py are joined through gloo on this machine's CPU, and run the production step in
float64, each on its own share of the production Loader's batches. Once with batch norm as it trains: what is trained
must be the same on both ranks, bit for bit. Once with constant running statistics, where an image's gradient does not
depend on the others: then the average over ranks is the gradient of the whole batch, which this process computes.
A network wider than the published ones for CIFAR-10 is narrowed to them.
B labeled images a rank, M = mu * B unlabeled ones.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from fixmatch import inputs
from fixmatch.config import Config, to_yaml
from fixmatch.data.dataset import Source
from fixmatch.data.loader import Batch
from parity import plants, ranks_worker
from parity.case import PUBLISHED, Case
from parity.compare import Row, compare_tensor
from parity.dry_run import short_config, small_source
from parity.recording import exact, near
from parity.subject import precision

RANKS = 2
GATE = 1e-10  # of what one process computes, over the largest element
TIMEOUT = 300  # seconds; a small network takes 4
TO_JOIN = 60  # seconds of that, until both have found each other


class DidNotRun(RuntimeError):
    """The processes have not come to an end; the message is one line."""


def rows(case: Case) -> Iterator[Row]:
    """Rows of the comparison, in the order in which a fault would show."""
    config, source = _short(narrowed(case)), small_source(case)
    with tempfile.TemporaryDirectory(prefix="fixmatch-parity-") as scratch:
        folder = pathlib.Path(scratch)
        _write_task(folder, config, source)
        try:
            launch(folder)
        except DidNotRun as error:
            yield Row("ranks/finished", np.inf, np.inf, False, str(error))
            return
        with contextlib.ExitStack() as files:
            found = [files.enter_context(safe_open(folder / f"rank-{rank}.safetensors", "numpy"))
                     for rank in range(RANKS)]
            yield from _collective_rows(found)
            batches = [[Batch(*(f.get_tensor(f"batch {step}/{name}") for name in Batch._fields)) for f in found]
                       for step in range(ranks_worker.STEPS)]
            yield from _share_rows(config, source, batches)
            yield from _equal_rows(found)
            yield from _whole_rows(config, source, batches, found[0])


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
    """A few images a rank, every pseudo-label counted, and statistics that `constant` can take from one batch."""
    config = short_config(case.config, case.num_classes, pathlib.Path("unused"))
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, bn_momentum=0.0),
        train=dataclasses.replace(config.train, batch_size=2, mu=2, clip_grad_norm=0.0, amp=False),
        ssl=dataclasses.replace(config.ssl, threshold=0.0))


def _write_task(folder: pathlib.Path, config: Config, source: Source) -> None:
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "task.json").write_text(json.dumps({
        "num_classes": len(source.classes), "mean": source.mean, "std": source.std, "timeout": TIMEOUT,
        "flip": source.flip, "plant": plants.current}), encoding="utf-8")
    save_file({"images": source.train.images, "labels": source.train.labels}, folder / "images.safetensors")


# --- the processes


def launch(folder: pathlib.Path) -> None:
    """Runs all ranks to their end. Raises DidNotRun, with no process left behind."""
    for last in (False, True):
        try:
            return _launch_once(folder)
        except _NotJoined as error:  # another program may have taken the port since it was chosen
            if last:
                raise DidNotRun(f"{RANKS} processes could not join through gloo: {error}") from None


class _NotJoined(DidNotRun):
    """It ended before the ranks had found each other."""


def _launch_once(folder: pathlib.Path) -> None:
    for file in folder.glob("joined-*"):
        file.unlink()
    with contextlib.ExitStack() as cleanup:
        processes = []
        for rank, environment in enumerate(_environments()):
            output = cleanup.enter_context(open(folder / f"output-{rank}.txt", "w", encoding="utf-8"))
            processes.append(subprocess.Popen(  # noqa: S603
                [sys.executable, "-W", "ignore", "-m", ranks_worker.__name__, folder], env=environment, stdout=output,
                stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True))
            cleanup.callback(_kill, processes[-1])
        started = time.monotonic()
        while any(process.poll() is None for process in processes):
            joined = all((folder / f"joined-{rank}").exists() for rank in range(RANKS))
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            if failed:
                raise (DidNotRun if joined else _NotJoined)(_last_words(folder, processes, failed[0]))
            limit = TIMEOUT if joined else TO_JOIN
            if time.monotonic() - started > limit:
                raise (DidNotRun if joined else _NotJoined)(f"not done within {limit} s")
            time.sleep(0.02)
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        if failed:
            raise DidNotRun(_last_words(folder, processes, failed[0]))


def _environments() -> Iterator[dict[str, str]]:
    """Of each rank, as paddle.distributed.launch would set it."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(RANKS)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        endpoints = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    inherited = {name: value for name, value in os.environ.items()
                 if not name.startswith(("PADDLE_", "MASTER_", "FLAGS_selected_"))}
    root = str(pathlib.Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    for rank, endpoint in enumerate(endpoints):
        yield inherited | {
            "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(RANKS), "PADDLE_CURRENT_ENDPOINT": endpoint,
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints), "PADDLE_DISTRI_BACKEND": "gloo"}


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(folder: pathlib.Path, processes: list, rank: int) -> str:
    code, said = processes[rank].returncode, (folder / f"output-{rank}.txt").read_text(errors="replace").split("\n")
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    telling = [line.strip() for line in said if "Error" in line] or [line.strip() for line in said if line.strip()]
    return f"rank {rank} ended with {cause}{': ' + telling[-1] if telling else ''}"


# --- what they found


def _collective_rows(found: list) -> Iterator[Row]:
    """`gather` puts the ranks' arrays one after the other, in the order of ranks; `anywhere` looks at all of them."""
    expected = {"int64": np.concatenate([np.arange(6).reshape(3, 2), np.arange(6).reshape(3, 2) + 10]),
                "float32": np.array([0.5, 1.5], dtype=np.float32),
                "float64": np.repeat([1 / 3, 1 + 1 / 3], 4).reshape(4, 1, 2)}
    for rank, file in enumerate(found):
        for name, array in expected.items():
            yield compare_tensor(f"rank {rank} gather/{name}", file.get_tensor(f"gather/{name}"), array, 0.0)
        yield exact(f"rank {rank} anywhere/flags", file.get_tensor("anywhere/flags"),
                    np.array([any(flags) for flags in ranks_worker.FLAGS]))


def _share_rows(config: Config, source: Source, batches: list[list[Batch]]) -> Iterator[Row]:
    """The ranks' shares of a step, one after the other, are the images of one process with the whole batch."""
    whole = inputs.build_loader(dataclasses.replace(config, train=dataclasses.replace(
        config.train, batch_size=RANKS * config.train.batch_size)), source, inputs.choose_split(config, source))
    for step, shares in enumerate(batches):
        for name in ("targets_x", "targets_u"):
            yield exact(f"share of step {step}/{name}", np.concatenate([getattr(share, name) for share in shares]),
                        getattr(whole.batch(step), name))
        for name in ("x", "u_w", "u_s"):
            apart = [getattr(share, name) for share in shares]
            if apart[0].size:
                yield exact(f"share of step {step}/{name} is the rank's own", np.array((apart[0] != apart[1]).any()),
                            np.array(True))


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
