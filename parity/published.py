"""Stage `config`: each packaged recipe against the published settings, which are written down here and nowhere else.

The table repeats nothing from the code: every value is from the paper (arXiv 2001.07685, section 4 and the list of
hyper-parameters in its appendix B), from the reference's train.py (its options' defaults and its table of networks) or
from its README. Nothing is computed, so that a slip in a recipe or in a default of fixmatch/config.py shows.
"""

import contextlib
import dataclasses
import json
import pathlib
import pickle
import tempfile
from collections.abc import Iterator

import numpy as np

from fixmatch import config as configuration
from fixmatch.data import DataError, load_source
from parity.case import Case
from parity.compare import Row

STATISTICS = {  # mean and standard deviation of the training pixels; the reference's dataset/cifar.py
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
LABELED = {"cifar10": (40, 250, 4000), "cifar100": (400, 2500, 10000)}  # paper, section 4
CLASSES = {"cifar10": 10, "cifar100": 100}

# {"section.key": (value, source)}. Without train.amp: the README's CIFAR-100 results were trained with it, others not.
_EVERYWHERE = {
    "data.labels_per_class": ((), "paper, section 4: the same number of labels a class"),
    "data.include_labeled": (True, "paper, section 2.2: labeled data are part of the unlabeled, without labels"),
    "augment.strong": ("reference", "paper, section 2.3: RandAugment, then Cutout"),
    "augment.flip": (True, "paper, section 2.3: flip and shift, on all but SVHN"),
    "model.init": ("", "train.py: from random weights"),
    "model.bn_momentum": (0.999, "models/wideresnet.py: 0.001, as Torch counts"),
    "train.total_steps": (1_048_576, "paper, appendix B: 2^20; train.py --total-steps"),
    "train.batch_size": (64, "paper, appendix B: B; train.py --batch-size"),
    "train.mu": (7, "paper, appendix B: mu; train.py --mu"),
    "train.eval_every": (1024, "train.py --eval-step"),
    "train.clip_grad_norm": (0.0, "train.py: none"),
    "ssl.mode": ("fixmatch", "paper, algorithm 1"),
    "ssl.supervised_steps": (0, "train.py: unlabeled images from the first step on"),
    "ssl.threshold": (0.95, "paper, appendix B: tau; train.py --threshold"),
    "ssl.temperature": (1.0, "train.py --T"),
    "ssl.lambda_u": (1.0, "paper, appendix B: lambda_u; train.py --lambda-u"),
    "optim.lr": (0.03, "paper, appendix B: eta; train.py --lr"),
    "optim.momentum": (0.9, "paper, appendix B: beta; train.py"),
    "optim.nesterov": (True, "paper, appendix B; train.py --nesterov"),
    "optim.warmup_steps": (0, "train.py --warmup"),
    "ema.decay": (0.999, "paper, appendix B; train.py --ema-decay"),
}
_OF_DATA = {
    "cifar10": {"optim.weight_decay": (0.0005, "paper, appendix B; train.py --wdecay")},
    "cifar100": {"optim.weight_decay": (0.001, "paper, appendix B; README: --wdecay 0.001")},
}
_OF_NETWORK = {
    ("cifar10", "wideresnet"): {"model.depth": (28, "train.py"), "model.width": (2, "paper, section 4: WRN-28-2")},
    ("cifar100", "wideresnet"): {"model.depth": (28, "train.py"), "model.width": (8, "paper, section 4: WRN-28-8")},
    ("cifar10", "resnext"): {"model.depth": (28, "train.py"), "model.width": (4, "train.py"),
                             "model.cardinality": (4, "train.py")},
    ("cifar100", "resnext"): {"model.depth": (29, "train.py"), "model.width": (64, "train.py"),
                              "model.cardinality": (8, "train.py")},
}

_OF_POLICY = {  # USB: microsoft/Semi-supervised-learning, config/classic_cv
    "fixed": {"ssl.policy": ("fixed", "paper, section 2.2"), "ssl.align": ("none", "paper, section 2.2")},
    "flexmatch": {"ssl.policy": ("flexmatch", "arXiv 2110.08263"), "ssl.align": ("none", "USB")},
    "freematch": {"ssl.policy": ("freematch", "arXiv 2205.07246"), "ssl.align": ("none", "USB"),
                  "ssl.policy_decay": (0.999, "USB: ema_p"), "ssl.lambda_e": (0.001, "USB: ent_loss_ratio")},
    "softmatch": {"ssl.policy": ("softmatch", "arXiv 2301.10921"), "ssl.align": ("uniform", "USB: dist_uniform"),
                  "ssl.policy_decay": (0.999, "USB: ema_p")},
}

# Keys that no publication fixes: where and how a run happens, and what belongs to other data sets.
OPEN = ("run.*", "data.root", "data.download", "data.split_file", "data.split_seed", "data.fold", "data.extra",
        "data.image_size", "data.max_broken", "data.test_fraction", "train.amp", "train.eval_batch_size", "parity.*",
        "runtime.*", "checkpoints.*")

# Every recipe of configs/: its data set, labeled images, architecture and, where it is not the fixed threshold, policy;
# or why it has no published settings.
RECIPES: dict[str, tuple | str] = {
    "cifar10_40": ("cifar10", 40, "wideresnet"),
    "cifar10_250": ("cifar10", 250, "wideresnet"),
    "cifar10_4000": ("cifar10", 4000, "wideresnet"),
    "cifar100_400": ("cifar100", 400, "wideresnet"),
    "cifar100_2500": ("cifar100", 2500, "wideresnet"),
    "cifar100_10000": ("cifar100", 10000, "wideresnet"),
    "cifar10_40_resnext": ("cifar10", 40, "resnext"),
    "cifar10_250_resnext": ("cifar10", 250, "resnext"),
    "cifar10_4000_resnext": ("cifar10", 4000, "resnext"),
    "cifar100_400_resnext": ("cifar100", 400, "resnext"),
    "cifar100_2500_resnext": ("cifar100", 2500, "resnext"),
    "cifar100_10000_resnext": ("cifar100", 10000, "resnext"),
    "cifar10_40_flexmatch": ("cifar10", 40, "wideresnet", "flexmatch"),
    "cifar10_40_freematch": ("cifar10", 40, "wideresnet", "freematch"),
    "cifar10_40_softmatch": ("cifar10", 40, "wideresnet", "softmatch"),
    "cifar10_4000_cpu": "none published: a small network and a run within an hour of two cores",
    "digits": "none published: a data set of this project's own",
    "folder": "none published: the user's own images",
}


def published(data: str, num_labeled: int, arch: str, policy: str = "fixed") -> dict[str, tuple[object, str]]:
    """{"section.key": (value, source)} of a run; "classes" is the number of them."""
    mean, std = STATISTICS[data]
    return {
        "data.name": (data, "paper, section 4"), "data.num_labeled": (num_labeled, "paper, section 4"),
        "classes": (CLASSES[data], "Krizhevsky 2009"), "data.mean": (mean, "dataset/cifar.py"),
        "data.std": (std, "dataset/cifar.py"), "model.arch": (arch, "train.py --arch"), **_OF_NETWORK[data, arch],
        **_OF_DATA[data], **_OF_POLICY[policy], **_EVERYWHERE}


def rows(case: Case) -> Iterator[Row]:
    """A row for each published setting of each packaged recipe. What `case` sets otherwise is for `deviations`."""
    found = configuration.recipes()
    for name in [*RECIPES, *(n for n in found if n not in RECIPES)]:
        entry = RECIPES.get(name)
        try:
            if entry is None:
                yield _failed(f"{name}/entry", "no entry in parity/published.py: add its published settings, or none")
            elif name not in found:
                yield _failed(f"{name}/file", "no such file in configs/")
            elif isinstance(entry, str):
                configuration.load_config(found[name])
                yield Row(f"{name}/loads", 0.0, 0.0, True)
            else:
                yield from _recipe(name, configuration.load_config(found[name]), published(*entry))
        except (configuration.ConfigError, DataError) as error:
            yield _failed(f"{name}/loads", str(error))


def deviations(config: configuration.Config) -> list[str]:
    """What a run sets otherwise than published for its data set and architecture: "optim.lr 0.1, published 0.03"."""
    data, arch = config.data.name, config.model.arch
    if data not in STATISTICS:
        return [f"data.name {data}, published settings are of {' and '.join(STATISTICS)}"]
    counts = LABELED[data]
    count = config.data.num_labeled if config.data.num_labeled in counts else counts[0]
    said = [] if config.data.num_labeled in counts else [
        f"data.num_labeled {config.data.num_labeled}, published {', '.join(map(str, counts))}"]
    wanted, ours = published(data, count, arch, config.ssl.policy), effective(config)
    return said + [f"{key} {_show(ours[key])}, published {_show(value)}" for key, (value, _) in wanted.items()
                   if ours[key] != value and key != "data.num_labeled"]


def effective(config: configuration.Config) -> dict[str, object]:
    """{"section.key": value} as a run on CIFAR gets them: what is left to the data set comes from its own reader."""
    tree = dataclasses.asdict(config)
    values = {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
    with _tiny_cifar(config.data.name) as folder:
        source = load_source(dataclasses.replace(config.data, root=folder, download=False))
    flip = source.flip if config.augment.flip is None else config.augment.flip
    return {**values, "data.mean": tuple(source.mean), "data.std": tuple(source.std), "augment.flip": flip,
            "classes": len(source.classes)}


def _recipe(name: str, config: configuration.Config, wanted: dict[str, tuple[object, str]]) -> Iterator[Row]:
    if config.data.name != wanted["data.name"][0]:
        yield _failed(f"{name}/data.name", f"{config.data.name}, published {wanted['data.name'][0]}")
        return
    ours = effective(config)
    for key, (value, source) in wanted.items():
        yield Row(f"{name}/{key}", 0.0, 0.0, True) if ours[key] == value else _failed(
            f"{name}/{key}", f"{_show(ours[key])}, published {_show(value)} ({source})")


@contextlib.contextmanager
def _tiny_cifar(name: str) -> Iterator[str]:
    """A folder in the layout of the official archive, one black image a file: CIFAR's reader says what a run gets."""
    image, tenfold = {b"data": np.zeros((1, 3072), np.uint8)}, name == "cifar10"
    folder, meta = ("cifar-10-batches-py", "batches.meta") if tenfold else ("cifar-100-python", "meta")
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if tenfold else ["train", "test"]
    labels, names = (b"labels", b"label_names") if tenfold else (b"fine_labels", b"fine_label_names")
    files = {batch: {**image, labels: [0]} for batch in batches} | {meta: {names: [b"a class"] * CLASSES[name]}}
    with tempfile.TemporaryDirectory() as root:
        (pathlib.Path(root) / folder).mkdir()
        for file, content in files.items():
            (pathlib.Path(root) / folder / file).write_bytes(pickle.dumps(content, protocol=4))
        yield root


def _failed(tensor: str, why: str) -> Row:
    return Row(tensor, np.inf, np.inf, False, why)


def _show(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)
