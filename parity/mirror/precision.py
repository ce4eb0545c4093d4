"""Hyper-parameters as Paddle stores them, so that a float64 comparison can be exact."""

import numpy as np


def as_stored(value: float) -> float:
    """`value` rounded to float32: Paddle keeps the batch-norm epsilon, the optimizer's momentum and weight decay so."""
    return float(np.float32(value))
