"""A checkpoint as a model for Paddle inference or ONNX, which needs nothing of this package.

    images         uint8 [N, H, W, 3] in RGB, any N; H and W are the run's image size
    probabilities  float32 [N, K]

Normalization and softmax are inside, and so are the class names, as metadata. A model is loaded again by the runtimes
that will run it, and compared with the checkpoint, before it takes its name.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import paddle

from fixmatch import inference
from fixmatch.checkpoint import load
from fixmatch.config import ConfigError, from_dict
from fixmatch.export_check import Comparison, choose_sample, in_batches
from fixmatch.files import replace_folder, write_atomic
from fixmatch.inference import FACTS, GRAPH, INPUT, OUTPUT, WEIGHTS, Classifier, Facts

OPSET = 17  # of ONNX; onnxruntime runs it from 1.12 on
_GRAPH_BYTES = 2**20  # more than the graph and the metadata of any network here take


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the checkpoint."""

    path: pathlib.Path
    checkpoint: pathlib.Path
    facts: Facts
    comparison: Comparison
    found: dict[str, np.ndarray]  # runtime -> probabilities float32 [N, K] of the comparison's sample


def export(path: pathlib.Path, out: pathlib.Path, kind: str | None = None, which: str = "latest", weights: str = "ema",
           overrides: Sequence[str] = ()) -> Exported:
    """Writes `out`, whole or not at all.

    Args:
        path: a run folder or a checkpoint folder.
        out: an .onnx file, or the folder of a model for Paddle; an earlier export there is replaced.
        kind: "paddle" or "onnx"; None goes by the name of `out`.
        which: "latest" or "best", of a run folder.
        weights: "ema" or "raw".
        overrides: `section.key=value` settings to change, such as data.root, where the test images are.

    Raises:
        ConfigError: `out` is not a name for this kind, or holds something else; an override that cannot be.
        CheckpointError: no checkpoint, or a damaged one.
        SelfCheckFailed: the model does not compute what the checkpoint does; nothing was written.
        OSError: the disk is full, say; nothing was written.
        ModuleNotFoundError: a package of the extra `onnx` is not installed.
    """
    kind = _check_target(out, kind)
    folder, facts, classifier = inference.open_checkpoint(path, which, weights)
    config = from_dict(load(folder).manifest.config, f"{folder}/checkpoint.json", overrides)
    sample = choose_sample(config, facts)
    expected = in_batches(inference.in_python(classifier), sample.images)
    write = _write_onnx if kind == "onnx" else _write_paddle
    comparison = Comparison(out, sample, expected)
    return Exported(out, folder, facts, comparison, write(out, classifier, facts, comparison))


def _check_target(out: pathlib.Path, kind: str | None) -> str:
    """The kind of export. Raises ConfigError before anything is computed."""
    is_onnx = out.suffix.lower() == ".onnx"
    if kind is None and not is_onnx and re.match(r"\.[^\W\d_]", out.suffix):  # "v1.2" is a name like any other
        raise ConfigError(f"{out}: no model of a kind {out.suffix} is written here, but .onnx files and folders for "
                          "Paddle; choose another name, or say --format paddle for a folder of this name")
    kind = kind or ("onnx" if is_onnx else "paddle")
    if is_onnx != (kind == "onnx"):
        raise ConfigError(f"{out}: " + ("an ONNX model is a file whose name ends in .onnx" if kind == "onnx" else
                                        "a model for Paddle is a folder, whose name cannot end in .onnx"))
    if kind == "onnx" and out.is_dir():
        raise ConfigError(f"{out}: is a folder; choose another name")
    if kind == "paddle" and out.exists() and not (out / FACTS).exists() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out}: holds something else than an export; choose another name")
    return kind


# --- what is written


def _write_paddle(out: pathlib.Path, classifier: Classifier, facts: Facts, comparison: Comparison) -> dict:
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir()
        with _silent():
            _trace(folder, classifier, facts, out)
            runs = {"paddle.jit": inference.with_jit(folder), "paddle.inference": inference.with_predictor(folder)}
            found = {name: comparison.with_run(name, run) for name, run in runs.items()}
        files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (GRAPH, WEIGHTS)}
        content = {**facts.to_json(), "compared": comparison.to_json(found), "files": files}
        write_atomic(folder / FACTS, json.dumps(content, indent=1) + "\n")
        replace_folder(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _write_onnx(out: pathlib.Path, classifier: Classifier, facts: Facts, comparison: Comparison) -> dict:
    import onnx
    import paddle2onnx

    with tempfile.TemporaryDirectory() as place, _silent():
        folder = pathlib.Path(place)
        _trace(folder, classifier, facts, folder)
        # The default of optimize_tool would install a package from a foreign index while it runs.
        model = onnx.load_model_from_string(paddle2onnx.export(str(folder / GRAPH), str(folder / WEIGHTS),
                                                               opset_version=OPSET, optimize_tool="None"))
    _tidy(model.graph)
    _describe(model, facts.to_json())
    run = inference.with_onnxruntime(model.SerializeToString(), out)[1]
    found = {"onnxruntime": comparison.with_run("onnxruntime", run)}
    _describe(model, {"compared": comparison.to_json(found)})
    write_atomic(out, model.SerializeToString())
    return found


def _trace(folder: pathlib.Path, classifier: Classifier, facts: Facts, where: pathlib.Path) -> None:
    """Writes the graph and its weights, for any number of images.

    Raises OSError, which names `where`, if there is no room for them.
    """
    _try_room(folder, classifier, where)
    images = paddle.static.InputSpec([None, *facts.image_size, 3], "uint8", INPUT)
    paddle.jit.save(classifier, str(folder / pathlib.Path(GRAPH).stem), input_spec=[images])


def _try_room(folder: pathlib.Path, classifier: Classifier, where: pathlib.Path) -> None:
    """Writes as much as the model will take, and removes it again.

    On a full disk Paddle would write a part of the weights, without a word, and load it again without one, too.
    """
    trial = folder / "trial"
    try:
        with open(trial, "wb") as file:
            for array in classifier.state_dict().values():
                file.write(array.numpy().tobytes())
            file.write(os.urandom(_GRAPH_BYTES))  # some disks would keep zeros in no room at all
            file.flush()
            os.fsync(file.fileno())
        trial.unlink()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; make room there for the model", str(where)) from None


def _tidy(graph) -> None:
    """Calls the probabilities of an ONNX graph OUTPUT, and drops constants that nothing uses.

    paddle2onnx gives them a name that says nothing, and onnxruntime warns of each such constant.
    """
    old = graph.output[0].name
    used = {name for node in graph.node for name in node.input}
    for node in [n for n in graph.node if n.op_type == "Constant" and n.output[0] not in used]:
        graph.node.remove(node)
    graph.output[0].name = OUTPUT
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = OUTPUT


def _describe(model, facts: dict) -> None:
    """Adds facts to the metadata of an ONNX model, each value as JSON."""
    for name, value in facts.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, json.dumps(value)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps from the terminal what Paddle and paddle2onnx print there from C++ and cannot be told not to."""
    sys.stdout.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with open(os.devnull, "wb") as nowhere:
            for descriptor in (1, 2):
                os.dup2(nowhere.fileno(), descriptor)
        yield
    finally:
        sys.stdout.flush()
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
