"""The version of this package, and of those that it computes with."""

import importlib.metadata
import platform

__version__ = "0.2.0.dev0"
PADDLE = ("paddlepaddle", "paddlepaddle-gpu")  # the builds of Paddle, both of which are the module paddle


def versions() -> dict[str, str | None]:
    """Of Python and the packages that compute, by the names that pip knows; None for one that is not installed."""
    packages = (*PADDLE, "torch", "numpy", "pillow", "numba")
    return {"python": platform.python_version()} | {package: _installed(package) for package in packages}


def paddle_build() -> str:
    """The build of Paddle that runs here, such as "paddlepaddle-gpu 3.3.0, CUDA 12.6". Loads Paddle."""
    import paddle

    builds = " and ".join(f"{name} {_installed(name)}" for name in PADDLE if _installed(name))
    cuda = paddle.version.cuda()  # the text "False" in a build for CPUs
    return f"{builds or f'paddle {paddle.__version__}'}, {'CPU' if cuda == 'False' else f'CUDA {cuda}'}"


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
