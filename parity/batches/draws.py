"""The joint distribution of what the Loader draws, by chi-square on every column and every pair of columns.

A column is one random number of a view: an operation, a magnitude, a sign, a crop's row. All are uniform over their
values, whatever the recipe, and all independent: within a view, between weak and strong, from image to image, step to
step, rank to rank and seed to seed, and of the image's class and its place in the batch.

Error rates: a draw that is right fails one row or more with a probability of FALSE_ALARM a run; each of R rows is held
to p >= FALSE_ALARM / R (Bonferroni), some 1e-9. With 10^5 draws that is 6 standard deviations of a share of one half:
a flip, sign or application with a probability outside 0.487..0.513 is caught with 99 %, and so is a dependence
between two of these that moves 1.3 % of the views from one diagonal of their table to the other. With fewer draws,
n, both are sqrt(10^5 / n) times as large. Dependence of three or more columns is tested between those of two values
alone, all together.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import paddle

from fixmatch.data.augment import ctaugment, randaugment, views
from parity.compare import Row

FALSE_ALARM = 1e-6  # of all rows of a run together
BINS = 8  # of a continuous column, and of a batch's places


class Column(NamedTuple):
    """One random number of every view."""

    codes: np.ndarray  # int64 [steps, views], 0..count-1
    count: int  # how many values it has, all equally likely


class Found(NamedTuple):
    """A chi-square test: the table that was counted, what was to be expected, and how unlikely that is by chance."""

    p: float
    effect: float  # Cramer's V, 0 (as expected) .. 1 (determined)
    observed: np.ndarray
    expected: np.ndarray


def uniform(column: Column) -> Found:
    """Whether the values are equally frequent; a value outside 0..count-1 makes p 0."""
    flat = column.codes.ravel()
    inside = flat[(flat >= 0) & (flat < column.count)]
    observed = np.bincount(inside, minlength=column.count)
    expected = np.full(column.count, flat.size / column.count)
    statistic = float(((observed - expected) ** 2 / expected).sum())
    p = _by_chance(statistic, column.count - 1) if inside.size == flat.size else 0.0
    effect = float(np.sqrt(statistic / flat.size / (column.count - 1)))
    return Found(p, min(1.0, effect), observed, expected)


def independent(one: Column, other: Column) -> Found:
    """Whether two columns of the same views are independent, whatever their own frequencies."""
    a, b = (np.clip(column.codes.ravel(), 0, column.count - 1) for column in (one, other))
    table = np.bincount(a * other.count + b, minlength=one.count * other.count).reshape(one.count, other.count)
    table = table[table.any(axis=1)][:, table.any(axis=0)]
    if min(table.shape) < 2:  # a column that never varies, which is for `uniform` to say
        return Found(1.0, 0.0, table, table.astype(float))
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    rows, columns = table.shape
    effect = np.sqrt(statistic / table.sum() / (min(rows, columns) - 1))
    return Found(_by_chance(statistic, (rows - 1) * (columns - 1)), float(effect), table, expected)


def _by_chance(statistic: float, freedom: int) -> float:
    """The probability that a chi-square of so many degrees of freedom is as large as this or larger.

    By Paddle, since importing scipy.special takes as long as a third of the stage; a test holds it to SciPy.
    """
    halves = (paddle.to_tensor(value / 2, dtype="float64", place="cpu") for value in (freedom, statistic))
    return float(paddle.gammaincc(*halves))


def together(columns: list[Column]) -> Column:
    """One column of all combinations of the values of some."""
    codes = functools.reduce(lambda so_far, column: so_far * column.count + column.codes, columns, 0)
    return Column(codes, int(np.prod([column.count for column in columns])))


def weak_columns(plans: list[views.WeakPlan], size: tuple, flip: bool, name: str) -> dict[str, Column]:
    """Flip, where views may be flipped, and crop of `plans`, one a step."""
    columns = {f"{name} flip": Column(np.stack([plan.flip for plan in plans]).astype(np.int64), 2)} if flip else {}
    offset = np.stack([plan.offset for plan in plans])
    for axis, what in enumerate(("row", "column")):
        columns[f"{name} crop {what}"] = Column(offset[..., axis], 2 * views.padding(size[axis]) + 1)
    return columns


def strong_columns(plans: list) -> dict[str, Column]:
    """The random numbers of strong plans, one a step, of whatever recipe."""
    fields = {name: np.stack([getattr(plan, name) for plan in plans]) for name in plans[0]._fields}
    operations, whole, fractions = len(randaugment.OPS), {}, {}
    if isinstance(plans[0], ctaugment.Plan):  # after the drawn operations comes the largest Cutout
        operations = len(ctaugment.OPS)
        fields = {name: field[:, :, :ctaugment.DEPTH] if name != "centre" else field for name, field in fields.items()}
        fractions = {"level": fields["level"][..., 0], "second level": fields["level"][..., 1]}
        fractions |= {f"centre {axis}": fields["centre"][..., i] for i, axis in enumerate("xy")}
    else:
        fractions = {"Cutout": fields["cutout"]}
    whole["operation"] = Column(fields["op"], operations)
    if "magnitude" in fields:
        whole["magnitude"] = Column(fields["magnitude"] - 1, randaugment.MAX_MAGNITUDE - 1)
        whole["applied"] = Column(fields["applied"].astype(np.int64), 2)
        whole["sign"] = Column(fields["negated"].astype(np.int64), 2)
    elif "side" in fields:
        fractions |= {"level": fields["level"], "Cutout side": 2 * fields["side"][..., None]}
    whole |= {name: Column(np.floor(values * BINS).astype(np.int64), BINS) for name, values in fractions.items()}
    return {_numbered(name, i, column.codes.shape[-1]): Column(column.codes[..., i], column.count)
            for name, column in whole.items() for i in range(column.codes.shape[-1])}


def _numbered(name: str, i: int, of: int) -> str:
    return f"{name} {'xy'[i]}" if name == "Cutout" else f"{name} {i + 1}" if of > 1 else name


def never_flipped(plans: list[views.WeakPlan], name: str) -> Row:
    """Where a mirrored image would be another thing, no view is mirrored."""
    flipped = sum(int(plan.flip.sum()) for plan in plans)
    why = "" if not flipped else f"{flipped} views are mirrored, which these images may not be"
    return Row(f"draws/{name} flip, not allowed", flipped, float(flipped > 0), not flipped, why)


Test = Callable[[], Found]


def of_one_view(columns: dict[str, Column], labels: np.ndarray, classes: int) -> dict[str, Test]:
    """Every column, every pair of them, each with class and place, and all that have two values together.

    Args:
        labels: int64 [steps, views], the class of each view's image; classes beyond BINS are taken in groups.
    """
    places = labels.shape[1]
    facts = {"class": Column(labels * min(BINS, classes) // classes, min(BINS, classes)),
             "place in the batch": Column(np.broadcast_to(np.arange(places) * BINS // places, labels.shape), BINS)}
    tests = {f"{name} uniform": functools.partial(uniform, column) for name, column in columns.items()}
    pairs = [*itertools.combinations(columns.items(), 2), *itertools.product(columns.items(), facts.items())]
    tests |= {f"{a} x {b} independent": functools.partial(independent, one, other) for (a, one), (b, other) in pairs}
    binary = [column for column in columns.values() if column.count == 2]
    if len(binary) > 2:
        tests["flips, applied and signs together"] = functools.partial(uniform, together(binary))
    return tests


def of_neighbours(columns: dict[str, Column]) -> dict[str, Test]:
    """Every column against itself in the next step and in the next image."""
    tests = {}
    for name, (codes, count) in columns.items():
        for what, one, other in (("step", codes[:-1], codes[1:]), ("image", codes[:, :-1], codes[:, 1:])):
            if one.size:
                tests[f"{name} of one {what} x the next independent"] = functools.partial(
                    independent, Column(one, count), Column(other, count))
    return tests


def between(what: str, columns: dict[str, Column], others: dict[str, Column]) -> dict[str, Test]:
    """Columns against columns, in the order of both, of views at the same places: as many as both sides have."""
    tests = {}
    for (a, one), (b, other) in zip(columns.items(), others.items(), strict=True):
        steps, places = np.minimum(one.codes.shape, other.codes.shape)
        pair = (Column(column.codes[:steps, :places], column.count) for column in (one, other))
        tests[f"{a} x {b if a != b else 'itself'} {what} independent"] = functools.partial(independent, *pair)
    return tests


def of_order(first: np.ndarray, second: np.ndarray, under_next_seed: np.ndarray) -> dict[str, Test]:
    """Where an image stands in a pass, against which it is, and against where it stands in two other passes.

    Args:
        first, second, under_next_seed: int64 [places], three passes that show no image twice.
    """
    def place(shown):
        found = np.full(1 + max(order.max() for order in (first, second, under_next_seed)), -1)
        found[shown] = np.arange(len(shown)) * BINS // len(shown)
        return found

    places = place(first)
    image = np.arange(len(places)) * BINS // len(places)
    tests = {}
    for name, other in (("which it is", image), ("in the next", place(second)),
                        ("under the next seed", place(under_next_seed))):
        both = (places >= 0) & (other >= 0)
        tests[f"an image's place in a pass x {name} independent"] = functools.partial(
            independent, Column(places[both], BINS), Column(other[both], BINS))
    return tests


def judged(tests: dict[str, Test]) -> Iterator[Row]:
    """A row a test: no difference where chance explains it, else `relative` is Cramer's V and `absolute` -log10 p.

    The largest V comes first, since a fault shows by its own name more clearly than by what follows from it; among
    equals the order is that of `tests`.
    """
    gate = FALSE_ALARM / len(tests)
    found = sorted(((name, test()) for name, test in tests.items()), key=lambda item: -round(item[1].effect, 6) * (
        item[1].p < gate))
    for name, (p, effect, observed, expected) in found:
        if p >= gate:
            yield Row(f"draws/{name}", 0.0, 0.0, True)
        else:
            yield Row(f"draws/{name}", float(-np.log10(max(p, 1e-300))), effect, False,
                      f"p = {p:.0e}, gate {gate:.0e}; {observed.sum():,} draws", observed, expected)
