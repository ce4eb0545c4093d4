"""The Torch side: the reference's step, file for file beside fixmatch/, same names, same order.

Torch is loaded without its compiler, and without the shapes of all operators' outputs, which only the compiler asks
for: together they take two seconds and 70 MB.
"""

import importlib
import sys
import types

_COMPILER, _SHAPES = "torch._dynamo", "torch._meta_registrations"


class _NoCompiler(types.ModuleType):
    """Stands in for the compiler, which Torch's optimizers load to say that they are not compiled.

    The first who asks for more of it gets the compiler itself.
    """

    __path__ = ()

    @staticmethod
    def disable(function, *args, **kwargs):
        return function

    @staticmethod
    def graph_break(*args, **kwargs) -> None:
        pass

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        load_compiler()
        return getattr(sys.modules[_COMPILER], name)


def load_compiler() -> None:
    """Must be called before torch.compile is, if this package was imported before Torch."""
    for name, stand_in in ((_SHAPES, _no_shapes), (_COMPILER, _no_compiler)):
        if sys.modules[name] is stand_in:
            del sys.modules[name]
            importlib.import_module(name)


_no_compiler, _no_shapes = _NoCompiler(_COMPILER), types.ModuleType(_SHAPES)
if "torch" not in sys.modules:
    sys.modules[_SHAPES] = _no_shapes  # what it would define is registered within Torch
sys.modules.setdefault(_COMPILER, _no_compiler)
