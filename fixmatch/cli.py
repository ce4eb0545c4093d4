"""The commands behind tools/train.py and tools/eval.py: parse, call, and turn what went wrong into one line and a code.

Exit codes: 0 done, 1 the system failed (a full disk, say), 2 wrong usage, configuration or data, 3 self-check failed,
4 training went non-finite, 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import pathlib
import signal
import sys

from fixmatch.config import Config, ConfigError, from_dict, load_config, to_dict, to_yaml

# What may differ between a checkpoint and the run that resumes it: the rest would change the numbers half-way. So does
# train.total_steps, by the schedule's length; it may differ so that a run can be made longer, and the log says so.
_RESUMABLE = ("run.name", "run.dir", "run.log_every", "data.root", "data.download", "data.max_broken",
              "train.total_steps", "train.eval_every", "train.eval_batch_size", "parity.enabled", "parity.on_failure",
              "parity.timeout", "runtime.device", "runtime.cpu_kernels", "runtime.data_threads")


class Parser(argparse.ArgumentParser):
    """Says wrong usage in one line; --help has the rest."""

    def error(self, message: str):
        self.exit(fail(f"{message} (--help shows the usage)", 2))


def train_main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="train.py", description="Train FixMatch.")
    _add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from run.dir/checkpoints/latest, if there is one")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")
    args = parser.parse_args(argv)
    return guarded(lambda: _train(args))


def eval_main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="eval.py", description="Evaluate a run or a checkpoint on the test images.")
    parser.add_argument("path", type=pathlib.Path, help="a run folder or a checkpoint folder")
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="of a run folder")
    parser.add_argument("-o", dest="overrides", metavar="section.key=value", nargs="+", action="extend", default=[],
                        help="settings to change, such as data.root or runtime.device")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write all figures to FILE")
    parser.add_argument("--predictions", type=pathlib.Path, metavar="FILE",
                        help="also write the EMA's prediction for every test image to FILE, as CSV")
    args = parser.parse_args(argv)
    return guarded(lambda: _evaluate(args))


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", required=True, type=pathlib.Path,
                        help="a YAML file, such as configs/digits.yaml")
    parser.add_argument("-o", dest="overrides", metavar="section.key=value", nargs="+", action="extend", default=[],
                        help="settings to change")


def guarded(command) -> int:
    from fixmatch.checkpoint import CheckpointError
    from fixmatch.data import DataError
    from fixmatch.monitor import NonFinite

    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tools set another one while modules load
    try:
        return command()
    except (ConfigError, DataError, CheckpointError) as error:
        return fail(error, 2)
    except NonFinite as error:
        return fail(error, 4)
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

    from fixmatch import distributed
    from fixmatch.selfcheck import SelfCheck

    device = _select_device(config)
    rank, world_size = distributed.init()
    with contextlib.ExitStack() as cleanup:
        check = SelfCheck(config) if rank == 0 else None  # runs while the data is read
        if check:
            cleanup.callback(check.close)
        return _train_checked(args, config, check, device, rank, world_size, cleanup)


def _train_checked(args, config: Config, check, device: str, rank: int, world_size: int, cleanup) -> int:
    """Reads data and split, makes the run folder, waits for the self-check, trains. `check` is None but on rank 0."""
    from fixmatch import checkpoint
    from fixmatch.data.loader import Loader
    from fixmatch.data.split import save_split
    from fixmatch.files import write_atomic
    from fixmatch.monitor import Monitor
    from fixmatch.preview import preview, save_png
    from fixmatch.runfolder import RunFolder, provenance
    from fixmatch.trainer import Trainer

    folder = pathlib.Path(config.run.dir)
    if folder.name in ("", ".."):  # the working directory or one above it, which may be moved aside
        folder = folder.resolve()
    source = load_data(config, rank)
    latest = folder / "checkpoints" / "latest"
    saved = checkpoint.load(latest) if args.resume and checkpoint.exists(latest) else None
    split = choose_split(config, source, folder, saved)
    facts = {**provenance(), "seed": config.run.seed, "world_size": world_size, "config": to_dict(config),
             "split_sha256": split.sha256()}
    before = _check_resumable(config, saved, facts) if saved else config

    run = RunFolder(folder, resume=saved is not None) if rank == 0 else None
    monitor = Monitor(folder if run else None, config.train.total_steps, saved.fact("step") if saved else 0,
                      config.run.log_every, world_size)
    cleanup.callback(monitor.close)
    if run:
        if run.moved_to:
            monitor.say(f"{folder}: held an earlier run, which is now in {run.moved_to}")
        write_atomic(folder / "config.yaml", to_yaml(config))
        save_split(split, folder / "split.json", source.name, source.train.labels)
        picture = preview(source.train, source.flip, config.run.seed, config.augment.strong)
        save_png(picture, folder / "preview.png")
        monitor.add_run(config, picture)

    loader = Loader(source.train, split, config.train.batch_size,
                    config.train.mu if config.ssl.mode == "fixmatch" else 0, config.run.seed, source.flip, rank,
                    world_size, config.runtime.data_threads, strong=config.augment.strong)
    trainer = Trainer(config, source, loader, monitor, folder / "checkpoints" if run else None, facts)
    monitor.say(_headline(config, source, split, trainer, device))
    if config.train.amp and device.startswith("cpu"):
        monitor.say("train.amp: mixed precision needs a GPU; training in float32")
    if check:
        verdict = check.result()
        write_atomic(folder / "parity.json", json.dumps(verdict, indent=1) + "\n")
        monitor.say(f"self-check: {verdict['verdict']}{' (remembered)' if verdict.get('cached') else ''}")
        facts["parity"] = verdict["verdict"]
        if verdict["passed"] is False and config.parity.on_failure == "abort":
            return fail(f"{folder}: the self-check failed, so nothing was trained; see {folder}/parity.json, or run "
                        f"tools/parity.py -c {args.config}; parity.on_failure=warn trains all the same", 3)
    if saved:
        trainer.restore(saved)
        monitor.say(f"{folder}: resuming after step {trainer.step}")
        if before.train.total_steps != config.train.total_steps:
            monitor.say(f"train.total_steps: was {before.train.total_steps:,}, now {config.train.total_steps:,}; the "
                        "learning rate follows the new schedule from here on")
    elif args.resume:
        monitor.say(f"{folder}: no checkpoint to resume; starting at step 0")
    return _fit(trainer, folder, facts)


def _fit(trainer, folder: pathlib.Path, facts: dict) -> int:
    """Trains to the end, to an interrupt or to a loss that is no number, and says which."""
    from fixmatch.files import write_atomic
    from fixmatch.monitor import NonFinite

    say = trainer.monitor.say
    try:
        finished = trainer.fit()
    except NonFinite as error:
        last = (f"{folder}/checkpoints/latest is from step {trainer.saved_step}" if trainer.saved_step
                else "no checkpoint was saved yet")
        say(f"stopped: {error}; {last}; a lower optim.lr may help")
        return fail(f"{error}; {last}; a lower optim.lr may help", 4)
    if not finished:
        say(f"{folder}: interrupted after step {trainer.step}; checkpoint saved, --resume goes on from it")
        return 130
    if trainer.checkpoints:
        result = _result(trainer, facts)
        write_atomic(folder / "result.json", json.dumps(result, indent=1) + "\n")
        say(_closing(folder, result))
    return 0


def load_data(config: Config, rank: int):
    """The data set; the other ranks wait for rank 0, which may have to download it."""
    from fixmatch import distributed
    from fixmatch.data import load_source

    if rank > 0:
        distributed.barrier()
    source = load_source(config.data)
    if rank == 0:
        distributed.barrier()
    flip = config.augment.flip
    return source if flip is None else dataclasses.replace(source, flip=flip)


def choose_split(config: Config, source, folder: pathlib.Path, saved):
    """The split of the run that is resumed, or the given one, or a new one. Raises DataError or ConfigError."""
    from fixmatch.data.split import choose_split, draw_split, load_split

    labels, data = source.train.labels, config.data
    file = folder / "split.json" if saved else data.split_file
    if file:
        expected = 0 if data.fold is not None else sum(data.labels_per_class) or data.num_labeled
        split = load_split(pathlib.Path(file), source.name, labels, expected, data.include_labeled)
    elif data.fold is not None:
        if data.fold >= len(source.folds):
            raise ConfigError(f"data.fold: {source.name} has {len(source.folds)} folds, got {data.fold}")
        split = choose_split(source.folds[data.fold], len(labels), data.include_labeled)
    else:
        seed = config.run.seed if data.split_seed is None else data.split_seed
        split = draw_split(labels, len(source.classes), data.labels_per_class or data.num_labeled, seed,
                           data.include_labeled)
    return split


def _evaluate(args) -> int:
    from fixmatch import checkpoint
    from fixmatch.checkpoint import load_weights
    from fixmatch.data import load_source
    from fixmatch.evaluate import predict, predictions_csv, score
    from fixmatch.files import write_atomic
    from fixmatch.monitor import describe
    from fixmatch.step import build_state

    folder = checkpoint.find(args.path, args.which)
    saved = checkpoint.load(folder)
    config = from_dict(saved.fact("config"), f"{folder}/checkpoint.json", args.overrides)
    _select_device(config)
    source = load_source(config.data)
    _check_classes(folder, saved.fact("classes"), source)
    state = build_state(config, len(source.classes), saved.fact("mean"), saved.fact("std"))
    load_weights(state.model, saved.part("model"))
    load_weights(state.ema.average, saved.part("ema"))
    logits, found = {}, {}
    for kind, model in (("raw", state.model), ("ema", state.ema.average)):
        logits[kind], losses = predict(model, state.normalize, source.test, config.train.eval_batch_size)
        found[kind] = score(logits[kind], source.test.labels, losses)
    if args.json:
        figures = {"checkpoint": str(folder), "step": saved.fact("step"), **{k: e.to_dict() for k, e in found.items()}}
        write_atomic(args.json, json.dumps(figures, indent=1) + "\n")
    if args.predictions:
        images = source.test_paths or range(len(source.test))
        write_atomic(args.predictions, predictions_csv(images, logits["ema"], source.test.labels, source.classes))
    print(f"{folder}  step {saved.fact('step')}  {describe(found)}")
    for index, name in enumerate(source.classes):
        accuracies = [found[kind].per_class[index] for kind in ("ema", "raw")]
        print(f"  {name:<20} " + "  ".join(f"{kind} {a:6.2f} %" if a is not None else f"{kind}      -"
                                           for kind, a in zip(("EMA", "raw"), accuracies, strict=True)))
    return 0


def _check_classes(folder: pathlib.Path, learned: list[str], source) -> None:
    """Raises CheckpointError where the data's classes, or their order, are not those of the checkpoint in `folder`."""
    from fixmatch.checkpoint import CheckpointError

    for index, (there, here) in enumerate(itertools.zip_longest(learned, source.classes)):
        if there != here:
            raise CheckpointError(f"{folder}: trained on {len(learned)} classes, of which number {index} is {there!r}; "
                                  f"of the {len(source.classes)} of {source.name} it is {here!r}; evaluate on data of "
                                  "the same classes (data.name, data.root)")


def _select_device(config: Config) -> str:
    """Sets device and operators; returns a description of both."""
    from fixmatch.models.layers import set_cpu_kernels
    from fixmatch.runtime import select_device

    try:
        device = select_device(config.runtime.device)
        return f"{device} ({set_cpu_kernels(config.runtime.cpu_kernels)})" if device == "cpu" else device
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_resumable(config: Config, saved, facts: dict) -> Config:
    """The configuration of the checkpoint. Raises ConfigError where going on would mix two different trainings."""
    before = from_dict(saved.fact("config"), f"{config.run.dir}/checkpoints/latest/checkpoint.json")
    tree = to_dict(before)
    for section, keys in to_dict(config).items():
        for name, value in keys.items():
            key, old = f"{section}.{name}", tree[section][name]
            if key not in _RESUMABLE and value != old:
                raise ConfigError(f"--resume: {key}: {config.run.dir} was trained with {old!r}, now it is {value!r}; "
                                  "use the old value or another run.dir")
    if config.train.total_steps < saved.fact("step"):
        raise ConfigError(f"--resume: train.total_steps: {config.run.dir} has done {saved.fact('step')} steps already, "
                          f"more than {config.train.total_steps}")
    ranks = saved.meta.get("world_size", facts["world_size"])
    if ranks != facts["world_size"]:
        raise ConfigError(f"--resume: {config.run.dir} was trained by {ranks} processes, now there are "
                          f"{facts['world_size']}; launch as many as before")
    if saved.fact("split_sha256") != facts["split_sha256"]:
        raise ConfigError(f"--resume: {config.run.dir}/split.json is not the split of the checkpoint")
    return before


def _headline(config: Config, source, split, trainer, device: str) -> str:
    model, train = config.model, config.train
    shape = (f"WRN-{model.depth}-{model.width}" if model.arch == "wideresnet"
             else f"ResNeXt-{model.depth} {model.cardinality}x{model.width}d")
    count = sum(p.size for p in trainer.state.model.parameters())
    batch = (f"{train.batch_size} labeled + {train.batch_size * train.mu} unlabeled images"
             if config.ssl.mode == "fixmatch" else f"{train.batch_size} labeled images, supervised only,")
    return (f"{config.run.name}: {shape}, {count:,} parameters, on {device}; {source.name}, {len(split.labeled)} "
            f"labels (split {split.sha256()[:8]}), {len(split.unlabeled):,} unlabeled and {len(source.test):,} test "
            f"images; {batch} a step, {train.total_steps:,} steps")


def _result(trainer, facts: dict) -> dict:
    """The content of result.json. images_per_second counts every image that went through the network in training."""
    train, with_unlabeled = trainer.config.train, trainer.config.ssl.mode == "fixmatch"
    images = trainer.step * facts["world_size"] * train.batch_size * (1 + 2 * train.mu * with_unlabeled)
    return {"steps": trainer.step, "seconds": round(trainer.seconds, 1),
            "images_per_second": round(images / trainer.train_seconds, 1), "top1": trainer.top1(), **facts}


def _closing(folder: pathlib.Path, result: dict) -> str:
    ema, raw = result["top1"]["ema"], result["top1"]["raw"]
    return (f"done: {result['steps']:,} steps in {result['seconds']:.0f} s. Top-1: EMA last {ema['last']:.2f} %, best "
            f"{ema['best']:.2f} %, median of last 20 {ema['median_last_20']:.2f} %; raw last {raw['last']:.2f} %.\n"
            f"See {folder}/result.json and {folder}/preview.png; curves: visualdl --logdir {folder}/vdl --language en "
            f"--disable-telemetry")
