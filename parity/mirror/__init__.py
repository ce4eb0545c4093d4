"""The Torch side: the reference's step, file for file beside fixmatch/, same names, same order."""

import importlib
import sys
import types


class _NoCompiler(types.ModuleType):
    """Stands in for torch._dynamo, the compiler, which Torch's optimizers load to say that they are not compiled.

    Loading it takes a second and 70 MB. The first who asks for more of it gets the compiler itself.
    """

    __path__ = ()

    @staticmethod
    def disable(function, *args, **kwargs):
        return function

    @staticmethod
    def graph_break(*args, **kwargs) -> None:
        pass

    def __getattr__(self, name: str):
        if name.startswith("__") or sys.modules.get(self.__name__) is not self:
            raise AttributeError(name)
        del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


sys.modules.setdefault("torch._dynamo", _NoCompiler("torch._dynamo"))
