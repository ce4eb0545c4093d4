"""Checkpoints of the PyTorch reference into ours and back, verified by comparing logits.

Weights, running statistics, their average and the momentum are converted, bit for bit, with the step and the class
names, so that either side can evaluate the other's file or go on from it. What the reference does not save is kept in
its file under a key of ours. A bare state dict is taken as well.
"""

import io
import pathlib
import re

import numpy as np
import paddle
import torch

import fixmatch.models
from fixmatch import checkpoint
from fixmatch.checkpoint import CheckpointError, Manifest, load_weights
from fixmatch.cli import Parser
from fixmatch.config import Config, DataConfig, ModelConfig, RunConfig, TrainConfig, from_dict, to_dict
from fixmatch.data import NUM_CLASSES
from fixmatch.data.sources.cifar import statistics
from fixmatch.files import write_atomic
from parity import reference_checkpoint as theirs
from parity.reference_checkpoint import ConvertError
from parity.subject import precision, without_initial_values
from parity.weights import paddle_to_torch, torch_to_paddle

TOLERANCE = 1e-9  # relative, of logits in float64
SUFFIXES = (".pth", ".pt", ".tar")  # of what Torch writes

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


def main(argv: list[str]) -> int:
    parser = Parser(
        "convert", description="Turn a .pth or .pth.tar of the PyTorch reference into a checkpoint folder, or "
        "a run or checkpoint folder into a .pth.tar.")
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="of a run folder")
    parser.add_argument("--dataset", choices=("cifar10", "cifar100"), help="what the reference was trained on "
                        "(default: what a file made here says, else cifar10 or cifar100 by its number of classes)")
    args = parser.parse_args(argv)
    if args.source.is_dir():
        print(to_reference(args.source, args.target, args.which))
    else:
        print(from_reference(args.source, args.target, args.dataset))
    return 0


def from_reference(source: pathlib.Path, target: pathlib.Path, dataset: str | None = None) -> str:
    """Reads a Torch file with weights_only and writes a checkpoint folder. Raises ConvertError."""
    content = theirs.read(source)
    raw = theirs.arrays(content["state_dict"], f"{source}: state_dict")
    average = content.get("ema_state_dict")  # None where the reference trained without
    average = raw if average is None else theirs.arrays(average, f"{source}: ema_state_dict")
    model, num_classes = infer_model(raw, source)
    parts = {"model": torch_to_paddle(raw), "ema": torch_to_paddle(average)}
    worst = verify(model, num_classes, [(raw, parts["model"]), (average, parts["ema"])], source)
    buffers, optim, note = _momentum(content.get("optimizer"), model, num_classes, f"{source}: optimizer")
    parts["momentum"] = torch_to_paddle(buffers)
    if theirs.OWN in content and dataset is None:
        manifest, others = _own_facts(content[theirs.OWN], num_classes, source)
    else:
        manifest, others = _manifest(content, model, num_classes, optim, source, dataset), {}
    arrays = {f"{part}/{n}": a for part, state in parts.items() for n, a in state.items()}
    checkpoint.save(target, {**others, **arrays}, manifest)
    return f"{target}: {_describe(model, worst)}, {note}"


def to_reference(source: pathlib.Path, target: pathlib.Path, which: str = "latest") -> str:
    """Writes a .pth.tar with the reference's keys from a run or checkpoint folder. Raises CheckpointError."""
    if target.suffix.lower() not in SUFFIXES:
        raise ConvertError(f"{target}: what is written is a Torch file, so its name must end in .pth, .pt or .pth.tar")
    saved = checkpoint.load(checkpoint.find(source, which))
    try:
        raw, average, buffers = (paddle_to_torch(saved.part(part)) for part in ("model", "ema", "momentum"))
    except ValueError as error:
        raise ConvertError(f"{source}: {error}") from None
    model, num_classes = infer_model(raw, source)
    worst = verify(model, num_classes, [(raw, saved.part("model")), (average, saved.part("ema"))], source)
    config, blob = from_dict(saved.manifest.config, f"{source}/checkpoint.json"), io.BytesIO()
    network = theirs.network_of(model, num_classes)
    others = {name: a for name, a in saved.arrays.items() if name.split("/")[0] not in ("model", "ema", "momentum")}
    torch.save(theirs.content(raw, average, buffers, others, network, config, saved.manifest), blob)
    write_atomic(target, blob.getvalue())
    return f"{target}: {_describe(model, worst)}, momentum of {len(buffers)} parameters"


def _describe(model: ModelConfig, worst: float) -> str:
    return f"{model.arch} depth {model.depth} width {model.width}, logits agree to {worst:.1e}"


def _momentum(optimizer, model: ModelConfig, num_classes: int, where: str) -> tuple[dict, dict, str]:
    """(buffers, hyper-parameters, what to say of them); an optimizer of another kind is left out, and said to be."""
    if optimizer is None:
        return {}, {}, "without momentum: the file has none"
    try:
        buffers = theirs.momentum(optimizer, theirs.network_of(model, num_classes), where)
    except ConvertError as error:
        return {}, {}, f"without momentum: {error}"
    return buffers, theirs.hyperparameters(optimizer), f"momentum of {len(buffers)} parameters"


def _own_facts(facts, num_classes: int, source: pathlib.Path) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Manifest, and the arrays that the reference does not know, of the checkpoint that became `source`."""
    try:
        manifest = Manifest.from_json(facts["manifest"])
        others = {str(name): tensor.numpy() for name, tensor in facts["arrays"].items()}
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConvertError(f"{source}: {theirs.OWN}: damaged: {error}") from None
    if len(manifest.classes) != num_classes:
        raise ConvertError(f"{source}: its classifier has {num_classes} classes, but {theirs.OWN} names "
                           f"{len(manifest.classes)}")
    return manifest, others


def _manifest(content: dict, model: ModelConfig, num_classes: int, optim: dict, source: pathlib.Path,
              dataset: str | None) -> Manifest:
    """Of a run of the reference, which does not say what data it was trained on. Raises ConvertError, ConfigError."""
    name = dataset or next((n for n, k in NUM_CLASSES.items() if k == num_classes and n.startswith("cifar")), None)
    if name is None or NUM_CLASSES[name] != num_classes:
        raise ConvertError(f"{source}: its classifier has {num_classes} classes, which is not {name or 'CIFAR'}")
    mean, std = statistics(name)
    step = theirs.steps(content)
    config = to_dict(Config(run=RunConfig(name=source.stem), data=DataConfig(name=name), model=model,
                            train=TrainConfig(total_steps=max(step, TrainConfig.total_steps))))
    config["optim"] |= optim
    origin = {"converted_from": source.name, "epoch": theirs.number(content.get("epoch"))}
    return Manifest(step, to_dict(from_dict(config, f"{source}: optimizer")), name, tuple(_CLASSES[name].split()), mean,
                    std, image_size=(32, 32), provenance=origin)


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


def verify(model: ModelConfig, num_classes: int, states: list[tuple[dict, dict]], where) -> float:
    """Largest relative difference of the two frameworks' logits, in float64 and eval mode. Raises ConvertError.

    Args:
        states: pairs of the same state under Torch's names and under Paddle's.
    """
    images = np.random.default_rng(0).standard_normal((4, 3, 8, 8))  # small: only the weights matter
    shape, worst = model.network(), 0.0
    with precision("float64"), without_initial_values():
        ours = fixmatch.models.build_model(num_classes=num_classes, **shape)
    mirror = theirs.network_of(model, num_classes).double()
    ours.eval()
    mirror.eval()
    for torch_state, paddle_state in states:
        load_weights(ours, {n: a.astype(np.float64) for n, a in paddle_state.items()})
        try:
            mirror.load_state_dict({n: torch.from_numpy(np.asarray(a)) for n, a in torch_state.items()})
        except RuntimeError as error:
            raise ConvertError(f"{where}: does not fit {model.arch}: {' '.join(str(error).split())[:200]}") from None
        with torch.no_grad(), paddle.no_grad():
            expected, found = mirror(torch.from_numpy(images)).numpy(), ours(paddle.to_tensor(images)).numpy()
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not error < TOLERANCE:  # so that NaN is refused, too
            raise ConvertError(f"{where}: the converted logits differ by {error:.1e}; nothing was written")
        worst = max(worst, error)
    return worst


def _count(state: dict, pattern: str) -> int:
    return len({m[1] for m in (re.fullmatch(pattern, name) for name in state) if m})
