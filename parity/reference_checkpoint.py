"""The file that the reference saves: read without executing anything, and made so that the reference resumes from it.

A .pth.tar is {"epoch", "state_dict", "ema_state_dict", "acc", "best_acc", "optimizer", "scheduler"}. The optimizer's
state knows parameters by their number: first those that are decayed, then the others, each in the network's order.
Reference: kekmodel/FixMatch-pytorch, train.py, save_checkpoint and --resume.
"""

import json
import pathlib
import pickle

import numpy as np
import torch

from fixmatch.checkpoint import CheckpointError, Manifest
from fixmatch.config import Config
from parity.mirror.models import build_model
from parity.mirror.optimizer import TwoGroupSGD
from parity.mirror.schedule import build_scheduler, cosine_7_16
from parity.reference import without_initial_values
from parity.weights import torch_to_paddle

OWN = "fixmatch_paddle"  # the key of what the reference does not know: {"manifest", "arrays": of CTAugment, say}
EPOCH = 1024  # steps; the reference's --eval-step


class ConvertError(CheckpointError):
    """A file that cannot be converted; the message is one line."""


def read(path: pathlib.Path) -> dict:
    """The content of a Torch file of plain tensors; a bare state dict as {"state_dict": it}. Raises ConvertError."""
    scalar = np.float64(0).__reduce__()[0]  # best_acc may be a numpy number, which weights_only refuses by default
    allowed = [(scalar, "numpy.core.multiarray.scalar"), scalar, np.dtype, np.dtypes.Float64DType,
               np.dtypes.Float32DType]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConvertError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConvertError(f"{path}: not a Torch checkpoint of plain tensors: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ConvertError(f"{path}: holds {type(content).__name__}, not a state dict")
    return content if "state_dict" in content else {"state_dict": content}


def arrays(state, where: str) -> dict[str, np.ndarray]:
    """The arrays of a state dict, without the prefix of a data-parallel wrapper. Raises ConvertError."""
    if not isinstance(state, dict) or not all(
            isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in state.items()):
        raise ConvertError(f"{where}: not a dict of tensors")
    try:
        found = {name.removeprefix("module."): _array(t) for name, t in state.items()}
        torch_to_paddle(found)
    except (ValueError, TypeError, RuntimeError) as error:  # such as a sparse tensor
        raise ConvertError(f"{where}: {error}") from None
    return found


def _array(tensor) -> np.ndarray:
    """In the precision of the trainer: a file in half or double precision is taken as well."""
    return (tensor.detach().float() if tensor.is_floating_point() else tensor).numpy()


def steps(content: dict) -> int:
    """Finished optimizer steps: what the schedule has counted, or else the finished epochs of 1024."""
    scheduler = content.get("scheduler")
    counted = scheduler.get("last_epoch") if isinstance(scheduler, dict) else None
    if isinstance(counted, int):
        return counted
    return (number(content.get("epoch")) or 0) * EPOCH


def number(value) -> int | None:
    return int(value) if isinstance(value, (int, float)) else None


def momentum(optimizer, network, where: str) -> dict[str, np.ndarray]:
    """Momentum buffers by parameter name. Raises ConvertError where `optimizer` is not the state of the reference's.

    Args:
        network: the mirror's, which has its parameters in the reference's order.
    """
    try:
        groups, state = optimizer["param_groups"], optimizer["state"]
        names = _names(network)
        if [len(group["params"]) for group in groups] != [len(of_group) for of_group in names]:
            raise ConvertError(f"{where}: not the reference's SGD with a decayed and an undecayed group")
        buffers = {name: state.get(index, {}).get("momentum_buffer") for group, of_group in zip(
            groups, names, strict=True) for index, name in zip(group["params"], of_group, strict=True)}
        found = {name: _array(tensor) for name, tensor in buffers.items() if tensor is not None}
    except (KeyError, TypeError, AttributeError):
        raise ConvertError(f"{where}: not the state of a Torch SGD") from None
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    for name, array in found.items():
        if array.shape != shapes[name]:
            raise ConvertError(f"{where}: the momentum of {name} has shape {array.shape}, not {shapes[name]}")
    return found


def hyperparameters(optimizer: dict) -> dict:
    """Those of `optim` in our configuration, of an optimizer that `momentum` has read."""
    decayed = optimizer["param_groups"][0]
    return {name: decayed[key] for name, key in (
        ("lr", "initial_lr"), ("momentum", "momentum"), ("nesterov", "nesterov"), ("weight_decay", "weight_decay"))
            if key in decayed}


def network_of(model, num_classes: int):
    """The mirror's network, for the names, shapes and order of its tensors, whose values nobody has set."""
    with without_initial_values():
        return build_model(num_classes=num_classes, **model.network())


def content(raw: dict, average: dict, buffers: dict, others: dict, network, config: Config, manifest: Manifest) -> dict:
    """What the reference would have saved.

    Args:
        raw, average, buffers: arrays under Torch's names: of the weights, of their average, of the momentum.
        others: the other arrays of the checkpoint, which the reference does not know.
        network: the mirror's.
        config: of the run.
        manifest: of the checkpoint.
    """
    optimizer, scheduler = _training(network, buffers, config, manifest.step)
    top1 = manifest.history["ema"] or [0.0]
    own = {"manifest": json.loads(json.dumps(manifest.to_json())),
           "arrays": {name: torch.from_numpy(np.array(array)) for name, array in others.items()}}
    return {"epoch": manifest.step // EPOCH, "state_dict": _tensors(raw, network),
            "ema_state_dict": _tensors(average, network), "acc": top1[-1], "best_acc": max(top1),
            "optimizer": optimizer, "scheduler": scheduler, OWN: own}


def _tensors(arrays: dict[str, np.ndarray], network) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(arrays[name])) for name in network.state_dict()}


def _training(network, buffers: dict[str, np.ndarray], config: Config, step: int) -> tuple[dict, dict]:
    """The states of optimizer and schedule after `step` steps."""
    optim = config.optim
    optimizer = TwoGroupSGD(network, optim.lr, optim.momentum, optim.weight_decay, optim.nesterov)
    scheduler = build_scheduler(optimizer, config.train.total_steps, optim.warmup_steps)
    state = optimizer.state_dict()
    lr = optim.lr * cosine_7_16(step, config.train.total_steps, optim.warmup_steps)
    for group, names in zip(state["param_groups"], _names(network), strict=True):
        group["lr"] = lr
        state["state"] |= {index: {"momentum_buffer": torch.from_numpy(np.array(buffers[name]))}
                           for index, name in zip(group["params"], names, strict=True) if name in buffers}
    counted = {"last_epoch": step, "_step_count": step + 1, "_last_lr": [lr] * len(state["param_groups"])}
    return state, scheduler.state_dict() | counted


def _names(network) -> list[list[str]]:
    """Of the parameters of each group, in the order in which the optimizer's state counts them."""
    optimizer = TwoGroupSGD(network, 1.0)
    return [[optimizer.names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
