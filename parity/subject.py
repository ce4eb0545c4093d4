"""The Paddle side of every stage: the production code itself, watched, yielding a trace under Torch's names."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import numpy as np
import paddle

from fixmatch import evaluation, kernels, losses, scaler, schedule, thresholds
from fixmatch import step as algorithm
from fixmatch.data.dataset import Dataset
from fixmatch.kernels import openmp
from fixmatch.models import layers
from fixmatch.normalize import Normalize
from parity.case import IDLE, Case, loss_probes, policy_probe, scaled_updates
from parity.compare import FRESH_WEIGHTS, Reading, Trace
from parity.weights import named_as_torch, paddle_to_torch, shared, torch_to_paddle


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Default dtype, and in float64, in which nobody trains, one thread, as the Torch side has."""
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        with threads(1) if dtype == "float64" else contextlib.nullcontext():
            yield
    finally:
        paddle.set_default_dtype(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """The kernels and Paddle's own operators take so many threads on a CPU, for a while."""
    obeys = paddle.device.get_device() == "cpu" and kernels.status()[0]
    before = openmp.num_threads() if obeys else None
    if obeys:
        kernels.set_num_threads(count)
    try:
        yield
    finally:
        if obeys:
            kernels.set_num_threads(before)


def _array(tensor) -> np.ndarray:
    return tensor.detach().numpy()  # a copy


def _named(items, read: Callable = _array) -> Reading:
    """Under Torch's names and shapes, without num_batches_tracked."""
    tensors = dict(items)
    ours = named_as_torch(tensors)
    return Reading(ours, lambda name: paddle_to_torch({ours[name]: read(tensors[ours[name]])})[name])


def _load(model, case: Case, scale: float = 1.0, salt: str = "") -> None:
    """Gives a network the case's weights, one tensor after the other."""
    for name, tensor in model.state_dict().items():
        values = shared(tensor)
        (theirs, shape), *_ = ((n, a.shape) for n, a in paddle_to_torch({name: values}).items())
        array, = torch_to_paddle(case.weights({theirs: shape}, scale, salt)).values()
        tensor.set_value(array.astype(values.dtype, copy=False))


def _build(case: Case) -> algorithm.TrainState:
    """The production state, as it is built and left by production, of a network that starts with the case's weights."""
    def build_model(**shape):
        with without_initial_values():
            model = right(**shape)
        _load(model, case)
        return model

    right = algorithm.build_model
    with mock.patch.object(algorithm, "build_model", build_model):
        return algorithm.build_state(case.short_config(), case.num_classes, case.mean, case.std,
                                     *case.label_facts())


@contextlib.contextmanager
def without_initial_values() -> Iterator[None]:
    """Networks are built with zeros, which takes less time than random numbers that are overwritten."""
    zeros = paddle.nn.initializer.Constant(0.0)
    paddle.nn.initializer.set_global_initializer(zeros, zeros)
    try:
        with contextlib.ExitStack() as stack:
            for name in ("kaiming_normal_", "xavier_normal_"):
                stack.enter_context(mock.patch.object(paddle.nn.init, name))
            yield
    finally:
        paddle.nn.initializer.set_global_initializer(None)


def _momentum(state: algorithm.TrainState, case: Case, read: Callable = _array) -> Mapping[str, np.ndarray]:
    """The momentum buffers; without momentum Torch keeps none, and Paddle a copy of the gradients."""
    return _named(state.optimizer.state().items(), read) if case.config.optim.momentum > 0 else {}


@contextlib.contextmanager
def _activations(model, seen: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Into `seen`: outputs of all named layers in the order in which they finish, [N, C, H, W] whatever their layout in
    memory."""
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
    yield from fresh(case, dtype)
    with precision(dtype):
        state = _build(case)
        yield from _shown(state, case, "eval", "train")
        yield "buffers", _named(state.model.named_buffers())


def _shown(state: algorithm.TrainState, case: Case, *modes: str, collect: type = dict) -> Trace:
    """The case's images, and all activations on them in each mode, "eval" or "train"."""
    batch = case.batch(0)
    images = state.normalize(np.concatenate([batch.x, batch.u_w, batch.u_s]))
    yield "input", {"images": _array(images)}
    for mode in modes:
        (state.model.train if mode == "train" else state.model.eval)()
        with paddle.no_grad(), _activations(state.model, collect()) as seen:
            seen["logits"] = _array(state.model(images))
        yield f"{mode} activations", seen


def fresh(case: Case, dtype: str) -> Trace:
    """The weights with which production begins."""
    with precision(dtype):
        paddle.seed(case.seed)
        model = algorithm.build_model(num_classes=case.num_classes, **case.config.model.network())
        yield FRESH_WEIGHTS, _named(model.state_dict().items())


def whole(case: Case, dtype: str, sections: dict[int, tuple[str, ...]], collect: type = dict) -> Trace:
    """Fresh weights, but not of a large network, an evaluation and some training steps of one network; `sections` as in
    `train`, activations and gradients in dicts of the type `collect`.
    """
    if not case.large:
        yield from fresh(case, dtype)
    with precision(dtype):
        state = _build(case)
        yield from _shown(state, case, "eval", collect=collect)
        state.model.train()
        yield from _steps(state, case, sections, collect)


def layer_alone(case: Case, name: str, given: np.ndarray) -> np.ndarray:
    """The output of one production layer, in train mode, on a given input."""
    with precision("float64"), paddle.no_grad():
        layer = dict(_build(case).model.named_sublayers())[name]
        return _array(layer(paddle.to_tensor(given)))


def metric(case: Case, dtype: str, table: np.ndarray, labels: np.ndarray, images: np.ndarray, batch_size: int,
           history: list[float]) -> Trace:
    class Lookup(paddle.nn.Layer):
        def forward(self, x):
            return paddle.gather(paddle.to_tensor(table), (x[:, 0, 0, 0] * 255).round().astype("int64"))

    with precision(dtype):
        found = evaluation.evaluate(Lookup(), Normalize((0, 0, 0), (1, 1, 1)), Dataset(images, labels), batch_size)
    per_class = np.array([-1.0 if percent is None else percent for percent in found.per_class])
    yield "metric", {**{name: np.array(getattr(found, name)) for name in ("top1", "top5", "loss")},
                     "per_class": per_class, "confusion": np.array(found.confusion)}
    yield "summary", {name: np.array(value) for name, value in evaluation.summarize(history).items()}


def loss(case: Case, dtype: str) -> Trace:
    ssl, train = case.config.ssl, case.config.train
    probes = loss_probes(case.num_classes, case.seed, train.batch_size, train.mu)
    with precision(dtype):
        for probe, (x, targets, u_w, u_s) in probes.items():
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
        if ssl.policy != "fixed" or ssl.align != "none":
            yield from _policy(case)


def _policy(case: Case) -> Trace:
    """The run's own policy on its own, from its first state through a few steps."""
    ssl, facts, steps = policy_probe(case)
    state = thresholds.initial_state(ssl, case.num_classes, *facts)
    for step, (x, weak, strong, index) in enumerate(steps):
        found, state = thresholds.pseudo_labels(paddle.to_tensor(x), paddle.to_tensor(weak), index, state, ssl)
        yield f"policy {step}", {**_named_arrays(found._asdict()), **_named_arrays(state)}
        if ssl.policy == "freematch":
            logits = paddle.to_tensor(strong, stop_gradient=False)
            term = thresholds.fairness(logits, found.weight, state)
            term.backward()
            yield f"policy {step} fairness", {"term": _array(term), "gradient": _array(logits.grad)}


def _named_arrays(tensors: dict) -> dict[str, np.ndarray]:
    return {name: _array(tensor) for name, tensor in tensors.items()}


def _losses(found) -> dict[str, np.ndarray]:
    return {name: _array(getattr(found, name))
            for name in ("confidence", "pseudo_labels", "mask", "loss_x", "loss_u", "loss")}


def train(case: Case, dtype: str, sections: dict[int, tuple[str, ...]]) -> Trace:
    """Free-running steps 0, 1, ...; `sections` says for each what of it is wanted."""
    with precision(dtype):
        yield from _steps(_build(case), case, sections)


def _steps(state: algorithm.TrainState, case: Case, sections: dict[int, tuple[str, ...]],
           collect: type = dict) -> Trace:
    step_of_optimizer, read = state.optimizer.step, _array if collect is dict else shared  # a digest is made at once

    def step_and_note(*args):
        if "gradients" in wanted:  # as the optimizer is given them
            tensors = ((n, p.grad) for n, p in reversed(list(state.model.named_parameters())) if p.grad is not None)
            gradients.update(_named(tensors, read))
        step_of_optimizer(*args)

    state.optimizer.step = step_and_note
    for step, wanted in sections.items():
        batch, lr, gradients = case.batch(step), state.scheduler.get_lr(), collect()
        with _activations(state.model, collect()) as seen:
            found = algorithm.train_step(state, batch, case.config.ssl)
        take = {"lr": lambda lr=lr: {"lr": np.array(lr)}, "activations": lambda seen=seen: seen,
                "losses": lambda found=found: {**_losses(found), **_named_arrays(state.thresholds)},
                "gradients": lambda gradients=gradients: gradients,
                "momentum": lambda: _momentum(state, case, read),
                "weights": lambda: _named(state.model.named_parameters(), read),
                "buffers": lambda: _named(state.model.named_buffers(), read),
                "ema": lambda: _named(state.ema.average.state_dict().items(), read)}
        for name in wanted:
            yield f"step {step} {name}", take[name]()


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


def scaler_alone(case: Case, dtype: str) -> Trace:
    """The production update under the loss scaler of float16, on given gradients of which some are infinite."""
    with precision(dtype):
        state = _build(case)
        state.scaler = scaler.LossScaler()
        parameters = {n: p for n, p in state.model.named_parameters() if n not in IDLE}
        shapes = {n: a.shape for n, a in _named(parameters.items()).items()}
        for i, wanted in enumerate(scaled_updates(list(parameters))):
            if wanted["again"]:
                saved, state.scaler = json.dumps(state.scaler.state()), scaler.LossScaler()
                state.scaler.load_state(json.loads(saved))
            if wanted["load"]:
                state.scaler.load_state(wanted["load"])
            gradients = torch_to_paddle(case.weights(shapes, 0.1, salt=f"scaled gradient {i}"))
            if wanted["spoiled"]:
                gradients[wanted["spoiled"]].flat[0] = np.inf
            algorithm.update(state, sum((p * paddle.to_tensor(gradients[n], dtype=p.dtype)).sum()
                                        for n, p in parameters.items()))
            yield f"update {i} scaler", {n: np.array(value) for n, value in state.scaler.state().items()}
            yield f"update {i} schedule", {"lr": np.array(state.scheduler.get_lr())}
            yield f"update {i} momentum", _momentum(state, case)
            yield f"update {i} weights", _named(parameters.items())
            yield f"update {i} ema", _named(dict(state.ema.average.named_parameters()).items())


def learning_rate(case: Case, dtype: str, settings: list[tuple[int, int]], points: list[int]) -> Trace:
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
    with precision(dtype):
        state = _build(case)
        for i in range(rounds):
            _load(state.model, case, salt=f"round {i}")
            state.ema.update()
            yield f"round {i} ema", _named(state.ema.average.state_dict().items())
