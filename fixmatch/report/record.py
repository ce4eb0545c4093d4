"""A run as its folder tells it, finished or not."""

import functools
import json
import pathlib
from dataclasses import dataclass

from fixmatch import metrics_file
from fixmatch.config import KEYS, OWN_IMAGES, Config, ConfigError, load_config
from fixmatch.diagnosis import Finding, diagnose
from fixmatch.report.predictions import Predictions, load
from fixmatch.settings import value_of

# What may be changed on resume can change no result, but for these two: the length, and when accuracy is measured.
_TELLING = ("train.total_steps", "train.eval_every")


@dataclass(frozen=True)
class Record:
    folder: pathlib.Path
    config: Config
    train: list[dict]  # lines of metrics.jsonl of kind "train", oldest first
    evaluations: list[dict]  # likewise of kind "eval"
    result: dict | None  # result.json; None until the run has ended
    parity: dict | None  # parity.json
    split: dict | None  # split.json
    predictions: Predictions | None

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def supervised(self) -> bool:
        return self.config.ssl.mode == "none"

    @property
    def step(self) -> int:
        """The last that is on record."""
        return max((line["step"] for line in (*self.train[-1:], *self.evaluations[-1:])), default=0)

    def final(self, which: str = "ema") -> float | None:
        """Top-1 at the last evaluation, percent; None before the first."""
        return self.evaluations[-1][which]["top1"] if self.evaluations else None

    def recent(self, key: str) -> float | None:
        """The mean of `key` over the last tenth of the log, None where there is none."""
        last = self.train[-max(1, len(self.train) // 10):]
        values = [line[key] for line in last if line.get(key) is not None]
        return sum(values) / len(values) if values else None

    @functools.cached_property
    def findings(self) -> list[Finding]:
        classes = self.predictions.classes if self.predictions else [f"class {k}" for k in range(100_000)]
        return diagnose(self.train, self.evaluations, self.config, classes)

    @property
    def checks(self) -> dict[str, dict]:
        """What parity.json holds, by what was checked: the self-check, then first steps of the run itself."""
        if self.parity is None:
            return {}
        return {"self-check": self.parity, **{name.replace("_", " "): found for name, found in self.parity.items()
                                              if name.startswith("first_steps")}}

    @property
    def failed(self) -> dict[str, str]:
        """The verdicts of those of the checks that failed."""
        return {what: found["verdict"] for what, found in self.checks.items() if found.get("passed") is False}

    @property
    def recipe(self) -> tuple[tuple[str, object], ...]:
        """What runs that differ in nothing but their seed have in common: the settings that can change a result.

        Of own images data.root is one of them, since it says which they are.
        """
        own = self.config.data.name in OWN_IMAGES[1]
        return tuple((name, value_of(self.config, name)) for name, entry in KEYS.items() if not name.startswith("run.")
                     and (not entry.metadata["resumable"] or name in _TELLING or (own and name == "data.root")))


def read(folder: pathlib.Path) -> Record:
    """Reads a run folder. Raises ConfigError where it is none, or a file in it is damaged."""
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder}: not a run folder: it has no config.yaml")
    metrics = folder / "metrics.jsonl"
    lines = [line for _, line in metrics_file.read(metrics)] if metrics.exists() else []
    try:
        predictions = load(folder)
    except ValueError as error:
        raise ConfigError(f"{error}; remove it, and the report is made without it") from None
    return Record(folder, load_config(folder / "config.yaml"), [line for line in lines if line["kind"] == "train"],
                  [line for line in lines if line["kind"] == "eval"], _json(folder / "result.json"),
                  _json(folder / "parity.json"), _json(folder / "split.json"), predictions)


def _json(path: pathlib.Path) -> dict | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not a file that a run wrote")
    return found
