"""The configuration: one frozen dataclass tree, read from YAML and `section.key=value` overrides, validated once, here.

Nothing else in the package checks user settings again. Every ConfigError says which file, which key, which value, and
where it can, what was probably meant.
"""

import dataclasses
import difflib
import os
import pathlib
import types
import typing
from dataclasses import dataclass, field

import yaml

DATASETS = ("digits", "cifar10", "cifar100", "svhn", "stl10", "folder", "csv")


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line."""


def _setting(default, *, low=None, high=None, above=None, choices=None):
    """A field whose values lie in [low, high], are greater than `above`, or are one of `choices`."""
    return field(default=default, metadata={"low": low, "high": high, "above": above, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    name: str = ""  # empty: the configuration file's name
    dir: str = ""  # run folder; empty: runs/<name>
    seed: int = _setting(0, low=0, high=2**64 - 1)
    log_every: int = _setting(50, low=1)  # steps


@dataclass(frozen=True)
class DataConfig:
    name: str = _setting("digits", choices=DATASETS)
    root: str = "data"  # where archives are looked for and downloaded to; csv may be given the training CSV itself
    download: bool = True
    num_labeled: int = _setting(40, low=0)  # in all, not per class; 0: every image whose class is known
    labels_per_class: tuple[int, ...] = ()  # one count a class, in class order, where they are not to be equal
    include_labeled: bool = True  # unlabeled images include the labeled ones, as in the paper
    split_file: str = ""  # a split.json to use instead of drawing one
    split_seed: int | None = _setting(None, low=0)  # null: run.seed; set it to compare seeds on one split
    fold: int | None = _setting(None, low=0)  # stl10: which of its ten folds is labeled, instead of drawing labels
    extra: bool = False  # svhn: its 531,131 extra images are training images, too
    # folder, csv: side in pixels; null: the common size, else a square of the median shorter side, 8..224
    image_size: int | None = _setting(None, low=8)
    mean: tuple[float, ...] | None = None  # of pixels in [0, 1], a channel; null: the data set's
    std: tuple[float, ...] | None = None
    # folder, csv: so many unreadable files are named and skipped; test images and dangling links count too
    max_broken: int = _setting(100, low=0)


@dataclass(frozen=True)
class AugmentConfig:
    # recipe of the strong views, see fixmatch/data/augment/recipes.py
    strong: str = _setting("reference", choices=("reference", "google", "torchssl", "ctaugment"))
    # whether views are mirrored at random; null: the data set's own; false for digits, signs, text
    flip: bool | None = None


@dataclass(frozen=True)
class ModelConfig:
    arch: str = _setting("wideresnet", choices=("wideresnet", "resnext"))
    depth: int = _setting(28, low=10)
    width: int = _setting(2, low=1)  # wideresnet: widen factor; resnext: base width
    cardinality: int = _setting(4, low=1)  # resnext only
    bn_momentum: float = _setting(0.999, low=0.0, high=1.0)  # share of the old running statistics; lower for short runs


@dataclass(frozen=True)
class TrainConfig:
    total_steps: int = _setting(2**20, low=1)
    batch_size: int = _setting(64, low=1)  # labeled images a step, a device
    mu: int = _setting(7, low=1)  # unlabeled images for each labeled one
    eval_every: int = _setting(1024, low=1)  # steps
    eval_batch_size: int = _setting(250, low=1)
    amp: bool = False  # GPU only
    # of each of the two parameter groups by itself; 0: off, as in the reference
    clip_grad_norm: float = _setting(0.0, low=0.0)


@dataclass(frozen=True)
class SSLConfig:
    mode: str = _setting("fixmatch", choices=("fixmatch", "none"))  # none: supervised baseline on the labels alone
    threshold: float = _setting(0.95, low=0.0, high=1.0)
    temperature: float = _setting(1.0, above=0.0)
    lambda_u: float = _setting(1.0, low=0.0)


@dataclass(frozen=True)
class OptimConfig:
    lr: float = _setting(0.03, above=0.0)
    momentum: float = _setting(0.9, low=0.0, high=1.0)
    nesterov: bool = True
    weight_decay: float = _setting(5e-4, low=0.0)
    warmup_steps: int = _setting(0, low=0)


@dataclass(frozen=True)
class EMAConfig:
    decay: float = _setting(0.999, low=0.0, high=1.0)


@dataclass(frozen=True)
class ParityConfig:
    enabled: bool = True  # check against the reference before training
    on_failure: str = _setting("abort", choices=("abort", "warn"))
    timeout: float = _setting(120.0, above=0.0)  # seconds


@dataclass(frozen=True)
class RuntimeConfig:
    device: str = _setting("auto", choices=("auto", "cpu", "gpu"))
    cpu_kernels: str = _setting("auto", choices=("auto", "on", "off"))  # faster operators on a CPU that has them
    data_threads: int = _setting(1, low=1)  # threads that prepare batches beside the training step


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
    parity: ParityConfig = ParityConfig()
    runtime: RuntimeConfig = RuntimeConfig()


SECTIONS = {f.name: f.type for f in dataclasses.fields(Config)}
KEYS = [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)]
_PATHS = ("run.dir", "data.root", "data.split_file")  # may start with ~


def load_config(path: str | pathlib.Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file, its `base` files first, and applies `section.key=value` overrides in order.

    Args:
        path: a YAML file; its top level holds sections, and optionally `base: FILE`, a path beside it to start from.
        overrides: strings as they stand behind -o on the command line; values are read as YAML.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a wrong type or a value out of range.
    """
    path = pathlib.Path(path)
    settings: dict[str, tuple[object, str]] = {}  # "section.key" -> (value, where it was said)
    _read_file(path, settings, seen=())
    _read_overrides(overrides, settings)
    config = from_settings(settings)
    name = config.run.name or path.stem
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name,
                                                               dir=config.run.dir or f"runs/{name}"))


def from_dict(tree: dict, where: str, overrides: typing.Sequence[str] = ()) -> Config:
    """The inverse of `to_dict`; `where` names the origin in errors. Raises ConfigError like `load_config`."""
    settings: dict[str, tuple[object, str]] = {}
    _flatten(tree, where, settings)
    _read_overrides(overrides, settings)
    return from_settings(settings)


def _read_overrides(overrides: typing.Sequence[str], settings: dict) -> None:
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"-o {text}: write section.key=value")
        try:
            settings[key.strip()] = (_parse_yaml(value), "-o")
        except yaml.YAMLError:
            raise ConfigError(f"-o {text}: the value is not YAML") from None


def to_dict(config: Config) -> dict:
    """The resolved tree as plain dicts, sections and keys in the order of their definition."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved tree as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_settings(settings: dict[str, tuple[object, str]]) -> Config:
    """Validates flat settings, {"section.key": (value, where it was said)}, and builds the tree."""
    chosen: dict[str, dict] = {section: {} for section in SECTIONS}
    for key, (value, where) in settings.items():
        if key not in KEYS:
            raise ConfigError(f"{where}: {key}: unknown key{_suggest(key)}")
        section, name = key.split(".")
        cls = SECTIONS[section]
        entry = next(f for f in dataclasses.fields(cls) if f.name == name)
        hint = typing.get_type_hints(cls)[name]
        if isinstance(value, bool) and "on" in (entry.metadata.get("choices") or ()):
            value = "on" if value else "off"  # YAML reads the bare words as true and false
        value = _check_range(_coerce(value, hint, key, where), entry.metadata, key, where)
        chosen[section][name] = os.path.expanduser(value) if key in _PATHS else value
    config = Config(**{section: SECTIONS[section](**values) for section, values in chosen.items()})
    _check_together(config, settings)
    return config


def _read_file(path: pathlib.Path, settings: dict, seen: tuple) -> None:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base: the files include each other")
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file{_suggest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise ConfigError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must hold sections such as train:, got {_show(tree)}")
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str) or "\0" in base:
            raise ConfigError(f"{path}: base: expected a file name, got {_show(base)}")
        _read_file(path.parent / base, settings, (*seen, path.resolve()))
    _flatten(tree, str(path), settings)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is set twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = []
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is set twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str):
    """Raises yaml.YAMLError for everything that it cannot read."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506, it is a SafeLoader
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        # a 13th month, a number of 5,000 digits; !!int ''; !!timestamp x; 5,000 brackets
        raise yaml.MarkedYAMLError(problem=str(error)) from None


def _flatten(tree: dict, where: str, settings: dict) -> None:
    for section, values in tree.items():
        if section not in SECTIONS:
            raise ConfigError(f"{where}: {section}: unknown section{_suggest(str(section), SECTIONS)}")
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: {section}: expected keys below it, got {_show(values)}")
        for name, value in values.items():
            settings[f"{section}.{name}"] = (value, where)


def _coerce(value, hint, key: str, where: str):
    """`value` as `hint`: PyYAML reads 3e-2 and 1e6 as strings, and a float field may be given as an integer."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(item, typing.get_args(hint)[0], key, where) for item in value)
    elif isinstance(value, bool) or hint is bool:
        if isinstance(value, bool) and hint is bool:
            return value
    elif hint is str and isinstance(value, (str, int, float)):
        if "\0" not in str(value):  # no file name has one
            return str(value)
    elif hint in (int, float) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
            if hint is float or number.is_integer():
                return int(value) if isinstance(value, int) and hint is int else hint(number)
        except (ValueError, OverflowError):
            pass
    wanted = {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(hint, "a list")
    raise ConfigError(f"{where}: {key}: expected {wanted}, got {_show(value)}")


def _check_range(value, limits, key: str, where: str):
    if value is None or not limits:
        return value
    choices, low, high, above = (limits[name] for name in ("choices", "low", "high", "above"))
    if choices is not None and value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"{where}: {key}: must be one of {', '.join(choices)}, got {_show(value)}{guess}")
    if value != value or value in (float("inf"), float("-inf")):
        raise ConfigError(f"{where}: {key}: must be finite, got {value}")
    if ((low is not None and value < low) or (above is not None and value <= above)
            or (high is not None and value > high)):
        bounds = [f"at least {low}"] * (low is not None) + [f"greater than {above}"] * (above is not None)
        bounds += [f"at most {high}"] * (high is not None)
        raise ConfigError(f"{where}: {key}: must be {' and '.join(bounds)}, got {value}")
    return value


def _check_together(config: Config, settings: dict) -> None:
    """Rules that take more than one key; the error names the file of the key that is to be changed."""
    def reject(key: str, why: str):
        raise ConfigError(f"{settings.get(key, (None, 'defaults'))[1]}: {key}: {why}")

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
    if optim.nesterov and optim.momentum == 0:
        reject("optim.momentum", "Nesterov needs a momentum above 0; or set optim.nesterov=false")


def _suggest(key: str, known: typing.Iterable[str] = KEYS) -> str:
    """The nearest known key: by its whole path, else by its last part, which catches a key in the wrong section."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not close:
        tails = {k.rsplit(".", 1)[-1]: k for k in known}
        close = [tails[t] for t in difflib.get_close_matches(key.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)]
    return f" (did you mean {close[0]}?)" if close else ""


def _suggest_file(path: pathlib.Path) -> str:
    beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


def _show(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
