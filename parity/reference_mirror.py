"""The mirror, driven as parity/reference_production.py drives production."""

import numpy as np
import torch

from fixmatch.data.loader import Batch
from parity.mirror import randaugment, schedule
from parity.mirror import step as algorithm
from parity.reference import precision as precision
from parity.reference_production import Production, initial


class Mirror(Production):
    """The Torch side, where it differs from the Paddle side in how it is watched."""

    prefix, algorithm, augment = "mirror/", algorithm, randaugment
    operations, precision = Production.operations, staticmethod(precision)

    def load(self, model, head: float) -> None:
        for name, tensor in model.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                tensor.copy_(torch.from_numpy(initial(name, tuple(tensor.shape), head)))

    def watch(self, state, outputs: list, gradients: dict) -> None:
        state.model.register_forward_hook(lambda module, given, output: outputs.append(output.detach()))
        state.optimizer.register_step_pre_hook(lambda *_: gradients.update(
            self.named((n, p.grad) for n, p in state.model.named_parameters() if p.grad is not None)))

    def named(self, items) -> dict[str, np.ndarray]:
        return {n: t.detach().numpy().copy() for n, t in items if not n.endswith("num_batches_tracked")}

    def momentum(self, state) -> dict[str, np.ndarray]:
        return self.named(state.optimizer.momentum_buffers().items())

    def learning_rate(self, state) -> float:
        return state.scheduler.get_last_lr()[0]

    def joint_logits(self, outputs: list, batch: Batch) -> np.ndarray:
        parts = 2 * (len(batch.u_w) // len(batch.x)) + 1
        return algorithm.de_interleave(torch.cat(outputs), parts).numpy()

    @torch.no_grad()
    def predict(self, state, model, images: np.ndarray) -> np.ndarray:
        model.eval()
        return model(state.normalize(images)).numpy()

    def factors(self, total: int, warmup: int, steps: np.ndarray) -> np.ndarray:
        return np.array([schedule.cosine_7_16(int(step), total, warmup) for step in steps])

    def tensor(self, array: np.ndarray):
        return torch.from_numpy(array)
