"""The command behind tools/parity.py. Exit codes: 0 aligned, 1 diverged, 2 wrong usage, 130 interrupted."""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import signal
import time

import paddle

from fixmatch.cli import Parser, fail
from fixmatch.config import Config, ConfigError, ModelConfig, load_config
from fixmatch.data import NUM_CLASSES, DataError
from parity import goldens, stages
from parity.case import Case
from parity.report import Report

CLASSIC_SEEDS = (100, 300, 1000, 2000, 3000)  # of the paper-reproduction guide
_SMALL = {"wideresnet": ModelConfig("wideresnet", 10, 2), "resnext": ModelConfig("resnext", 11, 4, 4)}
_PUBLISHED = {"wideresnet": ModelConfig("wideresnet", 28, 2), "resnext": ModelConfig("resnext", 28, 4, 4)}


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tool sets another one while modules load
    try:
        _check_usage(args, parser)
        return _run(args)
    except (ConfigError, DataError, UsageError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except OSError as error:
        return fail(f"{error.filename or 'writing'}: {error.strerror or error}", 2)


class UsageError(ValueError):
    """A combination of arguments that cannot be run."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="parity.py", description="Prove that the trainer is numerically the PyTorch reference.")
    names = [*stages.stages(), "all"]
    parser.add_argument("--stage", choices=names, default="all", help="what to prove (default: all)")
    parser.add_argument("-c", "--config", type=pathlib.Path, help="whose network and hyper-parameters to use")
    parser.add_argument("-o", dest="overrides", metavar="section.key=value", nargs="+", action="extend", default=[])
    parser.add_argument("--arch", choices=("wideresnet", "resnext"), help="another network than the configuration's: "
                        "of the published shape with -c, else a small one")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"of weights and images (default: {CLASSIC_SEEDS[0]})")
    parser.add_argument("--steps", type=int, default=3, help="free-running steps of stage train (default: 3)")
    parser.add_argument("--real-images", action="store_true", help="train on the configuration's own images")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--html", type=pathlib.Path, metavar="FILE", help="write the result as a self-contained page")
    parser.add_argument("--reprod-log", type=pathlib.Path, metavar="DIR",
                        help="also write the .npy pairs and diff logs of the paper-reproduction guide")
    parser.add_argument("--plant", metavar="NAME", help="put a known bug into the Paddle side")
    parser.add_argument("--list-plants", action="store_true")
    parser.add_argument("--mutation-score", action="store_true", help="try all known bugs and say which are caught")
    parser.add_argument("--write-goldens", action="store_true", help="record results for machines without Torch")
    parser.add_argument("--self-check", action="store_true", help="the stages that run before training: "
                        + ", ".join(stages.SELF_CHECK))
    return parser


def _check_usage(args, parser: argparse.ArgumentParser) -> None:
    """Raises UsageError for a value out of range, and for an argument that would be ignored beside another."""
    from parity import plants

    options = {"config": "-c", "overrides": "-o"}
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    honoured = {"list_plants": (), "write_goldens": (), "mutation_score": ("json",),
                "self_check": vars(args).keys() - {"stage", "steps"}}
    for command in honoured.keys() & given:
        for name in given:
            if name != command and name not in honoured[command]:
                one, other = (options.get(n, f"--{n.replace('_', '-')}") for n in (command, name))
                raise UsageError(f"{one} and {other} do not go together")
    if args.steps < 1:
        raise UsageError(f"--steps: at least 1, got {args.steps}")
    for seed in args.seeds or []:
        if not 0 <= seed < 2**63:
            raise UsageError(f"--seeds: 0 to 2**63 - 1, got {seed}")
    if args.plant and args.plant not in plants.PLANTS:
        raise UsageError(f"--plant {args.plant}: no such bug; --list-plants shows all {len(plants.PLANTS)}")
    if importlib.util.find_spec("torch") is None:
        for name in ("write_goldens", "mutation_score", "reprod_log", "seeds", "real_images"):
            if name in given:
                raise UsageError(f"--{name.replace('_', '-')} needs Torch: pip install 'fixmatch-paddle[parity]'")


def _run(args) -> int:
    from parity import plants

    if args.list_plants:
        print("\n".join(f"{plant.name:<36} {plant.stage:<10} {plant.what}" for plant in plants.PLANTS.values()))
        return 0
    paddle.set_device("cpu")  # where float64 is compared; a GPU's sums differ from run to run
    if args.write_goldens:
        return _write_goldens()
    if args.mutation_score:
        return plants.print_score(args.json)
    case = _case(args)
    chosen = (stages.SELF_CHECK if args.self_check else list(stages.stages()) if args.stage == "all" else (args.stage,))
    with_torch = importlib.util.find_spec("torch") is not None
    with plants.planted(args.plant):
        report = _prove(args, case, chosen) if with_torch else _prove_with_goldens(case, chosen)
        print(report.text())
        if args.reprod_log:
            from parity import reprod

            print("\n" + reprod.write(args.reprod_log, args.seeds or CLASSIC_SEEDS))
    if args.json:
        write(args.json, json.dumps(report.json(), indent=1) + "\n")
    if args.html:
        write(args.html, report.html())
    return 0 if report.passed else 1


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file, and makes its folder."""
    from fixmatch.files import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


def _case(args) -> Case:
    config = load_config(args.config, args.overrides) if args.config else _without_file(args.overrides)
    arch = args.arch or config.model.arch
    if not args.config:
        if not any(o.startswith("model.") for o in args.overrides):
            config = dataclasses.replace(config, model=_SMALL[arch])
    elif arch != config.model.arch:
        config = dataclasses.replace(config, model=_PUBLISHED[arch])
    case = Case(config, NUM_CLASSES.get(config.data.name, 10), seed=(args.seeds or CLASSIC_SEEDS)[0],
                total_steps=max(args.steps, Case.total_steps))
    return _with_real_images(case) if args.real_images else case


def small_case(arch: str, seed: int) -> Case:
    """A small network of this architecture with the reference's hyper-parameters."""
    return Case(Config(model=_SMALL[arch]), 10, seed)


def _without_file(overrides: list[str]) -> Config:
    from fixmatch.config import from_dict

    return from_dict({}, "defaults", overrides)


def _with_real_images(case: Case) -> Case:
    """Batches of the trainer's own loader: its split, augmentation and normalization, but the case's B and mu."""
    from fixmatch.cli import choose_split, load_data
    from fixmatch.data.loader import Loader

    source = load_data(case.config, rank=0)
    split = choose_split(case.config, source, pathlib.Path(case.config.run.dir), saved=None)
    # so far ahead CTAugment draws from its first rates, since nobody tells it of probes here
    loader = Loader(source.train, split, case.batch_size, case.mu, case.seed, source.flip,
                    strong=case.config.augment.strong, ahead=case.total_steps)
    return dataclasses.replace(case, num_classes=len(source.classes), loader=loader, mean=source.mean, std=source.std)


def _prove(args, case: Case, chosen) -> Report:
    started = time.perf_counter()
    every, results = stages.stages(args.steps), []
    for seed in args.seeds or [case.seed]:
        for name in chosen:
            result = stages.run_stage(every[name], case.with_seed(seed))
            if name == "forward" and not result.passed:
                stages.isolate(result, case.with_seed(seed))
            results.append(result)
    if "backward" in chosen and not args.self_check and all(result.passed for result in results):
        results.append(stages.rounding_lane(case, args.seeds if len(args.seeds or []) >= 5 else list(CLASSIC_SEEDS)))
    import torch

    model = case.config.model
    shape = f"{model.arch} depth {model.depth} width {model.width}" + (
        f" cardinality {model.cardinality}" if model.arch == "resnext" else "")
    pictures = "real images" if case.loader else "images from a numpy seed"
    return Report(results, time.perf_counter() - started, f"torch {torch.__version__}",
                  f"{shape}, {case.num_classes} classes, {pictures}")


def _prove_with_goldens(case: Case, chosen) -> Report:
    """Without Torch: the stages that were recorded. Raises UsageError for another stage, which cannot be proven."""
    started = time.perf_counter()
    recorded = (*stages.SELF_CHECK, "augment")
    missing = [name for name in chosen if name not in recorded]
    if missing:
        raise UsageError(f"stage {', '.join(missing)}: needs Torch: pip install 'fixmatch-paddle[parity]'; "
                         f"without it: {', '.join(recorded)}")
    name, exact = goldens.nearest(case.config.model)
    golden_case = goldens.CASES[name]
    results = []
    for stage in chosen:
        whole = stages.stages()[stage]
        if stage == "augment":
            results.append(stages.run_stage(whole, golden_case))
            continue
        digested = whole._replace(ours=lambda c, whole=whole: goldens.digest(whole.ours(c)))
        results.append(stages.run_stage(digested, golden_case, goldens.read(name, stage)))
    shape = f"{name} with the reference's hyper-parameters" + ("" if exact else
                                                               f", the nearest recorded to {case.config.model}")
    return Report(results, time.perf_counter() - started,
                  "results recorded from torch, since torch is not installed (fresh weights are not compared)", shape)


def _write_goldens() -> int:
    every = stages.stages()
    for name, case in goldens.CASES.items():
        path = goldens.write(name, {stage: every[stage].reference(case) for stage in stages.SELF_CHECK})
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0
