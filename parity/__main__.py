"""python -m parity: what tools/parity.py is, for an installed package."""

import gc
import os
import sys

gc.disable()  # nothing of what is imported is garbage, and looking for it takes a sixth of the time

from parity.cli import main  # noqa: E402

gc.enable()

if __name__ == "__main__":
    gc.freeze()
    gc.set_threshold(20_000)  # objects; Torch is still to come
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking two frameworks apart takes a second, and a run waits for this process
