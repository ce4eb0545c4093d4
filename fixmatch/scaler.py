"""The loss scale of float16 training, where gradients below 6e-8 would else be rounded to 0.

Mirrors the dynamic scaler of NVIDIA's apex, with which kekmodel/FixMatch-pytorch, train.py, trains under --amp. All of
it stays on the device, since asking the host at each step would make the step wait. Paddle's own GradScaler does ask,
cannot be enabled on a CPU, and cannot read back a state that was saved as numbers.
"""

import paddle

INITIAL, LARGEST = 2.0**16, 2.0**24
GROWS_AFTER = 2000  # steps without an overflow


class LossScaler:
    """Multiplies the loss, divides the gradients, and adapts the scale to whether they overflowed.

    After an overflow the scale is halved; after GROWS_AFTER steps in a row without one it is doubled, up to LARGEST.
    Paddle's operator stops halving at 1, where apex does not stop.
    """

    def __init__(self):
        self._scale = paddle.full([1], INITIAL)
        self._good_steps = paddle.zeros([1], dtype="int32")  # since the last overflow or growth
        self._bad_steps = paddle.zeros([1], dtype="int32")  # always 0 after a step: the first overflow counts
        self._skipped = paddle.zeros([1], dtype="int32")  # steps that overflowed, of the whole run

    def scaled(self, loss):
        """The loss to call backward() on, [1]."""
        return loss * self._scale

    @paddle.no_grad()
    def unscale(self, parameters):
        """Divides the gradients of `parameters` in place, and adapts the scale for the next step.

        Returns:
            bool [1] on the device: whether one of the gradients overflowed. The step is then to be skipped.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        _, overflowed = paddle._C_ops.check_finite_and_unscale_(gradients, self._scale)
        paddle._C_ops.update_loss_scaling_(gradients, overflowed, self._scale, self._good_steps, self._bad_steps,
                                           GROWS_AFTER, 1, 2.0, 0.5, False)
        self._scale.clip_(max=LARGEST)
        self._skipped.add_(overflowed.astype("int32"))
        return overflowed

    def state(self) -> dict[str, float | int]:
        """All of it as plain numbers: {"scale", "good_steps", "skipped"}. Waits for the device."""
        return {"scale": self._scale.item(), "good_steps": self._good_steps.item(), "skipped": self._skipped.item()}

    def load_state(self, state: dict[str, float | int]) -> None:
        """Restores what `state` gave, exactly. Raises ValueError where it is not such a state."""
        tensors = {"scale": self._scale, "good_steps": self._good_steps, "skipped": self._skipped}
        if state.keys() != tensors.keys() or not all(type(value) in (int, float) for value in state.values()):
            raise ValueError(f"not the state of a loss scaler: {state!r:.80}")
        for name, tensor in tensors.items():
            tensor.fill_(state[name])
