"""Recorded results of the Torch side, for machines without Torch, and for networks of which they take long.

Of every tensor a golden keeps its norm and three sums with random signs, in float64: a single element that is off shows
in each. Inputs and weights come from numpy seeds, so they are not recorded. Written by `tools/parity.py
--write-goldens`.
"""

import dataclasses
import io
import pathlib
import re
import zipfile
import zlib
from collections import UserDict
from collections.abc import Iterator

import numpy as np

from fixmatch.config import Config, ModelConfig, OptimConfig
from fixmatch.data import DataError
from fixmatch.files import write_atomic
from parity.case import CLASSIC_SEEDS, Case
from parity.compare import FRESH_WEIGHTS, Trace

WHOLE = "whole"  # the trace that the stages forward, backward, optimizer and ema are taken from
_FOLDER = pathlib.Path(__file__).parent / "goldens"
_PROJECTIONS = 3
_REPEATED = 1 << 14  # elements


def _large(model: ModelConfig) -> Case:
    """A network for CIFAR-100, just as a self-check takes it."""
    return Case(Config(model=model, optim=OptimConfig(weight_decay=1e-3)), 100, CLASSIC_SEEDS[0]).small()


# The networks of the published configurations and of configs/digits.yaml, with the reference's hyper-parameters.
CASES = {
    "wideresnet-10-2": Case(Config(model=ModelConfig("wideresnet", 10, 2)), 10),
    "wideresnet-28-2": Case(Config(model=ModelConfig("wideresnet", 28, 2)), 10),
    "wideresnet-28-8": _large(ModelConfig("wideresnet", 28, 8)),
    "resnext-28-4x4": Case(Config(model=ModelConfig("resnext", 28, 4, 4)), 10),
    "resnext-29-8x64": _large(ModelConfig("resnext", 29, 64, 8)),
}


class GoldenError(DataError):
    """A golden that is missing or cannot be read."""


def nearest(model: ModelConfig) -> tuple[str, bool]:
    """The golden of this architecture nearest in shape, and whether it is of exactly this shape."""
    def distance(name: str) -> float:
        other = CASES[name].config.model
        return (abs(np.log(other.depth / model.depth)) + abs(np.log(other.width / model.width))
                + abs(np.log(other.cardinality / model.cardinality)) * (model.arch == "resnext"))

    name = min((n for n, c in CASES.items() if c.config.model.arch == model.arch), key=distance)
    return name, distance(name) == 0


def recorded(case: Case) -> str | None:
    """The golden of what the reference does on this case, which is that of CASES in all that decides it."""
    wanted = _decides(case)
    return next((name for name, other in CASES.items() if _decides(other) == wanted), None)


def _decides(case: Case) -> Case:
    config = case.short_config()
    return dataclasses.replace(case, config=Config(
        model=dataclasses.replace(config.model, init=""), ssl=config.ssl, optim=config.optim, ema=config.ema))


def smallest(arch: str) -> str:
    """The golden of this architecture that has the fewest weights."""
    return min((n for n, c in CASES.items() if c.config.model.arch == arch), key=lambda n: CASES[n].num_weights)


class Digest(UserDict):
    """Tensors of a section, each reduced to what a golden keeps when it is put in."""

    def __setitem__(self, name: str, array: np.ndarray):
        key = f"{name} {'x'.join(map(str, np.shape(array)))} {np.asarray(array).dtype}"
        super().__setitem__(key, _project(name, array))


def undigested(tensor: str) -> str:
    """The name of a tensor without the shape and dtype that a Digest adds to it, if it does."""
    return re.sub(r" [\dx]* (float|int|bool)\d*$", "", tensor)


def digest(trace: Trace) -> Iterator[tuple[str, Digest]]:
    """A trace reduced to what a golden keeps. Fresh weights, which are random, are left out."""
    for section, tensors in trace:
        if section != FRESH_WEIGHTS:
            yield section, tensors if isinstance(tensors, Digest) else Digest(tensors)


def _project(name: str, array) -> np.ndarray:
    """Signs of a large array repeat, times a sign of each repetition: drawing one for each element takes too long."""
    flat = np.asarray(array, dtype=np.float64).reshape(-1)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    rows = max(1, -(-flat.size // _REPEATED))
    columns = -(-flat.size // rows) if flat.size else 0
    whole = flat if rows * columns == flat.size else np.concatenate([flat, np.zeros(rows * columns - flat.size)])
    of_row, of_column = (_signs(rng, n) for n in (rows, columns))
    sums = np.einsum("pc,pc->p", of_row @ whole.reshape(rows, columns), of_column)
    return np.concatenate([[np.linalg.norm(flat)], sums])


def _signs(rng: np.random.Generator, count: int) -> np.ndarray:
    """Signs of each projection [_PROJECTIONS, count], each from one random bit."""
    bits = np.unpackbits(np.frombuffer(rng.bytes(_PROJECTIONS * -(-count // 8)), np.uint8))
    return bits.reshape(_PROJECTIONS, -1)[:, :count] * 2.0 - 1.0


def write(name: str, traces: dict[str, Trace]) -> pathlib.Path:
    """Records {stage: reference trace} under `name`."""
    keys, values = [], []
    for stage, trace in traces.items():
        for section, tensors in digest(trace):
            for tensor, array in tensors.items():
                keys.append("\t".join((stage, section, tensor)))
                values.append(array)
    blob = io.BytesIO()
    np.savez_compressed(blob, name=np.array(name), keys=np.array("\n".join(keys)), values=np.array(values))
    _FOLDER.mkdir(exist_ok=True)
    path = _FOLDER / f"{name}.npz"
    write_atomic(path, blob.getvalue())
    return path


def read(name: str, stage: str) -> Trace:
    """The recorded reference trace of a stage, digested. Raises GoldenError."""
    path = _FOLDER / f"{name}.npz"
    sections: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            found, keys, values = str(file["name"]), str(file["keys"]).split("\n"), file["values"]
        for key, value in zip(keys, values, strict=True):
            of_stage, section, tensor = key.split("\t")
            if of_stage == stage:
                sections.setdefault(section, {})[tensor] = value
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or error
        raise GoldenError(f"{path}: recorded results cannot be read: {why}; install again") from None
    if found != name or not sections:
        raise GoldenError(f"{path}: not the recorded results of {name}; install again")
    return list(sections.items())
