"""FixMatch for PaddlePaddle, numerically the PyTorch reference's.

    import fixmatch
    result = fixmatch.train(fixmatch.load_config("digits"))
    result.top1
"""

import importlib

from fixmatch.runtime import NO_PADDLE, configure, has_paddle, without_garbage_collection
from fixmatch.version import __version__

_PUBLIC = {"train": "fixmatch.run", "evaluate": "fixmatch.run", "load": "fixmatch.predict",
           "Config": "fixmatch.config", "load_config": "fixmatch.config"}
__all__ = ["__version__", *_PUBLIC]

configure()  # before anything imports paddle


def __getattr__(name: str):
    """The public names, whose modules take seconds to load and so are loaded at their first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fixmatch' has no attribute {name!r}")
    if not has_paddle():
        raise ImportError(NO_PADDLE)
    with without_garbage_collection():
        return getattr(importlib.import_module(_PUBLIC[name]), name)
