"""python tools/convert.py --help"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)  # tools/ itself would hide the package `parity`

from parity.convert import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
