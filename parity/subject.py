"""The Paddle side of every stage: the production code itself, watched, yielding a trace under Torch's names."""

import contextlib
from collections.abc import Iterator

import numpy as np
import paddle

from fixmatch import evaluate, losses, schedule
from fixmatch import step as algorithm
from fixmatch.checkpoint import load_weights
from fixmatch.data.dataset import Dataset
from fixmatch.models import layers
from fixmatch.normalize import Normalize
from parity.case import IDLE, Case, loss_probes
from parity.compare import Trace
from parity.weights import paddle_to_torch, torch_to_paddle


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Makes `dtype` the default for the length of a with block."""
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(before)


def _array(tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


def _named(items) -> dict[str, np.ndarray]:
    """Under Torch's names and shapes, without num_batches_tracked."""
    converted = paddle_to_torch({name: _array(t) for name, t in items})
    return {name: a for name, a in converted.items() if not name.endswith("num_batches_tracked")}


def _load(model, case: Case, scale: float = 1.0, salt: str = "") -> None:
    shapes = {n: a.shape for n, a in paddle_to_torch({n: t.numpy() for n, t in model.state_dict().items()}).items()}
    arrays = torch_to_paddle(case.weights(shapes, scale, salt))
    load_weights(model, {n: a.astype(paddle.get_default_dtype()) for n, a in arrays.items()})


def _build(case: Case) -> algorithm.TrainState:
    state = algorithm.build_state(case.short_config(), case.num_classes, case.mean, case.std)
    _load(state.model, case)
    _load(state.ema.average, case)
    state.model.train()
    return state


def _momentum(state: algorithm.TrainState, case: Case) -> dict[str, np.ndarray]:
    """The momentum buffers; without momentum Torch keeps none, and Paddle a copy of the gradients."""
    return _named(state.optimizer.state().items()) if case.config.optim.momentum > 0 else {}


@contextlib.contextmanager
def _activations(model) -> Iterator[dict[str, np.ndarray]]:
    """Outputs of all named layers in the order in which they finish, [N, C, H, W] whatever their layout in memory."""
    seen: dict[str, np.ndarray] = {}

    def note(name):
        def hook(layer, inputs, output):
            channels_last = output.ndim == 4 and layers.on_kernels(output)
            seen[name] = _array(output.transpose([0, 3, 1, 2]) if channels_last else output)
        return hook

    handles = [layer.register_forward_post_hook(note(n)) for n, layer in model.named_sublayers()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def forward(case: Case, dtype: str) -> Trace:
    """Fresh weights, then with the case's: the input, all activations in eval and in train mode, running statistics."""
    with precision(dtype):
        fresh = algorithm.build_state(case.short_config(), case.num_classes, case.mean, case.std).model
        yield "initial", _named(fresh.state_dict().items())
        state, batch = _build(case), case.batch(0)
        images = state.normalize(np.concatenate([batch.x, batch.u_w, batch.u_s]))
        yield "input", {"images": _array(images)}
        for mode in ("eval", "train"):
            (state.model.train if mode == "train" else state.model.eval)()
            with paddle.no_grad(), _activations(state.model) as seen:
                state.model(images)
            yield f"{mode} activations", seen
        yield "buffers", _named(state.model.named_buffers())


def layer_alone(case: Case, name: str, given: np.ndarray) -> np.ndarray:
    """The output of one production layer, in train mode, on a given input."""
    with precision("float64"), paddle.no_grad():
        layer = dict(_build(case).model.named_sublayers())[name]
        return _array(layer(paddle.to_tensor(given)))


def metric(case: Case, dtype: str, table: np.ndarray, labels: np.ndarray, images: np.ndarray, batch_size: int) -> Trace:
    """Accuracy and loss of a network that looks up image i's logits in row i of `table`."""
    class Lookup(paddle.nn.Layer):
        def forward(self, x):
            return paddle.gather(paddle.to_tensor(table), (x[:, 0, 0, 0] * 255).round().astype("int64"))

    with precision(dtype):
        found = evaluate.evaluate(Lookup(), Normalize((0, 0, 0), (1, 1, 1)), Dataset(images, labels), batch_size)
    yield "metric", {name: np.array(getattr(found, name)) for name in ("top1", "top5", "loss")}


def loss(case: Case, dtype: str) -> Trace:
    """The FixMatch loss on probes, the gradients of its logits, and whether pseudo-labels are detached."""
    ssl = case.config.ssl
    with precision(dtype):
        for probe, (x, targets, u_w, u_s) in loss_probes(case.num_classes, case.seed).items():
            logits = [paddle.to_tensor(a, stop_gradient=False) for a in (x, u_w, u_s)]
            threshold = 0.5 if probe == "tie" else ssl.threshold
            temperature = 1.0 if probe == "tie" else ssl.temperature
            found = losses.fixmatch_loss(logits[0], paddle.to_tensor(targets), logits[1], logits[2], threshold,
                                         temperature, ssl.lambda_u)
            detached = all(t.stop_gradient for t in (found.confidence, found.pseudo_labels, found.mask))
            found.loss.backward()
            yield f"loss {probe}", _losses(found)
            yield f"loss {probe} gradients", {
                name: _array(t.grad) if t.grad is not None else np.zeros(t.shape)
                for name, t in zip(("logits_x", "logits_u_w", "logits_u_s"), logits, strict=True)}
        yield "structure", {"pseudo-labels are detached": np.array(detached)}


def _losses(found) -> dict[str, np.ndarray]:
    return {name: _array(getattr(found, name))
            for name in ("confidence", "pseudo_labels", "mask", "loss_x", "loss_u", "loss")}


def train(case: Case, dtype: str, steps: int, sections: tuple[str, ...]) -> Trace:
    """These sections of each of so many free-running FixMatch steps."""
    with precision(dtype):
        state = _build(case)
        gradients: dict[str, np.ndarray] = {}
        step_of_optimizer = state.optimizer.step

        def step_and_note(*args):
            gradients.clear()
            gradients.update(_named((n, p.grad) for n, p in reversed(list(state.model.named_parameters()))
                                    if p.grad is not None))
            step_of_optimizer(*args)

        state.optimizer.step = step_and_note
        for step in range(steps):
            batch, lr = case.batch(step), state.scheduler.get_lr()
            with _activations(state.model) as seen:
                found = algorithm.train_step(state, batch, case.config.ssl)
            yield from _select(step, sections, {
                "lr": {"lr": np.array(lr)},
                "activations": seen,
                "losses": _losses(found),
                "gradients": dict(gradients),
                "momentum": _momentum(state, case),
                "weights": _named(state.model.named_parameters()),
                "buffers": _named(state.model.named_buffers()),
                "ema": _named(state.ema.average.state_dict().items()),
            })


def _select(step: int, sections: tuple[str, ...], found: dict) -> Trace:
    yield from ((f"step {step} {name}", found[name]) for name in sections)


def optimizer_alone(case: Case, dtype: str, rounds: int) -> Trace:
    """The production update on given gradients: those of the sum of products with them."""
    with precision(dtype):
        state = _build(case)
        parameters = dict(state.model.named_parameters())
        shapes = {n: a.shape for n, a in _named(parameters.items()).items()}
        for i in range(rounds):
            gradients = torch_to_paddle(case.weights(shapes, 0.1, salt=f"gradient {i}"))
            surrogate = sum((p * paddle.to_tensor(gradients[n], dtype=p.dtype)).sum() for n, p in parameters.items()
                            if n not in IDLE)
            algorithm.update(state, surrogate)
            yield f"round {i} momentum", _momentum(state, case)
            yield f"round {i} weights", _named(parameters.items())


def learning_rate(case: Case, dtype: str, settings: list[tuple[int, int]], points: list[int]) -> Trace:
    """For each (total steps, warm-up steps): the first 30 learning rates, and those at so many percent of the run."""
    for total, warmup in settings:
        scheduler = schedule.build_scheduler(case.config.optim.lr, total, warmup)
        first = []
        for _ in range(min(total, 30)):
            first.append(scheduler.get_lr())
            scheduler.step()
        at = []
        for point in points:
            scheduler.step(total * point // 100)
            at.append(scheduler.get_lr())
        yield f"schedule of {total} steps, {warmup} of warm-up", {"first steps": np.array(first), "later": np.array(at)}


def average(case: Case, dtype: str, rounds: int) -> Trace:
    """The average after each round of new weights."""
    with precision(dtype):
        state = _build(case)
        for i in range(rounds):
            _load(state.model, case, salt=f"round {i}")
            state.ema.update()
            yield f"round {i} ema", _named(state.ema.average.state_dict().items())
