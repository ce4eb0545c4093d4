"""The loss scale of float16 training, as the reference has it from NVIDIA's apex. Mirrors fixmatch/scaler.py.

Reference: kekmodel/FixMatch-pytorch, train.py, amp.scale_loss; apex, amp/scaler.py.
"""

import torch

INITIAL, LARGEST = 2.0**16, 2.0**24
GROWS_AFTER = 2000


class LossScaler:
    """Multiplies the loss, divides the gradients, and adapts the scale to whether they overflowed."""

    def __init__(self):
        self.scale, self.good_steps, self.skipped = INITIAL, 0, 0

    def scaled(self, loss):
        return loss * self.scale

    def unscale(self, parameters) -> bool:
        """Divides the gradients in place and adapts the scale. Returns whether one of them overflowed."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        overflowed = not all(torch.isfinite(gradient).all() for gradient in gradients)
        for gradient in gradients:
            gradient.div_(self.scale)
        if overflowed:
            self.scale, self.good_steps, self.skipped = self.scale / 2, 0, self.skipped + 1
        else:
            self.good_steps += 1
        if self.good_steps == GROWS_AFTER:
            self.scale, self.good_steps = min(LARGEST, self.scale * 2), 0
        return overflowed

    def state(self) -> dict[str, float | int]:
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}

    def load_state(self, state: dict[str, float | int]) -> None:
        self.scale, self.good_steps, self.skipped = state["scale"], state["good_steps"], state["skipped"]
