"""fixmatch train: a run from a configuration to its result."""

import pathlib

from fixmatch import config_docs
from fixmatch.cli import Parser, add_overrides
from fixmatch.config import load_config


def main(argv: list[str]) -> int:
    parser = Parser("train", description="Train FixMatch.")
    parser.add_argument("-c", "--config", required=True, type=pathlib.Path,
                        help="a YAML file, or the name of a packaged recipe, such as digits")
    add_overrides(parser, "settings to change")
    parser.add_argument("--resume", action="store_true", help="go on from run.dir/checkpoints/latest, if there is one")
    parser.add_argument("--print-config", action="store_true", help="show every setting and its meaning, and stop")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(config_docs.commented_yaml(config), end="")
        return 0
    from fixmatch import run  # the modules of a training take seconds to load

    run.train(config, args.resume)
    return 0
