"""The loops of batch norm over float32 [rows, channels], compiled by numba and shared by oneDNN's threads.

oneDNN has a batch norm, too, but it adds up all rows one after the other in float32: over the 983,040 pixels of a batch
of the published settings its variance was off by a thousandth, where Torch's is off by a millionth. Here 128 rows at a
time are added in float32, relative to the mean of those before, and these sums in float64. It takes no longer, since
fewer passes over the memory are made.

Each function runs as many times as there are threads, each time on a share of the rows. Pointers and sizes are all that
it gets; `run` puts them together. All of it is in one file because numba notices a changed source only in the file of
the function it cached.
"""

import ctypes
import functools

import llvmlite.binding
import numba
import numpy as np
from numba import carray, types

from fixmatch.jit import remembered
from fixmatch.kernels.openmp import bound_runtime, num_threads

_BLOCK = 128  # rows
_OPTIONS = {"nogil": True, "no_rewrites": True, "error_model": "numpy", "fastmath": {"contract"}}
_SIGNATURE = types.void(types.CPointer(types.voidptr))  # the first pointer is to int64 (rows, channels)

# The OpenMP library that oneDNN is bound to, under names of our own, since there may be another one in the process.
_thread = types.ExternalFunction("fixmatch_thread", types.int32())
_threads = types.ExternalFunction("fixmatch_threads", types.int32())


@numba.njit(inline="always", **_OPTIONS)
def _share(rows, thread, threads):
    return rows * thread // threads, rows * (thread + 1) // threads


@numba.njit(inline="always", **_OPTIONS)
def _scales(var_pointer, weight_pointer, channels, epsilon):
    """1 / sqrt(var + epsilon) in float64, and that times the weight in float32."""
    var, weight = carray(var_pointer, (channels,), np.float32), carray(weight_pointer, (channels,), np.float32)
    inverse_std, scale = np.empty(channels, np.float64), np.empty(channels, np.float32)
    for c in range(channels):
        inverse_std[c] = 1 / np.sqrt(float(var[c]) + epsilon)
        scale[c] = weight[c] * inverse_std[c]
    return inverse_std, scale


def statistics(pointers):
    """(sizes, x [rows, C], sums float64 [threads, 2, C]): adds up x, and x * x."""
    rows, channels = carray(pointers[0], (2,), np.int64)
    x = carray(pointers[1], (rows, channels), np.float32)
    thread, threads = _thread(), _threads()
    sums = carray(pointers[2], (threads, 2, channels), np.float64)[thread]
    first, last = _share(rows, thread, threads)
    near = np.zeros(channels, np.float32)  # near the values, so that float32 holds the differences well
    begun = min(first + _BLOCK, last)
    for row in range(first, begun):
        for c in range(channels):
            near[c] += x[row, c] / (begun - first)
    difference, square = np.empty_like(near), np.empty_like(near)
    for start in range(first, last, _BLOCK):
        stop = min(start + _BLOCK, last)
        difference[:], square[:] = 0, 0
        for row in range(start, stop):
            for c in range(channels):
                d = x[row, c] - near[c]
                difference[c] += d
                square[c] += d * d
        count = float(stop - start)
        for c in range(channels):
            center, total = float(near[c]), float(difference[c])
            sums[0, c] += total + count * center
            sums[1, c] += square[c] + center * (2 * total + count * center)
            near[c] = sums[0, c] / (stop - first)


def normalize(pointers):
    """(sizes, x, mean, var, weight, bias [C], settings, y): y = LeakyReLU(z), z = (x - mean) * scale + bias.

    scale: weight / sqrt(var + epsilon).
    settings: float64 [3], the slope, epsilon, and how much of its sums each element's gradient has a share in.
    """
    rows, channels = carray(pointers[0], (2,), np.int64)
    x, y = carray(pointers[1], (rows, channels), np.float32), carray(pointers[7], (rows, channels), np.float32)
    mean, bias = carray(pointers[2], (channels,), np.float32), carray(pointers[5], (channels,), np.float32)
    settings = carray(pointers[6], (3,), np.float64)
    slope, (_, scale) = np.float32(settings[0]), _scales(pointers[3], pointers[4], channels, settings[1])
    first, last = _share(rows, _thread(), _threads())
    for row in range(first, last):
        for c in range(channels):
            z = (x[row, c] - mean[c]) * scale[c] + bias[c]
            y[row, c] = z if z > 0 else slope * z


def gradient_sums(pointers):
    """(sizes, x, mean, var, weight, bias, settings, y_grad, sums [threads, 2, C]): adds up the gradients of bias and
    weight: g, which is the gradient of z, and g * (x - mean) / sqrt(var + epsilon)."""
    rows, channels = carray(pointers[0], (2,), np.int64)
    x, y_grad = carray(pointers[1], (rows, channels), np.float32), carray(pointers[7], (rows, channels), np.float32)
    mean, bias = carray(pointers[2], (channels,), np.float32), carray(pointers[5], (channels,), np.float32)
    settings = carray(pointers[6], (3,), np.float64)
    slope, (inverse_std, scale) = np.float32(settings[0]), _scales(pointers[3], pointers[4], channels, settings[1])
    thread, threads = _thread(), _threads()
    sums = carray(pointers[8], (threads, 2, channels), np.float64)[thread]
    first, last = _share(rows, thread, threads)
    total, product = np.empty_like(mean), np.empty_like(mean)
    for start in range(first, last, _BLOCK):
        total[:], product[:] = 0, 0
        for row in range(start, min(start + _BLOCK, last)):
            for c in range(channels):
                d = x[row, c] - mean[c]
                g = y_grad[row, c] if d * scale[c] + bias[c] > 0 else slope * y_grad[row, c]
                total[c] += g
                product[c] += g * d
        for c in range(channels):
            sums[0, c] += total[c]
            sums[1, c] += product[c] * inverse_std[c]


def input_gradient(pointers):
    """(sizes, x, mean, var, weight, bias, settings, y_grad, sums [2, C], x_grad): x_grad = scale * g, less its share of
    the sums, through which all elements come into the batch's mean and variance."""
    rows, channels = carray(pointers[0], (2,), np.int64)
    x, y_grad = carray(pointers[1], (rows, channels), np.float32), carray(pointers[7], (rows, channels), np.float32)
    mean, bias = carray(pointers[2], (channels,), np.float32), carray(pointers[5], (channels,), np.float32)
    settings, sums = carray(pointers[6], (3,), np.float64), carray(pointers[8], (2, channels), np.float64)
    slope, (inverse_std, scale) = np.float32(settings[0]), _scales(pointers[3], pointers[4], channels, settings[1])
    constant, by_x = np.empty_like(mean), np.empty_like(mean)
    for c in range(channels):
        constant[c] = settings[2] * sums[0, c] * scale[c]
        by_x[c] = settings[2] * sums[1, c] * scale[c] * inverse_std[c]
    x_grad = carray(pointers[9], (rows, channels), np.float32)
    first, last = _share(rows, _thread(), _threads())
    for row in range(first, last):
        for c in range(channels):
            d = x[row, c] - mean[c]
            g = y_grad[row, c] if d * scale[c] + bias[c] > 0 else slope * y_grad[row, c]
            x_grad[row, c] = scale[c] * g - by_x[c] * d - constant[c]


def run(function, rows, channels, *arrays):
    """Runs one of the functions above on all threads.

    Args:
        function: of this file.
        rows, channels: of its matrices.
        arrays: what it gets after the sizes: contiguous tensors and numpy arrays, of which nothing is checked.
    """
    sizes = np.array([rows, channels])
    addresses = [a.ctypes.data if isinstance(a, np.ndarray) else a.data_ptr() for a in (sizes, *arrays)]
    pointers = (ctypes.c_void_p * len(addresses))(*addresses)
    threads = num_threads()
    bound_runtime().parallel(_compiled(function).address, pointers, threads)


def sums_of(function, rows, channels, *arrays):
    """The same for a function that adds up: its sums over all threads, float64 [2, C]."""
    sums = np.zeros((num_threads(), 2, channels))
    run(function, rows, channels, *arrays, sums)
    return sums.sum(axis=0)


def load():
    """Loads all of them, which else happens at the first use of each. Raises onednn.Unusable as `run` would."""
    for function in (statistics, normalize, gradient_sums, input_gradient):
        _compiled(function)


@functools.cache
def _compiled(function):
    """Its machine code."""
    runtime = bound_runtime()
    llvmlite.binding.add_symbol("fixmatch_thread", runtime.address("omp_get_thread_num"))
    llvmlite.binding.add_symbol("fixmatch_threads", runtime.address("omp_get_num_threads"))
    return remembered(functools.partial(numba.cfunc, _SIGNATURE), function, **_OPTIONS)
