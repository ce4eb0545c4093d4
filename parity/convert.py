"""Checkpoints of the PyTorch reference into ours and back, verified by comparing logits.

The reference saves {"state_dict", "ema_state_dict", "epoch", ...}; a bare state dict is taken as well. Weights and
their average are converted, the optimizer's state is not: a converted checkpoint is for evaluation and other tools.
"""

import dataclasses
import io
import pathlib
import pickle
import re

import numpy as np
import paddle
import torch

import fixmatch.models
import parity.mirror.models
from fixmatch import checkpoint
from fixmatch.checkpoint import load_weights
from fixmatch.cli import Parser, guarded
from fixmatch.config import Config, DataConfig, ModelConfig, RunConfig, to_dict
from fixmatch.data import NUM_CLASSES
from fixmatch.data.sources.cifar import statistics
from fixmatch.files import write_atomic
from parity.weights import paddle_to_torch, torch_to_paddle

TOLERANCE = 1e-9  # relative, of logits in float64

# The names in the archives, in label order; evaluation compares them with those of the data.
_CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
                "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup "
                "dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower "
                "leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange "
                "orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit "
                "raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel "
                "streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip "
                "turtle wardrobe whale willow_tree wolf woman worm",
}


class ConvertError(checkpoint.CheckpointError):
    """A file that cannot be converted; the message is one line."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="convert.py", description="Turn a .pth or .pth.tar of the PyTorch reference into a checkpoint folder, or "
        "a run or checkpoint folder into a .pth.tar.")
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="of a run folder")
    parser.add_argument("--dataset", choices=("cifar10", "cifar100"), help="what the reference was trained on "
                        "(default: cifar10 or cifar100, by its number of classes)")
    args = parser.parse_args(argv)
    return guarded(lambda: _convert(args))


def _convert(args) -> int:
    if args.source.is_dir():
        print(to_reference(args.source, args.target, args.which))
    else:
        print(from_reference(args.source, args.target, args.dataset))
    return 0


def from_reference(source: pathlib.Path, target: pathlib.Path, dataset: str | None = None) -> str:
    """Reads a Torch file with weights_only and writes a checkpoint folder. Raises ConvertError."""
    content = _torch_load(source)
    if "state_dict" not in content:
        content = {"state_dict": content}
    raw = _arrays(content["state_dict"], f"{source}: state_dict")
    average = _arrays(content["ema_state_dict"], f"{source}: ema_state_dict") if "ema_state_dict" in content else raw
    model, num_classes = infer_model(raw, source)
    name = dataset or next((n for n, k in NUM_CLASSES.items() if k == num_classes and n.startswith("cifar")), None)
    if name is None or NUM_CLASSES[name] != num_classes:
        raise ConvertError(f"{source}: its classifier has {num_classes} classes, which is not {name or 'CIFAR'}")
    worst = max(verify(model, num_classes, state, torch_to_paddle(state), source) for state in (raw, average))
    arrays = {f"{part}/{n}": a for part, state in (("model", raw), ("ema", average))
              for n, a in torch_to_paddle(state).items()}
    mean, std = statistics(name)
    config = Config(run=RunConfig(name=source.stem), data=DataConfig(name=name), model=model)
    origin = {"converted_from": source.name, "epoch": _number(content.get("epoch"))}
    checkpoint.save(target, arrays, checkpoint.Manifest(
        step=0, config=to_dict(config), dataset=name, classes=tuple(_CLASSES[name].split()), mean=mean, std=std,
        provenance=origin))
    return f"{target}: {model.arch} depth {model.depth} width {model.width}, logits agree to {worst:.1e}"


def to_reference(source: pathlib.Path, target: pathlib.Path, which: str = "latest") -> str:
    """Writes a .pth.tar with the reference's keys from a run or checkpoint folder. Raises CheckpointError."""
    saved = checkpoint.load(checkpoint.find(source, which))
    parts = {"state_dict": "model", "ema_state_dict": "ema"}
    try:
        states = {key: paddle_to_torch(saved.part(part)) for key, part in parts.items()}
    except ValueError as error:
        raise ConvertError(f"{source}: {error}") from None
    model, num_classes = infer_model(states["state_dict"], source)
    worst = max(verify(model, num_classes, state, torch_to_paddle(state), source) for state in states.values())
    blob = io.BytesIO()
    torch.save({"epoch": saved.manifest.step // 1024,
                **{key: {n: torch.from_numpy(a) for n, a in state.items()} for key, state in states.items()}}, blob)
    write_atomic(target, blob.getvalue())
    return f"{target}: {model.arch} depth {model.depth} width {model.width}, logits agree to {worst:.1e}"


def infer_model(state: dict[str, np.ndarray], where) -> tuple[ModelConfig, int]:
    """Architecture and number of classes from the names and shapes of a Torch state dict. Raises ConvertError."""
    try:
        if "fc.weight" in state:
            blocks = _count(state, r"block1\.layer\.(\d+)\.conv1\.weight")
            width = state["block1.layer.0.conv1.weight"].shape[0] // 16
            return ModelConfig("wideresnet", 6 * blocks + 4, width), state["fc.weight"].shape[0]
        blocks = _count(state, r"stage_1\.stage_1_bottleneck_(\d+)\.conv_conv\.weight")
        inner, of_group = state["stage_1.stage_1_bottleneck_0.conv_conv.weight"].shape[:2]
        return (ModelConfig("resnext", 9 * blocks + 2, of_group, inner // of_group),
                state["classifier.weight"].shape[0])
    except (KeyError, ZeroDivisionError, IndexError):
        raise ConvertError(f"{where}: holds neither a WideResNet nor a ResNeXt of the reference") from None


def verify(model: ModelConfig, num_classes: int, torch_state: dict, paddle_state: dict, where) -> float:
    """Largest relative difference of the two frameworks' logits, in float64 and eval mode. Raises ConvertError."""
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32))
    shape = dataclasses.asdict(model)
    before = paddle.get_default_dtype()
    try:
        paddle.set_default_dtype("float64")
        ours = fixmatch.models.build_model(num_classes=num_classes, **shape)
        load_weights(ours, {n: a.astype(np.float64) for n, a in paddle_state.items()})
    finally:
        paddle.set_default_dtype(before)
    theirs = parity.mirror.models.build_model(num_classes=num_classes, **shape).double()
    try:
        theirs.load_state_dict({n: torch.from_numpy(np.asarray(a)) for n, a in torch_state.items()})
    except RuntimeError as error:
        raise ConvertError(f"{where}: does not fit {model.arch}: {' '.join(str(error).split())[:200]}") from None
    ours.eval()
    theirs.eval()
    with torch.no_grad(), paddle.no_grad():
        expected, found = theirs(torch.from_numpy(images)).numpy(), ours(paddle.to_tensor(images)).numpy()
    worst = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not worst < TOLERANCE:
        raise ConvertError(f"{where}: the converted logits differ by {worst:.1e}; nothing was written")
    return worst


def _torch_load(path: pathlib.Path) -> dict:
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
    return content


def _arrays(state, where: str) -> dict[str, np.ndarray]:
    if not isinstance(state, dict) or not all(
            isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in state.items()):
        raise ConvertError(f"{where}: not a dict of tensors")
    try:
        arrays = {name.removeprefix("module."): t.detach().numpy() for name, t in state.items()}
        torch_to_paddle(arrays)
    except (ValueError, TypeError, RuntimeError) as error:  # such as bfloat16, which NumPy does not have
        raise ConvertError(f"{where}: {error}") from None
    return arrays


def _count(state: dict, pattern: str) -> int:
    return len({m[1] for m in (re.fullmatch(pattern, name) for name in state) if m})


def _number(value):
    return int(value) if isinstance(value, (int, float)) else None
