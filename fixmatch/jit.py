"""Compilation by numba that is remembered on disk."""

from collections.abc import Callable


def remembered(compiler: Callable, function: Callable, **options):
    """What `compiler`, a decorator of numba that takes a function, makes of `function` with these options.

    It comes from a cache on disk if any directory for one is writable: NUMBA_CACHE_DIR, __pycache__ beside the
    function's file, or the user's cache directory.
    """
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError:  # none of them is
        return compiler(**options)(function)
