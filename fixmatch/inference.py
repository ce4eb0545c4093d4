"""A trained network as a function from uint8 images to probabilities, whatever kind of file it comes from.

A checkpoint is run by the network itself, an export by paddle.jit, paddle.inference or onnxruntime. Shapes: N images of
H x W pixels, K classes.
"""

import dataclasses
import hashlib
import json
import pathlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F

from fixmatch import checkpoint
from fixmatch.checkpoint import CheckpointError, load_weights
from fixmatch.config import from_dict
from fixmatch.kernels.openmp import default_threads
from fixmatch.models import build_model
from fixmatch.normalize import Normalize, to_device

FORMAT = 1  # of the facts that an export carries
FACTS = "metadata.json"  # of an export for Paddle, which is a folder
GRAPH, WEIGHTS = "inference.json", "inference.pdiparams"  # the names that paddle.jit.save gives
INPUT, OUTPUT = "images", "probabilities"

Run = Callable[[np.ndarray], np.ndarray]  # images uint8 [N, H, W, 3] -> probabilities float32 [N, K]


@dataclass(frozen=True)
class Facts:
    """What is known of a trained network; an export carries it as JSON."""

    classes: tuple[str, ...]  # K names, in the order of the probabilities
    image_size: tuple[int, int]  # height and width in pixels
    weights: str  # "ema" or "raw"
    step: int  # of the training
    dataset: str  # what it was trained on
    mean: tuple[float, ...]  # of pixels in [0, 1], a channel
    std: tuple[float, ...]

    def __str__(self) -> str:
        height, width = self.image_size
        return (f"step {self.step:,}, {'EMA' if self.weights == 'ema' else 'raw'} weights, {len(self.classes)} "
                f"classes, images of {width}x{height} pixels")

    def to_json(self) -> dict:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content, where) -> "Facts":
        """The inverse of `to_json`; `where` names the origin in the CheckpointError of content of another kind."""
        try:
            if content["format"] != FORMAT:
                raise CheckpointError(f"{where}: format {content['format']!r:.60} is not one this version reads "
                                      f"({FORMAT})")
            facts = {field.name: content[field.name] for field in dataclasses.fields(cls)}
            height, width = map(int, facts["image_size"])
            lists = {name: tuple(facts[name]) for name in ("mean", "std")}
            return cls(**facts | lists | {"classes": tuple(map(str, facts["classes"])), "image_size": (height, width)})
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{where}: was not exported by this program: it does not say its classes and the "
                                  "size of its images") from None


class Classifier(paddle.nn.Layer):
    """Images uint8 [N, H, W, 3] -> probabilities float32 [N, K]: normalization, the network in eval mode, softmax.

    Called in Python it is what evaluation computes; traced, it is what an export holds.
    """

    def __init__(self, network: paddle.nn.Layer, facts: Facts):
        super().__init__()
        self.network, self.normalize = network, Normalize(facts.mean, facts.std)
        self.register_buffer("mean", self.normalize.mean)  # so that an export takes them along
        self.register_buffer("std", self.normalize.std)
        self.eval()

    def forward(self, images):
        return F.softmax(self.network(self.normalize.of_tensor(images)))


def open_model(path: pathlib.Path, which: str = "latest", weights: str | None = None) -> tuple[str, Facts, Run]:
    """The name of the checkpoint or export, what is known of it, and what runs it.

    Args:
        path: a run folder, a checkpoint folder, or an export: the folder of one for Paddle, or an .onnx file.
        which: "latest" or "best", of a run folder.
        weights: "ema" or "raw". None takes the average of a checkpoint, and what is inside an export.

    Raises:
        CheckpointError: none of these, a damaged one, or an export of other weights.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    if path.suffix.lower() == ".onnx" or (path / FACTS).exists():
        facts, run = open_onnx(path) if path.suffix.lower() == ".onnx" else open_paddle(path)
        if weights not in (None, facts.weights):
            raise CheckpointError(f"{path}: holds the weights {facts.weights!r}, not {weights!r}; export it anew from "
                                  "its run")
        return str(path), facts, run
    folder, facts, classifier = open_checkpoint(path, which, weights or "ema")
    return str(folder), facts, in_python(classifier)


def open_checkpoint(path: pathlib.Path, which: str, weights: str) -> tuple[pathlib.Path, Facts, Classifier]:
    """The checkpoint's folder, what is known of it, and its network; Paddle's random numbers stay as they were."""
    folder = checkpoint.find(path, which)
    saved = checkpoint.load(folder)
    manifest = saved.manifest
    if manifest.image_size is None:
        raise CheckpointError(f"{folder}: does not say the size of its images; write \"image_size\": [height, width] "
                              "into its checkpoint.json")
    config = from_dict(manifest.config, f"{folder}/checkpoint.json")
    facts = Facts(tuple(manifest.classes), tuple(manifest.image_size), weights, manifest.step, manifest.dataset,
                  tuple(manifest.mean), tuple(manifest.std))
    generator = paddle.get_rng_state()
    network = build_model(num_classes=len(facts.classes), **config.model.network())
    paddle.set_rng_state(generator)
    load_weights(network, saved.part("ema" if weights == "ema" else "model"))
    return folder, facts, Classifier(network, facts)


def in_python(classifier: Classifier) -> Run:
    @paddle.no_grad()
    def run(images):
        return classifier(to_device(images)).numpy()
    return run


def open_paddle(folder: pathlib.Path) -> tuple[Facts, Run]:
    """An export for Paddle, verified by the SHA-256 of its files. Raises CheckpointError."""
    try:
        content = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        facts = Facts.from_json(content, folder / FACTS)
        for name in (GRAPH, WEIGHTS):
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != content["files"][name]:
                raise CheckpointError(f"{folder / name}: damaged: its SHA-256 is not the one in {FACTS}")
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / FACTS}: damaged: {error}") from None
    return facts, with_jit(folder)


def with_jit(folder: pathlib.Path) -> Run:
    """Runs an export for Paddle by paddle.jit, one thread at a time: two at once would wait for each other for ever."""
    layer, lock = paddle.jit.load(str(folder / pathlib.Path(GRAPH).stem)), threading.Lock()

    @paddle.no_grad()
    def run(images):
        with lock:
            return layer(to_device(images)).numpy()
    return run


def with_predictor(folder: pathlib.Path) -> Run:
    """Runs an export for Paddle by paddle.inference in its default configuration."""
    from paddle import inference

    config = inference.Config(str(folder / GRAPH), str(folder / WEIGHTS))
    config.disable_glog_info()
    predictor = inference.create_predictor(config)
    source = predictor.get_input_handle(predictor.get_input_names()[0])
    result = predictor.get_output_handle(predictor.get_output_names()[0])

    def run(images):
        source.reshape(images.shape)
        source.copy_from_cpu(images)
        predictor.run()
        return result.copy_to_cpu()
    return run


def open_onnx(path: pathlib.Path) -> tuple[Facts, Run]:
    """An export to ONNX. Raises CheckpointError, or ModuleNotFoundError where onnxruntime is not installed."""
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return with_onnxruntime(blob, path)


def with_onnxruntime(blob: bytes, where) -> tuple[Facts, Run]:
    """What an ONNX file of this content says of itself, and what runs it. Raises CheckpointError, naming `where`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = default_threads()  # by itself it would take every core, and wait on it in a loop
    options.log_severity_level = 3  # errors; the warnings are about how paddle2onnx writes its graphs
    usable = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in usable]
    try:
        session = onnxruntime.InferenceSession(blob, options, providers)
        told = session.get_modelmeta().custom_metadata_map
    except Exception as error:  # onnxruntime has an exception for each kind of damage, without a common class
        raise CheckpointError(f"{where}: not an ONNX model that can be run: {' '.join(str(error).split())[:200]}"
                              ) from None
    try:
        facts = {name: json.loads(text) for name, text in told.items()}
    except ValueError:  # of another program
        facts = {}
    return Facts.from_json(facts, where), lambda images: session.run([OUTPUT], {INPUT: images})[0]
