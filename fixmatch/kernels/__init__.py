"""Convolution on the CPU through the oneDNN that Paddle's own wheel carries, and batch norm beside it.

Stock Paddle trains the networks here 3-6 times slower than Torch on the same CPU, because its eager convolutions
never reach oneDNN. These operators do: float32, activations in NHWC, weights in Paddle's layout so that state dicts
are the same with and without them. Ask `status()` before using any of them. Nothing here is used on a GPU, in
float64 or while a static graph is traced.

Files: onednn.py declares the C interface, loops.py holds what numba compiles for batch norm, openmp.py the threads,
ops.py the operators, selftest.py decides whether they can be used.
"""

from fixmatch.kernels.openmp import set_num_threads
from fixmatch.kernels.ops import add, batch_norm, batch_norm_inference, conv2d, global_average_pool
from fixmatch.kernels.selftest import status

__all__ = ["add", "batch_norm", "batch_norm_inference", "conv2d", "global_average_pool", "set_num_threads", "status"]
