"""The table of keys in fixmatch/config.py as people and editors read it: commented YAML, a page, a JSON schema."""

import dataclasses
import json
import types
import typing

import yaml

from fixmatch.config import Config, to_dict
from fixmatch.settings import sections

_COMMENT_AT = 32  # the column that comments begin at, where the setting before them is shorter
_JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
_PAGE_HEAD = """\
# Every setting

Made from the table in `fixmatch/config.py` by `fixmatch configs --keys`; a test keeps the two equal. `-c` takes a YAML
file whose top level holds these sections, and `base: FILE` to start from another file; `-o section.key=value` changes
one setting. `fixmatch train -c CONFIG --print-config` shows the settings of a run. Where **resume** says yes, a key may
have another value when `--resume` goes on with a run.

An editor that understands JSON schemas (the YAML extension of VS Code, for example) completes and checks a file whose
first line is `# yaml-language-server: $schema=PATH/docs/configs.schema.json`; `fixmatch configs --schema` prints it.
"""


def commented_yaml(config: Config) -> str:
    """The resolved tree as YAML that `load_config` reads back to an equal Config, with the meaning of each key."""
    lines = []
    for (section, values), cls in zip(to_dict(config).items(), sections(Config).values(), strict=True):
        lines.append(f"{section}:")
        for entry in dataclasses.fields(cls):
            setting = f"  {entry.name}: {yaml_value(values[entry.name])}"
            lines.append(f"{setting:<{_COMMENT_AT}}  # {entry.metadata['meaning']}")
    return "\n".join(lines) + "\n"


def page() -> str:
    """All keys as Markdown, a table for each section."""
    lines = [_PAGE_HEAD]
    for section, cls in sections(Config).items():
        lines += [f"## {section}", "", "| key | default | values | resume | meaning |", "|---|---|---|---|---|"]
        hints = typing.get_type_hints(cls)
        for entry in dataclasses.fields(cls):
            facts = (f"`{section}.{entry.name}`", f"`{yaml_value(entry.default)}`", _values(hints[entry.name], entry),
                     "yes" if entry.metadata["resumable"] else "", _where(entry) + entry.metadata["meaning"])
            lines.append("| " + " | ".join(fact.replace("|", "\\|").replace("<", "\\<") for fact in facts) + " |")
        lines.append("")
    return "\n".join(lines)


def schema() -> str:
    """A JSON schema (draft 7) of a configuration file, as text."""
    tree = {"base": {"type": "string", "description": "another file to start from, a path beside this one"}}
    for section, cls in sections(Config).items():
        hints = typing.get_type_hints(cls)
        tree[section] = _object({entry.name: _schema_of(hints[entry.name], entry) for entry in dataclasses.fields(cls)})
    return json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", "title": "FixMatch configuration",
                       **_object(tree)}, indent=1) + "\n"


def _object(properties: dict) -> dict:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _schema_of(hint, entry: dataclasses.Field) -> dict:
    limits, (kind, item, optional) = entry.metadata, _kind(hint)
    found = {"description": limits["meaning"], "default": entry.default}
    if limits["choices"]:
        read_as = {"on": True, "off": False}  # by YAML 1.1
        words = [*limits["choices"], *(read_as[word] for word in limits["choices"] if word in read_as)]
        return found | {"enum": words}
    name = "array" if kind is tuple else _JSON_TYPES[kind]
    found["type"] = [name, "null"] if optional else name
    if kind is tuple:
        found["items"] = {"type": _JSON_TYPES[item]}
    bounds = {"minimum": limits["low"], "maximum": limits["high"], "exclusiveMinimum": limits["above"]}
    return found | {name: bound for name, bound in bounds.items() if bound is not None}


def _kind(hint) -> tuple[type, type | None, bool]:
    """(the type of a value, the type of the items of a list, whether null may stand there)."""
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple:
        return tuple, typing.get_args(hint)[0], optional
    return hint, None, optional


def _values(hint, entry: dataclasses.Field) -> str:
    """What the key takes, in words."""
    limits, (kind, item, optional) = entry.metadata, _kind(hint)
    if limits["choices"]:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    words = {int: "integer", float: "number", bool: "true, false", str: "text"}
    found = f"list of {words[item]}s" if kind is tuple else words[kind]
    if limits["low"] is not None and limits["high"] is not None:
        found += f", {limits['low']} to {limits['high']}"
    elif limits["low"] is not None:
        found += f", at least {limits['low']}"
    if limits["above"] is not None:
        found += f", above {limits['above']}"
    return found + " or null" * optional


def _where(entry: dataclasses.Field) -> str:
    """Of a key that acts only somewhere: where."""
    if entry.metadata["only"] is None:
        return ""
    other, values = entry.metadata["only"]
    return f"(`{other}`: {', '.join(values)}) "


def yaml_value(value) -> str:
    """A value as YAML on one line."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n").removesuffix("\n...")
