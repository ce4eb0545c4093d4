"""python -m parity: what tools/parity.py is, for an installed package."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before Paddle loads: one order of summation, run after run

from parity.cli import main

if __name__ == "__main__":
    sys.exit(main())
