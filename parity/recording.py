"""Recomputes the recorded first steps of a run (fixmatch/recorder.py) with the Torch mirror in float64.

Every step is judged by itself: from the recorded state before it and its recorded batch, under the settings of the
configuration, the mirror computes the losses, gradients and batch statistics; then from the recorded gradients the
momentum, the weights and the average. So rounding of float32 does not grow from step to step, and a gate on every
tensor can be narrow. Only a WideResNet's gradients are chaotic within a step: where a pre-activation near 0 changes
sign, LeakyReLU has another slope. They are held to a wide gate here, and layer by layer to a narrow one in stage
operators.
B labeled images, M = mu * B unlabeled ones, K classes.
"""

import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from fixmatch.arrays import DTYPES, fingerprint
from fixmatch.config import Config
from parity import updates
from parity.compare import FRESH_WEIGHTS, Reading, Row, compare, exact, near, same_print
from parity.mirror import losses as mirror_losses
from parity.mirror import thresholds as mirror_thresholds
from parity.mirror.models import BLOCKS, build_model
from parity.mirror.normalize import Normalize
from parity.mirror.schedule import cosine_7_16
from parity.reference import precision, without_initial_values
from parity.weights import as_torch, part


class Gates(NamedTuple):
    """Largest allowed errors of what a forward and backward pass gives, relative to what a row compares it with."""

    loss: float
    gradient: dict[str, float]  # relative L2, by architecture
    statistic: float  # of what a step adds to the running statistics, a thousandth of their size
    undecided: float  # confidences so near to the threshold, and logits so near to each other, decide by rounding


# By the run's arithmetic. In float32 about ten times the worst of clean runs of both networks. For the others no GPU
# was at hand: they follow the Torch mirror's own errors under autocast on a CPU, over six seeds of both networks.
GATES = {"float32": Gates(5e-5, {"wideresnet": 0.1, "resnext": 2e-3}, 2e-3, 1e-3),
         "float16": Gates(2e-2, {"wideresnet": 0.5, "resnext": 0.1}, 2e-2, 5e-2),
         "bfloat16": Gates(0.2, {"wideresnet": 0.8, "resnext": 0.5}, 0.1, 0.2)}
GATES["tf32"] = GATES["float16"]

THRESHOLD_GATE = 1e-3  # of statistics of probabilities, and of weights
MOST_ELEMENTS = 2.5e8  # of all activations of a step that is computed at once, in float64: 2 GB


def rows(folder: pathlib.Path, mirror: "Mirror", forward: bool = True) -> Iterator[Row]:
    """Rows of all recorded steps, in the order in which a fault would show.

    Args:
        folder: of the recording.
        forward: whether losses, gradients and batch statistics are recomputed: not where other ranks have a part of
            the batch, and not of batches that are too large.
    """
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    before = Arrays(folder / "start.safetensors")
    if facts and facts[0]["step"] == 0:  # a run that goes on has an average of its own
        yield from start_rows(before)
        if not mirror.config.model.init:
            yield from fresh_rows(mirror, before)
    for number, fact in enumerate(facts):
        after = Arrays(folder / f"step-{number}.safetensors")
        yield from step_rows(mirror, before, after, fact, forward)
        before = after


def large_batch_rows(folder: pathlib.Path, mirror: "Mirror", most_bytes: float) -> Iterator[Row]:
    """Losses, gradients and batch statistics of the first recorded step, if its batch is too large for `rows`.

    In float32 and block by block, in half the time and a quarter of the memory. There are no rows where that would take
    more than `most_bytes`, too.
    """
    fact, *_ = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    before, after = (Arrays(folder / f"{name}.safetensors") for name in ("start", "step-0"))
    with precision("float32"):
        model = mirror.network(before)
        at_once, blockwise = _elements(model, after)
        if at_once > MOST_ELEMENTS and 4 * blockwise <= most_bytes:
            for block in _blocks(model):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
            yield from _forward_rows(f"step {fact['step']}", mirror, model, before, after, fact)


class Mirror(NamedTuple):
    """What steps are computed again with."""

    config: Config  # of the run: what it was to train under
    num_classes: int  # K
    mean: tuple[float, ...]  # of pixels in [0, 1], a channel, that images were to be normalized with
    std: tuple[float, ...]

    def network(self, arrays: Mapping[str, np.ndarray], prefix: str = "model") -> torch.nn.Module:
        """The mirror's network in train mode, in Torch's default dtype, with the recorded tensors below `prefix`."""
        with without_initial_values():
            model = build_model(num_classes=self.num_classes, **self.config.model.network())
        given = as_torch(arrays, prefix)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if not name.endswith("num_batches_tracked"):
                    tensor.copy_(torch.from_numpy(given[name]))
        return model

    def normalized(self, images: np.ndarray) -> torch.Tensor:
        return Normalize(self.mean, self.std)(images)


def start_rows(start: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """The average starts from the live network."""
    for name in (name[6:] for name in start if name.startswith("model/")):
        yield exact(f"start/average of {name}", start.get(f"ema/{name}"), start[f"model/{name}"])


def fresh_rows(mirror: Mirror, start: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Fresh weights are distributed as the mirror's."""
    with precision("float32"):
        model = build_model(num_classes=mirror.num_classes, **mirror.config.model.network())
    theirs = {name: _array(t) for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    yield from compare([(FRESH_WEIGHTS, as_torch(start, "model"))], [(FRESH_WEIGHTS, theirs)])


def restored_rows(restored: Mapping[str, str], start: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """A resumed run starts from what its checkpoint holds, of which these are the fingerprints."""
    for name, expected in restored.items():
        ours = fingerprint(start[name]) if name in start else None
        yield same_print(f"restored/{name}", ours, expected, "not what the checkpoint holds")


def step_rows(mirror: Mirror, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], fact: dict,
              forward: bool) -> Iterator[Row]:
    """Rows of one step, from the state before it to what it left behind; `forward` as of `rows`."""
    label, config = f"step {fact['step']}", mirror.config
    yield exact(f"{label} mode/model trains", np.array(fact["training"]["model"]), np.array(True))
    yield exact(f"{label} mode/average evaluates", np.array(fact["training"]["average"]), np.array(False))
    lr = config.optim.lr * cosine_7_16(fact["step"], config.train.total_steps, config.optim.warmup_steps)
    yield near(f"{label} lr/lr", np.array(fact["lr"]), np.array(lr), 1e-9)
    with precision("float64"):
        if forward:
            yield from _small_batch_rows(label, mirror, before, after, fact)
        yield from updates.rows(label, config, lr, before, after, fact["skipped"])


def _small_batch_rows(label: str, mirror: Mirror, before: Mapping, after: Mapping, fact: dict) -> Iterator[Row]:
    """Losses, gradients and running statistics, unless the batch is too large."""
    model = mirror.network(before)
    if _elements(model, after)[0] <= MOST_ELEMENTS:
        yield from _forward_rows(label, mirror, model, before, after, fact)


def _forward_rows(label: str, mirror: Mirror, model, before: Mapping, after: Mapping, fact: dict) -> Iterator[Row]:
    """Losses, gradients and running statistics of the mirror's network, from the recorded batch; gradients that
    overflowed float16 are left out."""
    config, found, gates = mirror.config, part(after, "losses"), GATES[fact["arithmetic"]]
    unlabeled = 0 if config.ssl.supervised_at(fact["step"]) else len(part(after, "batch")["u_w"])
    yield exact(f"{label} losses/number of pseudo-labels", np.array(found["mask"].size), np.array(unlabeled))
    if found["mask"].size != unlabeled:
        return
    losses, thresholds = _joint_losses(mirror, model, fact["step"], before, after, gates.undecided)
    for name in ("loss_x", "loss_u", "loss", "confidence"):
        yield near(f"{label} losses/{name}", found[name], _array(losses[name]), gates.loss, floor=1.0)
    if config.ssl.policy == "softmatch":
        yield near(f"{label} losses/mask", found["mask"], _array(losses["mask"]), THRESHOLD_GATE, floor=1.0)
    for name in ("mask", "pseudo_labels")[config.ssl.policy == "softmatch":]:
        decided = _array(losses[f"{name} decided"])
        yield exact(f"{label} losses/{name}", np.where(decided, found[name], 0), np.where(
            decided, _array(losses[name]), 0).astype(found[name].dtype))
    seen = part(after, "batch")["index_u"][:unlabeled]
    yield from _threshold_rows(label, seen, part(after, "thresholds"), thresholds,
                               _array(losses["mask decided"] & losses["pseudo_labels decided"]))
    buffers = {name: _array(t).copy() for name, t in model.named_buffers() if not name.endswith("num_batches_tracked")}
    gradients = _gradient_rows(label, model, losses["loss"], as_torch(after, "gradient"),
                               gates.gradient[config.model.arch])
    yield from () if fact["skipped"] else gradients
    old, new = as_torch(before, "model"), as_torch(after, "model")
    for name, buffer in buffers.items():
        moved = buffer - old[name].astype(np.float64)
        rounding = 4 * np.finfo(np.float32).eps * float(np.abs(old[name]).max())
        yield near(f"{label} buffers/{name}", new[name].astype(np.float64) - old[name], moved, gates.statistic,
                   floor=rounding / gates.statistic)


def _gradient_rows(label: str, model, loss, ours: Mapping[str, np.ndarray], gate: float) -> list[Row]:
    """In the order of the backward pass. Each of the mirror's gradients is judged once it is there, and dropped."""
    largest = max((float(np.abs(gradient).max()) for gradient in ours.values()), default=0.0)
    floor = 1e-6 * largest  # for a gradient that is 0 but for rounding
    rows: dict[str, Row] = {}

    def judge(parameter):
        name = names[parameter]
        rows[name] = near(f"{label} gradients/{name}", ours.get(name), _array(parameter.grad), gate, floor, norm="l2")
        parameter.grad = None

    names = {parameter: name for name, parameter in model.named_parameters()}
    hooks = [parameter.register_post_accumulate_grad_hook(judge) for parameter in names]
    loss.backward()
    for hook in hooks:
        hook.remove()
    return [*rows.values(), *(near(f"{label} gradients/{n}", ours[n], None, gate) for n in ours if n not in rows)]


def _threshold_rows(label: str, index, found: dict, expected: dict, decided: np.ndarray) -> Iterator[Row]:
    """The statistics of ssl.policy; what is remembered of single images only where no rounding decides."""
    for name, tensor in expected.items():
        ours, theirs = found.get(name), _array(tensor)
        if name == "assigned" and ours is not None:
            open_images = index[~decided]
            theirs = theirs.copy()
            theirs[open_images] = ours[open_images]
            yield exact(f"{label} thresholds/{name}", ours, theirs)
        else:
            yield near(f"{label} thresholds/{name}", ours, theirs, THRESHOLD_GATE, floor=1.0)


def _joint_losses(mirror: Mirror, model, step: int, before: Mapping, after: Mapping,
                  undecided: float) -> tuple[dict, dict]:
    """The mirror's losses in one forward, with pseudo-labels and mask taken from the run where rounding decides.

    Also the statistics of ssl.policy after it.
    """
    batch, found = part(after, "batch"), part(after, "losses")
    ssl, targets = mirror.config.ssl, torch.from_numpy(batch["targets_x"])
    old = {name: torch.from_numpy(a) for name, a in part(before, "thresholds").items()}
    old = {name: t.to(torch.get_default_dtype()) if t.is_floating_point() else t for name, t in old.items()}
    if ssl.supervised_at(step):
        loss = torch.nn.functional.cross_entropy(model(mirror.normalized(batch["x"])), targets)
        none = torch.zeros(0)
        return {"loss": loss, "loss_x": loss, "loss_u": torch.zeros([]), "confidence": none, "mask": none,
                "pseudo_labels": none, "mask decided": none.bool(), "pseudo_labels decided": none.bool()}, old
    images = mirror.normalized(np.concatenate([batch["x"], batch["u_w"], batch["u_s"]]))
    logits = model(images)  # [B + 2M, K]
    logits_x, logits_u_w, logits_u_s = logits.split([len(batch["x"]), len(batch["u_w"]), len(batch["u_s"])])
    (confidence, labels, mask), new = mirror_thresholds.pseudo_labels(logits_x, logits_u_w, batch["index_u"], old, ssl)
    best, second = logits_u_w.detach().topk(2, dim=1).values.T
    bars = mirror_thresholds.bars(old, new, ssl, logits.shape[1])
    clear_label = best - second > undecided
    clear_mask = (confidence - bars[labels]).abs() > undecided if bars is not None else torch.ones_like(clear_label)
    labels = torch.where(clear_label, labels, torch.from_numpy(found["pseudo_labels"]))
    mask = torch.where(clear_mask, mask, torch.from_numpy(found["mask"]).to(mask.dtype))
    loss_x = torch.nn.functional.cross_entropy(logits_x, targets)
    loss_u = (torch.nn.functional.cross_entropy(logits_u_s, labels, reduction="none") * mask).mean()
    found = mirror_losses.FixMatchLoss(loss_x + ssl.lambda_u * loss_u, loss_x, loss_u, mask, confidence, labels)
    found = mirror_thresholds.with_fairness(found, logits_u_s, new, ssl)
    return {**found._asdict(), "mask decided": clear_mask, "pseudo_labels decided": clear_label}, new


def _elements(model, after: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Of activations that a backward pass over the recorded batch needs: of all layers; and block by block.

    The second counts the blocks' outputs, and twice what is inside of the largest, for its gradients.
    """
    parts = [after[f"batch/{name}"].shape for name in ("x", "u_w", "u_s")]  # [n, H, W, 3]
    images, height, width = sum(n for n, *_ in parts), *parts[0][1:3]
    count: dict[torch.nn.Module, int] = {}
    hooks = [module.register_forward_hook(lambda module, args, output: count.__setitem__(module, output.numel()))
             for module in model.modules()]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, height, width))
    model.train()
    for hook in hooks:
        hook.remove()
    layers = {module for module in count if not list(module.children())}
    inside = [{module for module in block.modules() if module in layers} for block in _blocks(model)]
    kept = layers.difference(*inside).union(_blocks(model))
    largest = max(sum(count[layer] for layer in block) for block in inside)
    return images * sum(count[layer] for layer in layers), images * (sum(map(count.get, kept)) + 2 * largest)


def _blocks(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


class Arrays(Reading):
    """The arrays of a safetensors file, each read when it is asked for. What was mapped would stay in memory."""

    def __init__(self, path: pathlib.Path):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))

        def read(name: str) -> np.ndarray:
            (start, _), shape = header[name]["data_offsets"], header[name]["shape"]
            return np.fromfile(path, types[header[name]["dtype"]], math.prod(shape), offset=8 + length + start
                               ).reshape(shape)

        types = {stored: name for name, stored in DTYPES.items()}
        super().__init__(header, read)


def _array(tensor) -> np.ndarray:
    return tensor.detach().numpy()
