"""fixmatch predict: the classes of new images, as a table, CSV or JSON."""

import argparse
import csv
import io
import json
import pathlib
import sys
from dataclasses import dataclass

import numpy as np

from fixmatch.cli import Parser, output_file
from fixmatch.data.dataset import DataError, shown
from fixmatch.data.sources.folder.scan import describe_passed_over, find_images
from fixmatch.files import write_atomic
from fixmatch.predict import Classifier, load
from fixmatch.runtime import select_device

_NAMED = 10  # so many broken files are named, and more only counted
_WIDEST = 60  # characters of the column of paths


@dataclass(frozen=True)
class Found:
    """What was found for the images that can be read, and why others cannot."""

    paths: list[str]  # N
    probabilities: np.ndarray  # float32 [N, K]
    broken: list[tuple[str, str]]  # path, reason

    def least_sure_first(self) -> "Found":
        order = np.argsort(self.probabilities.max(axis=1), kind="stable")
        return Found([self.paths[index] for index in order], self.probabilities[order], self.broken)


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    paths, passed_over = find_images(args.images)
    select_device("auto")
    classifier = load(args.model, args.which, args.weights)
    found = classify(classifier, paths, args.max_broken)
    if passed_over:
        print(describe_passed_over(passed_over), file=sys.stderr)
    if args.sort == "confidence":
        found = found.least_sure_first()
    try:
        if args.csv:
            write_atomic(args.csv, to_csv(found, classifier.classes))
        if args.json:
            write_atomic(args.json, to_json(found, classifier, passed_over))
    finally:  # what took long is shown even if it cannot be written
        print(f"{classifier.source}: {classifier.facts}")
        print("\n".join(table(found, classifier.classes, args.top)))
    return 0


def _parser() -> Parser:
    parser = Parser("predict", description="Classify new images with a trained network.")
    parser.add_argument("model", type=pathlib.Path,
                        help="a run folder, a checkpoint folder, or an export: a folder, or an .onnx file")
    parser.add_argument("images", nargs="+", help="image files, folders (with all folders in them), or quoted patterns "
                        "such as 'photos/**/*.jpg'")
    parser.add_argument("--csv", type=output_file, metavar="FILE", help="also write FILE with the columns image, "
                        "predicted, confidence, and p_CLASS for each class, its probability")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the same as JSON, with the "
                        "images that cannot be read and the number of files passed over")
    parser.add_argument("--top", type=_at_least(1), default=3, metavar="N", help="likeliest classes of an image in the "
                        "table (default 3); the files have all")
    parser.add_argument("--sort", choices=("given", "confidence"), default="given", help="confidence: the least sure "
                        "first, which are worth labeling next")
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="of a run folder")
    parser.add_argument("--weights", choices=("ema", "raw"), help="of a checkpoint: their average (the default), or "
                        "themselves")
    parser.add_argument("--max-broken", type=_at_least(0), default=100, metavar="N", help="so many unreadable images "
                        "are named and left out (default 100); with more, nothing is written")
    return parser


def _at_least(least: int):
    def integer(text: str) -> int:  # argparse calls it so in messages
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"at least {least}, got {text}")
        return int(text)
    return integer


def classify(classifier: Classifier, paths: list[str], max_broken: int = 100) -> Found:
    """Predicts all images, and says on standard error which are left out. Raises DataError where too many are."""
    parts, broken = [], []
    for _, probabilities, bad in classifier.stream(paths):
        parts.append(probabilities)
        broken += bad
        if len(broken) > max_broken:
            raise DataError(f"more than {max_broken} images cannot be read, the first of them "
                            f"{_line(paths, broken[0])}; remove them, or raise --max-broken")
    if len(broken) == len(paths):
        raise DataError(f"no image can be read, the first of them {_line(paths, broken[0])}")
    for entry in broken[:_NAMED]:
        print(f"left out: {_line(paths, entry)}", file=sys.stderr)
    if len(broken) > _NAMED:
        print(f"left out: {len(broken) - _NAMED} more images", file=sys.stderr)
    left_out = dict(broken)
    return Found([path for index, path in enumerate(paths) if index not in left_out], np.concatenate(parts),
                 [(paths[index], reason) for index, reason in broken])


def _line(paths: list[str], entry: list) -> str:
    index, reason = entry
    return f"{shown(paths[index])}: {reason}"


def table(found: Found, classes: tuple[str, ...], top: int) -> list[str]:
    """A line for each image: its path, and its likeliest classes with their probabilities in percent."""
    width = min(_WIDEST, max(len(shown(path)) for path in found.paths))
    name_width = max(len(shown(name)) for name in classes)
    lines = []
    for path, row in zip(found.paths, found.probabilities, strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        lines.append(f"{shown(path):<{width}}  " + "  ".join(f"{shown(classes[k]):<{name_width}} {100 * row[k]:6.2f} %"
                                                             for k in best))
    return lines


def to_csv(found: Found, classes: tuple[str, ...]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "predicted", "confidence", *(f"p_{name}" for name in classes)))
    for path, row in zip(found.paths, found.probabilities, strict=True):
        best = int(row.argmax())
        writer.writerow((shown(path), classes[best], f"{row[best]:.6f}", *(f"{share:.6f}" for share in row)))
    return text.getvalue()


def to_json(found: Found, classifier: Classifier, passed_over: dict[str, int]) -> str:
    """{"model", "step", "weights", "classes": [K names], "images": [{"image", "predicted", "confidence",
    "probabilities": [K]}, ...], "broken": [{"image", "reason"}, ...], "passed_over": {extension: number of files}},
    with one image a line.
    """
    facts = classifier.facts
    head = {"model": classifier.source, "step": facts.step, "weights": facts.weights, "classes": facts.classes}
    images = (json.dumps({"image": shown(path), "predicted": facts.classes[int(row.argmax())],
                          "confidence": round(float(row.max()), 6),
                          "probabilities": [round(float(share), 6) for share in row]})
              for path, row in zip(found.paths, found.probabilities, strict=True))
    broken = json.dumps([{"image": shown(path), "reason": reason} for path, reason in found.broken])
    return (f'{json.dumps(head)[:-1]},\n"images": [\n' + ",\n".join(images)
            + f'\n],\n"broken": {broken},\n"passed_over": {json.dumps(passed_over)}}}\n')
