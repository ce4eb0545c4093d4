"""Compiled code is loaded without what it does not need, and leaves numba as others know it."""

import subprocess
import sys

from running import ROOT, tool_environment

PRODUCT = """
import sys
from fixmatch.data.augment import pixels
pixels.load()
assert "scipy.linalg" not in sys.modules
import numba, numpy
from numba.np import arraymath, linalg
assert arraymath.ensure_blas is linalg.ensure_blas
product = numba.njit(lambda a, b: numpy.dot(a, b))
print(product(numpy.array([[1.0, 2.0]]), numpy.array([[3.0], [4.0]])))
"""


def test_loading_leaves_scipy_out_and_matrix_products_work():
    done = subprocess.run([sys.executable, "-c", PRODUCT], cwd=ROOT, env=tool_environment(), capture_output=True,
                          text=True, timeout=120, check=False)
    assert done.stdout == "[[11.]]\n", done.stderr
