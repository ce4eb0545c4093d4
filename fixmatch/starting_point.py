"""The weights of another run as the starting point of a new one: model.init."""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle

from fixmatch import checkpoint
from fixmatch.checkpoint import CheckpointError, load_weights
from fixmatch.config import ModelConfig, from_dict
from fixmatch.distributed import digest
from fixmatch.ema import EMA

_SHAPE = ("arch", "depth", "width", "cardinality")  # the keys of section model that weights depend on


@dataclass(frozen=True)
class StartingPoint:
    """The averaged weights of a checkpoint."""

    arrays: dict[str, np.ndarray]
    classes: tuple[str, ...]
    facts: dict  # where they are from, for result.json and checkpoints

    def load(self, ema: EMA, classes: Sequence[str]) -> str:
        """Puts the weights into the live network and its average; returns what to say of it.

        The classifier stays a fresh one where the new run's `classes`, or their order, are not the checkpoint's.

        Raises:
            CheckpointError: the weights do not fit the network.
        """
        arrays, same = dict(self.arrays), tuple(classes) == self.classes
        if not same:
            fresh = ema.model.state_dict()
            for layer, _ in (found for found in ema.model.named_sublayers() if isinstance(found[1], paddle.nn.Linear)):
                arrays |= {name: fresh[name].numpy() for name in (f"{layer}.weight", f"{layer}.bias")}
        for network in (ema.model, ema.average):
            load_weights(network, arrays)
        kept = "classifier included" if same else "with a new classifier, since the classes are others"
        return (f"model.init: starting from the averaged weights of {self.facts['checkpoint']} (step "
                f"{self.facts['step']:,}, {self.facts['dataset']}), {kept}")


def read(model: ModelConfig) -> StartingPoint:
    """The weights that model.init names. Raises CheckpointError if there are none, or those of another network."""
    folder = checkpoint.find(pathlib.Path(model.init))
    saved = checkpoint.load(folder)
    manifest, arrays = saved.manifest, saved.part("ema")
    theirs = from_dict(manifest.config, f"{folder}/checkpoint.json").model
    for key in _SHAPE:
        if getattr(theirs, key) != getattr(model, key):
            needed = " ".join(f"model.{name}={getattr(theirs, name)}" for name in _SHAPE
                              if getattr(theirs, name) != getattr(model, name))
            raise CheckpointError(f"model.init: {folder}: has the weights of another network; use -o {needed}, or "
                                  "leave model.init out")
    return StartingPoint(arrays, tuple(manifest.classes), {
        "checkpoint": str(folder), "step": manifest.step, "dataset": manifest.dataset, "sha256": digest(arrays)})
