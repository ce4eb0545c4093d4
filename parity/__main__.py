"""python -m parity: what tools/parity.py is, for an installed package."""

import os
import sys

from parity.cli import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking two frameworks apart takes a second, and a run waits for this process
