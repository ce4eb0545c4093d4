#!/usr/bin/env python3
"""python tools/predict.py --help"""

import os
import pathlib
import signal
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)  # tools/ itself would hide the package `parity`
signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while modules load: nothing to save, nothing to say

from fixmatch.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
