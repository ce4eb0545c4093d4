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
    weight_by_group = weight.reshape(groups, o // groups, i_per_group, k, k)
    weight_grad = np.zeros_like(weight_by_group)
    for ky in range(k):
        for kx in range(k):
            window = (slice(None), slice(ky, ky + stride * (rows - 1) + 1, stride),
                      slice(kx, kx + stride * (columns - 1) + 1, stride))
            seen, tap = _by_group(padded[window], groups), np.ascontiguousarray(weight_by_group[..., ky, kx])
            by_group += seen @ tap.transpose(0, 2, 1)
            weight_grad[..., ky, kx] = weighted_grad.transpose(0, 2, 1) @ seen
            padded_grad[window] += _from_groups(grad_by_group @ tap, (n, rows, columns, i))
    return {"output": _from_groups(by_group, (n, rows, columns, o)),
            "input gradient": padded_grad[:, pad:pad + h, pad:pad + w],
            "weight gradient": weight_grad.reshape(weight.shape)}


def _by_group(x, groups: int):
    """[N, H, W, C] -> [G, N * H * W, C / G]."""
    return np.ascontiguousarray(x).reshape(-1, groups, x.shape[3] // groups).transpose(1, 0, 2)


def _from_groups(x, shape: tuple):
    return x.transpose(1, 0, 2).reshape(shape)


def batch_statistics(x, counts) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean [C] and biased variance [C] over the batch, and the number of values a channel."""
    values = int(counts.sum()) * x.shape[1] * x.shape[2]
    mean = _batch_sum(x, counts) / values
    return mean, _batch_sum((x - mean) ** 2, counts) / values, values


def _batch_sum(x, counts):
    return (counts @ x.sum(axis=(1, 2)))


def normalized(x, mean, variance, weight, bias, epsilon: float):
    """Batch norm's output before its activation."""
    return (x - mean) / np.sqrt(variance + epsilon) * weight + bias


def batch_norm(x, mean, variance, weight, bias, grad, counts, epsilon: float, activation,
               of_batch: bool) -> dict[str, np.ndarray]:
    """The activated output and the gradients; `of_batch`: mean and variance are the batch's, and x's gradient goes
    through them."""
    values = int(counts.sum()) * x.shape[1] * x.shape[2]
    output, slope = activate(normalized(x, mean, variance, weight, bias, epsilon), activation)
    grad = grad * slope
    unit = (x - mean) / np.sqrt(variance + epsilon)
    weight_grad, bias_grad = _batch_sum(grad * unit, counts), _batch_sum(grad, counts)
    through = grad - (bias_grad + unit * weight_grad) / values if of_batch else grad
    return {"output": output, "input gradient": through * weight / np.sqrt(variance + epsilon),
            "weight gradient": weight_grad, "bias gradient": bias_grad}


def activate(z, activation) -> tuple[np.ndarray, np.ndarray | float]:
    """The activation, None, "mish" or ("leaky_relu", slope), and its derivative."""
    if activation is None:
        return z, 1.0
    if activation == "mish":  # z * tanh(softplus(z)), Misra 2019
        squashed = np.tanh(np.logaddexp(0.0, z))
        return z * squashed, squashed + z * (1 - squashed**2) / (1 + np.exp(-z))
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
