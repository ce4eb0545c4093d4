"""The learning-rate schedule (arXiv 2001.07685, section 2.3): 7/16 of a cosine, after an optional linear warm-up.

Reference: kekmodel/FixMatch-pytorch, train.py, get_cosine_schedule_with_warmup.
"""

import math

from paddle.optimizer.lr import LambdaDecay


def cosine_7_16(step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """The factor on the base learning rate at `step` (0-based, counted in optimizer steps).

    Rises linearly from 0 over `warmup_steps`, then falls as cos(7 pi t / 16) from 1 to 0.195 at t = 1.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, math.cos(math.pi * 7 / 16 * progress))


def build_scheduler(lr: float, total_steps: int, warmup_steps: int = 0) -> LambdaDecay:
    """A scheduler at step 0; call its step() once after each optimizer step."""
    return LambdaDecay(lr, lambda step: cosine_7_16(step, total_steps, warmup_steps))
