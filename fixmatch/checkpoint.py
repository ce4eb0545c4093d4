"""Checkpoints: arrays in a safetensors file, everything else in JSON beside it; loading one executes nothing.

A checkpoint is a folder with checkpoint.json and the arrays-HASH.safetensors that it names. The arrays are written
first, and replacing checkpoint.json commits them, so a killed process or a full disk leaves the previous one whole.
"""

import hashlib
import json
import pathlib
import re
from dataclasses import dataclass

import numpy as np
import paddle
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from fixmatch.files import write_atomic

FORMAT = 1
_MANIFEST = "checkpoint.json"
_ARRAYS = r"arrays-[0-9a-f]+\.safetensors"
_FACTS = {  # what they must be: a type, [each item], (exactly these items) or {at least these entries}
    "step": int, "seconds": float, "train_seconds": float, "split_sha256": str, "config": {}, "scaler": {},
    "classes": [str], "mean": (float,) * 3, "std": (float,) * 3, "history": {"raw": [float], "ema": [float]}}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    arrays: dict[str, np.ndarray]  # "model/NAME", "ema/NAME", "momentum/NAME", with CTAugment "augment/NAME"
    meta: dict  # JSON: step, config, classes, history, versions, ...

    def fact(self, key: str):
        """An entry of `meta`. Raises CheckpointError where it is missing or is not what was saved under that name."""
        if key not in self.meta:
            raise CheckpointError(f"{_MANIFEST}: has no {key!r}: damaged, or of another program")
        fact = self.meta[key]
        if key in _FACTS and not _fits(fact, _FACTS[key]):
            raise CheckpointError(f"{_MANIFEST}: {key!r} cannot be {fact!r:.60}: damaged, or of another program")
        return fact

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays below `prefix`, under the names that follow it."""
        return {name[len(prefix) + 1:]: a for name, a in self.arrays.items() if name.startswith(prefix + "/")}


def _fits(value, pattern) -> bool:
    """Whether `value`, read from JSON, is as in _FACTS; a float may have been written as an integer."""
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(k in value and _fits(value[k], p) for k, p in pattern.items())
    if isinstance(pattern, list):
        return isinstance(value, list) and all(_fits(item, pattern[0]) for item in value)
    if isinstance(pattern, tuple):
        return isinstance(value, list) and len(value) == len(pattern) and all(map(_fits, value, pattern))
    return type(value) is pattern or (pattern is float and type(value) is int)


def save(folder: pathlib.Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """Writes a checkpoint into `folder`, replacing the one there. Raises OSError and keeps the old one if it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    blob = save_arrays({name: np.asarray(a, order="C") for name, a in arrays.items()})
    sha256 = hashlib.sha256(blob).hexdigest()
    file = folder / f"arrays-{sha256[:16]}.safetensors"
    write_atomic(file, blob)
    manifest = {"format": FORMAT, "arrays": file.name, "sha256": sha256, **meta}
    write_atomic(folder / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for old in (*folder.glob("arrays-*.safetensors"), *folder.glob(".*.tmp")):  # .tmp: of a process that was killed
        if old != file:
            old.unlink()


def exists(folder: pathlib.Path) -> bool:
    return (folder / _MANIFEST).exists()


def load(folder: pathlib.Path) -> Checkpoint:
    """Reads and verifies a checkpoint. Raises CheckpointError."""
    manifest = folder / _MANIFEST
    try:
        meta = json.loads(manifest.read_text(encoding="utf-8"))
        name = meta["arrays"]
        if meta["format"] != FORMAT:
            raise CheckpointError(f"{manifest}: format {meta['format']!r} is not one this version reads ({FORMAT})")
        if not re.fullmatch(_ARRAYS, name):
            raise CheckpointError(f"{manifest}: arrays: {name!r} is not a file of this folder")
        blob = (folder / name).read_bytes()
        if hashlib.sha256(blob).hexdigest() != meta["sha256"]:
            raise CheckpointError(f"{folder / name}: damaged: its SHA-256 is not the one in {_MANIFEST}")
        return Checkpoint(load_arrays(blob), meta)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: no such file; {folder} holds no complete checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{manifest}: not a checkpoint ({type(error).__name__}: {error})") from None


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
    wanted = {name: (tuple(t.shape), str(t.numpy().dtype)) for name, t in model.state_dict().items()}
    given = {name: (a.shape, str(a.dtype)) for name, a in arrays.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise CheckpointError(f"checkpoint does not fit the model: {name}: the model has "
                                             f"{wanted.get(name)}, the checkpoint {given.get(name)}")
    model.set_state_dict({name: paddle.to_tensor(a) for name, a in arrays.items()})
