"""What Windows lacks: fixmatch.data can be imported without the modules that only Unix has."""

import pkgutil
import subprocess
import sys

from running import ROOT, tool_environment

import fixmatch.data

UNIX_ONLY = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
IMPORTS = """
import importlib, os, sys
import numpy, PIL.Image, numba, scipy.io, sklearn.datasets, tqdm, paddle  # libraries look after themselves
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # from now on, an import of it is an ImportError
for name in sys.argv[2].split(","):
    importlib.import_module(name)
print("imported")
"""


def test_every_module_is_imported_without_unix():
    modules = [info.name for info in pkgutil.walk_packages(fixmatch.data.__path__, "fixmatch.data.")]
    assert len(modules) > 20
    done = subprocess.run([sys.executable, "-c", IMPORTS, ",".join(UNIX_ONLY), ",".join(modules)], cwd=ROOT, text=True,
                          capture_output=True, env=tool_environment(), check=False)
    assert done.stdout == "imported\n", done.stderr
