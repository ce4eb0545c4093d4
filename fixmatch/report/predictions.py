"""What the averaged network says of single images at the end of a run, kept in the run folder as predictions.npz.

So a report can be made later, and elsewhere, without the data. The file holds arrays and nothing that executes.
N images, K classes.
"""

import io
import pathlib
import zipfile
from dataclasses import dataclass

import numpy as np

from fixmatch.config import Config
from fixmatch.data.augment import views
from fixmatch.data.dataset import Dataset, Source
from fixmatch.data.split import Split
from fixmatch.evaluation import likeliest, predict
from fixmatch.files import write_atomic

FILE = "predictions.npz"
SAMPLE = 5000  # unlabeled images of which pseudo-labels are looked at
PICTURES = 24  # images of each kind that are kept
_STREAM = 5  # the seed's random stream of the sample; the loader, the preview and the split have 0 to 4


@dataclass(frozen=True)
class Judged:
    """Images of known class and what the network says of each."""

    label: np.ndarray  # int64 [N] the class
    predicted: np.ndarray  # int64 [N] the likeliest class
    confidence: np.ndarray  # float32 [N] its probability
    wrong: np.ndarray  # int64 [n] the wrong ones that it is surest of, these first; at most PICTURES
    pictures: np.ndarray  # uint8 [n, H, W, 3] the images of `wrong`, as the network saw them


@dataclass(frozen=True)
class Predictions:
    classes: tuple[str, ...]  # K names
    test: Judged
    unlabeled: Judged | None  # weak views of a sample; None where not all classes are known, or in a supervised run


def judge(logits: np.ndarray, data: Dataset) -> Judged:
    """Compares logits, float [N, K], of the N images of `data` with their labels."""
    predicted, confidence = likeliest(logits)
    wrong = np.flatnonzero(predicted != data.labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:PICTURES]
    return Judged(data.labels.astype(np.int64), predicted, confidence.astype(np.float32), wrong, data.images[wrong])


def collect(model, normalize, source: Source, split: Split, config: Config) -> Predictions:
    """Runs `model` over all test images, and over weak views of at most SAMPLE unlabeled ones.

    The views are drawn from run.seed alone. Pseudo-labels are judged where the classes of all unlabeled images are
    known.
    """
    batch_size = config.train.eval_batch_size
    test = judge(predict(model, normalize, source.test, batch_size)[0], source.test)
    unlabeled, labels = None, source.train.labels[split.unlabeled]
    if config.ssl.mode == "fixmatch" and (labels >= 0).all():
        rng = np.random.default_rng([config.run.seed, _STREAM])
        chosen = np.sort(rng.choice(split.unlabeled, min(SAMPLE, len(labels)), replace=False))
        plan = views.draw_weak(rng, len(chosen), source.train.images.shape[1:3], source.flip)
        sample = Dataset(views.weak(source.train.images, plan, chosen), source.train.labels[chosen])
        unlabeled = judge(predict(model, normalize, sample, batch_size)[0], sample)
    return Predictions(source.classes, test, unlabeled)


def save(found: Predictions, folder: pathlib.Path) -> None:
    """Writes `found` into the run folder, whole or not at all."""
    arrays = {"classes": np.array(found.classes)}
    for name, judged in (("test", found.test), ("unlabeled", found.unlabeled)):
        arrays |= {f"{name}_{key}": array for key, array in vars(judged).items()} if judged else {}
    blob = io.BytesIO()
    np.savez_compressed(blob, **arrays)
    write_atomic(folder / FILE, blob.getvalue())


def load(folder: pathlib.Path) -> Predictions | None:
    """What `save` wrote; None where there is none. Raises ValueError for a file that it did not write."""
    try:
        with np.load(folder / FILE, allow_pickle=False) as arrays:
            held = dict(arrays)
        parts = {name: Judged(**{key: held[f"{name}_{key}"] for key in Judged.__dataclass_fields__})
                 for name in ("test", "unlabeled") if f"{name}_label" in held}
        found = Predictions(tuple(map(str, held["classes"])), parts["test"], parts.get("unlabeled"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder / FILE}: damaged, or of another program ({type(error).__name__})") from None
    for judged in parts.values():
        _check(judged, len(found.classes), folder)
    return found


def _check(judged: Judged, num_classes: int, folder: pathlib.Path) -> None:
    """Raises ValueError where the arrays of a file do not fit each other."""
    n, m = len(judged.label), len(judged.wrong)
    shapes = [judged.label.shape, judged.predicted.shape, judged.confidence.shape, judged.pictures.shape[3:]]
    fits = shapes == [(n,), (n,), (n,), (3,)] and len(judged.pictures) == m and judged.pictures.dtype == np.uint8
    within = [(judged.label, num_classes), (judged.predicted, num_classes), (judged.wrong, n)]
    if not fits or any(a.dtype.kind != "i" or (a.size and not 0 <= a.min() <= a.max() < top) for a, top in within):
        raise ValueError(f"{folder / FILE}: its arrays do not fit each other")
