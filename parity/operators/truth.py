"""The layers' operators in float64, written out from their definitions with numpy: what the production ones must give.

Numpy and not Torch, so that a machine without Torch proves the same thing and no framework's fault can be on both
sides; tests hold every function here to Torch in float64 at 1e-12.

Legend: N distinct images, H W rows and columns, C channels; I O input and output channels of a convolution, G its
groups. Arrays are float64 [N, H, W, C]. `counts` [N] says how often each image is in the batch that is computed on the
other side: a sum over the batch (a statistic, a parameter's gradient) counts each image so often.
"""

import numpy as np


def conv2d(x, weight, grad, counts, stride: int, groups: int) -> dict[str, np.ndarray]:
    """weight: [O, I / G, k, k], padded by k // 2. Returns the output and both gradients for `grad` at the output."""
    n, h, w, _ = x.shape
    o, i_per_group, k, _ = weight.shape
    pad = k // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    by_group = padded.reshape(*padded.shape[:3], groups, i_per_group)
    kernels = weight.reshape(groups, o // groups, i_per_group * k * k)
    rows, columns = grad.shape[1:3]
    output, weight_grad, padded_grad = np.empty(grad.shape), np.empty(kernels.shape), np.zeros(by_group.shape)
    for g in range(groups):  # one after the other, since what fits the cache takes less time
        channels = slice(g * o // groups, (g + 1) * o // groups)
        windows = np.lib.stride_tricks.sliding_window_view(by_group[:, :, :, g], (k, k), axis=(1, 2))
        patches = windows[:, ::stride, ::stride].reshape(n * rows * columns, -1)
        output[..., channels] = (patches @ kernels[g].T).reshape(n, rows, columns, -1)
        upstream = grad[..., channels]
        counted = (upstream * counts[:, None, None, None]).reshape(len(patches), -1)
        np.matmul(counted.T, patches, out=weight_grad[g])
        patch_grad = (upstream.reshape(len(patches), -1) @ kernels[g]).reshape(n, rows, columns, i_per_group, k, k)
        for ky in range(k):
            for kx in range(k):
                padded_grad[:, ky:ky + stride * (rows - 1) + 1:stride, kx:kx + stride * (columns - 1) + 1:stride,
                            g] += patch_grad[..., ky, kx]
    return {"output": output, "input gradient": padded_grad[:, pad:pad + h, pad:pad + w].reshape(x.shape),
            "weight gradient": weight_grad.reshape(weight.shape)}


def batch_statistics(x, counts) -> tuple[np.ndarray, np.ndarray]:
    """Mean [C] and biased variance [C] over the batch."""
    values = counts.sum() * x.shape[1] * x.shape[2]
    mean = _batch_sum(x, counts) / values
    return mean, _batch_sum((x - mean) ** 2, counts) / values


def _batch_sum(x, counts) -> np.ndarray:
    return counts @ x.sum(axis=(1, 2))


class BatchNorm:
    """Batch norm with these statistics, then the activation; weight, bias, mean, variance: [C]."""

    def __init__(self, x, mean, variance, weight, bias, epsilon: float, activation):
        self._scale = 1 / np.sqrt(variance + epsilon)
        self._unit = (x - mean) * self._scale
        self._weight, self._activation = weight, activation
        self.z = self._unit * weight + bias  # what the activation is given

    def results(self, grad, counts, through_statistics: bool) -> dict[str, np.ndarray]:
        """The output and the gradients; `through_statistics`: mean and variance are the batch's and depend on x."""
        output, derivative = activate(self.z, self._activation)
        grad = grad * derivative
        weight_grad, bias_grad = _batch_sum(grad * self._unit, counts), _batch_sum(grad, counts)
        x_grad = grad
        if through_statistics:
            x_grad = grad - (bias_grad + self._unit * weight_grad) / (counts.sum() * grad.shape[1] * grad.shape[2])
        return {"output": output, "input gradient": x_grad * (self._weight * self._scale),
                "weight gradient": weight_grad, "bias gradient": bias_grad}


def activate(z, activation) -> tuple[np.ndarray, np.ndarray | float]:
    """The activation, None, "mish" or ("leaky_relu", slope), and its derivative."""
    if activation is None:
        return z, 1.0
    if activation == "mish":  # z * tanh(softplus(z)) (Misra 2019), with tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2)
        e = np.exp(np.minimum(z, 40.0))
        squashed = e * (e + 2) / (e * (e + 2) + 2)
        return z * squashed, squashed + z * (1 - squashed**2) * (e / (1 + e))
    _, slope = activation
    derivative = np.where(z > 0, 1.0, slope)
    return z * derivative, derivative


def add(x, y, grad, activation) -> dict[str, np.ndarray]:
    output, derivative = activate(x + y, activation)
    return {"output": output, "gradient of each input": grad * derivative}


def average_pool(x, grad) -> dict[str, np.ndarray]:
    """grad: [N, C]."""
    spread = np.broadcast_to(grad[:, None, None, :], x.shape) / (x.shape[1] * x.shape[2])
    return {"output": x.mean(axis=(1, 2)), "input gradient": spread}


def linear(x, weight, bias, grad, counts) -> dict[str, np.ndarray]:
    """x: [N, I]; weight: [I, O], Paddle's order."""
    counted = grad * counts[:, None]
    return {"output": x @ weight + bias, "input gradient": grad @ weight.T,
            "weight gradient": x.T @ counted, "bias gradient": counted.sum(axis=0)}
