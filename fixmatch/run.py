"""One run from its configuration to its result, and the evaluation of a checkpoint. What goes wrong is raised.

    import fixmatch
    result = fixmatch.train(fixmatch.load_config("digits"))
    result.top1["ema"]["last"]
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fixmatch import checkpoint, distributed, notes
from fixmatch.arrays import fingerprint
from fixmatch.channel import RankLost
from fixmatch.checkpoint import CheckpointError, load_weights
from fixmatch.config import OWN_IMAGES, Config, ConfigError, from_dict, to_yaml
from fixmatch.data import DataError, load_source
from fixmatch.data.dataset import Source
from fixmatch.data.dataset import shown as shown_name
from fixmatch.data.loader import LoaderError
from fixmatch.data.split import save_split
from fixmatch.evaluation import Scores, predict, score
from fixmatch.files import write_atomic
from fixmatch.inputs import Inputs, build_loader, data_facts, read_inputs, shared_facts
from fixmatch.log import LOGGER, RunLog, shown
from fixmatch.metrics import NonFinite
from fixmatch.models import build_model
from fixmatch.models.layers import set_cpu_kernels
from fixmatch.monitor import Monitor
from fixmatch.normalize import Normalize
from fixmatch.preview import preview, save_png
from fixmatch.recorder import Recorder
from fixmatch.report import compare, record
from fixmatch.report.figures import interval
from fixmatch.runfolder import RunFolder
from fixmatch.runtime import device_name, mixed_precision, select_device
from fixmatch.selfcheck import SelfCheck, SelfCheckFailed, StartCheck
from fixmatch.signals import ended_by_signals
from fixmatch.trainer import Trainer
from fixmatch.usage import command


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after a step; a checkpoint was saved, from which it can be resumed."""


EXIT_CODES = {  # of a process that such an exception ends, which the other ranks of its training then raise, too
    ConfigError: 2, DataError: 2, CheckpointError: 2, SelfCheckFailed: 3, NonFinite: 4, Interrupted: 130,
    KeyboardInterrupt: 130, LoaderError: 1, RankLost: 1}


@dataclass(frozen=True)
class Result:
    """What a finished run came to; the content of result.json. Accuracies are percent."""

    folder: pathlib.Path  # of the run
    steps: int
    seconds: float  # of training and evaluation, over all sessions
    images_per_second: float  # every image that went through the network in training
    # {"raw": ..., "ema": {"last", "best", "mean_last_20", "median_last_20"}}; of 20 evaluations or of all, if there are
    # fewer; empty without test images
    top1: dict[str, dict[str, float]]
    parity: str  # the verdict of the self-check
    about: dict  # seed, split, classes, configuration, versions, commit, machine

    def to_json(self) -> dict:
        facts = dataclasses.asdict(self)
        about, _ = facts.pop("about"), facts.pop("folder")
        return {**facts, **about}


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint's scores on all test images of its data set."""

    folder: pathlib.Path  # of the checkpoint
    step: int
    raw: Scores
    ema: Scores
    ema_logits: np.ndarray  # float32 [N, K]
    source: Source


def train(config: Config, resume: bool = False, recorder: Recorder | None = None) -> Result | None:
    """Trains from `config`, and keeps everything in its run folder.

    Args:
        resume: go on from run.dir/checkpoints/latest, if there is one, or from one before it, if it is damaged.
        recorder: writes down the first steps.

    Returns:
        The result; None on ranks other than 0.

    Raises:
        ConfigError, DataError, CheckpointError: what the user can mend; nothing was trained.
        SelfCheckFailed: parity.on_failure is abort and the self-check failed.
        NonFinite: a loss or a weight is no number; the checkpoints are from before.
        Interrupted: a signal stopped the run; a checkpoint was saved.
        RankLost: another process of this training failed or died.
        OSError: the system failed, such as a full disk.
    """
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(shown(quiet=distributed.rank() > 0))
        cleanup.enter_context(ended_by_signals())
        log = RunLog()
        cleanup.callback(log.close)
        device = _use_device(config)
        rank, world_size = cleanup.enter_context(distributed.joined(EXIT_CODES))
        if world_size > 1:
            _agree(shared_facts(config) | {"--resume": resume})
        check = SelfCheck(config) if rank == 0 else None  # runs while the data is read
        if check:
            cleanup.callback(check.close)
        device = _use_operators(config, device)  # after the self-check: what has their threads cannot be copied
        inputs = read_inputs(config, resume, rank, world_size)
        if world_size > 1:
            _agree(data_facts(inputs))
        trainer = _build_trainer(config, inputs, resume, rank, world_size, log, cleanup)
        trainer.recorder = recorder
        inputs.manifest.provenance["operators"] = f"{device}; OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
        LOGGER.info(_headline(config, inputs, trainer, device))
        if inputs.start:
            LOGGER.info(inputs.start.load(trainer.state.ema, inputs.source.classes))
        _say_notes(config, inputs, device)
        if check:
            _judge(config, inputs, check)
        if resume:
            _restore(config, inputs, trainer)
        if world_size > 1:
            _agree({"finished steps": trainer.step, "weights and momentum": distributed.digest(trainer.arrays())})
        if check and config.parity.enabled and recorder is None:
            _watch_first_steps(config, inputs, trainer, cleanup)
        return _fit(inputs, trainer)


def evaluate(path: str | pathlib.Path, which: str = "latest", overrides: Sequence[str] = ()) -> Evaluation:
    """Scores the raw and the averaged weights of a checkpoint on the test images of its data set.

    Args:
        path: a run folder or a checkpoint folder.
        which: "latest" or "best", of a run folder.
        overrides: `section.key=value` settings to change, such as data.root.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of other classes than the data's.
        ConfigError, DataError: the settings or the data cannot be used.
    """
    folder = checkpoint.find(pathlib.Path(path), which)
    saved = checkpoint.load(folder)
    manifest = saved.manifest
    config = from_dict(manifest.config, f"{folder}/checkpoint.json", overrides)
    with shown():
        _use_operators(config, _use_device(config))
        source = load_source(config.data)
    _check_classes(folder, manifest.classes, source)
    if not len(source.test):
        raise DataError(f"{source.name}: has no test images to evaluate on; add a test folder or test.csv with labeled "
                        "images that were not trained on (data.root), or train with data.test_fraction above 0, which "
                        "holds some out")
    model = build_model(num_classes=len(source.classes), **config.model.network())
    normalize = Normalize(manifest.mean, manifest.std)
    logits, found = {}, {}
    for part, name in (("model", "raw"), ("ema", "ema")):
        load_weights(model, saved.part(part))
        logits[name], losses = predict(model, normalize, source.test, config.train.eval_batch_size)
        found[name] = score(logits[name], source.test.labels, losses)
    return Evaluation(folder, manifest.step, found["raw"], found["ema"], logits["ema"], source)


# --- before the first step


def _use_device(config: Config) -> str:
    """Sets the device; returns its name. Raises ConfigError."""
    try:
        return select_device(config.runtime.device, config.runtime.deterministic)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _use_operators(config: Config, device: str) -> str:
    """Sets the operators of the device; returns a description of both. Raises ConfigError."""
    try:
        mixed_precision(config.train.amp)
        return f"{device} ({set_cpu_kernels(config.runtime.cpu_kernels)})" if device == "cpu" else device
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _agree(facts: dict) -> None:
    """Raises ConfigError on all ranks where one of `facts` is not the same on all of them."""
    found = distributed.difference(facts)
    if found:
        raise ConfigError(f"the processes differ in {found}; nothing was trained; start all of them with the same "
                          "configuration, data and versions")


def _build_trainer(config: Config, inputs: Inputs, resume: bool, rank: int, world_size: int, log: RunLog,
                   cleanup: contextlib.ExitStack) -> Trainer:
    """On rank 0 with the run folder and its first files.

    A run that was killed before its first checkpoint left nothing to keep, so one that resumes it has its folder.
    """
    folder, source, saved = inputs.folder, inputs.source, inputs.saved
    run = None
    if rank == 0:
        run = RunFolder(folder, resume=resume and (saved is not None or not (folder / "result.json").exists()))
        cleanup.callback(run.close)
        log.open(folder / "train.log")
    monitor = Monitor(folder if run else None, config, saved.manifest.step if saved else 0, world_size,
                      source.classes, saved.manifest.evaluated_step or 0 if saved else 0)
    cleanup.callback(monitor.close)
    if run:
        if run.moved_to:
            LOGGER.info(f"{folder}: held an earlier run, which is now in {run.moved_to}")
        write_atomic(folder / "config.yaml", to_yaml(config))
        save_split(inputs.split, folder / "split.json", source.name, source.train.labels,
                   source.test_paths if source.held_out else ())
        picture = preview(source.train, source.flip, config.run.seed, config.augment.strong)
        save_png(picture, folder / "preview.png")
        monitor.add_run(picture)
    loader = build_loader(config, source, inputs.split, rank, world_size)
    return Trainer(config, source, loader, monitor, folder / "checkpoints" if run else None, inputs.manifest)


def _headline(config: Config, inputs: Inputs, trainer: Trainer, device: str) -> str:
    model, train, source, split = config.model, config.train, inputs.source, inputs.split
    shape = (f"WRN-{model.depth}-{model.width}" if model.arch == "wideresnet"
             else f"ResNeXt-{model.depth} {model.cardinality}x{model.width}d")
    count = sum(p.size for p in trainer.state.model.parameters())
    ranks = inputs.manifest.world_size
    labeled = ranks * train.batch_size
    batch = (f"{labeled} labeled + {labeled * train.mu} unlabeled images"
             if config.ssl.mode == "fixmatch" else f"{labeled} labeled images, supervised only,")
    together = f" of {ranks} processes together" if ranks > 1 else ""
    unlabeled = f"{len(split.unlabeled):,} unlabeled and " if config.ssl.mode == "fixmatch" else ""
    start = (f", the first {config.ssl.supervised_steps:,} of them on the labels alone"
             if config.ssl.mode == "fixmatch" and config.ssl.supervised_steps else "")
    return (f"{config.run.name}: {shape}, {count:,} parameters, on {device}; {source.name}, {len(split.labeled)} "
            f"labels (split {split.sha256()[:8]}), {unlabeled}{len(source.test):,} test images; "
            f"{batch} a step{together}, {train.total_steps:,} steps{start}")


def _say_notes(config: Config, inputs: Inputs, device: str) -> None:
    for line in notes.before_training(config, inputs.source, inputs.split):
        LOGGER.info(line)
    if config.train.amp != "off" and device.startswith("cpu"):
        LOGGER.info("train.amp: mixed precision needs a GPU; training in float32")


def _judge(config: Config, inputs: Inputs, check: SelfCheck) -> None:
    """Waits for the self-check and keeps its verdict. Raises SelfCheckFailed."""
    folder, verdict = inputs.folder, check.result()
    write_atomic(folder / "parity.json", json.dumps(verdict, indent=1) + "\n")
    LOGGER.info(f"self-check: {verdict['verdict']}{' (remembered)' if verdict.get('cached') else ''}")
    inputs.manifest.provenance["parity"] = verdict["verdict"]
    if verdict["passed"] is False and config.parity.on_failure == "abort":
        raise SelfCheckFailed(f"{folder}: the self-check failed, so nothing was trained; see {folder}/parity.json, or "
                              f"run {command('parity')} -c {folder}/config.yaml; parity.on_failure=warn trains all the "
                              "same")


def _watch_first_steps(config: Config, inputs: Inputs, trainer: Trainer, cleanup: contextlib.ExitStack) -> None:
    """Has the next steps recorded and recomputed beside the training, which a failure stops with SelfCheckFailed.

    After a supervised start the first steps with unlabeled images follow in the same way.
    """
    source, saved = inputs.source, inputs.saved
    resumed = saved is not None and saved.manifest.step == trainer.step  # and not a supervised start that is over
    restored = {name: fingerprint(array) for name, array in saved.arrays.items()
                if not name.startswith(("augment/", "log/"))} if resumed else {}
    check = StartCheck(config, {"num_classes": len(source.classes), "mean": source.mean, "std": source.std,
                                "split": str(inputs.folder / "split.json"), "first_step": trainer.step,
                                "world_size": inputs.manifest.world_size, "device": device_name(),
                                "restored": restored})
    cleanup.callback(check.close)
    trainer.recorder = check.recorder
    starting = config.ssl.supervised_at(trainer.step)
    what = "first steps" if starting or not config.ssl.supervised_steps else "first steps with unlabeled images"
    then = functools.partial(_await_unlabeled, config, inputs, trainer, cleanup) if starting else None
    trainer.on_step = functools.partial(_judge_first_steps, config, inputs, trainer, check, what, then)


def _await_unlabeled(config: Config, inputs: Inputs, trainer: Trainer, cleanup: contextlib.ExitStack,
                     wait: bool = False) -> None:
    """Begins a check once the supervised start is over, if there are steps left that it could look at."""
    if trainer.step < config.train.total_steps and not config.ssl.supervised_at(trainer.step):
        _watch_first_steps(config, inputs, trainer, cleanup)


def _judge_first_steps(config: Config, inputs: Inputs, trainer: Trainer, check: StartCheck, what: str,
                       then: Callable[[], None] | None, wait: bool = False) -> None:
    """Looks whether a check of recorded steps is done, and keeps its verdict once. Raises SelfCheckFailed.

    Args:
        what: it looks at, in words.
        then: what is called after every step once it has passed.
    """
    folder, found = inputs.folder, check.poll(wait)
    if found is None:
        return
    trainer.on_step = then
    LOGGER.info(f"{what}: {found['verdict']}")
    verdicts = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
    write_atomic(folder / "parity.json", json.dumps({**verdicts, what.replace(" ", "_"): found}, indent=1) + "\n")
    if not found["passed"] and config.parity.on_failure == "abort":
        raise SelfCheckFailed(f"{folder}: the {what} are not what the reference computes, so training was stopped "
                              f"after step {trainer.step}; see {folder}/parity.json; parity.on_failure=warn trains all "
                              "the same")


# --- resuming


def _restore(config: Config, inputs: Inputs, trainer: Trainer) -> None:
    if inputs.saved is None:
        LOGGER.info(f"{inputs.folder}: no checkpoint to resume; starting at step 0")
        return
    trainer.restore(inputs.saved)
    if inputs.fallback:
        LOGGER.info(inputs.fallback)
        trainer.renew_latest()
    LOGGER.info(f"{inputs.folder}: resuming after step {trainer.step}")
    _say_what_changed(inputs.saved.manifest.provenance, inputs.manifest.provenance)
    was, now = inputs.saved.manifest.config["train"]["total_steps"], config.train.total_steps
    if was != now:
        LOGGER.info(f"train.total_steps: was {was:,}, now {now:,}; the learning rate follows the new schedule from "
                    "here on")


def _say_what_changed(before: dict, now: dict) -> None:
    """One line for each thing that rounds differently: operators with their threads, versions."""
    versions = before.get("versions") if isinstance(before.get("versions"), dict) else {}
    facts = {"operators": (before.get("operators"), now["operators"]),
             **{name: (versions.get(name), version) for name, version in now["versions"].items()}}
    for name, (was, used) in facts.items():
        if was is not None and was != used:
            LOGGER.info(f"{name}: was {shown_name(str(was))}, now {used}; sums may differ in their last digits from "
                        "here on")


# --- the training itself


def _fit(inputs: Inputs, trainer: Trainer) -> Result | None:
    """Trains to the end, to an interrupt or to a loss that is no number, and says which."""
    folder = inputs.folder
    try:
        finished = trainer.fit()
    except NonFinite as error:
        last = (f"{folder}/checkpoints/latest is from step {trainer.saved_step}" if trainer.saved_step
                else "no checkpoint was saved yet")
        LOGGER.info(f"stopped: {error}; {last}; a lower optim.lr may help")
        raise NonFinite(f"{error}; {last}; a lower optim.lr may help") from None
    distributed.meet()  # rank 0 has saved
    if not finished:
        message = f"{folder}: interrupted after step {trainer.step}; checkpoint saved, --resume goes on from it"
        LOGGER.info(message)
        raise Interrupted(message)
    if trainer.checkpoints is None:
        return None
    if trainer.on_step:  # so short a run that its first steps are still being recomputed
        trainer.on_step(wait=True)
    result = _result(inputs, trainer)
    write_atomic(folder / "result.json", json.dumps(result.to_json(), indent=1) + "\n")
    reported = trainer.config.run.report and _report(inputs, trainer)
    LOGGER.info(_closing(result, reported, _worth(folder), len(trainer.history["ema"])))
    return result


def _worth(folder: pathlib.Path) -> str:
    """What the unlabeled images were worth, where a supervised run on the same labels lies beside this one."""
    try:
        run = record.read(folder)
    except ConfigError:  # a file of the run was damaged meanwhile; the training is done all the same
        return ""
    baseline = compare.baseline_of(run, compare.beside(run))
    return f" {baseline.gain(run)}" if baseline and run.final() is not None else ""


def _report(inputs: Inputs, trainer: Trainer) -> bool:
    """Keeps what the network says of single images, and makes the page. A failure is said, and fails no training."""
    config, folder, state = trainer.config, inputs.folder, trainer.state
    try:
        from fixmatch.report import page, predictions  # the plotting takes a second to load

        if len(inputs.source.test):
            predictions.save(predictions.collect(state.ema.average, state.normalize, inputs.source, inputs.split,
                                                 config), folder)
        page.write_report([folder])
        return True
    except Exception as error:  # of any kind: the training is done and its result is written
        LOGGER.info(f"{folder}: no report was made: {type(error).__name__}: {' '.join(str(error).split())}; "
                    f"{command('report')} {folder} tries again")
        return False


def _result(inputs: Inputs, trainer: Trainer) -> Result:
    config, manifest = trainer.config, inputs.manifest
    images = manifest.world_size * config.images(0, trainer.step)
    about = {"world_size": manifest.world_size, "config": manifest.config, "split_sha256": manifest.split_sha256}
    about |= {name: fact for name, fact in manifest.provenance.items() if name != "parity"}
    about |= {"classes": list(inputs.source.classes)}
    top1 = trainer.top1()
    if config.data.name in OWN_IMAGES[1]:
        counts = notes.counts(inputs.source, inputs.split)
        about |= {"labeled_images": counts.labeled, "test_images": counts.test}
        about |= {"interval_95": {name: interval(found["last"], len(inputs.source.test))
                                  for name, found in top1.items()}} if top1 else {}
    return Result(inputs.folder, trainer.step, round(trainer.seconds, 1), round(images / trainer.train_seconds, 1),
                  top1, manifest.provenance.get("parity", "not checked"), about)


def _closing(result: Result, reported: bool, worth: str, evaluated: int) -> str:
    folder, scores = result.folder, "There are no test images, so no accuracy was measured."
    if result.top1:
        ema, raw = result.top1["ema"], result.top1["raw"]
        scores = (f"Top-1: EMA last {ema['last']:.2f} %, best {ema['best']:.2f} %, median of the last "
                  f"{min(20, evaluated)} {ema['median_last_20']:.2f} %; raw last {raw['last']:.2f} %.")
    if "interval_95" in result.about:
        low, high = result.about["interval_95"]["ema"]
        scores += (f" With {sum(result.about['test_images'].values()):,} test images the EMA's is known to lie in "
                   f"{low:.1f} to {high:.1f} % (95 % interval).")
    return (f"done: {result.steps:,} steps in {result.seconds:.0f} s. {scores}{worth}\n"
            f"See {folder}/{'report.html' if reported else 'result.json'}; all curves: {command('watch')} {folder}")


# --- evaluation


def _check_classes(folder: pathlib.Path, learned: Sequence[str], source: Source) -> None:
    """Raises CheckpointError where the data's classes, or their order, are not those of the checkpoint in `folder`."""
    for index, (there, here) in enumerate(itertools.zip_longest(learned, source.classes)):
        if there != here:
            raise CheckpointError(f"{folder}: trained on {len(learned)} classes, of which number {index} is {there!r}; "
                                  f"of the {len(source.classes)} of {source.name} it is {here!r}; evaluate on data of "
                                  "the same classes (data.name, data.root)")
