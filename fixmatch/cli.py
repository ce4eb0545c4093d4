"""The commands behind tools/train.py and tools/eval.py: arguments, and exceptions turned into one line and a code.

Exit codes: 0 done, 1 the system failed (a full disk, say), 2 wrong usage, configuration or data, 3 self-check failed,
4 training went non-finite, 130 interrupted.
"""

import argparse
import json
import pathlib
import signal
import sys

from fixmatch.config import ConfigError, load_config, to_yaml


class Parser(argparse.ArgumentParser):
    """Says wrong usage in one line; --help has the rest."""

    def error(self, message: str):
        self.exit(fail(f"{message} (--help shows the usage)", 2))


def add_overrides(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("-o", dest="overrides", metavar="section.key=value", nargs="+", action="extend", default=[],
                        help=help_text)


def train_main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="train.py", description="Train FixMatch.")
    parser.add_argument("-c", "--config", required=True, type=pathlib.Path,
                        help="a YAML file, or the name of a packaged recipe, such as digits")
    add_overrides(parser, "settings to change")
    parser.add_argument("--resume", action="store_true", help="go on from run.dir/checkpoints/latest, if there is one")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")
    args = parser.parse_args(argv)
    return guarded(lambda: _train(args))


def eval_main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="eval.py", description="Evaluate a run or a checkpoint on the test images.")
    parser.add_argument("path", type=pathlib.Path, help="a run folder or a checkpoint folder")
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="of a run folder")
    add_overrides(parser, "settings to change, such as data.root or runtime.device")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write all figures to FILE")
    parser.add_argument("--predictions", type=pathlib.Path, metavar="FILE",
                        help="also write the EMA's prediction for every test image to FILE, as CSV")
    args = parser.parse_args(argv)
    return guarded(lambda: _evaluate(args))


def guarded(command) -> int:
    """Runs a command, and turns what it raises into one line on standard error and the code that it returns."""
    from fixmatch.checkpoint import CheckpointError
    from fixmatch.data import DataError
    from fixmatch.metrics import NonFinite
    from fixmatch.run import Interrupted, SelfCheckFailed

    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tools set another one while modules load
    try:
        return command()
    except (ConfigError, DataError, CheckpointError) as error:
        return fail(error, 2)
    except SelfCheckFailed as error:
        return fail(error, 3)
    except NonFinite as error:
        return fail(error, 4)
    except Interrupted:  # the run has said it
        return 130
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except MemoryError as error:
        return fail(f"not enough memory: {error or 'smaller batches or images need less'}", 1)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        sys.stderr.close()
        return 1
    except OSError as error:
        return fail(f"{error.filename or 'writing'}: {error.strerror or error}", 1)


def fail(what, code: int) -> int:
    print("error: " + str(what).replace("\n", "\\n"), file=sys.stderr)
    return code


def _train(args) -> int:
    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    from fixmatch import run  # the modules of a training take seconds to load

    run.train(config, args.resume)
    return 0


def _evaluate(args) -> int:
    from fixmatch import run
    from fixmatch.evaluation import predictions_csv
    from fixmatch.files import write_atomic
    from fixmatch.monitor import describe

    found = run.evaluate(args.path, args.which, args.overrides)
    source, scores = found.source, {"raw": found.raw, "ema": found.ema}
    if args.json:
        figures = {"checkpoint": str(found.folder), "step": found.step, **{k: s.to_dict() for k, s in scores.items()}}
        write_atomic(args.json, json.dumps(figures, indent=1) + "\n")
    if args.predictions:
        images = source.test_paths or range(len(source.test))
        write_atomic(args.predictions,
                     predictions_csv(images, found.ema_logits, source.test.labels, source.classes))
    print(f"{found.folder}  step {found.step}  {describe(scores)}")
    for index, name in enumerate(source.classes):
        accuracies = [scores[kind].per_class[index] for kind in ("ema", "raw")]
        print(f"  {name:<20} " + "  ".join(f"{kind} {a:6.2f} %" if a is not None else f"{kind}      -"
                                           for kind, a in zip(("EMA", "raw"), accuracies, strict=True)))
    return 0
