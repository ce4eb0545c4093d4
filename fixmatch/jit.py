"""Compilation by numba that is remembered on disk."""

import functools
from collections.abc import Callable

import numba.np.linalg


def remembered(compiler: Callable, function: Callable, **options):
    """What `compiler`, a decorator of numba that takes a function, makes of `function` with these options.

    It comes from a cache on disk if any directory for one is writable: NUMBA_CACHE_DIR, __pycache__ beside the
    function's file, or the user's cache directory.
    """
    _load_array_functions()
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError:  # none of them is
        return compiler(**options)(function)


@functools.cache
def _load_array_functions() -> None:
    """Loads what numba knows of arrays, which asks whether SciPy's linear algebra is there by importing it.

    That takes 0.4 s, and only matrix products in compiled code need it: they look for it themselves.
    """
    ensure_blas, numba.np.linalg.ensure_blas = numba.np.linalg.ensure_blas, lambda: None
    try:
        from numba.np import arraymath
    finally:
        numba.np.linalg.ensure_blas = ensure_blas
    arraymath.ensure_blas = ensure_blas  # the module keeps what it has imported
