"""FixMatch for PaddlePaddle, numerically the PyTorch reference's."""

from fixmatch.runtime import configure
from fixmatch.version import __version__

__all__ = ["__version__"]

configure()  # before anything imports paddle
