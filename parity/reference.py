"""The Torch side of every stage: the mirror, driven as parity/subject.py drives the trainer, with the same trace."""

import contextlib
import json
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch

from parity.case import IDLE, Case, loss_probes, policy_probe, scaled_updates
from parity.compare import FRESH_WEIGHTS, Reading, Trace
from parity.mirror import evaluation, losses, scaler, schedule, thresholds
from parity.mirror import step as algorithm
from parity.mirror.normalize import Normalize


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Default dtype, and one thread, so that sums are taken in one order."""
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(threads)


def _array(tensor) -> np.ndarray:
    return _memory(tensor).copy()


def _memory(tensor) -> np.ndarray:
    """Its own memory: what it holds later is seen in it, too."""
    return tensor.detach().numpy()


def _load(model, case: Case, scale: float = 1.0, salt: str = "") -> None:
    """Gives a network the case's weights, one tensor after the other."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.from_numpy(case.weights({name: tuple(tensor.shape)}, scale, salt)[name]))


def _build(case: Case) -> algorithm.TrainState:
    """The mirror's state of a network that starts with the case's weights."""
    right = algorithm.build_model

    def build_model(**shape):
        model = right(**shape)
        _load(model, case)
        return model

    with without_initial_values(), mock.patch.object(algorithm, "build_model", build_model):
        return algorithm.build_state(case.short_config(), case.num_classes, case.mean, case.std, *case.label_facts())


@contextlib.contextmanager
def without_initial_values() -> Iterator[None]:
    """Networks are built with whatever lies in memory, which takes less time than numbers that are overwritten."""
    with contextlib.ExitStack() as stack:
        for name in ("kaiming_uniform_", "uniform_", "kaiming_normal_", "xavier_normal_"):
            stack.enter_context(mock.patch.object(torch.nn.init, name))
        yield


@contextlib.contextmanager
def _activations(model, seen: dict[str, np.ndarray], parts: int = 1) -> Iterator[dict[str, np.ndarray]]:
    """Into `seen`: outputs of all named layers in the order in which they finish; those of an interleaved batch in the
    order of labeled, weak and strong images."""
    def note(name):
        return lambda module, args, output: seen.__setitem__(name, _array(algorithm.de_interleave(output, parts)))

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if n]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _named(items, read: Callable = _array) -> Reading:
    """Without num_batches_tracked."""
    tensors = {name: t for name, t in items if not name.endswith("num_batches_tracked")}
    return Reading(tensors, lambda name: read(tensors[name]))


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
        state.model.train(mode == "train")
        with torch.no_grad(), _activations(state.model, collect()) as seen:
            seen["logits"] = _array(state.model(images))
        yield f"{mode} activations", seen


def fresh(case: Case, dtype: str) -> Trace:
    """The weights with which the mirror begins."""
    with precision(dtype):
        torch.manual_seed(case.seed)
        model = algorithm.build_model(num_classes=case.num_classes, **case.config.model.network())
        yield FRESH_WEIGHTS, _named(model.state_dict().items())


def whole(case: Case, dtype: str, sections: dict[int, tuple[str, ...]], collect: type = dict) -> Trace:
    if not case.large:
        yield from fresh(case, dtype)
    with precision(dtype):
        state = _build(case)
        yield from _shown(state, case, "eval", collect=collect)
        state.model.train()
        yield from _steps(state, case, sections, collect)


def layers_alone(case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Input and output of every layer that has no layers below it, in train mode."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def note(name):
        return lambda module, args, output: found.__setitem__(name, (_array(args[0]), _array(output)))

    with precision("float64"), torch.no_grad():
        state, batch = _build(case), case.batch(0)
        for name, module in state.model.named_modules():
            if name and not list(module.children()):
                module.register_forward_hook(note(name))
        state.model(state.normalize(np.concatenate([batch.x, batch.u_w, batch.u_s])))
    return found


def metric(case: Case, dtype: str, table: np.ndarray, labels: np.ndarray, images: np.ndarray, batch_size: int,
           history: list[float]) -> Trace:
    class Lookup(torch.nn.Module):
        def forward(self, x):
            return torch.from_numpy(table)[(x[:, 0, 0, 0] * 255).round().long()]

    with precision(dtype):
        found = evaluation.evaluate(Lookup(), Normalize((0, 0, 0), (1, 1, 1)), images, labels, batch_size)
    confusion = np.zeros((case.num_classes, case.num_classes), np.int64)
    for true, predicted in zip(labels, table.argmax(axis=1), strict=True):
        confusion[true, predicted] += 1
    seen = confusion.sum(axis=1)
    per_class = np.where(seen > 0, 100.0 * confusion.diagonal() / np.maximum(seen, 1), -1.0)
    yield "metric", {**{name: np.array(value) for name, value in found.items()}, "per_class": per_class,
                     "confusion": confusion}
    yield "summary", {name: np.array(value) for name, value in evaluation.summarize(history).items()}


def loss(case: Case, dtype: str) -> Trace:
    ssl, train = case.config.ssl, case.config.train
    probes = loss_probes(case.num_classes, case.seed, train.batch_size, train.mu)
    with precision(dtype):
        for probe, (x, targets, u_w, u_s) in probes.items():
            logits = [torch.from_numpy(a).requires_grad_(True) for a in (x, u_w, u_s)]
            threshold = 0.5 if probe == "tie" else ssl.threshold
            temperature = 1.0 if probe == "tie" else ssl.temperature
            found = losses.fixmatch_loss(logits[0], torch.from_numpy(targets), logits[1], logits[2], threshold,
                                         temperature, ssl.lambda_u)
            found.loss.backward()
            yield f"loss {probe}", _losses(found)
            yield f"loss {probe} gradients", {
                name: _array(t.grad) if t.grad is not None else np.zeros(t.shape)
                for name, t in zip(("logits_x", "logits_u_w", "logits_u_s"), logits, strict=True)}
        yield "structure", {"pseudo-labels are detached": np.array(True)}
        if ssl.policy != "fixed" or ssl.align != "none":
            yield from _policy(case)


def _policy(case: Case) -> Trace:
    ssl, facts, steps = policy_probe(case)
    state = thresholds.initial_state(ssl, case.num_classes, *facts)
    for step, (x, weak, strong, index) in enumerate(steps):
        found, state = thresholds.pseudo_labels(torch.from_numpy(x), torch.from_numpy(weak), index, state, ssl)
        yield f"policy {step}", {**_named(found._asdict().items()), **_named(state.items())}
        if ssl.policy == "freematch":
            logits = torch.from_numpy(strong).requires_grad_(True)
            term = thresholds.fairness(logits, found.weight, state)
            gradient, = torch.autograd.grad(term, logits) if term.requires_grad else (torch.zeros_like(logits),)
            yield f"policy {step} fairness", {"term": _array(term), "gradient": _array(gradient)}


def _losses(found) -> dict[str, np.ndarray]:
    return {name: _array(getattr(found, name))
            for name in ("confidence", "pseudo_labels", "mask", "loss_x", "loss_u", "loss")}


def train(case: Case, dtype: str, sections: dict[int, tuple[str, ...]]) -> Trace:
    with precision(dtype):
        yield from _steps(_build(case), case, sections)


def _steps(state: algorithm.TrainState, case: Case, sections: dict[int, tuple[str, ...]],
           collect: type = dict) -> Trace:
    read = _array if collect is dict else _memory  # a digest is made at once

    def note(*_):
        if "gradients" in wanted:
            tensors = ((n, p.grad) for n, p in reversed(list(state.model.named_parameters())) if p.grad is not None)
            gradients.update(_named(tensors, read))

    state.optimizer.register_step_pre_hook(note)
    for step, wanted in sections.items():
        batch, lr, gradients = case.batch(step), state.scheduler.get_last_lr()[0], collect()
        parts = 2 * (len(batch.u_w) // len(batch.x)) + 1
        with _activations(state.model, collect(), parts) as seen:
            found = algorithm.train_step(state, batch, case.config.ssl)
        take = {"lr": lambda lr=lr: {"lr": np.array(lr)},
                "activations": lambda seen=seen: seen,
                "losses": lambda found=found: {**_losses(found), **_named(state.thresholds.items())},
                "gradients": lambda gradients=gradients: gradients,
                "momentum": lambda: _named(state.optimizer.momentum_buffers().items(), read),
                "weights": lambda: _named(state.model.named_parameters(), read),
                "buffers": lambda: _named(state.model.named_buffers(), read),
                "ema": lambda: _named(state.ema.average.state_dict().items(), read)}
        for name in wanted:
            yield f"step {step} {name}", take[name]()


def optimizer_alone(case: Case, dtype: str, rounds: int) -> Trace:
    with precision(dtype):
        state = _build(case)
        parameters = dict(state.model.named_parameters())
        shapes = {n: tuple(p.shape) for n, p in parameters.items()}
        for i in range(rounds):
            gradients = case.weights(shapes, 0.1, salt=f"gradient {i}")
            surrogate = sum((p * torch.from_numpy(gradients[n]).to(p.dtype)).sum() for n, p in parameters.items()
                            if n not in IDLE)
            algorithm.update(state, surrogate)
            yield f"round {i} momentum", _named(state.optimizer.momentum_buffers().items())
            yield f"round {i} weights", _named(parameters.items())


def scaler_alone(case: Case, dtype: str) -> Trace:
    """The mirror's update under its loss scaler of float16, on given gradients of which some are infinite."""
    with precision(dtype):
        state = _build(case)
        state.scaler = scaler.LossScaler()
        parameters = {n: p for n, p in state.model.named_parameters() if n not in IDLE}
        shapes = {n: tuple(p.shape) for n, p in parameters.items()}
        for i, wanted in enumerate(scaled_updates(list(parameters))):
            if wanted["again"]:
                saved, state.scaler = json.dumps(state.scaler.state()), scaler.LossScaler()
                state.scaler.load_state(json.loads(saved))
            if wanted["load"]:
                state.scaler.load_state(wanted["load"])
            gradients = case.weights(shapes, 0.1, salt=f"scaled gradient {i}")
            if wanted["spoiled"]:
                gradients[wanted["spoiled"]].flat[0] = np.inf
            algorithm.update(state, sum((p * torch.from_numpy(gradients[n]).to(p.dtype)).sum()
                                        for n, p in parameters.items()))
            yield f"update {i} scaler", {n: np.array(value) for n, value in state.scaler.state().items()}
            yield f"update {i} schedule", {"lr": np.array(state.scheduler.get_last_lr()[0])}
            yield f"update {i} momentum", _named(state.optimizer.momentum_buffers().items())
            yield f"update {i} weights", _named(parameters.items())
            yield f"update {i} ema", _named(dict(state.ema.average.named_parameters()).items())


def learning_rate(case: Case, dtype: str, settings: list[tuple[int, int]], points: list[int]) -> Trace:
    for total, warmup in settings:
        parameter = torch.nn.Parameter(torch.zeros([]))
        sgd = torch.optim.SGD([parameter], lr=case.config.optim.lr)
        scheduler = schedule.build_scheduler(sgd, total, warmup)
        first = []
        for _ in range(min(total, 30)):
            first.append(scheduler.get_last_lr()[0])
            sgd.step()
            scheduler.step()
        at = [case.config.optim.lr * schedule.cosine_7_16(total * p // 100, total, warmup) for p in points]
        yield f"schedule of {total} steps, {warmup} of warm-up", {"first steps": np.array(first), "later": np.array(at)}


def average(case: Case, dtype: str, rounds: int) -> Trace:
    with precision(dtype):
        state = _build(case)
        for i in range(rounds):
            _load(state.model, case, salt=f"round {i}")
            state.ema.update()
            yield f"round {i} ema", _named(state.ema.average.state_dict().items())
