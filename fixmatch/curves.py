"""Which numbers of metrics.jsonl VisualDL draws, and under which names.

Its page shows groups and the curves in them in the order in which they were first written. The first group answers what
one asks first: does it learn, are the pseudo-labels right, and is the data fast enough.
"""

_TAGS = {  # tag in VisualDL: (kind of the line, keys from the line down to the number)
    "1_overview/ema_top1": ("eval", "ema", "top1"),
    "1_overview/pseudo_label_accuracy": ("train", "pseudo_label_accuracy"),
    "1_overview/mask": ("train", "mask"),
    "1_overview/data_wait": ("train", "data_wait"),
    "1_overview/images_per_second": ("train", "images_per_second"),
    "2_evaluation/ema_top1": ("eval", "ema", "top1"),
    "2_evaluation/raw_top1": ("eval", "raw", "top1"),
    "2_evaluation/ema_top5": ("eval", "ema", "top5"),
    "2_evaluation/raw_top5": ("eval", "raw", "top5"),
    "2_evaluation/ema_loss": ("eval", "ema", "loss"),
    "2_evaluation/raw_loss": ("eval", "raw", "loss"),
    "3_training/loss": ("train", "loss"),
    "3_training/loss_x": ("train", "loss_x"),
    "3_training/loss_u": ("train", "loss_u"),
    "3_training/lr": ("train", "lr"),
    "4_pseudo_labels/impurity": ("train", "impurity"),
    "4_pseudo_labels/top_class_share": ("train", "top_class_share")}
RESULTS = ("2_evaluation/ema_top1", "2_evaluation/raw_top1")  # what its table of hyper-parameters shows beside them


def late(num_classes: int) -> list[str]:
    """The tags of evaluations: written once without a value at the start, they stand before those of the first step."""
    return [tag for tag, (kind, *path) in _TAGS.items() if kind == "eval" and _tells(path, num_classes)]


def points(line: dict, num_classes: int) -> dict[str, float]:
    """{tag: value} of a line of metrics.jsonl; what the line does not have, or what tells nothing, is left out."""
    found = {}
    for tag, (kind, *path) in _TAGS.items():
        value = line if line["kind"] == kind and _tells(path, num_classes) else None
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (int, float)):
            found[tag] = value
    return found


def _tells(path: list[str], num_classes: int) -> bool:
    """Top-5 of five classes is always 100 %."""
    return path[-1] != "top5" or num_classes > 5
