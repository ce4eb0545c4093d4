"""What is made of the table of keys: the page, the JSON schema, and hints on the command line."""

import json

import pytest
from running import ROOT

from fixmatch import cli
from fixmatch.config import KEYS
from fixmatch.config_docs import page, schema


@pytest.mark.parametrize(("file", "option"), [("configs.md", "--keys"), ("configs.schema.json", "--schema")])
def test_the_documents_are_those_of_the_table(file, option, capsys):
    assert cli.main(["configs", option]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / file).read_text(encoding="utf-8"), \
        f"make it anew: fixmatch configs {option} > docs/{file}"


def test_every_key_has_a_line_and_a_place_in_the_schema():
    tree = json.loads(schema())["properties"]
    for name in KEYS:
        section, last = name.split(".")
        assert page().count(f"| `{name}` |") == 1
        assert tree[section]["properties"][last]["description"] == KEYS[name].metadata["meaning"]
    assert sum(len(tree[section]["properties"]) for section in tree.keys() - {"base"}) == len(KEYS)


def test_what_the_schema_says_of_some_keys():
    tree = json.loads(schema())["properties"]
    said = {"ssl.threshold": {"type": "number", "minimum": 0.0, "maximum": 1.0, "default": 0.95},
            "data.split_seed": {"type": ["integer", "null"], "minimum": 0, "default": None},
            "data.mean": {"type": ["array", "null"], "items": {"type": "number"}, "default": None},
            "optim.lr": {"type": "number", "exclusiveMinimum": 0.0, "default": 0.03},
            "runtime.cpu_kernels": {"enum": ["auto", "on", "off", True, False], "default": "auto"}}
    for name, facts in said.items():
        section, last = name.split(".")
        found = tree[section]["properties"][last]
        assert {key: found[key] for key in found if key != "description"} == facts
    assert tree["train"]["additionalProperties"] is False


def test_a_line_of_the_page():
    assert "| `train.mu` | `7` | integer, at least 1 |  | unlabeled images for each labeled one |\n" in page()


@pytest.mark.parametrize(("arguments", "said"), [
    (["--lr", "0.1"], "settings are given as -o section.key=value (did you mean optim.lr?)"),
    (["--epochs=3"], "settings are given as -o section.key=value (here it is train.total_steps: steps of the run)"),
    (["--unheard-of", "1"], "--help shows the usage"),
])
def test_a_setting_given_as_an_argument(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "-c", "digits", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: unrecognized arguments: {' '.join(arguments)} ({said})"]
