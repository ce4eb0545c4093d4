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
    n, h, w, i = x.shape
    o, i_per_group, k, _ = weight.shape
    pad = k // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    padded_grad = np.zeros_like(padded)
    rows, columns = (h + 2 * pad - k) // stride + 1, (w + 2 * pad - k) // stride + 1
    by_group = np.zeros((groups, n * rows * columns, o // groups))
    grad_by_group = _by_group(grad, groups)
    weighted_grad = _by_group(grad * counts[:, None, None, None], groups)
    by_tap = np.ascontiguousarray(weight.reshape(groups, o // groups, i_per_group, k, k).transpose(3, 4, 0, 1, 2))
    grad_by_tap = np.empty_like(by_tap)
    for ky in range(k):
        for kx in range(k):
            window = (slice(None), slice(ky, ky + stride * (rows - 1) + 1, stride),
                      slice(kx, kx + stride * (columns - 1) + 1, stride))
            seen = _by_group(padded[window], groups)
            by_group += seen @ by_tap[ky, kx].transpose(0, 2, 1)
            np.matmul(weighted_grad.transpose(0, 2, 1), seen, out=grad_by_tap[ky, kx])
            padded_grad[window] += _from_groups(grad_by_group @ by_tap[ky, kx], (n, rows, columns, i))
    return {"output": _from_groups(by_group, (n, rows, columns, o)),
            "input gradient": padded_grad[:, pad:pad + h, pad:pad + w],
            "weight gradient": grad_by_tap.transpose(2, 3, 4, 0, 1).reshape(weight.shape)}


def _by_group(x, groups: int):
    """[N, H, W, C] -> [G, N * H * W, C / G]."""
    return np.ascontiguousarray(x).reshape(-1, groups, x.shape[3] // groups).transpose(1, 0, 2)


def _from_groups(x, shape: tuple):
    return x.transpose(1, 0, 2).reshape(shape)


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
