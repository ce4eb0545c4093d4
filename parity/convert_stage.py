"""Stage `convert`: checkpoints to the reference and back, and a file of the reference to us.

The checkpoint that is converted is a production run's, with a classifier that has as many classes as inputs in the
place of its own, because a square matrix that was not transposed fits without an error. What the file means to
the reference is in parity/convert_meaning.py. A network wider than the published ones for CIFAR-10 is narrowed to them;
that the wide ones are recognized is for the tests.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

from fixmatch import checkpoint, run
from fixmatch.checkpoint import Checkpoint
from fixmatch.config import Config, OptimConfig, from_dict
from fixmatch.scratch import scratch_folder
from parity import convert
from parity.case import Case
from parity.compare import Row, exact
from parity.convert_meaning import meaning_rows
from parity.mirror import step as mirror
from parity.ranks import narrowed
from parity.reference import precision
from parity.reference_checkpoint import network_of
from parity.small_run import short_config, small_source, training_on
from parity.weights import paddle_to_torch, torch_to_paddle

STEP = 5 * 1024 + 7  # that the converted checkpoint says it is from: within an epoch of the reference, its sixth
KEYS = ("epoch", "state_dict", "ema_state_dict", "acc", "best_acc", "optimizer", "scheduler")
PARTS = {"model": "state_dict", "ema": "ema_state_dict"}
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def rows(case: Case) -> Iterator[Row]:
    """Rows of all three conversions, in the order in which a fault would show."""
    case = narrowed(case)
    with (scratch_folder() as folder,
          mock.patch.object(os, "fsync")):  # nothing here is to outlast a power cut
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
    yield from meaning_rows("to the reference", saved, content, config)
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
    yield from meaning_rows("from the reference", found, content, config)


# --- the two sides' checkpoints


def _trained(case: Case, folder: pathlib.Path) -> Checkpoint:
    """The checkpoint of a short production run, in folder/late, as if it had come later in a long one."""
    with training_on(small_source(case)):
        run.train(short_config(case, folder / "run", steps=3))
    saved = checkpoint.load(folder / "run/checkpoints/latest")
    arrays, manifest = _square(saved.arrays, case.seed), saved.manifest
    train = manifest.config["train"] | {"total_steps": 2**20, "clip_grad_norm": 0.0}  # the reference does not clip
    config = manifest.config | {"train": train}
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
    network = network_of(config.model, len(saved.manifest.classes))
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
