"""One recipe with several seeds, and with every combination of some settings: one run after the other.

A sweep that was stopped goes on where it was: what has ended is skipped, what has begun is resumed.
"""

import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fixmatch import run
from fixmatch.config import KEYS, Config, ConfigError, from_dict, load_config
from fixmatch.files import write_atomic
from fixmatch.log import LOGGER, shown
from fixmatch.metrics import NonFinite
from fixmatch.report.figures import Spread, spread
from fixmatch.settings import value_of

_NUMBERS = ("last", "best", "mean_last_20", "median_last_20")  # of result.json's top1


@dataclass(frozen=True)
class Planned:
    """A run of a sweep before it is trained."""

    setting: str  # the overrides that set it apart, "" where there is one setting
    seed: int
    config: Config


def plan(path: str | pathlib.Path, seeds: Sequence[int], overrides: Sequence[str], folder: pathlib.Path | None = None
         ) -> tuple[pathlib.Path, list[Planned]]:
    """The sweep's folder, and its runs: every combination of settings, each with every seed.

    Args:
        path: a YAML file or the name of a packaged recipe.
        overrides: `section.key=value` strings; a comma outside of brackets and quotes separates values to try.
        folder: of the sweep; None: <run.dir>-sweep.

    Raises:
        ConfigError: before anything is trained, for any of the runs.
    """
    if any(override.partition("=")[0].strip() == "run.seed" for override in overrides):
        raise ConfigError("-o run.seed: --seeds says which seeds are tried")
    choices = [[f"{name}={value}" for value in _values(text)] if text else [name] for name, _, text in
               (override.partition("=") for override in overrides)]
    varied = {number for number, choice in enumerate(choices) if len(choice) > 1}
    planned = []
    for combination in itertools.product(*choices):
        setting = " ".join(combination[number] for number in sorted(varied))
        base = load_config(path, combination)
        home = folder or pathlib.Path(f"{base.run.dir}-sweep")
        for seed in seeds:
            name = re.sub(r"[^\w.=+-]+", "_", f"{setting} seed={seed}".strip())
            settings = dataclasses.replace(base.run, seed=seed, dir=str(home / name), name=f"{base.run.name} {name}")
            planned.append(Planned(setting, seed, dataclasses.replace(base, run=settings)))
    if len({p.config.run.dir for p in planned}) < len(planned):
        raise ConfigError("-o: two of the combinations are the same")
    return home, planned


def sweep(folder: pathlib.Path, planned: Sequence[Planned]) -> dict:
    """Trains what of `planned` has not ended; returns the content of sweep.json, which is rewritten after every run.

    A run whose loss becomes no number is noted as failed, and the next one begins.

    Raises:
        What `fixmatch.run.train` raises, but for NonFinite.
    """
    failed = {}
    with shown():
        LOGGER.info(_what_a_seed_changes(planned[0].config))
    for number, each in enumerate(planned, 1):
        where = f"run {number} of {len(planned)}: {each.config.run.dir}"
        try:
            ended = _ended(each.config)
            with shown():
                LOGGER.info(f"{where}{': has ended already' if ended else ''}")
            if not ended:
                run.train(each.config, resume=True)
        except NonFinite as error:
            failed[each.config.run.dir] = str(error)
        found = summary(planned, failed)
        write_atomic(folder / "sweep.json", json.dumps(found, indent=1) + "\n")
        write_atomic(folder / "sweep.md", table(found))
    return found


def summary(planned: Sequence[Planned], failed: dict[str, str]) -> dict:
    """What has come out so far: every run, and the mean and the deviation (n - 1) of the seeds of each setting."""
    settings = []
    for setting, members in itertools.groupby(planned, key=lambda each: each.setting):
        runs = [_outcome(each, failed) for each in members]
        done = [each["top1"] for each in runs if each["top1"]]
        top1 = {which: {number: spread([top1[which][number] for top1 in done])._asdict() for number in _NUMBERS}
                for which in ("ema", "raw")} if done else None
        settings.append({"setting": setting, "top1": top1, "runs": runs})
    return {"seed_changes": _what_a_seed_changes(planned[0].config), "settings": settings}


def table(found: dict) -> str:
    """A summary in Markdown: EMA top-1 at the last step, percent."""
    rows = ["| setting | EMA top-1, % | median of the last evaluations (20 at most), % | runs | each seed |",
            "|---|---|---|---|---|"]
    for entry in found["settings"]:
        numbers = ["-", "-", "0"]
        if entry["top1"]:
            ema = entry["top1"]["ema"]
            numbers = [str(Spread(**ema["last"])), str(Spread(**ema["median_last_20"])), str(ema["last"]["n"])]
        each = ", ".join(f"{r['seed']}: {r['top1']['ema']['last']:.2f}" if r["top1"] else f"{r['seed']}: {r['state']}"
                         for r in entry["runs"])
        rows.append(f"| {entry['setting'] or 'all'} | {' | '.join(numbers)} | {each} |")
    return "\n".join([*rows, "", f"Mean ± standard deviation (n - 1) over the seeds. {found['seed_changes']}", ""])


def _outcome(each: Planned, failed: dict[str, str]) -> dict:
    folder = each.config.run.dir
    result = _ended(each.config)
    state = "ended" if result else "failed" if folder in failed else "to do"
    return {"seed": each.seed, "folder": folder, "state": state, "top1": result and result["top1"]}


def _ended(config: Config) -> dict | None:
    """result.json of a run that has come to its end. Raises ConfigError where that run had other settings."""
    path = pathlib.Path(config.run.dir) / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        old, steps = from_dict(result["config"], str(path)), result["steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a file that a run wrote ({type(error).__name__}: {error})") from None
    for name, entry in KEYS.items():
        if not entry.metadata["resumable"] and value_of(old, name) != value_of(config, name):
            raise ConfigError(f"{path.parent}: was trained with {name}={value_of(old, name)}, now it is "
                              f"{value_of(config, name)}; name another folder with --dir")
    return result if steps >= config.train.total_steps else None


def _what_a_seed_changes(config: Config) -> str:
    data = config.data
    if data.split_seed is None and not data.split_file and data.fold is None and data.num_labeled:
        return ("A seed draws the labeled images, the first weights, the batches and the views; data.split_seed=N "
                "keeps the labeled images.")
    return "A seed draws the first weights, the batches and the views; the labeled images are the same for all seeds."


def _values(text: str) -> list[str]:
    """The values that `text` lists: parted at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if character == "," and not depth and not quote:
            parts.append("")
            continue
        if quote or character in "'\"":
            quote = "" if character == quote else quote or character
        else:
            depth += (character in "[{") - (character in "]}")
        parts[-1] += character
    return parts
