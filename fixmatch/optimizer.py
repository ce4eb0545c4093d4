"""SGD with Nesterov momentum, as two Paddle optimizers: one that decays weights and one that does not.

The reference's two parameter groups become two optimizers, the usual way in Paddle. Nesterov and L2 decay follow
Torch's SGD to rounding. Reference: kekmodel/FixMatch-pytorch, train.py, no_decay = ['bias', 'bn'].
"""

import paddle
from paddle.optimizer import Momentum

NO_DECAY = ("bias", "bn")


def decays(name: str) -> bool:
    """Whether the parameter of this *structured* name ("block1.layer.0.bn1.weight") is decayed.

    Paddle's own names ("batch_norm2d_0.w_0") do not tell a batch norm's scale apart, so they are never used here.
    """
    return not any(word in name for word in NO_DECAY)


class TwoGroupSGD:
    """The two optimizers as one: step(), clear_grad() and a state under structured parameter names.

    Args:
        model: its trainable parameters are split by `decays`.
        learning_rate: a float or a Paddle LR scheduler, shared by both.
        momentum: mu of v <- mu * v + (g + weight_decay * w).
        weight_decay: L2 coefficient of the decayed group.
        nesterov: w <- w - lr * (g + weight_decay * w + mu * v) instead of w - lr * v.
        clip_grad_norm: largest norm of each group's gradient; 0 is off.
    """

    def __init__(self, model, learning_rate, momentum: float = 0.9, weight_decay: float = 5e-4, nesterov: bool = True,
                 clip_grad_norm: float = 0.0):
        self.parameters = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
        self._loaded: dict[str, paddle.Tensor] = {}
        clip = paddle.nn.ClipGradByGlobalNorm(clip_grad_norm) if clip_grad_norm else None

        self.optimizers = []
        for decayed in (True, False):
            members = [p for name, p in self.parameters.items() if decays(name) == decayed]
            if members:
                self.optimizers.append(Momentum(
                    learning_rate, momentum, parameters=members, use_nesterov=nesterov,
                    weight_decay=weight_decay if decayed else None, grad_clip=clip))

    def step(self, skip: paddle.Tensor | None = None):
        """Updates both groups.

        Args:
            skip: bool [1] on the device; where it is true, all weights and momentum stay what they were. It is not
                read on the host, which would have to wait for it.
        """
        before = None if skip is None else self._copies()
        for optimizer in self.optimizers:
            optimizer.step()
        if self._loaded:  # Paddle has made its own copies, but for parameters without a gradient
            made = self._velocities()
            self._loaded = {name: t for name, t in self._loaded.items() if self.parameters[name].name not in made}
        if before is not None:
            self._take_back(skip, before)

    @paddle.no_grad()
    def _copies(self) -> list[dict[str, paddle.Tensor]]:
        return [{name: t.clone() for name, t in tensors.items()} for tensors in (self.parameters, self.state())]

    @paddle.no_grad()
    def _take_back(self, skip: paddle.Tensor, before: list[dict[str, paddle.Tensor]]) -> None:
        """Where `skip` is true, puts the copies back; momentum that this very step made was 0 before it."""
        for copies, tensors in zip(before, (self.parameters, self.state()), strict=True):
            for name, tensor in tensors.items():
                old = copies[name] if name in copies else paddle.zeros_like(tensor)
                tensor.copy_(paddle.where(skip, old, tensor), False)

    def clear_grad(self):
        """Drops the gradients: left as zeros, a parameter that got none would still be decayed, and Torch skips it."""
        for optimizer in self.optimizers:
            optimizer.clear_grad(set_to_zero=False)

    def state(self) -> dict[str, paddle.Tensor]:
        """The live momentum buffers by structured parameter name; a parameter that has had no gradient has none.

        Empty before the first step. Between `load_state` and the step after it, when Paddle makes its buffers, they are
        those that were loaded.
        """
        found = self._velocities()
        live = {name: found.get(p.name, self._loaded.get(name)) for name, p in self.parameters.items()}
        return {name: velocity for name, velocity in live.items() if velocity is not None}

    def load_state(self, state: dict[str, paddle.Tensor]):
        """Restores what `state` gave, whatever Paddle's own names of the parameters are now.

        What fits no parameter is ignored, so a checkpoint is compared first (Trainer.restore).
        """
        self._loaded = {name: state[name] for name in self.parameters if name in state}
        for optimizer in self.optimizers:
            members = {p.name for p in optimizer._parameter_list}
            optimizer.set_state_dict({f"{p.name}_velocity_0": state[name] for name, p in self.parameters.items()
                                      if p.name in members and name in state})

    def _velocities(self) -> dict[str, paddle.Tensor]:
        found = {}
        for optimizer in self.optimizers:
            found.update(optimizer._accumulators.get("velocity", {}))
        return found
