"""The learning-rate schedule. Mirrors fixmatch/schedule.py.

Reference: kekmodel/FixMatch-pytorch, train.py, get_cosine_schedule_with_warmup.
"""

import math

from torch.optim.lr_scheduler import LambdaLR


def cosine_7_16(step: int, total_steps: int, warmup_steps: int = 0, num_cycles: float = 7.0 / 16.0) -> float:
    """The factor on the base learning rate at `step`."""
    if step < warmup_steps:
        return float(step) / float(max(1, warmup_steps))
    no_progress = float(step - warmup_steps) / float(max(1, total_steps - warmup_steps))
    return max(0.0, math.cos(math.pi * num_cycles * no_progress))


def build_scheduler(optimizer, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """A scheduler at step 0; call its step() once after each optimizer step."""
    return LambdaLR(optimizer, lambda step: cosine_7_16(step, total_steps, warmup_steps))
