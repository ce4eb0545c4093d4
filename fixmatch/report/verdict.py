"""A run in sentences: did it learn, are the pseudo-labels right, was the data fast enough, which number to quote."""

import numpy as np

from fixmatch.report.compare import Baseline
from fixmatch.report.figures import interval
from fixmatch.report.record import Record


def verdict(run: Record, baseline: Baseline | None = None) -> list[str]:
    """Sentences on one run, the answer to each question in its own.

    Args:
        baseline: of supervised runs on the same labels.
    """
    answers = _proof(run) + ([] if run.result else [_progress(run)])
    if run.final() is None:
        return [*answers, "There were no test images, so no accuracy was measured." if run.result else
                "Nothing was evaluated yet."]
    answers.append(_learned(run))
    if baseline:
        answers.append(baseline.gain(run))
    return answers + [*filter(None, (_pseudo_labels(run), _data(run), _quote(run)))]


def _proof(run: Record) -> list[str]:
    """What a reader has to know before any number: which check failed, and what that means; nothing where none did."""
    said = [f"The {what if what == 'self-check' else f'check of the {what}'} failed: "
            f"{found.removeprefix('PARITY FAIL ')}." for what, found in run.failed.items()]
    return said and [*said, "So this training is not proven to be what the reference computes: quote none of its "
                            "numbers."]


def _progress(run: Record) -> str:
    """Of a run without a result."""
    where = f"step {run.step:,} of {run.config.train.total_steps:,}"
    if run.failed and run.config.parity.on_failure == "abort":
        return f"The failed check stopped the run: the last on record is {where}."
    return f"The run has not ended: {where}."


def _learned(run: Record) -> str:
    top1, found = run.final(), run.predictions
    if found is None:
        return f"EMA top-1 on the test images is {top1:.2f} %{_so_far(run)}."
    counts, n = np.bincount(found.test.label, minlength=len(found.classes)), len(found.test.label)
    low, high = interval(top1, n)
    guess = 100 * counts.max() / n
    reach = f"EMA top-1 is {top1:.2f} % on {n:,} test images (95 % interval {low:.1f} to {high:.1f})"
    blind = f"always naming {found.classes[int(counts.argmax())]!r} would score {guess:.1f} %"
    return f"It learned: {reach}; {blind}." if low > guess else f"It did not learn: {reach}, and {blind}."


def _pseudo_labels(run: Record) -> str | None:
    mask, impurity = run.recent("mask"), run.recent("impurity")
    if run.supervised or mask is None:
        return None
    if run.config.ssl.supervised_at(run.train[-1]["step"] - 1):
        return f"It trained on the labels alone{_so_far(run)}, as ssl.supervised_steps says."
    used = f"{100 * mask:.0f} % of the unlabeled images had a confident pseudo-label{_so_far(run) or ' at the end'}"
    if impurity is None:
        return f"{used}; how many are right is not known, because the classes of unlabeled images are not."
    return f"{used}, and {100 - impurity:.1f} % of these were right."


def _data(run: Record) -> str | None:
    wait = run.recent("data_wait")
    if wait is None:
        return None
    return (f"The data was fast enough{_so_far(run)}: {100 * wait:.1f} % of the time went by waiting for it."
            if wait <= 0.1 else
            f"The data was too slow{_so_far(run)}: {100 * wait:.0f} % of the time went by waiting for it.")


def _quote(run: Record) -> str | None:
    if not run.result or run.failed:
        return None
    ema = run.result["top1"]["ema"]
    median = (f", or as some papers do the median of the last 20 evaluations, {ema['median_last_20']:.2f} %"
              if len(run.evaluations) >= 20 else "")
    best = ("" if ema["best"] <= ema["last"] else
            f"; the best, {ema['best']:.2f} %, was chosen on the test images and is too high")
    return f"Quote the averaged weights at the last step, {ema['last']:.2f} %{median}{best}."


def _so_far(run: Record) -> str:
    return "" if run.result else " so far"
