"""The configuration: a table of all keys, each with its default, its meaning and its range.

fixmatch/settings.py reads YAML files and overrides into it. Nothing else in the package checks user settings again.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from fixmatch import settings
from fixmatch.settings import ConfigError, key

__all__ = ["Config", "ConfigError", "from_dict", "load_config", "recipes", "to_dict", "to_yaml"]

DATASETS = ("digits", "cifar10", "cifar100", "svhn", "stl10", "folder", "csv")
OWN_IMAGES = ("data.name", ("folder", "csv"))


@dataclass(frozen=True)
class RunConfig:
    name: str = key("", "what the run is called; empty: the configuration file's name", resumable=True)
    dir: str = key("", "run folder; empty: runs/<name>", resumable=True, path=True,
                   also=("out", "output", "output_dir", "out_dir", "save_dir"))
    seed: int = key(0, "of every random draw", low=0, high=2**64 - 1, also=("random_seed", "manual_seed"))
    log_every: int = key(50, "steps between lines in the log, metrics.jsonl and VisualDL", low=1, resumable=True)
    report: bool = key(True, "whether report.html and its plots are made at the end", resumable=True)


@dataclass(frozen=True)
class DataConfig:
    name: str = key("digits", "the data set", choices=DATASETS, also=("dataset",))
    root: str = key("data", "where archives are looked for and downloaded to; csv may be given the training CSV itself",
                    resumable=True, path=True, also=("data_dir", "dataset_dir", "data_path"))
    download: bool = key(True, "whether what is missing may be downloaded", resumable=True)
    num_labeled: int = key(40, "labels in all, not a class; 0: every image whose class is known", low=0,
                           also=("n_labeled", "num_labels", "labels"))
    labels_per_class: tuple[int, ...] = key((), "one count a class, in class order, where they are not to be equal")
    include_labeled: bool = key(True, "whether unlabeled images include the labeled ones, as in the paper")
    split_file: str = key("", "a split.json to use instead of drawing one", path=True)
    split_seed: int | None = key(None, "seed of the split; null: run.seed; set it to compare seeds on one split", low=0)
    fold: int | None = key(None, "which of the data set's ten folds is labeled, instead of drawing labels", low=0,
                           only=("data.name", ("stl10",)))
    test_fraction: float = key(0.2, "where own images have no test images: so much of each class's labeled images are "
                                    "held out, at least one, by data.split_seed or 0, not by run.seed; 0: no test",
                               low=0.0, high=0.9, only=OWN_IMAGES, also=("test_size", "val_fraction", "val_split"))
    extra: bool = key(False, "whether the 531,131 extra images are training images, too",
                      only=("data.name", ("svhn",)))
    image_size: int | None = key(None, "side in pixels; null: the common size, else a square of the median shorter "
                                       "side, 8..224", low=8, only=OWN_IMAGES)
    mean: tuple[float, ...] | None = key(None, "of pixels in [0, 1], a channel; null: the data set's")
    std: tuple[float, ...] | None = key(None, "of pixels in [0, 1], a channel; null: the data set's")
    max_broken: int = key(100, "so many unreadable files are named and skipped; test images and dangling links count, "
                               "too", low=0, resumable=True, only=OWN_IMAGES)


@dataclass(frozen=True)
class AugmentConfig:
    strong: str = key("reference", "recipe of the strong views, see fixmatch/data/augment/recipes.py",
                      choices=("reference", "google", "torchssl", "ctaugment"))
    flip: bool | None = key(None, "whether views are mirrored at random; null: the data set's own; false for digits, "
                                  "signs, text", also=("hflip", "horizontal_flip"))


@dataclass(frozen=True)
class ModelConfig:
    arch: str = key("wideresnet", "the network", choices=("wideresnet", "resnext"), also=("model", "network", "net"))
    depth: int = key(28, "layers as the name counts them: 28 in WRN-28-2", low=10)
    width: int = key(2, "widen factor of a WideResNet, base width of a ResNeXt", low=1)
    cardinality: int = key(4, "groups of a ResNeXt", low=1, only=("model.arch", ("resnext",)))
    bn_momentum: float = key(0.999, "share of the old running statistics; lower for short runs", low=0.0, high=1.0)
    init: str = key("", "a run or checkpoint whose averaged weights are started from; its classifier is kept if it is "
                        "of the same classes", path=True, also=("pretrained", "init_from", "load_path"))

    def network(self) -> dict:
        """The arguments of `models.build_model` that describe the network, but for the number of classes."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "init"}


@dataclass(frozen=True)
class TrainConfig:
    total_steps: int = key(2**20, "steps of the run; changing it on resume changes the schedule from there on", low=1,
                           resumable=True, also=("epochs", "epoch", "num_epochs", "max_epochs", "iterations", "steps",
                                                 "num_iters", "num_train_iter", "max_steps"))
    batch_size: int = key(64, "B, labeled images a step, a device", low=1, also=("batch", "bs"))
    mu: int = key(7, "unlabeled images for each labeled one", low=1, also=("uratio", "unlabeled_ratio"))
    eval_every: int = key(1024, "steps between evaluations and checkpoints", low=1, resumable=True,
                          also=("eval_step", "num_eval_iter", "eval_interval"))
    eval_batch_size: int = key(250, "test images at a time", low=1, resumable=True)
    amp: str = key("off", "mixed precision, on a GPU only: what convolutions and products are computed in",
                   choices=("off", "float16", "bfloat16"), also=("fp16", "mixed_precision"))
    clip_grad_norm: float = key(0.0, "largest gradient norm of each parameter group by itself; 0: off, as in the "
                                     "reference", low=0.0, also=("clip", "grad_clip", "max_grad_norm"))


@dataclass(frozen=True)
class SSLConfig:
    mode: str = key("fixmatch", "none: the supervised baseline on the labels alone", choices=("fixmatch", "none"))
    supervised_steps: int = key(0, "first steps that train on the labels alone, until predictions are worth a "
                                   "pseudo-label; they take a fraction of the time", low=0, also=("burn_in",))
    policy: str = key("fixed", "which pseudo-labels count: FixMatch's fixed threshold, or a later method's, see "
                               "fixmatch/thresholds.py", choices=("fixed", "flexmatch", "freematch", "softmatch"))
    align: str = key("none", "what the distribution of pseudo-labels over classes is drawn towards",
                     choices=("none", "uniform", "labels", "model"))
    policy_decay: float = key(0.999, "share of the old statistics of a policy or an alignment; lower for short runs",
                              low=0.0, high=1.0)
    lambda_e: float = key(0.001, "weight of the fairness term", low=0.0, only=("ssl.policy", ("freematch",)))
    threshold: float = key(0.95, "tau, the least confidence for a pseudo-label to count", low=0.0, high=1.0,
                           also=("tau", "p_cutoff"))
    temperature: float = key(1.0, "T of the pseudo-labels' softmax", above=0.0, also=("t",))
    lambda_u: float = key(1.0, "weight of the unsupervised loss", low=0.0, also=("ulb_loss_ratio", "wu"))

    def supervised_at(self, step: int) -> bool:
        """Whether the step that follows `step` finished ones trains on the labels alone."""
        return self.mode == "none" or step < self.supervised_steps


@dataclass(frozen=True)
class OptimConfig:
    lr: float = key(0.03, "learning rate at the start of the cosine", above=0.0,
                    also=("learning_rate", "base_lr", "eta"))
    momentum: float = key(0.9, "of the gradients", low=0.0, high=1.0)
    nesterov: bool = key(True, "whether the momentum is Nesterov's")
    weight_decay: float = key(5e-4, "L2 coefficient, not on biases and batch norm", low=0.0,
                              also=("wd", "wdecay", "l2"))
    warmup_steps: int = key(0, "steps of linear warm-up", low=0, also=("warmup",))


@dataclass(frozen=True)
class EMAConfig:
    decay: float = key(0.999, "share of the old average of the weights", low=0.0, high=1.0, also=("ema_m", "ema_decay"))


@dataclass(frozen=True)
class CheckpointsConfig:
    keep: int = key(2, "how many are kept beside the best: the latest, and those before it in case it is damaged",
                    low=1, resumable=True)


@dataclass(frozen=True)
class ParityConfig:
    enabled: bool = key(True, "whether the run is checked against the reference before it trains", resumable=True)
    on_failure: str = key("abort", "what follows a failed check", choices=("abort", "warn"), resumable=True)
    timeout: float = key(300.0, "seconds that the check may take", above=0.0, resumable=True)


@dataclass(frozen=True)
class RuntimeConfig:
    device: str = key("auto", "where it trains", choices=("auto", "cpu", "gpu"), resumable=True,
                      also=("gpu", "gpus", "gpu_id"))
    deterministic: bool = key(False, "whether a run on a GPU, too, is bit for bit repeatable, which takes longer",
                              resumable=True)
    cpu_kernels: str = key("auto", "faster operators on a CPU that has them", choices=("auto", "on", "off"),
                           resumable=True)
    data_threads: int = key(1, "threads that prepare batches beside the training step", low=1, resumable=True,
                            also=("num_workers", "workers"))


@dataclass(frozen=True)
class Config:
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    ssl: SSLConfig = SSLConfig()
    optim: OptimConfig = OptimConfig()
    ema: EMAConfig = EMAConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    parity: ParityConfig = ParityConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def images(self, first: int, last: int) -> int:
        """How many images one process puts through the network in the steps after `first` and up to `last`."""
        start = last if self.ssl.mode == "none" else min(max(first, self.ssl.supervised_steps), last)
        return self.train.batch_size * (last - first + 2 * self.train.mu * (last - start))


KEYS = settings.keys(Config)  # {"section.key": its dataclass field}


def recipes() -> dict[str, pathlib.Path]:
    """The packaged recipes, {name: YAML file}: in the package where it was installed, beside it in a checkout."""
    package = pathlib.Path(__file__).resolve().parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package / "configs")
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file or a packaged recipe, and applies `section.key=value` overrides in order.

    Args:
        path: a YAML file, or the name of a packaged recipe, such as "digits".
        overrides: strings as they stand behind -o on the command line; values are read as YAML.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a wrong type or a value out of range.
    """
    path = pathlib.Path(path)
    if not path.exists() and len(path.parts) == 1:
        path = recipes().get(path.name, path)
    config = settings.build(Config, settings.from_file(Config, path) | settings.from_overrides(overrides),
                            _check_together)
    name = config.run.name or path.stem
    run = dataclasses.replace(config.run, name=name, dir=config.run.dir or f"runs/{name}")
    return dataclasses.replace(config, run=run)


def from_dict(tree: dict, where: str, overrides: Sequence[str] = ()) -> Config:
    """The inverse of `to_dict`; `where` names the origin in errors. Raises ConfigError like `load_config`."""
    return settings.build(Config, settings.from_tree(Config, tree, where) | settings.from_overrides(overrides),
                          _check_together)


def to_dict(config: Config) -> dict:
    """The resolved tree as plain dicts, sections and keys in the order of their definition."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved tree as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _check_together(config: Config, reject: settings.Reject) -> None:
    """Rules that take more than one key; `reject` names the file of the key that is to be changed."""
    model, optim, total = config.model, config.optim, config.train.total_steps
    if model.arch == "wideresnet" and (model.depth - 4) % 6:
        near = max(10, round((model.depth - 4) / 6) * 6 + 4)
        reject("model.depth", f"a WideResNet's depth is 6n + 4, got {model.depth} (nearest: {near})")
    if model.arch == "resnext" and model.depth < 11:
        reject("model.depth", f"a ResNeXt's depth is at least 11, got {model.depth}")
    for name in ("mean", "std"):
        values = getattr(config.data, name)
        if values is not None and (len(values) != 3 or not all(0 <= v <= 1 for v in values)):
            reject(f"data.{name}", f"three numbers, one a channel, of pixels in [0, 1]; got {list(values)}")
    if config.data.std is not None and min(config.data.std) == 0:
        reject("data.std", f"must be greater than 0, got {list(config.data.std)}")
    if optim.warmup_steps >= total:
        reject("optim.warmup_steps", f"must be below train.total_steps = {total}, got {optim.warmup_steps}")
    if config.ssl.policy == "softmatch" and config.train.batch_size * config.train.mu < 2:
        reject("ssl.policy", "softmatch takes the variance of a batch: train.batch_size * train.mu must be 2 at least")
    if optim.nesterov and optim.momentum == 0:
        reject("optim.momentum", "Nesterov needs a momentum above 0; or set optim.nesterov=false")
