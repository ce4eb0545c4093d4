"""What a run starts from: its data set, its split, its batches, and the checkpoint that it goes on from."""

import dataclasses
import pathlib
from dataclasses import dataclass

from fixmatch import checkpoint, distributed, starting_point
from fixmatch.checkpoint import Checkpoint, Manifest
from fixmatch.config import KEYS, Config, ConfigError, from_dict, to_dict
from fixmatch.data import DataError, load_source
from fixmatch.data.dataset import Source
from fixmatch.data.loader import Loader
from fixmatch.data.split import Split, draw_split, load_split
from fixmatch.data.split import choose_split as split_with
from fixmatch.runfolder import provenance
from fixmatch.settings import value_of
from fixmatch.starting_point import StartingPoint


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, on every rank."""

    folder: pathlib.Path
    source: Source
    split: Split
    saved: Checkpoint | None  # the checkpoint that is resumed
    start: StartingPoint | None  # what model.init names, where the run does not go on from a checkpoint of its own
    manifest: Manifest  # what is known of this run before its first step


def read_inputs(config: Config, resume: bool, rank: int, world_size: int) -> Inputs:
    """Reads all of it, on every rank. Raises ConfigError, DataError or CheckpointError.

    Args:
        resume: whether to go on from the checkpoint in the run folder, if there is one.
    """
    folder = pathlib.Path(config.run.dir)
    if folder.name in ("", ".."):  # the working directory or one above it, which may be moved aside
        folder = folder.resolve()
    source = read_data(config, rank)
    latest = folder / "checkpoints" / "latest"
    saved = checkpoint.load(latest) if resume and checkpoint.exists(latest) else None
    try:
        split = choose_split(config, source, folder / "split.json" if saved else None)
    except DataError as error:
        raise DataError(f"{error}{_way_on(folder) if saved else ''}") from None
    start = starting_point.read(config.model) if config.model.init and not saved else None
    origin = start.facts if start else saved.manifest.provenance.get("init") if saved else None
    manifest = Manifest(
        step=0, config=to_dict(config), dataset=source.name, classes=source.classes, mean=source.mean, std=source.std,
        image_size=source.train.images.shape[1:3], split_sha256=split.sha256(), world_size=world_size,
        provenance={**provenance(), "seed": config.run.seed, **({"init": origin} if origin else {})})
    if saved:
        _check_resumable(config, saved.manifest, manifest)
    return Inputs(folder, source, split, saved, start, manifest)


def read_data(config: Config, rank: int = 0) -> Source:
    """The data set of `config`; the other ranks wait for rank 0, which may have to download it. Raises DataError."""
    if rank > 0:
        distributed.barrier()
    source = load_source(config.data)
    if rank == 0:
        distributed.barrier()
    flip = config.augment.flip
    return source if flip is None else dataclasses.replace(source, flip=flip)


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
    if before.split_sha256 != now.split_sha256:
        raise ConfigError(f"--resume: {run}/split.json is not the split of the checkpoint{_way_on(run)}")


def _way_on(run) -> str:
    """What to do instead of --resume with other images or settings."""
    return f"; or start a new run from its weights: without --resume, -o model.init={run} and another run.dir"
