"""Decides once whether the kernels can be used here, by comparing them with Paddle's own operators."""

import functools
import sys

import numpy as np
import paddle
import paddle.nn.functional as F

from fixmatch.kernels import onednn, openmp, ops

TOLERANCE = 1e-5  # relative to the largest element; rounding alone stays ten times below


@functools.cache
def status():
    """Whether the kernels can be used, and why or why not.

    Decided on the first call, in well under 0.3 s, and the same from then on. Nothing is raised. Where they can be
    used, the call also sets the calling thread's number of OpenMP threads.

    Returns:
        (usable, reason): reason is one line for a log.
    """
    try:
        _check_platform()
        version = onednn.version()
        runtime, threads = openmp.bound_runtime().name, openmp.num_threads()
        _check_against_stock()
    except Exception as error:  # a start-up probe: whatever goes wrong, the answer is to use stock operators
        return False, f"stock operators, because: {' '.join((str(error) or repr(error)).split())}"
    return True, f"oneDNN {version} from Paddle's wheel, {threads} thread{'s' * (threads > 1)} ({runtime})"


def _check_platform():
    if sys.platform != "linux":
        raise onednn.Unusable(f"the CPU kernels are tried on Linux only, this is {sys.platform}")
    device = paddle.device.get_device()
    if device != "cpu":
        raise onednn.Unusable(f"the device is {device}, not cpu")
    if not paddle.in_dynamic_mode():
        raise onednn.Unusable("Paddle is in static mode")


def _check_against_stock():
    """Raises Unusable when a value or gradient differs from the stock operators' by more than TOLERANCE."""
    rng = np.random.default_rng(0)
    x, y_grad = rng.standard_normal((2, 7, 9, 16)), rng.standard_normal((2, 4, 5, 32))
    weight = rng.standard_normal((32, 16, 3, 3)) / 12
    grouped = rng.standard_normal((32, 4, 3, 3)) / 6
    scale, shift = rng.uniform(0.5, 2, 16), rng.standard_normal(16)
    with paddle.enable_grad():
        for groups, w in ((1, weight), (4, grouped)):
            _compare(f"conv2d with {groups} groups", lambda x, w, g=groups: ops.conv2d(x, w, 2, 1, g),
                     lambda x, w, g=groups: F.conv2d(x, w, None, 2, 1, 1, g), [x, w], y_grad)
        for activation in (("leaky_relu", 0.1), "mish"):
            _compare(f"batch_norm with {activation}", lambda *a, act=activation: ops.batch_norm(*a, 1e-5, act)[0],
                     lambda *a, act=activation: _stock_batch_norm(*a, act), [x, scale, shift], x[::-1])


def _stock_batch_norm(x, weight, bias, activation):
    """Batch norm in NCHW in train mode and the activation."""
    mean, var = paddle.zeros([x.shape[1]]), paddle.ones([x.shape[1]])
    y = F.batch_norm(x, mean, var, weight, bias, training=True, epsilon=1e-5)
    return F.mish(y) if activation == "mish" else F.leaky_relu(y, activation[1])


def _compare(name, kernel, stock, inputs, y_grad):
    x, *others = inputs
    nhwc = _value_and_gradients(kernel, [x, *others], y_grad)
    nchw = _value_and_gradients(stock, [x.transpose(0, 3, 1, 2), *others], y_grad.transpose(0, 3, 1, 2))
    expected = [nchw[0].transpose(0, 2, 3, 1), nchw[1].transpose(0, 2, 3, 1), *nchw[2:]]
    for got, want in zip(nhwc, expected, strict=True):
        error = np.abs(got - want).max() / np.abs(want).max()
        if not error <= TOLERANCE:  # also when it is NaN
            raise onednn.Unusable(f"self-test: {name} differs from the stock operator by {error:.1e}")


def _value_and_gradients(function, inputs, y_grad):
    """function(*inputs) and its gradients with respect to each input, as numpy arrays."""
    tensors = [paddle.to_tensor(np.ascontiguousarray(a), dtype="float32", stop_gradient=False) for a in inputs]
    y = function(*tensors)
    y.backward(paddle.to_tensor(np.ascontiguousarray(y_grad), dtype="float32"))
    return [y.numpy(), *(t.grad.numpy() for t in tensors)]
