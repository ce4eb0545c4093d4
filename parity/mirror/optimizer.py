"""SGD with Nesterov momentum and two parameter groups. Mirrors fixmatch/optimizer.py.

Reference: kekmodel/FixMatch-pytorch, train.py, no_decay = ['bias', 'bn'].
"""

import torch

from parity.mirror.precision import as_stored

NO_DECAY = ("bias", "bn")


def decays(name: str) -> bool:
    """Whether the parameter of this name is decayed."""
    return not any(word in name for word in NO_DECAY)


class TwoGroupSGD(torch.optim.SGD):
    """One Torch SGD with a decayed and an undecayed group, its hyper-parameters as Paddle stores them."""

    def __init__(self, model, learning_rate: float, momentum: float = 0.9, weight_decay: float = 5e-4,
                 nesterov: bool = True):
        groups = [
            {"params": [p for n, p in model.named_parameters() if decays(n)], "weight_decay": as_stored(weight_decay)},
            {"params": [p for n, p in model.named_parameters() if not decays(n)], "weight_decay": 0.0},
        ]
        super().__init__(groups, lr=learning_rate, momentum=as_stored(momentum), nesterov=nesterov)
        self.names = {p: n for n, p in model.named_parameters()}

    def momentum_buffers(self) -> dict[str, torch.Tensor]:
        """By parameter name; a parameter that has had no gradient has none."""
        return {self.names[p]: s["momentum_buffer"] for p, s in self.state.items()
                if s.get("momentum_buffer") is not None}
