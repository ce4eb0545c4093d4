"""Arrays as a safetensors file, written piece by piece: a large network is not to be in memory twice; fingerprints."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping

import numpy as np

# The types of elements of a safetensors file, by numpy's names of them.
DTYPES = {"bool": "BOOL", "uint8": "U8", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32",
           "float64": "F64"}


def safetensors(arrays: Mapping[str, np.ndarray]) -> Iterator[bytes | np.ndarray]:
    """The content of a safetensors file of `arrays`, piece by piece, of which no other copy is made.

    A piece is bytes or uint8 [n]: the header's length and the header, JSON, then the arrays, widest elements first.

    Args:
        arrays: numpy arrays, or Paddle tensors, each of which is copied to the host when its turn comes.
    """
    types = {name: np.dtype(str(array.dtype).removeprefix("paddle.")) for name, array in arrays.items()}
    ordered = sorted(arrays.items(), key=lambda item: (-types[item[0]].itemsize, item[0]))
    header, end = {}, 0
    for name, array in ordered:
        start, end = end, end + types[name].itemsize * math.prod(array.shape)
        header[name] = {"dtype": DTYPES[types[name].name], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, array in ordered:
        yield np.ascontiguousarray(as_numpy(array)).reshape(-1).view(np.uint8)


def as_numpy(array) -> np.ndarray:
    """A numpy array as it is, or a copy on the host of a Paddle tensor."""
    return array.numpy() if hasattr(array, "numpy") else array


def fingerprint(array: np.ndarray) -> str:
    """Its dtype, its shape, and a SHA-256 of its elements: equal for equal arrays."""
    return f"{array.dtype} {array.shape} {hashlib.sha256(np.ascontiguousarray(array)).hexdigest()}"
