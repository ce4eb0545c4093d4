"""Checkpoints: arrays in a safetensors file, everything else in JSON beside it; loading one executes nothing.

A checkpoint is a folder with checkpoint.json, its manifest, and the arrays-HASH.safetensors that the manifest names.
The arrays are written first, and replacing checkpoint.json commits them, so a killed process or a full disk leaves the
previous one whole. The manifest holds the SHA-256 of the arrays, and one of itself.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import paddle
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays

from fixmatch.arrays import safetensors
from fixmatch.data.dataset import one_line
from fixmatch.files import linked, read_text, replacing, write_atomic
from fixmatch.settings import show

FORMAT = 2  # format 1 is read, too: it is the same without the manifest's SHA-256 of itself
_FILE = "checkpoint.json"
_LARGEST = 2**28  # bytes of a manifest; a run of 2^20 steps on 10 classes comes to 50 kB
_ARRAYS = r"arrays-[0-9a-f]+\.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says beside its arrays."""

    step: int  # finished steps
    config: dict  # the resolved configuration, as config.to_dict gives it
    dataset: str  # name of the data source
    classes: tuple[str, ...]  # K names, in label order
    mean: tuple[float, float, float]  # of pixels in [0, 1], a channel
    std: tuple[float, float, float]
    image_size: tuple[int, int] | None = None  # height and width in pixels
    seconds: float = 0.0  # of training and evaluation, over all sessions
    train_seconds: float = 0.0  # of that, in steps and waiting for their batches
    evaluated_step: int | None = None  # the step that the last of `history` is from
    # top-1 percents of all evaluations, oldest first
    history: dict[str, list[float]] = field(default_factory=lambda: {"raw": [], "ema": []})
    split_sha256: str = ""
    data_sha256: dict[str, str] = field(default_factory=dict)  # of images and labels: {"train": ..., "test": ...}
    world_size: int = 1  # ranks that train
    scaler: dict = field(default_factory=dict)  # of mixed precision; empty without it
    provenance: dict = field(default_factory=dict)  # versions, commit, machine, parity verdict

    def to_json(self) -> dict:
        """Provenance stands beside the other facts, under its own keys."""
        facts = dataclasses.asdict(self)
        return {**facts.pop("provenance"), **facts}

    @classmethod
    def from_json(cls, content: dict) -> "Manifest":
        """The inverse of `to_json`. Raises CheckpointError where a fact is missing or is not what was saved."""
        content, facts = dict(content), {}
        for entry in dataclasses.fields(cls):
            if entry.name in content and entry.name in _PATTERNS:
                value = facts[entry.name] = content.pop(entry.name)
                if not _fits(value, _PATTERNS[entry.name]):
                    raise CheckpointError(f"{_FILE}: {entry.name!r} cannot be {show(value)}: damaged, or of another "
                                          "program")
            elif entry.default is entry.default_factory is dataclasses.MISSING:
                raise CheckpointError(f"{_FILE}: has no {entry.name!r}: damaged, or of another program")
        return cls(**facts, provenance=content)


@dataclass(frozen=True)
class _Within:
    """The pattern of a number, which may have been written as an integer; NaN lies within no limits."""

    low: float = -1e300
    high: float = 1e300


# What a fact must be in JSON: a type, an integer of a range, a number within limits, [each item], (just these items),
# {at least these entries} or one of {these}.
_COUNT, _SIDE, _PERCENT = range(2**63), range(1, 2**31), _Within(0, 100)
_PATTERNS = {
    "step": _COUNT, "config": {}, "dataset": str, "classes": [str], "mean": (_Within(),) * 3, "std": (_Within(),) * 3,
    "image_size": {(_SIDE, _SIDE), None}, "seconds": _Within(0), "train_seconds": _Within(0),
    "evaluated_step": {_COUNT, None}, "history": {"raw": [_PERCENT], "ema": [_PERCENT]}, "split_sha256": str,
    "data_sha256": {}, "world_size": range(1, 2**31), "scaler": {}}


class Written(NamedTuple):
    """The arrays of a checkpoint on disk."""

    file: pathlib.Path
    sha256: str  # of its content


@dataclass(frozen=True)
class Checkpoint:
    arrays: dict[str, np.ndarray]  # "model/NAME", "ema/NAME", "momentum/NAME", with CTAugment "augment/NAME"
    manifest: Manifest

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays below `prefix`, under the names that follow it."""
        return {name[len(prefix) + 1:]: a for name, a in self.arrays.items() if name.startswith(prefix + "/")}


def _fits(value, pattern) -> bool:
    """Whether `value`, read from JSON, is as in _PATTERNS."""
    match pattern:
        case range():
            return type(value) is int and value in pattern
        case set():
            return any(_fits(value, alternative) for alternative in pattern)
        case dict():
            return isinstance(value, dict) and all(k in value and _fits(value[k], p) for k, p in pattern.items())
        case [each] if isinstance(pattern, list):
            return isinstance(value, list) and all(_fits(item, each) for item in value)
        case tuple():
            return isinstance(value, list) and len(value) == len(pattern) and all(map(_fits, value, pattern))
        case _Within(low, high):
            return type(value) in (int, float) and low <= value <= high
        case None:
            return value is None
    return type(value) is pattern


def save(folder: pathlib.Path, arrays: dict[str, np.ndarray], manifest: Manifest,
         twin: Written | None = None) -> Written:
    """Writes a checkpoint into `folder`, replacing the one there. Raises OSError and keeps the old one if it cannot.

    Args:
        folder: of the checkpoint; it is made.
        arrays: by name.
        manifest: what else there is to say.
        twin: what an earlier call has written of these very arrays; where the disk has hard links they are not written
            again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = twin.sha256 if twin else _digest(arrays)
    file = folder / f"arrays-{sha256[:16]}.safetensors"
    if twin is None or not linked(twin.file, file):
        with replacing(file) as opened:
            for piece in safetensors(arrays):
                opened.write(piece)
    content = sealed({"format": FORMAT, "arrays": file.name, "sha256": sha256, **manifest.to_json()})
    write_atomic(folder / _FILE, json.dumps(content, indent=1) + "\n")
    for old in (*folder.glob("arrays-*.safetensors"), *folder.glob(".*.tmp")):  # .tmp: of a process that was killed
        if old != file:
            old.unlink()
    return Written(file, sha256)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for piece in safetensors(arrays):
        digest.update(piece)
    return digest.hexdigest()


def sealed(content: dict) -> dict:
    """The content of checkpoint.json with its own SHA-256, which is over all else in it, as "manifest_sha256"."""
    facts = {name: fact for name, fact in content.items() if name != "manifest_sha256"}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return {**facts, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}


def exists(folder: pathlib.Path) -> bool:
    return (folder / _FILE).exists()


def load(folder: pathlib.Path) -> Checkpoint:
    """Reads and verifies a checkpoint, which may be replaced meanwhile. Raises CheckpointError."""
    file, tried = folder / _FILE, None
    while True:
        try:
            text = read_text(file, _LARGEST)
            content = _opened(text, file)
            name, sha256 = content.pop("arrays"), content.pop("sha256")
            if not re.fullmatch(_ARRAYS, name):
                raise CheckpointError(f"{file}: arrays: {show(name)} is not a file of this folder")
            if _sha256(folder / name) != sha256:
                raise CheckpointError(f"{folder / name}: damaged: its SHA-256 is not the one in {_FILE}")
            return Checkpoint(load_arrays(folder / name, backend="pread"), Manifest.from_json(content))
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            if error.filename == str(file) or text == tried:
                raise CheckpointError(f"{error.filename}: no such file; {folder} holds no complete "
                                      "checkpoint") from None
            tried = text  # a run that saved just now has removed the arrays of this manifest, and replaced it before
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"{file}: not a checkpoint ({type(error).__name__}: {one_line(error)})") from None


def _sha256(file: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _opened(text: str, file: pathlib.Path) -> dict:
    """The content of a manifest, whose format is known and whose SHA-256 is right."""
    content = json.loads(text)
    version, seal = content.pop("format"), content.pop("manifest_sha256", None)
    if version not in (1, FORMAT) or type(version) is not int:
        raise CheckpointError(f"{file}: format {show(version)} is not one this version reads (1, {FORMAT})")
    if version == FORMAT and seal != sealed({"format": version, **content})["manifest_sha256"]:
        raise CheckpointError(f"{file}: damaged or edited: its SHA-256 of itself is wrong")
    return content


def find(path: pathlib.Path, which: str = "latest") -> pathlib.Path:
    """The checkpoint folder that `path`, a run folder or a checkpoint, means. Raises CheckpointError if neither."""
    for folder in (path, path / "checkpoints" / which, path / which):
        if exists(folder):
            return folder
    raise CheckpointError(f"{path}: neither a run folder with checkpoints/{which} nor a checkpoint")


def load_weights(model, arrays: dict[str, np.ndarray]) -> None:
    """Puts `arrays` into `model`, which must have exactly these names, shapes and dtypes; else CheckpointError.

    Layer.set_state_dict alone would skip what does not fit.
    """
    check_fit("the model", {name: t.numpy() for name, t in model.state_dict().items()}, arrays)
    model.set_state_dict({name: paddle.to_tensor(a) for name, a in arrays.items()})


def check_fit(owner: str, wanted: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> None:
    """Raises CheckpointError unless `given` has exactly the names, shapes and dtypes of `wanted`, which `owner` has."""
    kinds = [{name: (a.shape, str(a.dtype)) for name, a in arrays.items()} for arrays in (wanted, given)]
    for name in sorted(wanted.keys() | given.keys()):
        here, there = (kind.get(name) for kind in kinds)
        if here != there:
            raise CheckpointError(f"checkpoint does not fit: {name}: {owner} has {here}, the checkpoint {there}")
