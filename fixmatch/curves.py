"""Which numbers of metrics.jsonl VisualDL draws, and under which names.

Its page sorts groups and the curves in them by name: so the first group is numbered, and answers what one asks first:
does it learn, are the pseudo-labels right, and is the data fast enough.
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


def points(line: dict, num_classes: int) -> dict[str, float]:
    """{tag: value} of a line of metrics.jsonl; what the line does not have, or what tells nothing, is left out."""
    found = {}
    for tag, (kind, *path) in _TAGS.items():
        if path[-1] == "top5" and num_classes <= 5:
            continue
        value = line if line["kind"] == kind else None
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (int, float)):
            found[tag] = value
    return found
