"""CIFAR's pickles, read without trust.

A pickle can run any code when Python loads it, and these come from archives that anyone may have packed.
"""

import io
import pickle

import numpy as np

from fixmatch.data.dataset import DataError, one_line

_MOST_READS = 1_000_000  # the largest official file, the training images of CIFAR-100, takes less than half of it


def unpickle(blob: bytes, where: str) -> dict:
    """The dict that a pickle holds, with its keys as text and with arrays of uint8 as the attribute `uint8` of a value.

    Args:
        blob: the pickle.
        where: what it was read from, for messages.

    Raises:
        DataError: the pickle is damaged or holds something else.
    """
    try:
        content = _ArraysOnly(blob).load()
    except pickle.UnpicklingError as error:
        raise DataError(f"{where}: refused: {error}") from None
    except Exception as error:  # a damaged pickle raises almost anything, by its kind of damage
        raise DataError(f"{where}: damaged ({one_line(error)}); get the archive again") from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: not a CIFAR file: holds {type(content).__name__}, not a dict")
    return {k.decode("utf-8", "replace") if isinstance(k, bytes) else k: v for k, v in content.items()}


class _ArraysOnly(pickle._Unpickler):
    """An unpickler that admits what arrays, lists, dicts, numbers and strings are pickled with, and nothing else.

    A pickle must not get more memory than it fills, either. That is why NumPy's own classes are replaced, and why this
    is the unpickler written in Python: the C one makes room for any memo index that a pickle names. Nor may it take
    longer than the largest of the official files by much.
    """

    def __init__(self, blob: bytes):
        super().__init__(_Counted(blob), encoding="bytes")
        self.left_to_encode = len(blob)

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        try:
            return _STAND_INS[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            wanted = f"{module}.{name}"
            raise pickle.UnpicklingError(f"it wants to run {wanted!r}, which no image archive needs") from None

    def _encode(self, text: str, encoding: str) -> bytes:
        """Stands in for _codecs.encode, with which Python 3 pickles bytes in protocol 2."""
        self.left_to_encode -= len(text)
        if encoding != "latin1" or self.left_to_encode < 0:
            raise pickle.UnpicklingError("it encodes what is no bytes object")
        return text.encode("latin1")


class _Counted(io.BytesIO):
    """A pickle of bounded length in instructions: each is one read or more."""

    left = _MOST_READS

    def read(self, size=-1):
        self._count()
        return super().read(size)

    def readline(self, size=-1):
        self._count()
        return super().readline(size)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"it has more than {_MOST_READS:,} instructions, which no image archive needs")


class _PickledDtype:
    """Stands in for numpy.dtype, and knows one type from all others."""

    def __init__(self, code, align, copy):
        self.is_uint8 = code in ("u1", b"u1")

    def __setstate__(self, state):
        """Takes byte order and the like, which a type of one byte has no use for."""


class _PickledArray:
    """Stands in for an array, which pickle makes empty and then gives its state to.

    The state is (version, shape, dtype, whether column-major, bytes).
    """

    def __init__(self, subtype, shape, typecode):
        self.uint8 = None  # the array, if it is one of uint8

    def __setstate__(self, state):
        _, shape, dtype, column_major, content = state
        if dtype.is_uint8:
            self.uint8 = np.frombuffer(content, np.uint8).reshape(shape, order="F" if column_major else "C")


_STAND_INS = {
    ("numpy", "dtype"): _PickledDtype,
    ("numpy", "ndarray"): None,  # only ever an argument of the next one
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
}
