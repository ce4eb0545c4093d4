"""Bugs in turning checkpoints of the reference into ours and back.

The modules they are in load Torch, and are imported only where a plant is put in.
"""

import dataclasses
from functools import partial

import numpy as np

from fixmatch.optimizer import decays
from parity import weights
from parity.plants.plant import Patch, Plant


def _written(patch: Patch, change) -> None:
    """Files of change(content), of what would be written."""
    from parity import reference_checkpoint

    right = reference_checkpoint.content

    def changed(*args):
        content = right(*args)
        change(content)
        return content

    patch(reference_checkpoint, "content", changed)


def _named_for_torch(patch: Patch, change) -> None:
    """State under Torch's names, as change(state) leaves it, on the way to the reference."""
    from parity import convert

    def changed(state):
        converted = weights.paddle_to_torch(state)
        change(converted)
        return converted

    patch(convert, "paddle_to_torch", changed)


def _square_left_transposed(state: dict) -> None:
    state |= {n: np.ascontiguousarray(a.T) for n, a in state.items() if a.ndim == 2 and a.shape[0] == a.shape[1]}


def _mean_and_variance_exchanged(state: dict) -> None:
    for name in [n for n in state if n.endswith("running_mean")]:
        other = name.removesuffix("mean") + "var"
        state[name], state[other] = state[other], state[name]


def _momentum_left_transposed(patch: Patch) -> None:
    """Buffers are told by having no running statistics."""
    def change(state):
        if not any("running" in name for name in state):
            _square_left_transposed(state)

    _named_for_torch(patch, change)


def _statistics_of_the_other(content: dict) -> None:
    raw, average = content["state_dict"], content["ema_state_dict"]
    for name in [n for n in raw if n.endswith("running_mean")]:
        raw[name], average[name] = average[name] + 1e-3, raw[name]


def _average_from_raw(content: dict) -> None:
    content["ema_state_dict"] = content["state_dict"]


def _average_dropped(content: dict) -> None:
    content["ema_state_dict"] = None


def _without_batches_tracked(content: dict) -> None:
    for key in ("state_dict", "ema_state_dict"):
        content[key] = {n: t for n, t in content[key].items() if not n.endswith("num_batches_tracked")}


def _in_half(content: dict) -> None:
    for key in ("state_dict", "ema_state_dict"):
        content[key] = {n: t.half() if t.is_floating_point() else t for n, t in content[key].items()}


def _epoch_lost(content: dict) -> None:
    content["epoch"] = 0


def _schedule_at_its_start(content: dict) -> None:
    content["scheduler"] |= {"last_epoch": 0, "_step_count": 1}


def _learning_rate_at_its_start(content: dict) -> None:
    for group in content["optimizer"]["param_groups"]:
        group["lr"] = group["initial_lr"]


def _decay_in_both_groups(content: dict) -> None:
    decayed, undecayed = content["optimizer"]["param_groups"]
    undecayed["weight_decay"] = decayed["weight_decay"]


def _second_group_shifted(content: dict) -> None:
    """The momentum of each undecayed parameter goes to the next one that has any."""
    state, undecayed = content["optimizer"]["state"], content["optimizer"]["param_groups"][1]["params"]
    numbers = [number for number in undecayed if number in state]
    shifted = [state[number] for number in numbers[-1:] + numbers[:-1]]
    state |= dict(zip(numbers, shifted, strict=True))


def _numbered_without_groups(patch: Patch) -> None:
    """Parameters are counted in the network's order, as if there were one group."""
    from parity import reference_checkpoint

    def changed(network):
        names = [name for name, _ in network.named_parameters()]
        first = sum(map(decays, names))
        return [names[:first], names[first:]]

    patch(reference_checkpoint, "_names", changed)


def _momentum_not_read(patch: Patch) -> None:
    from parity import reference_checkpoint

    patch(reference_checkpoint, "momentum", lambda optimizer, network, where: {})


def _hyperparameters_not_read(patch: Patch) -> None:
    from parity import reference_checkpoint

    patch(reference_checkpoint, "hyperparameters", lambda optimizer: {})


def _average_not_read(patch: Patch) -> None:
    from parity import reference_checkpoint

    right = reference_checkpoint.read

    def changed(path):
        content = right(path)
        return content | {"ema_state_dict": content["state_dict"]}

    patch(reference_checkpoint, "read", changed)


def _prefix_kept(patch: Patch) -> None:
    from parity import reference_checkpoint

    right = reference_checkpoint.arrays

    def changed(state, where):
        found = right(state, where)
        return dict(zip(state, found.values(), strict=True))

    patch(reference_checkpoint, "arrays", changed)


def _manifest(patch: Patch, change) -> None:
    """Checkpoints of the reference's own files that say change(manifest)."""
    from parity import convert

    right = convert._manifest
    patch(convert, "_manifest", lambda *args: _changed(right(*args), change))


def _own_manifest(patch: Patch, change) -> None:
    """Checkpoints that say change(manifest), of a file made here."""
    from parity import convert

    right = convert._own_facts

    def changed(*args):
        manifest, others = right(*args)
        return _changed(manifest, change), others

    patch(convert, "_own_facts", changed)


def _changed(manifest, change):
    return dataclasses.replace(manifest, **change(manifest))


PLANTS = [
    Plant("convert-square-transposed", "convert", "a square classifier is not transposed",
          partial(_named_for_torch, change=_square_left_transposed)),
    Plant("convert-momentum-transposed", "convert", "the momentum of a square classifier is not transposed",
          _momentum_left_transposed),
    Plant("convert-mean-variance-exchanged", "convert", "running mean and variance are exchanged",
          partial(_named_for_torch, change=_mean_and_variance_exchanged)),
    Plant("convert-without-batches-tracked", "convert", "num_batches_tracked is missing from the file",
          partial(_written, change=_without_batches_tracked)),
    Plant("convert-statistics-of-the-other", "convert", "running statistics of weights and average are mixed up",
          partial(_written, change=_statistics_of_the_other)),
    Plant("convert-average-from-raw", "convert", "the raw weights are written as the average",
          partial(_written, change=_average_from_raw)),
    Plant("convert-average-dropped", "convert", "the average is left out of the file",
          partial(_written, change=_average_dropped)),
    Plant("convert-float16", "convert", "the file is in half precision", partial(_written, change=_in_half)),
    Plant("convert-epoch-lost", "convert", "the file says that it is from epoch 0",
          partial(_written, change=_epoch_lost)),
    Plant("convert-schedule-lost", "convert", "the schedule in the file is at its start",
          partial(_written, change=_schedule_at_its_start)),
    Plant("convert-lr-lost", "convert", "the learning rate in the file is that of the first step",
          partial(_written, change=_learning_rate_at_its_start)),
    Plant("convert-decay-in-both-groups", "convert", "both groups in the file are decayed",
          partial(_written, change=_decay_in_both_groups)),
    Plant("convert-second-group-shifted", "convert", "the momentum of the undecayed group is shifted by one",
          partial(_written, change=_second_group_shifted)),
    Plant("convert-momentum-by-network-order", "convert", "momentum is numbered as if there were one group",
          _numbered_without_groups),
    Plant("convert-momentum-not-read", "convert", "the reference's momentum is left out", _momentum_not_read),
    Plant("convert-hyperparameters-not-read", "convert", "the reference's decay and momentum are not taken over",
          _hyperparameters_not_read),
    Plant("convert-average-not-read", "convert", "the reference's raw weights are read as its average",
          _average_not_read),
    Plant("convert-prefix-kept", "convert", "the prefix `module.` stays in the names", _prefix_kept),
    Plant("convert-classes-sorted", "convert", "class names come back in alphabetical order",
          partial(_own_manifest, change=lambda m: {"classes": sorted(m.classes)})),
    Plant("convert-step-lost", "convert", "a checkpoint of the reference is at step 0",
          partial(_manifest, change=lambda m: {"step": 0})),
    Plant("convert-std-of-imagenet", "convert", "a checkpoint of the reference is given ImageNet's deviations",
          partial(_manifest, change=lambda m: {"std": (0.229, 0.224, 0.225)})),
]
