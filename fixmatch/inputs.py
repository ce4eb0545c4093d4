"""What a run starts from: its data set, its split, its batches, and the checkpoint that it goes on from."""

import dataclasses
import itertools
import pathlib
from dataclasses import dataclass

from fixmatch import checkpoints, distributed, starting_point
from fixmatch.checkpoint import Checkpoint, CheckpointError, Manifest
from fixmatch.config import KEYS, Config, ConfigError, from_dict, to_dict
from fixmatch.data import DataError, load_source
from fixmatch.data.dataset import Source
from fixmatch.data.loader import Loader
from fixmatch.data.split import Split, draw_split, load_split
from fixmatch.data.split import choose_split as split_with
from fixmatch.runfolder import provenance
from fixmatch.settings import value_of
from fixmatch.starting_point import StartingPoint

# Keys that may differ from machine to machine, beside paths: rank 0's count, or they do not change what is trained.
_LOCAL = ("run.name", "data.download", "data.max_broken", "parity.", "runtime.")


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, on every rank."""

    folder: pathlib.Path
    source: Source
    split: Split
    saved: Checkpoint | None  # the checkpoint that is resumed
    start: StartingPoint | None  # what model.init names, where the run does not go on from a checkpoint of its own
    manifest: Manifest  # what is known of this run before its first step
    fallback: str = ""  # where `saved` is not checkpoints/latest: a line that says why, and which it is


def shared_facts(config: Config) -> dict[str, object]:
    """Settings and versions that have to be the same on all ranks."""
    settings = {name: value_of(config, name) for name, entry in KEYS.items()
                if not entry.metadata["path"] and not name.startswith(_LOCAL)}
    return settings | {f"version of {name}": version for name, version in provenance()["versions"].items()}


def data_facts(inputs: Inputs) -> dict[str, object]:
    """What of the data has to be the same on all ranks."""
    images = " ".join(digest[:16] for digest in inputs.manifest.data_sha256.values())
    return {"the classes": inputs.source.classes, "the images and labels": images,
            "mean and std": (inputs.source.mean, inputs.source.std), "the split": inputs.split.sha256()}


def read_inputs(config: Config, resume: bool, rank: int, world_size: int) -> Inputs:
    """Reads all of it, on every rank. Raises ConfigError, DataError or CheckpointError.

    The run folder is rank 0's, which gives the other ranks the checkpoint and the split: they may see no common disk.

    Args:
        resume: whether to go on from the checkpoint in the run folder, if there is one.
    """
    folder = pathlib.Path(config.run.dir)
    if folder.name in ("", ".."):  # the working directory or one above it, which may be moved aside
        folder = folder.resolve()
    source = read_data(config)
    saved, split, fallback = None, None, ""
    if rank == 0:
        saved, split, fallback = _saved_and_split(config, source, folder, resume)
    if world_size > 1:
        saved, split = _of_rank_0(saved, split)
    start = starting_point.read(config.model) if config.model.init and not saved else None
    origin = start.facts if start else saved.manifest.provenance.get("init") if saved else None
    manifest = Manifest(
        step=0, config=to_dict(config), dataset=source.name, classes=source.classes, mean=source.mean, std=source.std,
        image_size=source.train.images.shape[1:3], split_sha256=split.sha256(), world_size=world_size,
        data_sha256={"train": source.train.sha256(), "test": source.test.sha256()},
        provenance={**provenance(), "seed": config.run.seed, **({"init": origin} if origin else {})})
    if saved:
        _check_resumable(config, saved.manifest, manifest)
    return Inputs(folder, source, split, saved, start, manifest, fallback)


def _saved_and_split(config: Config, source: Source, folder: pathlib.Path,
                     resume: bool) -> tuple[Checkpoint | None, Split, str]:
    saved, fallback = checkpoints.newest(folder / "checkpoints") if resume else (None, "")
    if resume and saved is None:
        _check_that_none_was_saved(folder)
    try:
        return saved, choose_split(config, source, folder / "split.json" if saved else None), fallback
    except DataError as error:
        raise DataError(f"{error}{_way_on(folder) if saved else ''}") from None


def read_data(config: Config) -> Source:
    """The data set of `config`; the other ranks wait for rank 0, which may have to download it. Raises DataError."""
    source = distributed.in_turn(lambda: load_source(config.data))
    flip = config.augment.flip
    return source if flip is None else dataclasses.replace(source, flip=flip)


def _of_rank_0(saved: Checkpoint | None, split: Split | None) -> tuple[Checkpoint | None, Split]:
    """The checkpoint and the split that rank 0 has, on every rank."""
    facts = distributed.exchange(saved and saved.manifest.to_json())[0]
    arrays = distributed.of_rank_0(saved and saved.arrays)
    parts = distributed.of_rank_0(split and {"labeled": split.labeled, "unlabeled": split.unlabeled})
    return facts and Checkpoint(arrays, Manifest.from_json(facts)), Split(**parts)


def choose_split(config: Config, source: Source, recorded: pathlib.Path | None = None) -> Split:
    """The split of the run that is resumed, or the given one, or a new one. Raises DataError or ConfigError.

    Args:
        recorded: split.json of the run that is resumed.
    """
    labels, data = source.train.labels, config.data
    file = recorded or data.split_file
    if file:
        expected = 0 if data.fold is not None else sum(data.labels_per_class) or data.num_labeled
        return load_split(pathlib.Path(file), source.name, labels, expected, data.include_labeled,
                          source.test_paths if source.held_out else ())
    if data.fold is not None:
        if data.fold >= len(source.folds):
            raise ConfigError(f"data.fold: {source.name} has {len(source.folds)} folds, got {data.fold}")
        return split_with(source.folds[data.fold], len(labels), data.include_labeled)
    seed = config.run.seed if data.split_seed is None else data.split_seed
    return draw_split(labels, len(source.classes), data.labels_per_class or data.num_labeled, seed,
                      data.include_labeled, source.classes)


def build_loader(config: Config, source: Source, split: Split, rank: int = 0, world_size: int = 1) -> Loader:
    """The batches of a rank, as `config` wants them."""
    mu = config.train.mu if config.ssl.mode == "fixmatch" else 0
    return Loader(source.train, split, config.train.batch_size, mu, config.run.seed, source.flip, rank, world_size,
                  config.runtime.data_threads, strong=config.augment.strong)


def _check_that_none_was_saved(folder: pathlib.Path) -> None:
    """Raises CheckpointError where a run was evaluated, and so was saved, and yet no checkpoint is there to resume."""
    log = folder / "metrics.jsonl"
    if log.exists():
        with open(log, "rb") as file:
            if any(b'"eval"' in part for part in iter(lambda: file.readline(2**20), b"")):
                raise CheckpointError(f"--resume: {log} has evaluations, but {folder}/checkpoints has no checkpoint; "
                                      "without --resume the run starts anew, and what is there is moved aside")


def _check_resumable(config: Config, before: Manifest, now: Manifest) -> None:
    """Raises ConfigError where going on would mix two different trainings."""
    run = config.run.dir
    old = from_dict(before.config, f"{run}/checkpoints/latest/checkpoint.json")
    for name, entry in KEYS.items():
        was, value = value_of(old, name), value_of(config, name)
        if not entry.metadata["resumable"] and value != was:
            raise ConfigError(f"--resume: {name}: {run} was trained with {was!r}, now it is {value!r}; use the old "
                              f"value{'' if name.startswith('model.') else _way_on(run)}")
    if config.train.total_steps < before.step:
        raise ConfigError(f"--resume: train.total_steps: {run} has done {before.step} steps already, more than "
                          f"{config.train.total_steps}")
    if before.world_size != now.world_size:
        raise ConfigError(f"--resume: {run} was trained by {before.world_size} processes, now there are "
                          f"{now.world_size}; launch as many as before")
    _check_same_data(run, before, now)
    if before.split_sha256 != now.split_sha256:
        raise ConfigError(f"--resume: {run}/split.json is not the split of the checkpoint{_way_on(run)}")


def _check_same_data(run: str, before: Manifest, now: Manifest) -> None:
    """Raises ConfigError where images, labels or class names are not those that the run has been trained on."""
    change = f"; give it back its data (data.root){_way_on(run)}"
    for index, (was, name) in enumerate(itertools.zip_longest(before.classes, now.classes)):
        if was != name:
            raise ConfigError(f"--resume: {run} was trained on {len(before.classes)} classes, of which number {index} "
                              f"is {was!r}; of the {len(now.classes)} of {now.dataset} it is {name!r}{change}")
    for part, images in (("train", "training"), ("test", "test")):
        if before.data_sha256.get(part, now.data_sha256[part]) != now.data_sha256[part]:  # format 1 has none
            raise ConfigError(f"--resume: {run}: the {images} images of {now.dataset}, or their labels, are not those "
                              f"that the run began with{change}")


def _way_on(run) -> str:
    """What to do instead of --resume with other images or settings."""
    return f"; or start a new run from its weights: without --resume, -o model.init={run} and another run.dir"
