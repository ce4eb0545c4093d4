"""From a listing to the images: decoded once, cached, and memory-mapped.

Beside the images, 85 MB are held for a million files while they are decoded, and 65 MB after that.
"""

import functools
import hashlib
import logging
import os
import pathlib
import time

import numpy as np

from fixmatch.data.dataset import DataError, Dataset, Source, shown
from fixmatch.data.sources.cache import cached_images
from fixmatch.data.sources.folder import duplicates
from fixmatch.data.sources.folder.decode import common_size, decoding
from fixmatch.data.sources.folder.image import DECODER_VERSION
from fixmatch.data.sources.folder.listing import Listing
from fixmatch.data.sources.folder.scan import scan_folder
from fixmatch.data.sources.folder.table import scan_tables
from fixmatch.data.sources.writer import Writer

_SHOWN = 10  # so many broken files are named, and more only counted

_log = logging.getLogger(__name__)


def load_folder(root: str, image_size: int | None, max_broken: int, test_fraction: float = 0.2,
                seed: int = 0) -> Source:
    """Reads ROOT/labeled, unlabeled and test. Classes are the sorted names of labeled's subfolders.

    The training images are the labeled ones, class by class, then the unlabeled ones (label -1), each sorted by path.
    Files whose extension is no image's are passed over, as is everything hidden (.DS_Store, .ipynb_checkpoints). Links
    are followed, but each folder is entered once. A link that leads nowhere counts as a broken image.

    Args:
        root: the folder that holds the three; labeled may also be called train, and test val.
        image_size: the side of the square that images are made into, in pixels. None takes the size that all images
            have, if it is one and both its sides have 8 pixels or more; else a square with the median of their shorter
            sides, from 8 to 224.
        max_broken: how many image files may be unreadable; they are named and left out.
        test_fraction: where there is no test folder, so much of each class's labeled images are test images, and at
            least one, with all copies of it; 0: there are no test images then.
        seed: of the choice of these.

    Raises:
        DataError: folders are missing, there is one class only, a class has no readable image, labeled/ and test/ do
            not fit each other, there are too many broken images, or there is no room for the decoded ones.
    """
    return _load("folder", scan_folder(pathlib.Path(root)), image_size, max_broken, test_fraction, seed)


def load_csv(root: str, image_size: int | None, max_broken: int, test_fraction: float = 0.2, seed: int = 0) -> Source:
    """Reads ROOT/train.csv and ROOT/test.csv; or ROOT is itself the training CSV, with test.csv beside it.

    The files are UTF-8 and comma-separated, and their first line names the columns. Columns other than path and label
    are passed over. Paths start from the folder of the CSV file, and may lead out of it. Classes are the sorted labels
    of the training file, without spaces around them. Order, sizes, broken images and test images where there is no
    test.csv are as in `load_folder`.

    Raises:
        DataError: as in `load_folder`, naming file and line: a file is not there, a column is missing, a label in
            test.csv is empty or is one that no training image has, a path is given two labels, or an image is both a
            labeled training image and a test image.
    """
    place = pathlib.Path(root)
    train = place if place.is_file() else place / "train.csv"
    name = "csv" if train.name == "train.csv" else f"csv-{hashlib.sha256(os.fsencode(train.name)).hexdigest()[:8]}"
    return _load(name, scan_tables(train), image_size, max_broken, test_fraction, seed)


def _load(name: str, listing: Listing, image_size: int | None, max_broken: int, test_fraction: float,
          seed: int) -> Source:
    """The source with the images of `listing`, where `name` is that of the cache, without the size."""
    listing.labels()  # raises at once what would otherwise be raised after hours of decoding
    holding = (test_fraction, seed) if test_fraction and not listing.tested else None
    if holding:
        listing.choose_test(*holding)  # likewise
    images, facts = cached_images(
        listing.root, f"{name}-{image_size or 'auto'}", listing.fingerprint(DECODER_VERSION, image_size, holding),
        functools.partial(_decode_all, listing, image_size, max_broken, holding))
    if holding:
        listing = listing.with_test(facts["held_out"])
    broken = facts["broken"]
    _refuse(listing, broken, max_broken)
    for index, reason in broken[:_SHOWN]:
        _log.info("%s: left out: %s", shown(listing[index]), reason)
    if len(broken) > _SHOWN:
        _log.info("%s: %d more broken images left out", listing.root, len(broken) - _SHOWN)
    left_out = [index for index, _ in broken]
    train, test = listing.labels(left_out)
    if holding:
        _log.info("%s: not there, so %s of the %s labeled images are held out as test images: %g of each class and at "
                  "least one (data.test_fraction)", listing.where[1], f"{len(test):,}",
                  f"{(train >= 0).sum() + len(test):,}", test_fraction)
    elif listing.tested:
        _log.info("%s: the test images are those of %s; data.test_fraction is for data without any", listing.root,
                  listing.where[1])
    for line in duplicates.findings(listing, facts["duplicates"]):
        _log.info("%s: %s", listing.root, line)
    paths = tuple(shown(listing.name(index)) for index in listing.kept(left_out)[1])
    return Source(name.split("-")[0], listing.classes, Dataset(images[:len(train)], train),
                  Dataset(images[len(train):], test), tuple(facts["mean"]), tuple(facts["std"]), flip=True,
                  test_paths=paths, held_out=listing.held_out)


def _refuse(listing: Listing, broken: list[list], max_broken: int) -> None:
    """Raises DataError if there are more `broken` images than may be."""
    if len(broken) > max_broken:
        index, reason = broken[0]
        raise DataError(f"{listing.root}: more than {max_broken} broken images, the first of them "
                        f"{shown(listing.name(index))} ({reason}); remove them, or raise data.max_broken")


def _decode_all(listing: Listing, image_size: int | None, max_broken: int, holding: tuple[float, int] | None,
                writer: Writer) -> dict:
    """Writes every image that can be read, the test images at the end.

    Args:
        listing: of all images.
        image_size: see `load_folder`.
        max_broken: likewise.
        holding: the fraction and the seed of the labeled images that are held out as test images, which is decided when
            their pixels are known, as copies are to stay together; None: none are held out.
        writer: of the cache.

    Returns:
        Mean, std, the indices that are held out, what is broken: [[index, reason], ...], and which images are equal:
        [[index, index, ...], ...]. The latter two are of the listing that has the held-out images at its end.
    """
    started, broken, digests, test = time.monotonic(), [], duplicates.Digests(), []
    cut = int((listing.all_labels() >= 0).sum()) if holding else listing.num_train
    height, width = (image_size, image_size) if image_size else common_size(listing, listing.root)
    writer.begin(height, width, len(listing) + (cut if holding else 0))
    with decoding(listing, cut, height, width, listing.root) as results, writer.room_beside() as waiting:
        for part, (images, bad) in results:
            broken += bad
            digests.add(images, np.delete(part, [index - part.start for index, _ in bad]))
            _refuse(listing, broken, max_broken)
            if not holding or part.start >= cut:
                writer.append(images, counted=bool(holding) or part.stop <= cut)
                continue
            waiting.write(images)
            if part.stop == cut:
                left_out = [index for index, _ in broken]
                test = listing.choose_test(*holding, digests.groups(), left_out)
                is_test = np.isin(np.delete(np.arange(cut), left_out), test)
                writer.append_from(waiting, np.flatnonzero(~is_test), counted=True)
        if holding:
            writer.append_from(waiting, np.flatnonzero(is_test), counted=False)
    _log.info("%s: %s images decoded in %.0f s", listing.root, f"{writer.shape[0]:,}", time.monotonic() - started)
    place = np.argsort(listing.with_test(test).order)  # of each image, with the held-out ones at the end
    return {**writer.statistics(), "held_out": test,
            "broken": sorted([int(place[index]), reason] for index, reason in broken),
            "duplicates": sorted(sorted(place[group].tolist()) for group in digests.groups())}
