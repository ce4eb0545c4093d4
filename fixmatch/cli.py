"""The command `fixmatch`, and tools/*.py: which command it is, and exceptions turned into one line and a code.

Exit codes: 0 done, 1 the system failed (a full disk, say), 2 wrong usage, configuration or data, 3 self-check failed,
4 training went non-finite, 130 interrupted.
"""

import argparse
import importlib
import os
import pathlib
import re
import signal
import sys

from fixmatch.config import Config
from fixmatch.log import discard, printable
from fixmatch.runtime import NO_PADDLE, has_paddle, without_garbage_collection
from fixmatch.settings import meant, suggest
from fixmatch.usage import OPTIONAL, command
from fixmatch.version import __version__

COMMANDS = {  # name -> (the module whose `main` it is, what it does)
    "train": ("fixmatch.commands.train", "train FixMatch, or the supervised baseline, from a configuration"),
    "init": ("fixmatch.commands.init", "look at a folder of images and write a configuration that fits"),
    "eval": ("fixmatch.commands.eval", "score a run or a checkpoint on the test images"),
    "predict": ("fixmatch.commands.predict", "classify new images with a run, a checkpoint or an export"),
    "export": ("fixmatch.commands.export", "write a model for Paddle inference or ONNX, compared before it is kept"),
    "report": ("fixmatch.commands.report", "make the page of a run, or of several side by side"),
    "watch": ("fixmatch.commands.watch", "show the curves of runs in the browser while they train"),
    "sweep": ("fixmatch.commands.sweep", "train a recipe with several seeds and settings; mean and deviation"),
    "configs": ("fixmatch.commands.configs", "list the packaged recipes"),
    "parity": ("parity.cli", "prove that what trains computes what the PyTorch reference computes"),
    "convert": ("parity.convert", "turn a checkpoint of the reference into one of ours, and back"),
    "check": ("fixmatch.commands.check", "describe and try this machine, to paste into a bug report"),
    "bench": ("parity.bench", "measure speed beside named rivals"),
}


class Parser(argparse.ArgumentParser):
    """The arguments of the command `name`. Says wrong usage in one line; --help has the rest."""

    def __init__(self, name: str, **options):
        super().__init__(prog=command(name), **options)
        self.add_argument("--version", action="version", version=f"fixmatch {__version__}")

    def error(self, message: str):
        self.exit(fail(f"{message} ({self._override_meant(message) or '--help shows the usage'})", 2))

    def _override_meant(self, message: str) -> str:
        """Where `message` says that "--lr 0.1" is no argument: that it is a setting for -o."""
        option = re.search(r"unrecognized arguments: --([\w.-]+)", message)
        hint = meant(option[1], Config) if option and self.get_default("overrides") is not None else ""
        return f"settings are given as -o section.key=value{hint}" if hint else ""


def add_overrides(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("-o", dest="overrides", metavar="section.key=value", nargs="+", action="extend", default=[],
                        help=help_text)


def output_file(text: str) -> pathlib.Path:
    """The type of an argument that names a file to write: in a folder that is there, as another one is a mistake."""
    path = pathlib.Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}; make it, or name another one")
    return path


def main(argv: list[str] | None = None) -> int:
    """Runs the command that `argv` (default: the process's arguments) begins with; returns the exit code."""
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:  # it was closed before; files that are opened would take its place
            setattr(sys, stream, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: fixmatch COMMAND ...; fixmatch COMMAND --help has the arguments\n")
        print("\n".join(f"  {name:<8} {purpose}" for name, (_, purpose) in COMMANDS.items()))
        return 0
    if name == "--version":
        print(f"fixmatch {__version__}")
        return 0
    if name not in COMMANDS:
        return fail(f"{name}: no such command{suggest(name, COMMANDS)} (fixmatch --help lists them)", 2)
    if not has_paddle():
        return fail(NO_PADDLE, 2)
    return guarded(lambda: importlib.import_module(COMMANDS[name][0]).main(arguments))


def guarded(run) -> int:
    """Calls `run`, and turns what it raises into one line on standard error and the code that it returns."""
    with without_garbage_collection():
        from fixmatch.run import EXIT_CODES, Interrupted

    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tools set another one while modules load
    try:
        code = run()
        sys.stdout.flush()
        return code
    except Interrupted as error:  # the run has said it
        return EXIT_CODES[type(error)]
    except tuple(EXIT_CODES) as error:
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        return fail(str(error) or "interrupted", code)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        return fail(f"this needs {error.name}: pip install {OPTIONAL[error.name]}", 2)
    except MemoryError as error:
        return fail(f"not enough memory: {error or 'smaller batches or images need less'}", 1)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        discard(sys.stdout)
        return 1
    except OSError as error:
        return fail(f"{error.filename or 'writing'}: {error.strerror or error}", 1)


def fail(what, code: int) -> int:
    print(f"error: {printable(str(what))}", file=sys.stderr)
    return code
