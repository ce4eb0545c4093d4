"""What the Loader draws for a batch, written down while it makes that batch.

The functions that draw are replaced by ones that call them and keep a copy of the result, for the calling thread alone:
a training that runs beside the proof draws and renders as ever. What was drawn is recorded where it is drawn, so a plan
that is changed afterwards no longer fits the pixels of the batch.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np

from fixmatch.data.augment import randaugment, views
from fixmatch.data.loader import Batch, Loader


class Drawn(NamedTuple):
    """The plans of one batch in the order of drawing; one of each, if the Loader does what it should."""

    labeled: list[views.WeakPlan]
    unlabeled: list[views.ViewPlan]


def watched(loader: Loader, step: int) -> tuple[Batch, Drawn]:
    """The batch of `step`, and what was drawn for it."""
    with _recording() as drawn:
        return loader.batch(step), drawn


def drawn_only(loader: Loader, steps: Iterable[int]) -> tuple[list[Batch], list[Drawn]]:
    """Batches of some steps without pixels, and what was drawn for them: a tenth of the time."""
    empty = np.empty((0, 1, 1, 3), np.uint8)
    batches, plans = [], []
    with contextlib.ExitStack() as stack:
        for owner, name, result in ((views, "weak", empty), (views, "weak_and_strong", (empty, empty)),
                                    (randaugment, "apply", empty)):
            stack.enter_context(_replaced(owner, name, lambda *args, result=result, **kwargs: result))
        for step in steps:
            batch, drawn = watched(loader, step)
            batches.append(batch)
            plans.append(drawn)
    return batches, plans


@contextlib.contextmanager
def _recording() -> Iterator[Drawn]:
    drawn, draw, draw_weak = Drawn([], []), views.draw, views.draw_weak
    inside = []  # views.draw, which itself calls views.draw_weak

    def recorded_draw(*args, **kwargs):
        inside.append(True)
        try:
            plan = draw(*args, **kwargs)
        finally:
            inside.pop()
        drawn.unlabeled.append(views.ViewPlan(*(_copied(part) for part in plan)))
        return plan

    def recorded_draw_weak(*args, **kwargs):
        plan = draw_weak(*args, **kwargs)
        if not inside:
            drawn.labeled.append(_copied(plan))
        return plan

    with _replaced(views, "draw", recorded_draw), _replaced(views, "draw_weak", recorded_draw_weak):
        yield drawn


def _copied(plan):
    return type(plan)(*(field.copy() for field in plan))


def _replaced(owner, name: str, function: Callable):
    """`function` in the place of owner.name for calls from this thread."""
    right, caller = getattr(owner, name), threading.get_ident()
    return mock.patch.object(owner, name, lambda *args, **kwargs: (
        function if threading.get_ident() == caller else right)(*args, **kwargs))
