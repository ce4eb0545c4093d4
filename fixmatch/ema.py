"""Exponential moving average of a model's weights (arXiv 2001.07685, section 2.3).

Reference: kekmodel/FixMatch-pytorch, models/ema.py: no warm-up, buffers copied.
"""

import copy

import paddle


class EMA:
    """Averages parameters and copies buffers, so that evaluation of the average uses the live running statistics.

    Args:
        model: the live network. `average` starts as a copy of it, and is in eval mode.
        decay: the share of the old average, 0..1.
    """

    def __init__(self, model, decay: float):
        self.model, self.decay = model, decay
        self.average = copy.deepcopy(model)
        self.average.eval()
        for parameter in self.average.parameters():
            parameter.stop_gradient = True
        self.parameters = list(zip(self.average.parameters(), model.parameters(), strict=True))
        self.buffers = list(zip(self.average.buffers(), model.buffers(), strict=True))

    @paddle.no_grad()
    def update(self):
        """average <- decay * average + (1 - decay) * live, once after each optimizer step."""
        for average, live in self.parameters:
            average.scale_(self.decay).add_(live * (1.0 - self.decay))
        for average, live in self.buffers:
            average.copy_(live, False)
