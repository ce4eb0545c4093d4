"""python tools/parity.py --help"""

import os
import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)  # tools/ itself would hide the package `parity`
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before Paddle loads: one order of summation, run after run

from parity.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
