"""Evaluation on every test image. Mirrors fixmatch/evaluation.py.

Reference: kekmodel/FixMatch-pytorch, train.py, test(), and utils/misc.py, accuracy(). Accuracies are percent.
"""

import torch
import torch.nn.functional as F


@torch.no_grad()
def evaluate(model, normalize, images, labels, batch_size: int) -> dict[str, float]:
    """{"top1", "top5", "loss"} over all images, each batch weighted by its size."""
    model.eval()
    totals = {"top1": 0.0, "top5": 0.0, "loss": 0.0}
    for start in range(0, len(images), batch_size):
        targets = torch.from_numpy(labels[start:start + batch_size])
        logits = model(normalize(images[start:start + batch_size]))
        top1, top5 = accuracy(logits, targets, (1, min(5, logits.shape[1])))
        for name, value in (("top1", top1), ("top5", top5), ("loss", F.cross_entropy(logits, targets).item())):
            totals[name] += value * len(targets)
    return {name: total / len(images) for name, total in totals.items()}


def accuracy(logits, targets, topk) -> list[float]:
    """Percent of targets among the k largest logits, for each k. Of equal logits the first class ranks first."""
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices  # topk() leaves the order of ties open
    hits = order.eq(targets[:, None])
    return [100.0 * hits[:, :k].any(dim=1).to(torch.float64).mean().item() for k in topk]


def summarize(history: list[float]) -> dict[str, float]:
    """What the reference reports of all evaluations, and the median that the paper reports; oldest first."""
    last20 = torch.tensor(history[-20:], dtype=torch.float64)
    return {"last": history[-1], "best": max(history), "mean_last_20": last20.mean().item(),
            "median_last_20": last20.quantile(0.5).item()}
