"""Which images are equal, pixel for pixel as they are trained on, and what that means for a data set."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from fixmatch.data.dataset import shown
from fixmatch.data.sources.folder.listing import Listing


class Digests:
    """Takes the images of a data set as they are decoded; 16 bytes are held for each."""

    def __init__(self):
        self._digests, self._indices = [], []

    def add(self, images: np.ndarray, indices: np.ndarray) -> None:
        """Adds uint8 [n, H, W, 3], which are the images `indices`, int64 [n]."""
        found = b"".join(hashlib.blake2b(image, digest_size=8).digest() for image in images)
        self._digests.append(np.frombuffer(found, np.uint64))
        self._indices.append(np.asarray(indices, np.int64))

    def groups(self) -> list[list[int]]:
        """The indices of each two or more images that are equal, in rising order."""
        if not self._digests:
            return []
        digests, indices = np.concatenate(self._digests), np.concatenate(self._indices)
        order = np.argsort(digests, kind="stable")
        starts = np.flatnonzero(np.diff(digests[order])) + 1
        return sorted(sorted(group.tolist()) for group in np.split(indices[order], starts) if len(group) > 1)


def findings(listing: Listing, groups: Sequence[Sequence[int]]) -> Iterator[str]:
    """A line for each kind of duplicates that there is: how many images, and an example.

    Args:
        groups: as Digests.groups gives them.
    """
    labels, cut, counts, examples = listing.all_labels(), listing.num_train, {}, {}
    for group in groups:
        labeled = [index for index in group if index < cut and labels[index] >= 0]
        unlabeled = [index for index in group if index < cut and labels[index] < 0]
        test = [index for index in group if index >= cut]
        known = labeled + test
        other = [index for index in known if labels[index] != labels[known[0]]]
        learned = [index for index in test if (labels[labeled] == labels[index]).any()]
        again = [index for index in labeled[1:] if labels[index] == labels[labeled[0]]]
        for kind, images, others in (("two classes", other, known), ("learned", learned, labeled),
                                     ("seen", test, unlabeled), ("repeated", again, labeled),
                                     ("unlabeled", labeled, unlabeled)):
            if images and others:
                counts[kind] = counts.get(kind, 0) + len(images)
                examples.setdefault(kind, (images[0], others[0]))
    for kind, meaning in _MEANINGS.items():
        if kind in counts:
            one, another = (shown(listing.name(index)) for index in examples[kind])
            yield meaning.format(count=f"{counts[kind]:,}") + f", such as {one} and {another}"


_MEANINGS = {  # of equal images: what is said, worst first
    "two classes": "warning: labeled images that are in another class, too: {count}",
    "learned": "warning: the accuracy is too high, as test images are labeled training images, too: {count}",
    "seen": "warning: the accuracy may be too high, as test images are unlabeled training images, too: {count}",
    "repeated": "labeled images that are there more than once: {count}",
    "unlabeled": "labeled images that are among the unlabeled ones, too, which does no harm: {count}"}
