"""Stage `convert`: checkpoints to the reference and back, and a file of the reference to us.

The checkpoint that is converted is a production run's, with a classifier that has as many classes as inputs in the
place of its own, because a square matrix that was not transposed fits without an error. The reference's side is the
mirror: it loads the file as the reference's --resume does. One further step on both sides, with the same gradients,
tells whether weights, average, momentum, hyper-parameters and schedule have arrived where they belong. A network wider
than the published ones for CIFAR-10 is narrowed to them; that the wide ones are recognized is for the tests.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
import paddle
import torch

from fixmatch import checkpoint, run
from fixmatch import step as algorithm
from fixmatch.checkpoint import Checkpoint, load_weights
from fixmatch.config import Config, OptimConfig, from_dict
from parity import convert, subject
from parity.case import IDLE, Case
from parity.compare import Row, compare_tensor
from parity.dry_run import short_config, small_source, training_on
from parity.mirror import step as mirror
from parity.mirror.models import build_model
from parity.ranks import narrowed
from parity.recording import exact, near
from parity.reference import precision
from parity.weights import paddle_to_torch, torch_to_paddle

STEP = 5 * 1024 + 7  # that the converted checkpoint says it is from: within an epoch of the reference, its sixth
LOGITS_GATE = 1e-11
UPDATE_GATE = 1e-12  # of a step on both sides in float64
KEYS = ("epoch", "state_dict", "ema_state_dict", "acc", "best_acc", "optimizer", "scheduler")
PARTS = {"model": "state_dict", "ema": "ema_state_dict"}
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def rows(case: Case) -> Iterator[Row]:
    """Rows of all three conversions, in the order in which a fault would show."""
    case = narrowed(case)
    with tempfile.TemporaryDirectory(prefix="fixmatch-parity-") as scratch:
        folder = pathlib.Path(scratch)
        yield from _there_and_back(case, folder)
        yield from _from_the_mirror(case, folder)


def _there_and_back(case: Case, folder: pathlib.Path) -> Iterator[Row]:
    saved, file = _trained(case, folder), folder / "ours.pth.tar"
    row = _converts("to the reference/converts", convert.to_reference, folder / "late", file)
    yield row
    if not row.passed:
        return
    content, config = torch.load(file, weights_only=True), from_dict(saved.manifest.config, "parity")
    yield from _content_rows(content, saved, config)
    yield from _meaning_rows("to the reference", saved, content, config)
    row = _converts("back/converts", convert.from_reference, file, folder / "back")
    yield row
    if not row.passed:
        return
    back = checkpoint.load(folder / "back")
    for name in [*saved.arrays, *(n for n in back.arrays if n not in saved.arrays)]:
        yield _same(f"back {name}", back.arrays.get(name), saved.arrays.get(name))
    for field in dataclasses.fields(saved.manifest):
        if field.name != "provenance":
            yield _equal(f"back manifest/{field.name}", *(getattr(c.manifest, field.name) for c in (back, saved)))


def _from_the_mirror(case: Case, folder: pathlib.Path) -> Iterator[Row]:
    """A file that the mirror has trained, and that was saved from within a data-parallel wrapper."""
    config = dataclasses.replace(
        case.config, train=dataclasses.replace(case.config.train, total_steps=2**20), ema=Config().ema,
        optim=OptimConfig(lr=0.04, momentum=0.8, nesterov=False, weight_decay=2e-3))  # none of which is our default
    state = _mirror_trained(dataclasses.replace(case, num_classes=10), config)
    content = {"epoch": 1, "state_dict": state.model.state_dict(), "ema_state_dict": state.ema.average.state_dict(),
               "acc": 50.0, "best_acc": 62.5, "optimizer": state.optimizer.state_dict(),
               "scheduler": state.scheduler.state_dict()}
    wrapped = {key: {f"module.{n}": t for n, t in content[key].items()} for key in PARTS.values()}
    torch.save(content | wrapped, folder / "theirs.pth.tar")
    row = _converts("from the reference/converts", convert.from_reference, folder / "theirs.pth.tar", folder / "theirs")
    yield row
    if not row.passed:
        return
    found, momentum = checkpoint.load(folder / "theirs"), state.optimizer.momentum_buffers()
    for part, tensors in (*((part, content[key]) for part, key in PARTS.items()), ("momentum", momentum)):
        expected = torch_to_paddle({n: t.numpy() for n, t in tensors.items()})
        ours = found.part(part)
        for name in [*expected, *(n for n in ours if n not in expected)]:
            yield _same(f"from the reference {part}/{name}", ours.get(name), expected.get(name))
    facts = {"step": 2, "classes": [*CIFAR10], "mean": [*Case.mean], "std": [*Case.std]}
    for name, expected in facts.items():
        yield _equal(f"from the reference manifest/{name}", getattr(found.manifest, name), expected)
    yield _equal("from the reference manifest/epoch", found.manifest.provenance.get("epoch"), 1)
    yield from _meaning_rows("from the reference", found, content, config)


# --- the two sides' checkpoints


def _trained(case: Case, folder: pathlib.Path) -> Checkpoint:
    """The checkpoint of a short production run, in folder/late, as if it had come later in a long one."""
    with training_on(small_source(case)):
        run.train(short_config(case.config, case.num_classes, folder / "run"))
    saved = checkpoint.load(folder / "run/checkpoints/latest")
    arrays, manifest = _square(saved.arrays, case.seed), saved.manifest
    config = manifest.config | {"train": manifest.config["train"] | {"total_steps": 2**20}}
    classes = tuple(f"class {i}" for i in range(next(a for a in arrays.values() if a.ndim == 2).shape[0]))
    checkpoint.save(folder / "late", arrays, dataclasses.replace(manifest, step=STEP, config=config, classes=classes))
    return checkpoint.load(folder / "late")


def _square(arrays: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The same network with another classifier, of as many classes as it has inputs."""
    rng, changed = np.random.default_rng([seed, 9]), dict(arrays)
    for name in [name for name, a in arrays.items() if a.ndim == 2]:  # in the weights, the average and the momentum
        inputs = len(arrays[name])
        for each, shape in ((name, (inputs, inputs)), (name.removesuffix("weight") + "bias", (inputs,))):
            changed[each] = (rng.standard_normal(shape) / np.sqrt(inputs)).astype(np.float32)
    return changed


def _mirror_trained(case: Case, config: Config) -> mirror.TrainState:
    with precision("float32"):
        torch.manual_seed(case.seed)
        state = mirror.build_state(config, case.num_classes, case.mean, case.std)
        for step in range(2):
            mirror.train_step(state, case.batch(step), config.ssl)
    return state


# --- what is compared


def _content_rows(content: dict, saved: Checkpoint, config: Config) -> Iterator[Row]:
    """The file has what the reference asks for, in the precision it saves, and the numbers that were trained."""
    for key in KEYS:
        yield _equal(f"file/{key}", key in content, True)
    network = _without_memory(config, len(saved.manifest.classes))
    for part, key in PARTS.items():
        given, expected = content.get(key) or {}, paddle_to_torch(saved.part(part))
        for name in [*network.state_dict(), *(n for n in given if n not in expected)]:
            yield _same(f"file {key}/{name}", given[name].numpy() if name in given else None, expected.get(name))
    optim, step = config.optim, saved.manifest.step
    numbered = mirror.TwoGroupSGD(network, optim.lr, optim.momentum, optim.weight_decay, optim.nesterov)
    names = [numbered.names[p] for group in numbered.param_groups for p in group["params"]]
    expected, given = paddle_to_torch(saved.part("momentum")), content["optimizer"]["state"]
    for index, name in enumerate(names):
        if index in given or name in expected:
            ours = given.get(index, {}).get("momentum_buffer")
            yield _same(f"file optimizer/{name}", None if ours is None else ours.numpy(), expected.get(name))
    yield _equal("file/epoch is right", content["epoch"], step // 1024)
    yield _equal("file/best_acc is right", content["best_acc"], max(saved.manifest.history["ema"]))


def _without_memory(config: Config, classes: int):
    """The mirror's network, for the names and the order of its tensors."""
    with torch.device("meta"):
        return build_model(num_classes=classes, **dataclasses.asdict(config.model))


def _meaning_rows(label: str, ours: Checkpoint, theirs: dict, config: Config) -> Iterator[Row]:
    """Logits of both sides in eval mode, and what one further step makes of both.

    Args:
        ours: a checkpoint, which production restores as --resume does.
        theirs: a file's content, which the mirror loads as the reference's --resume does.
        config: under which the mirror goes on; production takes the checkpoint's own.
    """
    classes = len(ours.manifest.classes)
    with precision("float64"), subject.precision("float64"):
        try:
            expected = _mirror_restored(theirs, config, classes)
            found = _restored(ours, classes)
            yield from _logits_rows(label, found, expected)
            yield from _step_rows(label, found, expected)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield Row(f"{label}/loads", np.inf, np.inf, False, why)


def _mirror_restored(content: dict, config: Config, classes: int) -> mirror.TrainState:
    state = mirror.build_state(config, classes, Case.mean, Case.std)
    state.model.load_state_dict(content["state_dict"], strict=True)
    state.ema.average.load_state_dict(content["ema_state_dict"], strict=True)
    state.optimizer.load_state_dict(content["optimizer"])
    state.scheduler.load_state_dict(content["scheduler"])
    return state


def _restored(saved: Checkpoint, classes: int) -> algorithm.TrainState:
    config, manifest = from_dict(saved.manifest.config, "parity"), saved.manifest
    state = algorithm.build_state(config, classes, manifest.mean, manifest.std)
    parts = {part: {n: a.astype(np.float64) for n, a in saved.part(part).items()}
             for part in ("model", "ema", "momentum")}
    load_weights(state.model, parts["model"])
    load_weights(state.ema.average, parts["ema"])
    state.optimizer.load_state({n: paddle.to_tensor(a) for n, a in parts["momentum"].items()})
    state.scheduler.step(manifest.step)
    return state


def _logits_rows(label: str, ours: algorithm.TrainState, theirs: mirror.TrainState) -> Iterator[Row]:
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8))
    for name, one, other in (("raw", ours.model, theirs.model), ("average", ours.ema.average, theirs.ema.average)):
        one.eval()
        other.eval()
        with paddle.no_grad(), torch.no_grad():
            found, expected = one(paddle.to_tensor(images)).numpy(), other(torch.from_numpy(images)).numpy()
        yield compare_tensor(f"{label} logits/{name}", found, expected, LOGITS_GATE)


def _step_rows(label: str, ours: algorithm.TrainState, theirs: mirror.TrainState) -> Iterator[Row]:
    yield _lr_row(f"{label} further step/lr", ours, theirs)
    rng = np.random.default_rng(1)
    gradients = {n: rng.standard_normal(tuple(p.shape)) for n, p in theirs.model.named_parameters() if n not in IDLE}
    given = torch_to_paddle(gradients)
    algorithm.update(ours, sum((p * paddle.to_tensor(given[n])).sum() for n, p in ours.model.named_parameters()
                               if n in given))
    mirror.update(theirs, sum((p * torch.from_numpy(gradients[n])).sum() for n, p in theirs.model.named_parameters()
                              if n in gradients))
    yield _lr_row(f"{label} further step/next lr", ours, theirs)
    pairs = {"momentum": (ours.optimizer.state(), theirs.optimizer.momentum_buffers()),
             "weights": (ours.model.state_dict(), theirs.model.state_dict()),
             "average": (ours.ema.average.state_dict(), theirs.ema.average.state_dict())}
    for part, (found, expected) in pairs.items():
        arrays = paddle_to_torch({n: t.numpy() for n, t in found.items()})
        for name, tensor in expected.items():
            if not name.endswith("num_batches_tracked"):
                yield near(f"{label} further step {part}/{name}", arrays.get(name), tensor.detach().numpy(),
                           UPDATE_GATE)


def _lr_row(tensor: str, ours: algorithm.TrainState, theirs: mirror.TrainState) -> Row:
    expected = [group["lr"] for group in theirs.optimizer.param_groups]
    return near(tensor, np.full(len(expected), ours.scheduler.get_lr()), np.array(expected), UPDATE_GATE)


def _converts(tensor: str, conversion, source: pathlib.Path, target: pathlib.Path) -> Row:
    try:
        conversion(source, target)
    except checkpoint.CheckpointError as error:
        return Row(tensor, np.inf, np.inf, False, str(error).removeprefix(f"{source}: "))
    return Row(tensor, 0.0, 0.0, True)


def _same(tensor: str, ours, reference) -> Row:
    """A row of two arrays that must be equal bit for bit, in the same precision."""
    if ours is not None and reference is not None and ours.dtype != reference.dtype:
        return Row(tensor, np.inf, np.inf, False, f"dtype {ours.dtype}, not {reference.dtype}", ours, reference)
    return exact(tensor, ours, reference)


def _equal(tensor: str, ours, expected) -> Row:
    """A row of two plain values."""
    row = exact(tensor, np.array(ours == expected), np.array(True))
    return row if row.passed else row._replace(why=f"{str(ours)[:80]}, not {str(expected)[:80]}")
