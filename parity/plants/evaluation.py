"""Bugs in how accuracy is measured."""

from fixmatch import evaluation
from parity.plants.plant import Patch, Plant


def _last_batch_dropped(patch: Patch) -> None:
    right = evaluation.evaluate

    def changed(model, normalize, data, batch_size):
        keep = len(data) // batch_size * batch_size
        return right(model, normalize, type(data)(data.images[:keep], data.labels[:keep]), batch_size)

    patch(evaluation, "evaluate", changed)


def _ties_rank_last(patch: Patch) -> None:
    right = evaluation.score
    patch(evaluation, "score",
          lambda logits, labels, values: right(logits[:, ::-1], logits.shape[1] - 1 - labels, values))


def _first_evaluations_reported(patch: Patch) -> None:
    right = evaluation.summarize
    of_20 = ("mean_last_20", "median_last_20")
    patch(evaluation, "summarize", lambda history: right(history) | {n: right(history[:20])[n] for n in of_20})


PLANTS = [
    Plant("last-batch-dropped", "metric", "the last partial test batch is left out", _last_batch_dropped),
    Plant("ties-rank-last", "metric", "of equal logits the last class ranks first", _ties_rank_last),
    Plant("first-20-evaluations", "metric", "the first 20 evaluations are reported, not the last",
          _first_evaluations_reported),
]
