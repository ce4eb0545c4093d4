"""Stage `reference`: production, and the mirror where Torch is there, against figures of the reference itself.

parity/goldens/reference/ holds figures only, computed by kekmodel/FixMatch-pytorch's own code (its networks, ModelEMA,
interleave, schedule, loss, torch SGD with two groups, RandAugmentMC operations and CutoutAbs) in float64 on one thread,
under Torch and Pillow 13. Its resnext.py, which does not parse, was mended to plain batch norm. What Paddle stores as
float32 (momentum, weight decay, batch norm's epsilon) was given to it as such. No mirror took part in them, so what
production and mirror misunderstand alike fails here.

Rows are named FILE/KEY after the keys of the files, those of the mirror mirror/FILE/KEY.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from unittest import mock

import numpy as np

from fixmatch.checkpoint import CheckpointError
from fixmatch.config import Config, EMAConfig, ModelConfig, OptimConfig, SSLConfig, TrainConfig
from fixmatch.data.augment import randaugment
from fixmatch.data.loader import Batch
from parity import published
from parity.case import Case
from parity.compare import Row, compare_tensor, float64_gate
from parity.goldens import GoldenError
from parity.reference_production import Production

FOLDER = pathlib.Path(__file__).parent / "goldens" / "reference"
RULES = "schedule-randaugment"
NETWORKS = {
    "wideresnet-16-2": ModelConfig("wideresnet", 16, 2),
    "wideresnet-10-1-warmup": ModelConfig("wideresnet", 10, 1),
    "resnext-20-4x4d": ModelConfig("resnext", 20, 4, 4),
}
# What a self-check has time for: networks, and whether all of their steps and an evaluation, or the forward pass of the
# first step alone. The small WideResNet is always there, since it alone has a temperature, a lambda_u and a warm-up
# that make a difference, and shows what comes with later steps.
LIGHT = {"wideresnet": {"wideresnet-10-1-warmup": True},
         "resnext": {"wideresnet-10-1-warmup": True, "resnext-20-4x4d": False}}
_SHA256 = {
    "resnext-20-4x4d": "ab54d82134ae350c25995227aedd5994bdfa5609294e5d526867c84dbd0efb3d",
    "schedule-randaugment": "82ca0be010d633a45cdabe5919bdcc5cb53983fadfd3d40cfd5c98fecee5e125",
    "wideresnet-10-1-warmup": "28cf82d26beb07510cccc22715dfd5c2225c4a590edce3215482f4946ebccc6f",
    "wideresnet-16-2": "c96160eeb489205f6d5ff0be3fe9ab478c53659c808ff406871a5225399b9acc",
}
_ORDER = ("lr", "logits", "confidence", "pseudo_labels", "mask", "loss_x", "loss_u", "loss", "gradient", "momentum",
          "state", "ema")  # of diagnosis


def rows(case: Case, thorough: bool = True) -> Iterator[Row]:
    """Every figure of the files; without `thorough` those of LIGHT for the case's architecture, production only.

    Raises GoldenError where a file is missing or is not the recorded one; all are verified either way.
    """
    files = {name: read(name) for name in _SHA256}
    networks = dict.fromkeys(NETWORKS, True) if thorough else LIGHT[case.config.model.arch]
    for side in _sides(thorough):
        yield from _rules(side, files[RULES])
        for name, whole in networks.items():
            yield from _network(side, name, files[name], whole)


def read(name: str) -> Mapping[str, np.ndarray]:
    """The figures of one file by key, each unpacked when it is asked for. Raises GoldenError."""
    path = FOLDER / f"{name}.npz"
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise GoldenError(f"{path}: the reference's figures cannot be read: {error.strerror}; install again") from None
    if hashlib.sha256(blob).hexdigest() != _SHA256[name]:
        raise GoldenError(f"{path}: damaged, its SHA-256 is not that of the reference's figures; install again")
    return np.load(io.BytesIO(blob), allow_pickle=False)


def _sides(thorough: bool) -> Iterator[Production]:
    yield Production()
    if thorough and importlib.util.find_spec("torch") is not None:
        from parity.reference_mirror import Mirror

        yield Mirror()


def _build(side: Production, config: Config, settings: dict):
    """A state as `build_state` makes it, but for the first network's weights: they are loaded as soon as it is built.

    The average is left as it is built. That it starts from the network's weights is for production to see to.
    """
    build_model, built = side.algorithm.build_model, []

    def loaded(**shape):
        model = build_model(**shape)
        if not built:
            side.load(model, settings["head"])
        built.append(model)
        return model

    side.algorithm.build_model = loaded
    try:
        return side.algorithm.build_state(config, settings["classes"], *published.STATISTICS["cifar10"])
    finally:
        side.algorithm.build_model = build_model


def _network(side: Production, name: str, golden: Mapping, whole: bool) -> Iterator[Row]:
    """The training steps of one network and an evaluation, or the forward pass of the first step alone."""
    label, settings = f"{side.prefix}{name}", json.loads(str(golden["settings"]))
    trace = _trace(side, _config(name, settings), settings, golden)
    try:
        if whole:
            for section, ours in trace:
                yield from _judge(label, ours, golden, _in_order(golden, section))
        else:
            with mock.patch.object(side.algorithm, "update"), contextlib.closing(trace):
                section, ours = next(trace)
            yield from _judge(label, {key: ours[key] for key in filter(_of_forward, ours)}, golden,
                              [*filter(_of_forward, _in_order(golden, section))])
    except CheckpointError as error:
        yield Row(f"{label}/state", np.inf, np.inf, False, str(error))


def _config(name: str, settings: dict) -> Config:
    """Of the reference's settings; what they leave open (Nesterov, batch norm's momentum) is production's default."""
    s = settings
    return Config(
        model=NETWORKS[name], train=TrainConfig(total_steps=s["total_steps"], batch_size=s["batch_size"], mu=s["mu"]),
        ssl=SSLConfig(threshold=s["threshold"], temperature=s["temperature"], lambda_u=s["lambda_u"]),
        optim=OptimConfig(lr=s["lr"], momentum=s["momentum"], weight_decay=s["weight_decay"],
                          warmup_steps=s["warmup_steps"]),
        ema=EMAConfig(decay=s["ema_decay"]))


def _of_forward(key: str) -> bool:
    """Whether a forward pass decides it: all up to the loss, and running statistics."""
    kind, _, tensor = key.split("/", 1)[1].partition("/")
    return not tensor or (kind == "state" and tensor.endswith(("running_mean", "running_var")))


def _trace(side: Production, config: Config, settings: dict, golden: Mapping):
    """(section, {key: array}) of each step, then of the evaluation, under the golden's keys."""
    with side.precision("float64"):
        state = _build(side, config, settings)
        outputs, gradients = [], {}
        side.watch(state, outputs, gradients)
        for at in range(sum(key.endswith("/lr") for key in golden)):
            given = {n: golden[f"step{at}/input/{n}"] for n in ("x", "targets_x", "u_w", "u_s")}
            batch = Batch(**given, targets_u=np.zeros(len(given["u_w"]), np.int64))  # what is unlabeled has no part
            outputs.clear()
            gradients.clear()
            ours = {"lr": np.array(side.learning_rate(state))}
            found = side.algorithm.train_step(state, batch, config.ssl)
            ours |= {n: getattr(found, n).detach().numpy() for n in _ORDER if hasattr(found, n)}
            ours["logits"] = side.joint_logits(outputs, batch)
            for kind, tensors in (("gradient", gradients), ("momentum", side.momentum(state)),
                                  ("state", side.state(state.model)), ("ema", side.state(state.ema.average))):
                ours |= {f"{kind}/{n}": a for n, a in tensors.items()}
            yield f"step{at}", {f"step{at}/{n}": a for n, a in ours.items()}
        yield "eval", {"eval/raw_logits": side.predict(state, state.model, batch.u_s),
                       "eval/ema_logits": side.predict(state, state.ema.average, batch.u_s)}


def _in_order(golden: Mapping, section: str) -> list[str]:
    """The keys of a section in the order of diagnosis; gradients from the last layer to the first."""
    keys = [k for k in golden if k.startswith(f"{section}/") and "/input/" not in k]
    if section == "eval":
        return keys
    of_kind = {kind: [k for k in keys if k.split("/")[1] == kind] for kind in _ORDER}
    of_kind["gradient"].reverse()
    return [key for kind in _ORDER for key in of_kind[kind]]


def _rules(side: Production, golden: Mapping) -> Iterator[Row]:
    """What needs no network: schedule, RandAugment with Cutout, and a confidence that is exactly the threshold."""
    label = f"{side.prefix}{RULES}"
    for key in [k for k in golden if k.startswith("schedule/") and k.endswith("/steps")]:
        total, warmup = map(int, key.split("/")[1].split("-"))
        factors = key.replace("/steps", "/factors")
        yield compare_tensor(f"{label}/{factors}", side.factors(total, warmup, golden[key]), golden[factors])
    images, centres = golden["randaugment/images"], golden["randaugment/centres"]
    for name, views in zip(golden["randaugment/names"], golden["randaugment/views"], strict=True):
        yield compare_tensor(f"{label}/randaugment/{name}", _augmented(side, str(name), images, centres), views)
    yield _tie(side, label)


def _augmented(side: Production, name: str, images: np.ndarray, centres: np.ndarray) -> np.ndarray | None:
    """Views of one operation, uint8 [magnitude - 1, sign negated, 4, 32, 32, 3]."""
    if name not in side.operations:
        return None
    shape = (9, 2, len(images))
    magnitude, negated, image = (index.reshape(-1) for index in np.indices(shape))
    plan = randaugment.Plan(
        op=np.full((image.size, 1), side.operations.index(name)), magnitude=1 + magnitude[:, None],
        applied=np.ones((image.size, 1), bool), negated=negated[:, None].astype(bool), cutout=centres[image])
    return side.augment.apply(images[image], plan).reshape(*shape, *images.shape[1:])


def _tie(side: Production, label: str) -> Row:
    """softmax([0, 0, -1000]) is exactly 0.5, which counts at a threshold of 0.5: train.py has max_probs.ge(threshold).

    By hand, since no confidence in the files is exactly a threshold.
    """
    with side.precision("float64"):
        logits = side.tensor(np.array([[0.0, 0.0, -1000.0]]))
        found = side.algorithm.fixmatch_loss(logits, side.tensor(np.array([0])), logits, logits, 0.5, 1.0, 1.0)
    return compare_tensor(f"{label}/tie/mask", found.mask.numpy(), np.array([1.0]))


def _judge(label: str, ours: dict, golden: Mapping, keys: list[str]) -> Iterator[Row]:
    """A row for each key of the golden, and for each that only this side has."""
    known = {key.removesuffix("|digest"): key for key in keys}
    for name in [*known, *(n for n in ours if n not in known)]:
        key, mine = known.get(name, name), ours.get(name)
        if key.endswith("|digest") and mine is not None:
            yield compare_digest(f"{label}/{name}", digest(name, mine), golden[key])
        else:
            yield compare_tensor(f"{label}/{name}", mine, golden.get(key))


def digest(key: str, array: np.ndarray) -> np.ndarray:
    """What the files keep of an array over 1,500 elements: max |a|, L2 norm, four sums with random signs."""
    flat, rng = array.ravel(), np.random.default_rng(zlib.crc32(key.encode()))
    sums = [rng.choice([-1.0, 1.0], flat.size) @ flat for _ in range(4)]
    return np.array([np.abs(flat).max(), np.linalg.norm(flat), *sums])


def compare_digest(tensor: str, ours: np.ndarray, reference: np.ndarray) -> Row:
    """One row of two digests at the gate: the largest magnitude over itself, norm and sums over the norm.

    A sum with random signs is off by the norm of the difference, in the root of the mean square, so this compares
    norms of difference and array: for a fault that is spread over the array as its values are, as strict as comparing
    elements, for one element alone laxer by norm / max |a|, which is below 150 in these files. So one element off by
    1.5e-9 of the largest shows in every sum. Over max |a| the sums could not be judged: rounding of n elements adds up
    to sqrt(n) times that of one. What differs by the same amount in two elements only escapes 1 time in 16.
    """
    if not np.isfinite(ours).all():
        return Row(tensor, np.inf, np.inf, False, "NaN or infinity", ours, reference)
    scale = np.array([reference[0], *[reference[1]] * 5])
    absolute, relative = np.abs(ours - reference), float((np.abs(ours - reference) / scale).max())
    values = (None, None) if relative <= float64_gate() else (ours, reference)
    return Row(tensor, float(absolute.max()), relative, relative <= float64_gate(), "", *values)
