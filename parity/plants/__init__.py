"""Known bugs of FixMatch ports, each as a change to the production code, to see whether the proof catches it.

Every file but plant.py and score.py holds the bugs of one part of the trainer in its table PLANTS. A plant names the
stage that has to catch it. `planted` puts one in for the length of a with block.
"""

import contextlib
from collections.abc import Iterator

from fixmatch.data.augment import randaugment
from parity.plants import (
    batch,
    batches,
    convert,
    data,
    ema,
    evaluation,
    kernels,
    loop,
    loss,
    model,
    optimizer,
    ranks,
    recipes,
    reference,
    resume,
    scaler,
    thresholds,
)
from parity.plants.plant import Plant

_KINDS = {"model": model, "optimizer": optimizer, "loss": loss, "batch": batch, "ema": ema, "evaluation": evaluation,
          "data": data, "batches": batches, "kernels": kernels, "loop": loop, "resume": resume, "convert": convert,
          "ranks": ranks, "recipes": recipes, "reference": reference, "scaler": scaler,
          "thresholds": thresholds}

PLANTS: dict[str, Plant] = {plant.name: plant._replace(kind=kind)
                            for kind, module in _KINDS.items() for plant in module.PLANTS}

current: str | None = None  # the name of the plant that is in: stage ranks puts it into the processes it starts, too


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Puts the bug of this name into the production code; None puts in nothing."""
    global current
    undo: list[tuple[object, str, object]] = []

    def patch(owner, attribute, value):
        undo.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    try:
        current = name
        if name is not None:
            PLANTS[name].put_in(patch)
        randaugment.table.cache_clear()
        yield
    finally:
        current = None
        for owner, attribute, value in reversed(undo):
            setattr(owner, attribute, value)
        randaugment.table.cache_clear()
