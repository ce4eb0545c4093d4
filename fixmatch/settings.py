"""Reads and checks a table of settings: a frozen dataclass of sections, each a frozen dataclass of keys.

fixmatch/config.py holds the table; nothing here knows which keys there are. Settings come from YAML files and from
`section.key=value` overrides, and are validated once, here. Every ConfigError is one line that says which file, which
key, which value, and where it can, what was probably meant.
"""

import dataclasses
import difflib
import itertools
import math
import os
import pathlib
import reprlib
import types
import typing
from dataclasses import field

import yaml

from fixmatch.files import read_text
from fixmatch.log import printable

_LARGEST = 100_000  # bytes of a YAML file, which PyYAML reads in about a second; one with every key has 900
_MOST_NODES = 10_000
_MOST_BRACKETS = 1_000  # PyYAML's time grows with the square of those that are open


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line."""


def key(default, meaning: str, *, low=None, high=None, above=None, choices=None, resumable: bool = False,
        path: bool = False, only: tuple[str, tuple] | None = None, also: tuple[str, ...] = ()):
    """A key of a section.

    Args:
        default: its value where nothing is said.
        meaning: what it is, for people, with its unit.
        low, high, above: its values lie in [low, high] and are greater than `above`.
        choices: or they are one of these.
        resumable: whether it may change when a run is resumed without mixing two different trainings.
        path: whether a leading ~ means the home folder.
        only: (other key, its values) where this key does something; elsewhere it must keep its default.
        also: what other programs call it, for hints.
    """
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high, "above": above,
                                            "choices": choices, "resumable": resumable, "path": path, "only": only,
                                            "also": also})


Settings = dict[str, tuple[object, str]]  # "section.key" -> (value, where it was said)
Reject = typing.Callable[[str, str], typing.NoReturn]  # reject(key, why) raises a ConfigError that names the file


def sections(table: type) -> dict[str, type]:
    return {f.name: f.type for f in dataclasses.fields(table)}


def keys(table: type) -> dict[str, dataclasses.Field]:
    """{"section.key": its dataclass field} of all keys, in the order of their definition."""
    return {f"{section}.{f.name}": f for section, cls in sections(table).items() for f in dataclasses.fields(cls)}


def value_of(config, name: str):
    """The value of the key "section.key" in a configuration."""
    section, _, last = name.partition(".")
    return getattr(getattr(config, section), last)


def from_file(table: type, path: pathlib.Path) -> Settings:
    """The settings of a YAML file, those of its `base` files first.

    The top level of a file holds sections, and optionally `base: FILE`, a path beside it to start from.

    Raises:
        ConfigError: a file that cannot be read, or that holds something else than sections.
    """
    settings: Settings = {}
    _read_file(table, path, settings, seen=())
    return settings


def from_tree(table: type, tree: dict, where: str) -> Settings:
    """The settings of nested dicts; `where` names their origin in errors."""
    settings: Settings = {}
    _flatten(table, tree, where, settings)
    return settings


def from_overrides(overrides: typing.Sequence[str]) -> Settings:
    """The settings of `section.key=value` strings, as they stand behind -o; values are read as YAML."""
    settings: Settings = {}
    for text in overrides:
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"-o {text}: write section.key=value")
        try:
            settings[name.strip()] = (_parse_yaml(value), "-o")
        except yaml.YAMLError:
            raise ConfigError(f"-o {text}: the value is not YAML") from None
    return settings


def build(table: type, settings: Settings, check_together: typing.Callable[[object, Reject], None]):
    """Validates settings and builds the tree of dataclasses. Raises ConfigError.

    Args:
        check_together: checks the rules that take more than one key; is called with the tree and `reject(key, why)`.
    """
    known = keys(table)
    chosen: dict[str, dict] = {section: {} for section in sections(table)}
    hints = {section: typing.get_type_hints(cls) for section, cls in sections(table).items()}
    for name, (value, where) in settings.items():
        if name not in known:
            raise ConfigError(f"{where}: {printable(name)}: unknown key{meant(name, table)}")
        section, last = name.split(".")
        entry = known[name]
        choices = entry.metadata["choices"] or ()
        if isinstance(value, bool) and "off" in choices:  # YAML reads the bare words as true and false
            value = "off" if not value else "on" if "on" in choices else "true"
        value = _check_range(_coerce(value, hints[section][last], name, where), entry.metadata, name, where)
        chosen[section][last] = os.path.expanduser(value) if entry.metadata["path"] else value
    config = table(**{section: cls(**chosen[section]) for section, cls in sections(table).items()})

    def reject(name: str, why: str):
        raise ConfigError(f"{settings.get(name, (None, 'defaults'))[1]}: {name}: {why}")

    check_together(config, reject)
    _check_that_all_do_something(config, known, reject)
    return config


def _check_that_all_do_something(config, known: dict[str, dataclasses.Field], reject: Reject) -> None:
    """Rejects a key that was changed where it has no effect."""
    for name, entry in known.items():
        if entry.metadata["only"] is None or value_of(config, name) == entry.default:
            continue
        other, values = entry.metadata["only"]
        if value_of(config, other) not in values:
            reject(name, f"does nothing with {other}={value_of(config, other)}, only with {' or '.join(values)}; "
                         "leave it out")


# --- files


def _read_file(table: type, path: pathlib.Path, settings: Settings, seen: tuple) -> None:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base: the files include each other")
    try:
        tree = _parse_yaml(read_text(path, _LARGEST))
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
        raise ConfigError(f"{path}: the top level must hold sections such as train:, got {show(tree)}")
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str) or "\0" in base:
            raise ConfigError(f"{path}: base: expected a file name, got {show(base)}")
        _read_file(table, path.parent / base, settings, (*seen, path.resolve()))
    _flatten(table, tree, str(path), settings)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is set twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for name, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(name, yaml.ScalarNode) and name.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{name.value} is set twice", problem_mark=name.start_mark)
            seen.add(name.value if isinstance(name, yaml.ScalarNode) else id(name))
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str):
    """Raises yaml.YAMLError for everything that it cannot read, and for what would take too long or too much memory."""
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        raise yaml.MarkedYAMLError(problem=f"more than {_MOST_BRACKETS:,} brackets")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MOST_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {_MOST_NODES:,} values, with all aliases written out")
        return loader.construct_document(node)
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        # a 13th month, a number of 5,000 digits; !!int ''; !!timestamp x; 5,000 brackets
        raise yaml.MarkedYAMLError(problem=str(error)) from None


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes there are once aliases are replaced by what they stand for; infinitely many where they go round.

    Nine aliases in each of nine lists are 500 bytes of YAML and 9^9 values.
    """
    if id(node) not in known:
        known[id(node)] = math.inf  # until its parts are counted: what meets it below itself goes round
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        every = itertools.chain.from_iterable(parts) if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_size(part, known) for part in every)
    return known[id(node)]


def _flatten(table: type, tree: dict, where: str, settings: Settings) -> None:
    for section, values in tree.items():
        if section not in sections(table):
            raise ConfigError(f"{where}: {printable(str(section))}: unknown section{meant(str(section), table)}")
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: {section}: expected keys below it, got {show(values)}")
        for name, value in values.items():
            settings[f"{section}.{name}"] = (value, where)


# --- values


def _coerce(value, hint, name: str, where: str):
    """`value` as `hint`: PyYAML reads 3e-2 and 1e6 as strings, and a float field may be given as an integer."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(item, typing.get_args(hint)[0], name, where) for item in value)
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
    raise ConfigError(f"{where}: {name}: expected {wanted}, got {show(value)}")


def _check_range(value, limits, name: str, where: str):
    if value is None:
        return value
    choices, low, high, above = (limits[limit] for limit in ("choices", "low", "high", "above"))
    if choices is not None and value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"{where}: {name}: must be one of {', '.join(choices)}, got {show(value)}{guess}")
    if value != value or value in (float("inf"), float("-inf")):
        raise ConfigError(f"{where}: {name}: must be finite, got {value}")
    if ((low is not None and value < low) or (above is not None and value <= above)
            or (high is not None and value > high)):
        bounds = [f"at least {low}"] * (low is not None) + [f"greater than {above}"] * (above is not None)
        bounds += [f"at most {high}"] * (high is not None)
        raise ConfigError(f"{where}: {name}: must be {' and '.join(bounds)}, got {value}")
    return value


# --- messages


def meant(name: str, table: type) -> str:
    """A hint at the key or section that the unknown `name` stands for.

    It is the one key whose last part is the same, else the one that other programs call so, else the nearest spelling.
    Empty where nothing comes near.
    """
    last = name.rsplit(".", 1)[-1].lower().replace("-", "_")
    same = [known for known in keys(table) if known.rsplit(".", 1)[-1] == last]
    if len(same) == 1:
        return f" (did you mean {same[0]}?)"
    for known, entry in keys(table).items():
        if last in entry.metadata["also"]:
            return f" (here it is {known}: {entry.metadata['meaning'].partition(';')[0]})"
    return suggest(name, keys(table) if "." in name else sections(table))


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """The nearest known key: by its whole path, else by its last part, which catches a key in the wrong section."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not close:
        tails = {k.rsplit(".", 1)[-1]: k for k in known}
        close = [tails[t] for t in difflib.get_close_matches(name.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)]
    return f" (did you mean {close[0]}?)" if close else ""


def _suggest_file(path: pathlib.Path) -> str:
    beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


_SHORT = reprlib.Repr()  # builds no more of a value than it shows
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def show(value) -> str:
    """A value in an error message, at most 60 characters of it."""
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
