"""fixmatch check: this machine in a few lines, to paste into a bug report."""

import json
import pathlib

from fixmatch import check
from fixmatch.cli import Parser, add_overrides
from fixmatch.config import ConfigError, load_config
from fixmatch.files import write_atomic
from fixmatch.log import shown


def main(argv: list[str]) -> int:
    """Returns 3 where the self-check fails, and 1 where another section does."""
    parser = Parser("check", description="Describe this machine and try it: versions, device, memory, disk, the "
                    f"self-check, and the speed of {check.STEPS} steps. Paste it into a bug report.")
    parser.add_argument("-c", "--config", type=pathlib.Path, default=pathlib.Path("digits"),
                        help="whose self-check and steps, a YAML file or a packaged recipe (default: digits)")
    add_overrides(parser, "settings to change")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write all of it to FILE")
    args = parser.parse_args(argv)
    config, found = load_config(args.config, args.overrides), {}
    try:
        with shown():
            for name, facts, line in check.sections(config):
                found[name] = facts
                print(f"{name:<10}  {line}", flush=True)
    except ValueError as error:  # runtime.device
        raise ConfigError(str(error)) from None
    if args.json:
        write_atomic(args.json, json.dumps(found, indent=1) + "\n")
    if found["self-check"].get("passed") is False:
        return 3
    return 1 if any("error" in facts for facts in found.values()) else 0
