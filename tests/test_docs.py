"""The documentation: its links lead somewhere, its commands are commands, and both READMEs say the same."""

import pathlib
import re
import shlex

import pytest
from running import ROOT

from fixmatch import cli
from fixmatch.config import load_config, recipes

PAGES = [ROOT / name for name in ("README.md", "README_cn.md", "CONTRIBUTING.md", "CHANGELOG.md", "parity/README.md")
         ] + sorted((ROOT / "docs").glob("*.md"))
# fixmatch X ..., or tools/X.py ... with or without a Python before it, at the start of a line of a block
COMMAND = re.compile(
    r"^(?:\$ )?(?:OMP_NUM_THREADS=\d+ )?(?:(?:\.venv/bin/)?python )?"
    r"(?:(?:\.venv/bin/)?fixmatch +(?P<installed>\w+)|tools/(?P<tool>\w+)\.py)(?P<arguments>[^\n]*)$", re.MULTILINE)


def blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[tuple[str, str, str]]:
    """(page, command, its arguments) of all commands in blocks, without comments."""
    found = []
    for page in PAGES:
        for match in (m for block in blocks(page) for m in COMMAND.finditer(block)):
            arguments = re.sub(r"(^|\s)#.*", "", match["arguments"]).replace("[", "").replace("]", "")
            found.append((page.name, match["installed"] or match["tool"], arguments.strip()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


class Parsed(Exception):
    """The arguments are ones that the command takes."""


def test_every_command_is_one_with_arguments_that_it_takes(monkeypatch):
    parse = cli.Parser.parse_args

    def parse_alone(self, *args):
        raise Parsed(parse(self, *args))

    monkeypatch.setattr(cli.Parser, "parse_args", parse_alone)
    assert len(commands()) > 15
    for page, name, arguments in commands():
        assert name in cli.COMMANDS, f"{page}: {name}"
        try:
            cli.main([name, *shlex.split(arguments)])
            pytest.fail(f"{page}: {name} {arguments}: nothing was parsed")
        except SystemExit:
            pytest.fail(f"{page}: {name} {arguments}")
        except Parsed as parsed:
            args = parsed.args[0]
        config = getattr(args, "config", None)
        if config is not None and (config.stem in recipes() or config.exists()):
            load_config(config, getattr(args, "overrides", []))  # the settings are settings


def test_the_sample_of_the_readme_has_the_median_of_as_many_evaluations_as_that_run():
    train, text = load_config("digits").train, (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"median of the last {train.total_steps // train.eval_every} " in text


def test_both_readmes_have_the_same_commands_and_headings():
    english, chinese = PAGES[:2]
    without_comments = [[re.sub(r" +#.*", "", line) for block in blocks(page) for line in block.splitlines()]
                        for page in (english, chinese)]
    assert without_comments[0] == without_comments[1]
    levels = [re.findall(r"^#+ ", page.read_text(encoding="utf-8"), re.MULTILINE) for page in (english, chinese)]
    assert levels[0] == levels[1]
    prose = [re.sub(r"```.*?```", "", page.read_text(encoding="utf-8").replace("README_cn.md", "README.md"),
                    flags=re.DOTALL) for page in (english, chinese)]
    names = [sorted(re.findall(r"`[^`]+`|\]\([^)#]+\)", text)) for text in prose]  # files, settings and links
    assert names[0] == names[1]
