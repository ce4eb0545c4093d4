"""What was found before any image is opened: paths, labels, and a fingerprint of the files.

For a million files a listing takes 65 MB.
"""

import array
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fixmatch.data.dataset import DataError, shown
from fixmatch.data.sources.folder.image import EXTENSIONS


class Files:
    """Paths and labels, in half the memory of a list of strings, and a fingerprint of the files themselves."""

    def __init__(self):
        self._paths, self._ends, self._labels = bytearray(), array.array("q", [0]), array.array("q")
        self._digest = hashlib.sha256()

    def add(self, path: str, label: int, status: os.stat_result | None) -> None:
        """Adds a file, whose `status` is None if it is a link that leads nowhere.

        The fingerprint covers path, size, time and mode. The mode counts because it decides who may read the file.
        """
        name = os.fsencode(path)
        self._paths += name
        self._ends.append(len(self._paths))
        self._labels.append(label)
        facts = (status.st_size, status.st_mtime_ns, status.st_mode) if status else ()
        self._digest.update(name + b"\0" + repr(facts).encode())

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> str:
        """The path of a file, as it was added."""
        return os.fsdecode(bytes(self._paths[self._ends[index]:self._ends[index + 1]]))

    def labels(self) -> np.ndarray:
        """The labels of all files, int64 [N]."""
        return np.array(self._labels, dtype=np.int64)

    def fingerprint(self, *settings) -> str:
        """The hex digest of all files and of the `settings` that their images depend on, too."""
        digest = self._digest.copy()
        digest.update(repr(settings).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Listing:
    """All images of a data set: the labeled ones, then the unlabeled ones, then those of the test set.

    It is a sequence of paths that can be opened.
    """

    root: pathlib.Path  # the folder that the paths of `files` start from
    files: Files
    num_train: int  # how many of them are training images; the others are test images
    classes: tuple[str, ...]
    where: tuple[str, str]  # where the labeled images and the test images were looked for, for messages
    tested: bool  # whether there are to be test images
    order: np.ndarray | None = None  # int64 [N], each image's place in `files`, where that order is another
    held_out: bool = False  # whether the test images were taken from the labeled ones

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.root, self.name(index))

    def name(self, index: int) -> str:
        """The path of an image from the root on."""
        return self.files[index if self.order is None else int(self.order[index])]

    def all_labels(self) -> np.ndarray:
        """The labels of all images, int64 [N], -1 where the class is not known."""
        labels = self.files.labels()
        return labels if self.order is None else labels[self.order]

    def fingerprint(self, *settings) -> str:
        """The hex digest of all files, and of the `settings` that their images depend on, too."""
        return self.files.fingerprint(self.num_train, *settings)

    def choose_test(self, fraction: float, seed: int, equal: Sequence[Sequence[int]] = (),
                    broken: Sequence[int] = ()) -> list[int]:
        """Which labeled images to hold out as test images: about `fraction` of each class, and at least one.

        They depend on `seed` and on the paths below the root, so nearly all of them stay test images when others are
        added. Copies of one picture stay together, on one side; a picture that is in two classes is not held out.

        Args:
            fraction: 0..1, of the images of a class.
            seed: of the choice.
            equal: indices of each two or more images with the same pixels, as far as that is known.
            broken: indices of images that are left out.

        Returns:
            Indices, sorted.

        Raises:
            DataError: a class has no two pictures, of which one could be held out.
        """
        labels, test = self.files.labels(), []
        first = {index: group[0] for group in equal for index in group}  # which one stands for all copies
        pictures: dict[str | int, list[int]] = {}
        for index in np.setdiff1d(np.flatnonzero(labels >= 0), np.array(broken, np.int64)).tolist():
            pictures.setdefault(first.get(index, self.files[index]), []).append(index)
        classes: list[list[list[int]]] = [[] for _ in self.classes]  # of each class its own pictures, with all copies
        for copies in pictures.values():
            if (labels[copies] == labels[copies[0]]).all():
                classes[labels[copies[0]]].append(copies)
        for name, own in zip(self.classes, classes, strict=True):
            if len(own) < 2:
                counted = " without copies and those that are in another class, too" if equal else ""
                raise DataError(f"{self.where[0]}: class {shown(name)} has {len(own)} labeled image"
                                f"{'s' * (len(own) != 1)}{counted}, so none can be held out as a test image; add one, "
                                "or train without a test: data.test_fraction=0")
            own.sort(key=lambda copies: min(self._rank(index, seed) for index in copies))
            count, chosen = sum(map(len, own)), []
            wanted = min(max(1, round(fraction * count)), count - 1)
            for copies in own:
                if len(chosen) + len(copies) <= wanted:
                    chosen += copies
            test += chosen or min(own, key=len)  # where every picture has more copies than were wanted
        return sorted(test)

    def _rank(self, index: int, seed: int) -> bytes:
        """By which a class's images are drawn: the lowest first."""
        return hashlib.sha256(b"%d/" % seed + os.fsencode(self.files[index])).digest()

    def with_test(self, test: Sequence[int]) -> "Listing":
        """The listing with these images, which `choose_test` gives, at its end as test images."""
        order = np.concatenate([np.delete(np.arange(len(self)), test), test]).astype(np.int64)
        return dataclasses.replace(self, num_train=len(self) - len(test), tested=True, order=order, held_out=True)

    def kept(self, broken: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The indices of training images and of test images without the `broken` ones, each int64."""
        kept = np.delete(np.arange(len(self)), np.array(broken, np.int64))
        return np.split(kept, [np.searchsorted(kept, self.num_train)])

    def labels(self, broken: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The labels of training images and of test images without the `broken` ones, each int64.

        Raises:
            DataError: there is one class only, a class has no labeled image, or there is no test image where there are
                to be some.
        """
        if len(self.classes) < 2:
            raise DataError(f"{self.where[0]}: has one class only, {shown(self.classes[0])}, so there is nothing to "
                            "tell apart; add labeled images of another class")
        train, test = (self.all_labels()[indices] for indices in self.kept(broken))
        counts = np.bincount(train[train >= 0], minlength=len(self.classes))
        if not counts.all():
            name = self.classes[int(np.argmin(counts))]
            raise DataError(f"{self.where[0]}: class {shown(name)} has no labeled image that can be read "
                            f"({' '.join(EXTENSIONS)}); add one, or remove the class")
        if self.tested and not len(test):
            raise DataError(f"{self.where[1]}: no test image that can be read; put images of each class there, since "
                            "the accuracy is measured on them, or remove it, and data.test_fraction of the labeled "
                            "images will be test images")
        return train, test
