"""python -m parity: what tools/parity.py is, for an installed package."""

import gc
import os
import sys

from fixmatch.runtime import without_garbage_collection

with without_garbage_collection():
    from parity.cli import main

if __name__ == "__main__":
    gc.freeze()
    gc.set_threshold(20_000)  # objects; Torch is still to come
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking two frameworks apart takes a second, and a run waits for this process
