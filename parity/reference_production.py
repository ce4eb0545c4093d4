"""Production, as parity/reference_figures.py drives and watches it; parity/reference_mirror.py is the other side."""

import zlib

import numpy as np

from fixmatch import evaluation, schedule
from fixmatch import step as algorithm
from fixmatch.checkpoint import load_weights
from fixmatch.data.augment import randaugment
from fixmatch.data.dataset import Dataset
from fixmatch.data.loader import Batch
from fixmatch.normalize import to_device
from parity.subject import precision
from parity.weights import paddle_to_torch, torch_to_paddle


def initial(name: str, shape: tuple, head: float) -> np.ndarray:
    """What the reference was given to start with, by Torch's name of the parameter or buffer."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 4:
        return normal * np.sqrt(2.0 / (shape[0] * shape[2] * shape[3]))
    if len(shape) == 2:
        return normal * head / np.sqrt(shape[1])
    if name.endswith("running_var"):
        return 1.0 + 0.2 * np.abs(normal)
    return 0.1 * normal + (1.0 if name.endswith("weight") else 0.0)


class Production:
    """What is trained with. The stage watches it and calls nothing that a run would not."""

    prefix, algorithm, augment = "", algorithm, randaugment
    operations, precision = randaugment.OPS, staticmethod(precision)

    def load(self, model, head: float) -> None:
        shapes = {name: a.shape for name, a in self.state(model).items()}
        load_weights(model, torch_to_paddle({name: initial(name, shape, head) for name, shape in shapes.items()}))

    def watch(self, state, outputs: list, gradients: dict) -> None:
        """Notes the network's outputs, and the gradients that the optimizer is given."""
        state.model.register_forward_post_hook(lambda layer, given, output: outputs.append(output.numpy()))
        step = state.optimizer.step

        def noting(*args):
            gradients.update(self.named((n, p.grad) for n, p in state.model.named_parameters() if p.grad is not None))
            step(*args)

        state.optimizer.step = noting

    def named(self, items) -> dict[str, np.ndarray]:
        """Under Torch's names and shapes, without num_batches_tracked."""
        arrays = paddle_to_torch({name: tensor.numpy().copy() for name, tensor in items})
        return {name: a for name, a in arrays.items() if not name.endswith("num_batches_tracked")}

    def state(self, model) -> dict[str, np.ndarray]:
        return self.named(model.state_dict().items())

    def momentum(self, state) -> dict[str, np.ndarray]:
        return self.named(state.optimizer.state().items())

    def learning_rate(self, state) -> float:
        return state.scheduler.get_lr()

    def joint_logits(self, outputs: list, batch: Batch) -> np.ndarray:
        return np.concatenate(outputs)

    def predict(self, state, model, images: np.ndarray) -> np.ndarray:
        """Logits in eval mode, in batches of which the last is partial."""
        return evaluation.predict(model, state.normalize, Dataset(images, np.zeros(len(images), np.int64)), 7)[0]

    def factors(self, total: int, warmup: int, steps: np.ndarray) -> np.ndarray:
        scheduler, found = schedule.build_scheduler(1.0, total, warmup), []
        for step in steps:
            scheduler.step(int(step))
            found.append(scheduler.get_lr())
        return np.array(found)

    def tensor(self, array: np.ndarray):
        return to_device(array)
