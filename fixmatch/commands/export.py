"""fixmatch export: a model for Paddle inference or ONNX."""

import pathlib

import numpy as np

from fixmatch.cli import Parser, add_overrides
from fixmatch.export import export
from fixmatch.export_check import TOLERANCE
from fixmatch.log import shown
from fixmatch.runtime import select_device


def main(argv: list[str]) -> int:
    parser = Parser("export", description="Write a run's network for Paddle inference (a folder) or ONNX (a file): "
                    "uint8 images in, probabilities out. It is compared with the checkpoint before it is kept.")
    parser.add_argument("run", type=pathlib.Path, help="a run folder or a checkpoint folder")
    parser.add_argument("out", type=pathlib.Path, help="FILE.onnx, or the folder of a model for Paddle")
    parser.add_argument("--format", choices=("paddle", "onnx"), help="default: onnx for FILE.onnx, else paddle")
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="of a run folder")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="their average (the default), or "
                        "themselves")
    add_overrides(parser, "settings to change, such as data.root, whose test images it is compared on")
    args = parser.parse_args(argv)
    select_device("cpu")  # an export is compared where every machine can run it
    with shown():
        done = export(args.run, args.out, args.format, args.which, args.weights, args.overrides)
    sample, expected = done.comparison.sample, done.comparison.expected
    print(f"{done.path}: {done.checkpoint}, {done.facts}")
    print(f"compared with the checkpoint on {sample.what}; probabilities may differ by {TOLERANCE:.0e}:")
    for name, found in {**({} if sample.labels is None else {"checkpoint": expected}), **done.found}.items():
        top1 = "" if sample.labels is None else f"  top-1 {100 * np.mean(found.argmax(1) == sample.labels):6.2f} %"
        worst = f"  largest difference {np.abs(found - expected).max():.1e}" if name in done.found else ""
        print(f"  {name:<16}{top1}{worst}")
    return 0
