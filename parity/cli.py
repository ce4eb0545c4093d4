"""The command behind tools/parity.py. Exit codes: 0 aligned, 1 diverged or not done, 2 wrong usage, 130 interrupted."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator

import paddle

from fixmatch import process
from fixmatch.cli import Parser, fail, guarded
from fixmatch.config import ConfigError, from_dict, load_config
from fixmatch.data import NUM_CLASSES
from fixmatch.data.loader import Loader
from fixmatch.files import write_atomic
from fixmatch.inputs import choose_split, read_data
from fixmatch.runtime import physical_cores, select_device
from fixmatch.selfcheck import load_machine_code
from fixmatch.usage import OPTIONAL
from parity import first_steps, goldens, page, plants, prove, stages, subject
from parity.case import CLASSIC_SEEDS, PUBLISHED, SMALL, Case
from parity.plants import score
from parity.report import Report
from parity.second_process import Died, Turns, in_second_process

# What else may be given beside an argument that is a command of its own.
_BESIDE = {"list_plants": (), "write_goldens": (), "mutation_score": ("json",), "recording": ("config", "json")}
_NOT_IN_SELF_CHECK = ("stage", "steps")
_NEEDS_TORCH = ("write_goldens", "mutation_score", "reprod_log", "seeds", "real_images")


class UsageError(ConfigError):
    """A combination of arguments that cannot be run."""


def main(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    return guarded(lambda: _checked(args, parser))


def _checked(args, parser: argparse.ArgumentParser) -> int:
    """Runs the command; a file that cannot be written is wrong usage, as exit code 1 says that something diverged."""
    _check_usage(args, parser)
    try:
        return _run(args)
    except BrokenPipeError:
        raise
    except Died as error:
        return fail(str(error), 1)
    except OSError as error:
        return fail(f"{error.filename or 'writing'}: {error.strerror or error}", 2)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("parity", description="Prove that the trainer is numerically the PyTorch reference.")
    names = [*stages.stages(), "all"]
    parser.add_argument("--stage", choices=names, default="all", help="what to prove (default: all)")
    parser.add_argument("-c", "--config", type=pathlib.Path, help="whose network and hyper-parameters to use")
    parser.add_argument("-o", dest="overrides", metavar="section.key=value", nargs="+", action="extend", default=[])
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), help="where Paddle computes; Torch stays on the "
                        "CPU (default: runtime.device of the configuration)")
    parser.add_argument("--arch", choices=("wideresnet", "resnext"), help="another network than the configuration's: "
                        "of the published shape with -c, else a small one")
    parser.add_argument("--seeds", type=int, nargs="+",
                        help=f"of weights and images (default: {CLASSIC_SEEDS[0]})")
    parser.add_argument("--steps", type=int, default=3, help="free-running steps of stage train (default: 3; where all "
                        "stages are run, at most 2 of a large network)")
    parser.add_argument("--real-images", action="store_true", help="train on the configuration's own images")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--html", type=pathlib.Path, metavar="FILE", help="write the result as a self-contained page")
    parser.add_argument("--reprod-log", type=pathlib.Path, metavar="DIR",
                        help="also write the .npy pairs and diff logs of the paper-reproduction guide")
    parser.add_argument("--plant", metavar="NAME", help="put a known bug into the Paddle side")
    parser.add_argument("--list-plants", action="store_true", help="name the known bugs and stop")
    parser.add_argument("--mutation-score", action="store_true", help="try all known bugs and say which are caught")
    parser.add_argument("--write-goldens", action="store_true", help="record results for machines without Torch")
    parser.add_argument("--self-check", action="store_true",
                        help=f"the stages that run before training: {', '.join(stages.SELF_CHECK)}")
    parser.add_argument("--processes", type=int, choices=(1, 2),
                        help="that share the self-check, or all stages (default: 2, where this one can be copied)")
    parser.add_argument("--recording", type=pathlib.Path, help=argparse.SUPPRESS)  # of a run's first steps
    return parser


def _check_usage(args, parser: argparse.ArgumentParser) -> None:
    """Raises UsageError for a value out of range, and for an argument that would be ignored beside another."""
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    _check_combination(given, vars(args).keys())
    if args.steps < 1:
        raise UsageError(f"--steps: at least 1, got {args.steps}")
    for seed in args.seeds or []:
        if not 0 <= seed < 2**63:
            raise UsageError(f"--seeds: 0 to 2**63 - 1, got {seed}")
    if args.processes == 2 and not _can_be_shared(args):
        raise UsageError("--processes 2: of a --self-check or, with Torch, of all stages, without --seeds and "
                         "--real-images")
    if args.plant and args.plant not in plants.PLANTS:
        raise UsageError(f"--plant {args.plant}: no such bug; --list-plants shows all {len(plants.PLANTS)}")
    for name in _NEEDS_TORCH if not _installed("torch") else ():
        if name in given:
            raise UsageError(f"{_option(name)} needs Torch: pip install {OPTIONAL['torch']}")
    if args.reprod_log and not _installed("reprod_log"):
        raise UsageError(f"--reprod-log needs reprod_log: pip install {OPTIONAL['reprod_log']}")


def _check_combination(given: list[str], every) -> None:
    beside = {**_BESIDE, "self_check": every - set(_NOT_IN_SELF_CHECK)}
    for command in beside.keys() & given:
        for name in given:
            if name != command and name not in beside[command]:
                raise UsageError(f"{_option(command)} and {_option(name)} do not go together")


def _option(name: str) -> str:
    return {"config": "-c", "overrides": "-o"}.get(name, f"--{name.replace('_', '-')}")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _run(args) -> int:
    if args.list_plants:
        print("\n".join(f"{plant.name:<36} {plant.stage:<10} {plant.what}" for plant in plants.PLANTS.values()))
        return 0
    if args.write_goldens or args.mutation_score or args.recording:  # a recording is of what another process computed
        paddle.set_device("cpu")
    if args.write_goldens:
        return _write_goldens()
    if args.mutation_score:
        return score.print_score(args.json)
    if args.recording:
        report = first_steps.prove(args.recording, load_config(args.config))
        print(report.text())
        return _keep(args, report)
    return _prove(args)


def _prove(args) -> int:
    case, turns = _case(args), Turns()
    second_share = contextlib.nullcontext()
    if _processes(args) == 2:  # it starts before anything is computed, since what has threads cannot be forked
        load_machine_code()
        second_share = in_second_process(_share_of_second, args, case, _installed("torch"), turns)
    with second_share as second, _prepared(args, case):
        report = _report(args, case, second, turns)
        print(report.text())
        if args.reprod_log:
            from parity import reprod  # loads Torch, which is not installed everywhere

            print("\n" + reprod.write(args.reprod_log, args.seeds or CLASSIC_SEEDS))
    return _keep(args, report)


def _processes(args) -> int:
    shared = _can_be_shared(args) and process.can_fork() and physical_cores() > 1
    return args.processes or (2 if shared else 1)


def _can_be_shared(args) -> bool:
    return _alone(args) if args.self_check else _all_alone(args) and _installed("torch")


@contextlib.contextmanager
def _prepared(args, case: Case) -> Iterator[None]:
    """The run's device is chosen, and the bug planted that is to be."""
    runtime = case.config.runtime
    try:
        select_device(runtime.device, runtime.deterministic)
    except ValueError as error:
        raise UsageError(error) from None
    with plants.planted(args.plant):
        yield


def _report(args, case: Case, second: Iterator | None, turns: Turns) -> Report:
    torch, every = _installed("torch"), _every(args, case, turns.from_back if second else range)
    if args.self_check and _alone(args):
        return prove.self_check(case, every, torch, second)
    if torch and _all_alone(args):
        return prove.all_stages(case, every, second)
    chosen = list(every) if args.stage == "all" else [args.stage]
    if args.self_check:
        chosen = stages.of_self_check("all", case)
    if not torch:
        return prove.with_goldens(case, chosen, every)
    return prove.with_torch(case, chosen, args.seeds or [case.seed], every, lane=not args.self_check)


def _alone(args) -> bool:
    """Whether one case is looked at, of images from a numpy seed."""
    return not (args.seeds or args.real_images)


def _all_alone(args) -> bool:
    return args.stage == "all" and _alone(args) and not args.self_check


def _every(args, case: Case, turns: Callable[[int], Iterable[int]]) -> dict[str, stages.Stage]:
    thorough = not (args.self_check or (case.large and _all_alone(args)))
    return stages.stages(args.steps, thorough, turns=turns if args.self_check else range)


def _share_of_second(args, case: Case, torch: bool, turns: Turns) -> Iterator:
    """What the second process does. In a self-check the first has the run's threads, as it trains; this one has one."""
    every = _every(args, case, turns.from_front)
    with _prepared(args, case):
        if args.self_check:
            with subject.threads(1):
                yield from prove.share_of_second(case, every, torch)
        else:
            yield from prove.second_of_all(case, every)


def _keep(args, report: Report) -> int:
    if args.json:
        write_atomic(args.json, json.dumps(report.json(), indent=1) + "\n")
    if args.html:
        write_atomic(args.html, page.html_page(report))
    return 0 if report.passed else 1


def _case(args) -> Case:
    overrides = args.overrides + ([f"runtime.device={args.device}"] if args.device else [])
    config = load_config(args.config, overrides) if args.config else from_dict({}, "defaults", overrides)
    arch = args.arch or config.model.arch
    if not args.config:
        if not any(o.startswith("model.") for o in args.overrides):
            config = dataclasses.replace(config, model=SMALL[arch])
    elif arch != config.model.arch:
        config = dataclasses.replace(config, model=PUBLISHED[arch])
    case = Case(config, NUM_CLASSES.get(config.data.name, 10), seed=(args.seeds or CLASSIC_SEEDS)[0],
                total_steps=max(args.steps, Case.total_steps))
    return _with_real_images(case) if args.real_images else case


def _with_real_images(case: Case) -> Case:
    """Batches of the trainer's own loader: its split, augmentation and normalization, but the case's B and mu."""
    source = read_data(case.config)
    split = choose_split(case.config, source)
    # so far ahead CTAugment draws from its first rates, since nobody tells it of probes here
    loader = Loader(source.train, split, case.batch_size, case.mu, case.seed, source.flip,
                    strong=case.config.augment.strong, ahead=case.total_steps)
    return dataclasses.replace(case, num_classes=len(source.classes), loader=loader, mean=source.mean, std=source.std)


def _write_goldens() -> int:
    every = stages.stages()
    for name, case in goldens.CASES.items():
        path = goldens.write(name, {"loss": every["loss"].reference(case), goldens.WHOLE: stages.whole_reference(case)})
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0
