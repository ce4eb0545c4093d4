"""fixmatch eval: the scores of a checkpoint on the test images of its data set."""

import json
import pathlib

from fixmatch import run
from fixmatch.cli import Parser, add_overrides, output_file
from fixmatch.config import OWN_IMAGES
from fixmatch.evaluation import predictions_csv
from fixmatch.files import write_atomic
from fixmatch.log import printable
from fixmatch.monitor import describe
from fixmatch.report.figures import interval


def main(argv: list[str]) -> int:
    parser = Parser("eval", description="Evaluate a run or a checkpoint on the test images.")
    parser.add_argument("path", type=pathlib.Path, help="a run folder or a checkpoint folder")
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="of a run folder")
    add_overrides(parser, "settings to change, such as data.root or runtime.device")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write all figures to FILE")
    parser.add_argument("--predictions", type=output_file, metavar="FILE",
                        help="also write the EMA's prediction for every test image to FILE, as CSV")
    args = parser.parse_args(argv)
    found = run.evaluate(args.path, args.which, args.overrides)
    source, scores = found.source, {"raw": found.raw, "ema": found.ema}
    if args.json:
        figures = {"checkpoint": str(found.folder), "step": found.step, "classes": list(source.classes),
                   **{k: s.to_dict() for k, s in scores.items()}}
        write_atomic(args.json, json.dumps(figures, indent=1) + "\n")
    if args.predictions:
        images = source.test_paths or range(len(source.test))
        write_atomic(args.predictions,
                     predictions_csv(images, found.ema_logits, source.test.labels, source.classes))
    print(f"{printable(str(found.folder))}  step {found.step}  {describe(scores)}")
    if source.name in OWN_IMAGES[1]:
        low, high = interval(scores["ema"].top1, len(source.test))
        print(f"  with {len(source.test):,} test images the EMA's top-1 is known to lie in {low:.1f} to {high:.1f} % "
              "(95 % interval)")
    for index, name in enumerate(map(printable, source.classes)):
        accuracies = [scores[kind].per_class[index] for kind in ("ema", "raw")]
        print(f"  {name:<20} " + "  ".join(f"{kind} {a:6.2f} %" if a is not None else f"{kind}      -"
                                           for kind, a in zip(("EMA", "raw"), accuracies, strict=True)))
    return 0
