"""Which training images are labeled. The choice is drawn once, recorded in a file, and checked wherever it is read.

Reference: kekmodel/FixMatch-pytorch, dataset/cifar.py, x_u_split.
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fixmatch.data.dataset import DataError, shown
from fixmatch.files import read_text, write_atomic

_STREAM = 4  # the seed's random stream that splits are drawn from; the loader and the preview have 0 to 3


@dataclass(frozen=True)
class Split:
    """The labeled and the unlabeled training images."""

    labeled: np.ndarray  # int64 [n] indices into the training images, sorted
    unlabeled: np.ndarray  # int64 [m] likewise

    def label_counts(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """How many labeled images each class has, int64 [K]; `labels`, int64 [N], are those of all training images."""
        return np.bincount(labels[self.labeled], minlength=num_classes)

    def sha256(self) -> str:
        """The SHA-256 of both index lists, by which two runs can be seen to have used the same split."""
        digest = hashlib.sha256(b"labeled" + self.labeled.astype("<i8").tobytes())
        digest.update(b"unlabeled" + self.unlabeled.astype("<i8").tobytes())
        return digest.hexdigest()


def draw_split(labels: np.ndarray, num_classes: int, num_labeled: int | tuple[int, ...], seed: int,
               include_labeled: bool = True, classes: Sequence[str] = ()) -> Split:
    """Draws the labeled images of each class.

    Args:
        labels: int64 [N], -1 where the class is not known.
        num_classes: K.
        num_labeled: how many images are to be labeled in all, equally many of each class; 0 takes every image whose
            class is known. Or K counts, one for each class.
        seed: of a random generator that draws nothing else.
        include_labeled: whether the labeled images are also among the unlabeled, as in the paper.
        classes: K names, for messages.

    Raises:
        DataError: num_labeled is no multiple of K, or a class is to have no label, or more than it has images.
    """
    rng = np.random.default_rng([seed, _STREAM])
    chosen = []
    for c, count in enumerate(_counts(labels, num_classes, num_labeled)):
        members = np.flatnonzero(labels == c)
        if not 0 < count <= len(members):
            asked = f"data.num_labeled: {num_labeled}" if isinstance(num_labeled, int) else "data.labels_per_class:"
            name = shown(classes[c]) if classes else c
            raise DataError(f"{asked} takes {count} images of class {name}, which has {len(members)}; a class needs "
                            "at least one label")
        chosen.append(rng.choice(members, count, replace=False))
    return choose_split(np.concatenate(chosen), len(labels), include_labeled)


def _counts(labels: np.ndarray, num_classes: int, num_labeled: int | tuple[int, ...]) -> list[int]:
    """How many labels each class is to have, K counts."""
    if not isinstance(num_labeled, int):
        if len(num_labeled) != num_classes:
            raise DataError(f"data.labels_per_class: has {len(num_labeled)} counts for {num_classes} classes")
        return list(num_labeled)
    if num_labeled == 0:
        return np.bincount(labels[labels >= 0], minlength=num_classes).tolist()
    per_class, rest = divmod(num_labeled, num_classes)
    if rest:
        near = max(1, round(num_labeled / num_classes)) * num_classes
        raise DataError(f"data.num_labeled: {num_labeled} labels cannot be spread evenly over {num_classes} classes "
                        f"(nearest: {near}; or say data.labels_per_class)")
    return [per_class] * num_classes


def choose_split(labeled: np.ndarray, num_images: int, include_labeled: bool = True) -> Split:
    """The split with exactly these labeled images. Raises DataError if no unlabeled image is left."""
    labeled = np.sort(labeled).astype(np.int64)
    everything = np.arange(num_images, dtype=np.int64)
    unlabeled = everything if include_labeled else np.setdiff1d(everything, labeled)
    if not len(unlabeled):
        raise DataError("data.include_labeled: false leaves no unlabeled image; set it to true")
    return Split(labeled, unlabeled)


def save_split(split: Split, path: pathlib.Path, dataset: str, labels: np.ndarray,
               held_out: Sequence[str] = ()) -> None:
    """Writes a split file, which holds the indices, their SHA-256, and that of the labels they were drawn from.

    It also names the test images that were `held_out` of the labeled ones.
    """
    write_atomic(path, json.dumps({
        "held_out": list(held_out),
        "dataset": dataset, "num_images": len(labels), "labels_sha256": _labels_sha256(labels),
        "num_labeled": len(split.labeled), "sha256": split.sha256(),
        "labeled": split.labeled.tolist(), "unlabeled": split.unlabeled.tolist()}) + "\n")


def load_split(path: pathlib.Path, dataset: str, labels: np.ndarray, num_labeled: int,
               include_labeled: bool = True, held_out: Sequence[str] = ()) -> Split:
    """Reads a split file and verifies it against the data and the settings.

    Args:
        path: of the file.
        dataset: the name of the data set.
        labels: int64 [N], the data set's.
        num_labeled: how many labels the file must have; 0 accepts any number.
        include_labeled: as in draw_split.
        held_out: the names of the test images that were taken from the labeled ones.

    Raises:
        DataError: the file is damaged, or belongs to other data or settings.
    """
    split, facts = _parse_split(path, largest=2**24 + 50 * len(labels))
    if (facts["dataset"], facts["num_images"]) != (dataset, len(labels)):
        raise DataError(f"{path}: made for {facts['dataset']} with {facts['num_images']} images, "
                        f"not for {dataset} with {len(labels)}")
    if facts["held_out"] != list(held_out):
        raise DataError(f"{path}: made for {len(facts['held_out'])} test images held out of the labeled ones, not for "
                        f"the {len(held_out)} of here; use the same images, data.test_fraction and data.split_seed")
    if facts["labels_sha256"] != _labels_sha256(labels):
        raise DataError(f"{path}: made for another copy of {dataset}: the labels are in another order")
    for name, index in (("labeled", split.labeled), ("unlabeled", split.unlabeled)):
        if not len(index) or index.min() < 0 or index.max() >= len(labels) or len(np.unique(index)) < len(index):
            raise DataError(f"{path}: {name}: indices must be distinct and in 0..{len(labels) - 1}")
    shared = np.isin(split.labeled, split.unlabeled)
    if not (shared.all() if include_labeled else not shared.any()):
        raise DataError(f"{path}: {shared.sum()} of its {len(shared)} labeled images are also unlabeled, which does "
                        f"not fit data.include_labeled={str(include_labeled).lower()}")
    if (labels[split.labeled] < 0).any():
        raise DataError(f"{path}: labeled: has images whose class is not known")
    if num_labeled and len(split.labeled) != num_labeled:
        raise DataError(f"{path}: has {len(split.labeled)} labeled images, but data.num_labeled is {num_labeled}")
    return split


def _parse_split(path: pathlib.Path, largest: int) -> tuple[Split, dict]:
    """The split that an undamaged file holds, and what the file says of the data set that it was made for."""
    try:
        content = json.loads(read_text(path, largest))
        split = Split(*(np.array(content[key], dtype=np.int64).reshape(-1) for key in ("labeled", "unlabeled")))
        facts = {key: content[key] for key in ("dataset", "num_images", "labels_sha256", "sha256")}
        facts["held_out"] = [str(name) for name in content.get("held_out", ())]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not a split file ({type(error).__name__}: {error})") from None
    if facts["sha256"] != split.sha256():
        raise DataError(f"{path}: its SHA-256 does not fit its indices: it was edited or damaged")
    return split, facts


def _labels_sha256(labels: np.ndarray) -> str:
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
