"""The checkpoints of a run, in its folder checkpoints/: latest, some of those before it as step-N, and best.

Those before it are there for the day on which latest cannot be read.
"""

import contextlib
import itertools
import pathlib
import shutil

from fixmatch import checkpoint
from fixmatch.checkpoint import Checkpoint, CheckpointError
from fixmatch.files import linked


def keep_latest(folder: pathlib.Path, step: int) -> None:
    """Makes checkpoints/latest, which is of `step`, also step-N. That takes no room where the disk has hard links."""
    latest, kept = folder / "latest", folder / f"step-{step}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for file in sorted(latest.glob("[!.]*")):  # arrays-... before checkpoint.json, which commits them; no .tmp
        if not linked(file, kept / file.name):
            shutil.copy2(file, kept / file.name)


def drop_old(folder: pathlib.Path, step: int, count: int) -> None:
    """Leaves the `count` newest of those from before `step`; later ones are of a past that the run does not go on."""
    found = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdecimal()}
    kept = sorted((n for n in found if n < step), reverse=True)[:count]
    for number, path in found.items():
        if number not in kept:
            shutil.rmtree(path, ignore_errors=True)


def newest(folder: pathlib.Path) -> tuple[Checkpoint | None, str]:
    """What a resumed run goes on from: latest, or else, of those that can be read, the one of the most steps.

    Returns:
        The checkpoint, None where there is none at all; and, if it is not latest, a line that says why and which.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be read.
    """
    every = {path.name: path for path in [folder / "latest", *folder.glob("step-*"), folder / "best"]
             if checkpoint.exists(path)}
    if not every:
        return None, ""
    why = f"{folder}/latest: there is none"
    if "latest" in every:
        try:
            return checkpoint.load(every.pop("latest")), ""
        except CheckpointError as error:
            why = str(error)
    others = {}
    for name, path in every.items():
        with contextlib.suppress(CheckpointError):
            others[name] = checkpoint.load(path)
    if not others:
        raise CheckpointError(f"{why}; no other checkpoint in {folder} can be read; without --resume the run starts "
                              "anew, and what is there is moved aside")
    name = max(others, key=lambda name: others[name].manifest.step)
    return others[name], f"{why}; going on from {folder / name}, of step {others[name].manifest.step:,}"


def set_latest_aside(folder: pathlib.Path) -> pathlib.Path | None:
    """Renames a checkpoints/latest that could not be read, so that nothing is overwritten; returns where it is now."""
    latest = folder / "latest"
    if not latest.exists():
        return None
    names = (folder / f"damaged-{n}" for n in itertools.count(1))
    return latest.rename(next(path for path in names if not path.exists()))
