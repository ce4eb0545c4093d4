"""python -m parity: what tools/parity.py is, for an installed package."""

import sys

from parity.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
