"""Exponential moving average of a model's weights. Mirrors fixmatch/ema.py.

Reference: kekmodel/FixMatch-pytorch, models/ema.py.
"""

import copy

import torch


class EMA:
    """Averages parameters and copies buffers."""

    def __init__(self, model, decay: float):
        self.model, self.decay = model, decay
        self.average = copy.deepcopy(model)
        self.average.eval()
        for parameter in self.average.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def update(self):
        """average <- decay * average + (1 - decay) * live, once after each optimizer step."""
        live, average = self.model.state_dict(), self.average.state_dict()
        for name, _ in self.model.named_parameters():
            average[name].mul_(self.decay).add_((1.0 - self.decay) * live[name])
        for name, _ in self.model.named_buffers():
            average[name].copy_(live[name])
