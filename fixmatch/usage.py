"""How the user calls the commands here, for usage lines and for hints in messages."""

import pathlib
import sys

_TOOLS = pathlib.Path(__file__).resolve().parent.parent / "tools"


def command(name: str) -> str:
    """The command `name` as the user types it: "tools/train.py" in a checkout, "fixmatch train" elsewhere."""
    started = pathlib.Path(sys.argv[0]).stem
    return f"tools/{name}.py" if started != "fixmatch" and (_TOOLS / f"{name}.py").exists() else f"fixmatch {name}"
