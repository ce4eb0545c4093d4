"""fixmatch sweep: a recipe with several seeds and settings, and the report of all of them."""

import pathlib
import re

from fixmatch.cli import Parser, add_overrides, fail
from fixmatch.config import ConfigError


def main(argv: list[str]) -> int:
    parser = Parser("sweep", description="Train one run after the other: every combination of settings with every "
                                         "seed. Started again, it goes on where it was.")
    parser.add_argument("-c", "--config", required=True, type=pathlib.Path,
                        help="a YAML file, or the name of a packaged recipe, such as digits")
    parser.add_argument("--seeds", default="0-4", help="such as 0-4 or 0,1,7; default: 0-4")
    add_overrides(parser, "settings to change; section.key=1,2 tries both values")
    parser.add_argument("--dir", type=pathlib.Path, help="the sweep's folder; default: <run.dir>-sweep")
    args = parser.parse_args(argv)
    from fixmatch import sweep
    from fixmatch.report.page import write_report

    folder, planned = sweep.plan(args.config, seeds(args.seeds), args.overrides, args.dir)
    found = sweep.sweep(folder, planned)
    print(f"\n{sweep.table(found)}")
    runs = [each for setting in found["settings"] for each in setting["runs"]]
    ended = [pathlib.Path(each["folder"]) for each in runs if each["state"] == "ended"]
    if ended:
        print(f"See {write_report(ended, folder / 'report.html')} and {folder / 'sweep.json'}")
    failed = [each["folder"] for each in runs if each["state"] == "failed"]
    return fail(f"a loss became no number in {', '.join(failed)}", 4) if failed else 0


def seeds(text: str) -> list[int]:
    """The seeds that "0-4" or "0,1,7" means, in this order. Raises ConfigError."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        if not match:
            raise ConfigError(f"--seeds: expected such as 0-4 or 0,1,7, got {text!r:.60}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < 10_000:
            raise ConfigError(f"--seeds: {part.strip()}: expected the lower one first, and at most 10,000 seeds")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))
