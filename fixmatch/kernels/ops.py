"""Differentiable operators on float32 NHWC tensors, computed on the CPU by oneDNN and by the loops of loops.py.

Legend: N images, H W height and width, C channels; I O input and output channels of a convolution, G its groups.

Tensors are passed by address, without copies. Each operator is a PyLayer: it can be differentiated once, and Paddle 3.3
crashes when the graph of any PyLayer is kept with retain_graph and run a second time. Where a gradient needs the values
of an output, a detached alias is saved, so that the graph does not hold itself. A result must not be changed in place.
"""

import math

import numpy as np
import paddle
from paddle.autograd import PyLayer

from fixmatch.kernels import loops
from fixmatch.kernels import onednn as dnn
from fixmatch.kernels.allocator import empty
from fixmatch.kernels.openmp import num_threads

_VECTOR = 16  # channels per group below which oneDNN has no fast grouped kernel


def conv2d(x, weight, stride, padding, groups=1):
    """Convolution without bias.

    Args:
        x: float32 [N, H, W, I]; a non-contiguous tensor is copied first.
        weight: float32 [O, I / groups, kh, kw], the layout of paddle.nn.Conv2D.
        stride: int, or (rows, columns).
        padding: zeros on each side, int or (rows, columns).
        groups: divides I and O.

    Returns:
        float32 [N, (H + 2 padding - kh) // stride + 1, the same for W, O], differentiable with respect to x and weight.

    Raises:
        ValueError: the shapes do not fit each other.

    Groups of few channels are computed as fewer, larger groups whose weights hold zeros off the diagonal. The result
    is the same for finite x; an infinity in one group of x becomes NaN in its neighbours.
    """
    _check_float32("conv2d", x=x, weight=weight)
    channels = x.shape[3] if x.ndim == 4 else -1
    if weight.ndim != 4 or channels != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(f"conv2d: x {x.shape} (NHWC) and weight {weight.shape} (OIHW) do not fit with {groups} groups")
    merged = _groups_to_merge(groups, weight.shape[0] // groups, weight.shape[1])
    if merged > 1:
        weight, groups = _merge_groups(weight, groups, merged), groups // merged
    return _Convolution.apply(x, weight, _pair(stride), _pair(padding), groups)


def batch_norm(x, weight, bias, epsilon, activation=None):
    """Batch norm with the statistics of this batch, then an activation.

    Args:
        x: float32 [N, H, W, C].
        weight, bias: float32 [C].
        epsilon: added to the variance.
        activation: None, "mish" or ("leaky_relu", slope) with slope >= 0.

    Returns:
        y: float32 [N, H, W, C], differentiable with respect to x, weight and bias. LeakyReLU's derivative at exactly
            0 is the slope, as
            in Torch and in Paddle.
        batch_mean, batch_var: float32 [C] without a gradient; the variance is the biased one.

    Raises:
        ValueError: unknown activation, or shapes that do not fit.
    """
    _check_batch_norm(x, weight=weight, bias=bias)
    x, activation = x.contiguous(), _activation(activation)
    mean, var = _batch_statistics(x)
    return _BatchNorm.apply(x, weight, bias, mean, var, False, float(epsilon), activation), mean, var


def batch_norm_inference(x, mean, var, weight, bias, epsilon, activation=None):
    """Batch norm with given statistics [C], then an activation; otherwise as `batch_norm`.

    Returns:
        y: float32 [N, H, W, C], differentiable with respect to x, weight and bias, with mean and var as constants.
    """
    _check_batch_norm(x, weight=weight, bias=bias, mean=mean, var=var)
    return _BatchNorm.apply(x, weight, bias, mean.detach(), var.detach(), True, float(epsilon), _activation(activation))


def add(x, y, activation=None):
    """Sum of two tensors of the same shape, then an activation (a residual connection).

    Args:
        x, y: float32 [N, H, W, C].
        activation: as for `batch_norm`.

    Returns:
        float32 [N, H, W, C], differentiable with respect to x and y.

    Raises:
        ValueError: unknown activation, or shapes that differ.
    """
    _check_float32("add", x=x, y=y)
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(f"add: x {x.shape} and y {y.shape} must have the same shape [N, H, W, C]")
    return _Add.apply(x, y, _activation(activation))


def global_average_pool(x):
    """Mean over rows and columns: float32 [N, H, W, C] -> [N, C], differentiable."""
    _check_float32("global_average_pool", x=x)
    if x.ndim != 4:
        raise ValueError(f"global_average_pool: x must be [N, H, W, C], got {x.shape}")
    n, h, w, c = x.shape
    # A matrix product, because Paddle's mean over these axes is 6-30 times slower.
    average = paddle.full([n, 1, h * w], 1 / (h * w), dtype="float32")
    return paddle.matmul(average, x.reshape([n, h * w, c])).reshape([n, c])


class _Convolution(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, stride, padding, groups):
        ctx.wanted = _differentiable(x, weight)
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.key = (tuple(x.shape), tuple(weight.shape), stride, padding, groups)
        return _cached(_ConvolutionForward, *ctx.key)(x, weight)

    @staticmethod
    def backward(ctx, y_grad):
        x, weight = ctx.saved_tensor()
        y_grad = y_grad.contiguous()
        x_wanted, weight_wanted = ctx.wanted
        x_grad = _cached(_ConvolutionBackwardData, *ctx.key)(y_grad, weight) if x_wanted else None
        weight_grad = _cached(_ConvolutionBackwardWeights, *ctx.key)(x, y_grad) if weight_wanted else None
        return x_grad, weight_grad


class _ConvolutionShapes:
    """What a convolution's three operations share: descriptions of its tensors and the choice of a forward kernel.

    oneDNN chooses the layout of the weights (tag ANY). They are converted from and to OIHW at every call: under 1% of
    the time, and nothing to keep in step with the optimizer.
    """

    def __init__(self, x_shape, weight_shape, stride, padding, groups):
        n, h, w, i = x_shape
        o, i_per_group, kh, kw = weight_shape
        out_h, out_w = (h + 2 * padding[0] - kh) // stride[0] + 1, (w + 2 * padding[1] - kw) // stride[1] + 1
        if out_h < 1 or out_w < 1:
            raise ValueError(f"conv2d: kernel {kh}x{kw} with padding {padding} is larger than x {x_shape} (NHWC)")
        self.y_shape = [n, out_h, out_w, o]
        self.x, self.y = _nhwc(x_shape), _nhwc(self.y_shape)
        grouped = (o, i, kh, kw) if groups == 1 else (groups, o // groups, i_per_group, kh, kw)
        self.weight = dnn.Description(grouped, dnn.ABCD if groups == 1 else dnn.ABCDE)
        self.any_weight = dnn.Description(grouped, dnn.ANY)
        self.geometry = (dnn.dims(stride), dnn.dims((0, 0)), dnn.dims(padding), dnn.dims(padding))
        self.forward = dnn.PrimitiveDesc.on_engine(
            "convolution_forward", dnn.FORWARD_TRAINING, dnn.CONVOLUTION_DIRECT, self.x, self.any_weight,
            None, self.y, *self.geometry, None)


class _ConvolutionForward:
    def __init__(self, x_shape, weight_shape, stride, padding, groups):
        shapes = _ConvolutionShapes(x_shape, weight_shape, stride, padding, groups)
        weight = dnn.Description.chosen(shapes.forward, dnn.QUERY_WEIGHTS)
        self._y_shape = shapes.y_shape
        self._convert = dnn.Reorder(shapes.weight, weight)
        self._run = dnn.Primitive(shapes.forward, [(dnn.SRC, shapes.x), (dnn.WEIGHTS, weight), (dnn.DST, shapes.y)])

    def __call__(self, x, weight):
        y = empty(self._y_shape)
        self._run(x, self._convert(weight), y)
        return y


class _ConvolutionBackwardData:
    def __init__(self, x_shape, weight_shape, stride, padding, groups):
        shapes = _ConvolutionShapes(x_shape, weight_shape, stride, padding, groups)
        operation = dnn.PrimitiveDesc.on_engine(
            "convolution_backward_data", dnn.CONVOLUTION_DIRECT, shapes.x, shapes.any_weight,
            shapes.y, *shapes.geometry, shapes.forward, None)
        weight = dnn.Description.chosen(operation, dnn.QUERY_WEIGHTS)
        self._x_shape = list(x_shape)
        self._convert = dnn.Reorder(shapes.weight, weight)
        arguments = [(dnn.DIFF_DST, shapes.y), (dnn.WEIGHTS, weight), (dnn.DIFF_SRC, shapes.x)]
        self._run = dnn.Primitive(operation, arguments)

    def __call__(self, y_grad, weight):
        x_grad = empty(self._x_shape)
        self._run(y_grad, self._convert(weight), x_grad)
        return x_grad


class _ConvolutionBackwardWeights:
    def __init__(self, x_shape, weight_shape, stride, padding, groups):
        shapes = _ConvolutionShapes(x_shape, weight_shape, stride, padding, groups)
        operation = dnn.PrimitiveDesc.on_engine(
            "convolution_backward_weights", dnn.CONVOLUTION_DIRECT, shapes.x, shapes.any_weight, None,
            shapes.y, *shapes.geometry, shapes.forward, None)
        weight = dnn.Description.chosen(operation, dnn.QUERY_DIFF_WEIGHTS)
        self._weight_shape, self._nbytes = list(weight_shape), weight.nbytes
        self._convert = dnn.Reorder(weight, shapes.weight)
        arguments = [(dnn.SRC, shapes.x), (dnn.DIFF_DST, shapes.y), (dnn.DIFF_WEIGHTS, weight)]
        self._run = dnn.Primitive(operation, arguments)

    def __call__(self, x, y_grad):
        weight_grad = empty([self._nbytes // 4])
        self._run(x, y_grad, weight_grad)
        return self._convert(weight_grad).reshape(self._weight_shape)


def _groups_to_merge(groups, o_per_group, i_per_group):
    """How many neighbouring groups to compute as one so that each has a multiple of _VECTOR channels on both sides."""
    if groups == 1:
        return 1
    needed = max(_VECTOR // math.gcd(_VECTOR, o_per_group), _VECTOR // math.gcd(_VECTOR, i_per_group))
    return needed if groups % needed == 0 else 1


def _merge_groups(weight, groups, merged):
    """[G * o, i, kh, kw] -> [G * o, merged * i, kh, kw], zero where an output and an input channel are of different
    groups."""
    total, i, kh, kw = weight.shape
    diagonal = paddle.eye(merged, dtype="float32").reshape([1, merged, 1, merged, 1])
    blocks = weight.reshape([groups // merged, merged, total // groups, 1, i * kh * kw]) * diagonal
    return blocks.reshape([total, merged * i, kh, kw])


def _batch_statistics(x):
    """Mean and biased variance over all but the last axis: float32 [C]."""
    rows, channels = math.prod(x.shape[:3]), x.shape[3]
    total, square = loops.sums_of(loops.statistics, rows, channels, x) / rows
    return _tensor(total), _tensor(np.maximum(square - total ** 2, 0))


class _BatchNorm(PyLayer):
    """Normalizes with mean and var, which are the batch's own unless they are `given`: then they are constants."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, given, epsilon, activation):
        ctx.wanted = _differentiable(x, weight, bias)
        x, weight, bias = (t.contiguous() for t in (x, weight, bias))
        ctx.key = (tuple(x.shape), epsilon, given, activation)
        y, for_activation = _cached(_BatchNormForward, *ctx.key)(x, weight, bias, mean, var)
        ctx.save_for_backward(x, weight, bias, mean, var, for_activation)
        return y

    @staticmethod
    def backward(ctx, y_grad):
        *tensors, for_activation = ctx.saved_tensor()
        grads = _cached(_BatchNormBackward, *ctx.key)(*tensors, for_activation, y_grad.contiguous())
        return *(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True)), None, None


class _BatchNormShapes:
    """What both directions share. LeakyReLU is part of their loops; other activations are oneDNN's."""

    def __init__(self, x_shape, epsilon, given, activation):
        algorithm, slope = activation
        in_loop = algorithm == dnn.RELU_FROM_OUTPUT
        self.x_shape, self.size = list(x_shape), (math.prod(x_shape[:3]), x_shape[3])
        self.settings = np.array([slope if in_loop else 1, epsilon, 0 if given else 1 / self.size[0]])
        self.activation = (0, 0.0) if in_loop else activation


class _BatchNormForward(_BatchNormShapes):
    def __init__(self, x_shape, *rest):
        super().__init__(x_shape, *rest)
        self._activate = _ActivationForward(x_shape, self.activation)

    def __call__(self, x, weight, bias, mean, var):
        """y, and what the gradient of oneDNN's activation will need."""
        y = empty(self.x_shape)
        loops.run(loops.normalize, *self.size, x, mean, var, weight, bias, self.settings, y)
        return self._activate(y)


class _BatchNormBackward(_BatchNormShapes):
    def __init__(self, x_shape, *rest):
        super().__init__(x_shape, *rest)
        self._activate = _ActivationBackward(x_shape, self.activation)

    def __call__(self, x, weight, bias, mean, var, for_activation, y_grad):
        if self.activation[0]:
            y_grad = self._activate(for_activation, y_grad, empty(self.x_shape))
        shared, x_grad = (x, mean, var, weight, bias, self.settings, y_grad), empty(self.x_shape)
        sums = loops.sums_of(loops.gradient_sums, *self.size, *shared)
        loops.run(loops.input_gradient, *self.size, *shared, sums, x_grad)
        bias_grad, weight_grad = sums
        return x_grad, _tensor(weight_grad), _tensor(bias_grad)


def _tensor(array):
    """A float32 tensor of this content. Not by paddle.to_tensor, which in Paddle 3.3 loses 112 bytes for good."""
    tensor = empty(array.shape)
    tensor.set_value(array.astype(np.float32))
    return tensor


def _activate_operation(data, activation):
    """The forward operation of an activation (algorithm, slope)."""
    algorithm, slope = activation
    return dnn.PrimitiveDesc.on_engine(
        "eltwise_forward", dnn.FORWARD_TRAINING, algorithm, data, data, slope, 0.0, None)


class _ActivationForward:
    """z -> (y, what the gradient will need): an alias of y for LeakyReLU, which overwrites z, and z itself for Mish."""

    def __init__(self, shape, activation):
        self._run, self._in_place = None, activation[0] == dnn.RELU_FROM_OUTPUT
        if activation[0]:
            data = _nhwc(shape)
            self._run = dnn.Primitive(_activate_operation(data, activation), [(dnn.SRC, data), (dnn.DST, data)])

    def __call__(self, z):
        if self._run is None:
            return z, None
        y = z if self._in_place else empty(z.shape)
        self._run(z, y)
        return y, z.detach()


class _ActivationBackward:
    """Writes the gradient with respect to z into `into` and returns that; without an activation returns y_grad."""

    def __init__(self, shape, activation):
        self._run = None
        if activation[0]:
            algorithm, slope = activation
            data = _nhwc(shape)
            operation = dnn.PrimitiveDesc.on_engine(
                "eltwise_backward", algorithm, data, data, data, slope, 0.0,
                _activate_operation(data, activation), None)
            known = dnn.DST if algorithm == dnn.RELU_FROM_OUTPUT else dnn.SRC
            self._run = dnn.Primitive(operation, [(known, data), (dnn.DIFF_DST, data), (dnn.DIFF_SRC, data)])

    def __call__(self, for_activation, y_grad, into):
        if self._run is None:
            return y_grad
        self._run(for_activation, y_grad, into)
        return into


class _Add(PyLayer):
    @staticmethod
    def forward(ctx, x, y, activation):
        ctx.wanted = _differentiable(x, y)
        ctx.key = (tuple(x.shape), activation)
        total, for_activation = _cached(_AddForward, *ctx.key)(x.contiguous(), y.contiguous())
        ctx.save_for_backward(for_activation)
        return total

    @staticmethod
    def backward(ctx, total_grad):
        (for_activation,) = ctx.saved_tensor()
        total_grad = total_grad.contiguous()
        shape, activation = ctx.key
        if activation[0]:
            activate = _cached(_ActivationBackward, *ctx.key)
            total_grad = activate(for_activation, total_grad, empty(shape))
        if all(ctx.wanted):
            return total_grad, paddle.assign(total_grad, empty(shape))  # Paddle may accumulate into either in place
        return tuple(total_grad if wanted else None for wanted in ctx.wanted)


class _AddForward:
    def __init__(self, shape, activation):
        data = _nhwc(shape)
        operation = dnn.PrimitiveDesc.on_engine("binary", dnn.BINARY_ADD, data, data, data, None)
        self._add = dnn.Primitive(operation, [(dnn.SRC, data), (dnn.SRC_1, data), (dnn.DST, data)])
        self._activate = _ActivationForward(shape, activation)

    def __call__(self, x, y):
        total = empty(x.shape)
        self._add(x, y, total)
        return self._activate(total)


def _activation(activation):
    """(oneDNN's algorithm, slope) of a public activation argument; algorithm 0 is none."""
    match activation:
        case None:
            return 0, 0.0
        case "mish":
            return dnn.MISH, 0.0
        case ("leaky_relu", float() | int() as slope) if slope >= 0:
            return dnn.RELU_FROM_OUTPUT, float(slope)
    raise ValueError(f'activation: None, "mish" or ("leaky_relu", slope >= 0), got {activation!r}')


def _differentiable(*tensors):
    """For which inputs a PyLayer has to return a gradient; for the others it must return None."""
    return tuple(not tensor.stop_gradient for tensor in tensors)


def _cached(build, *key):
    """build(*key), compiled once per thread, key and number of OpenMP threads."""
    return dnn.cached(num_threads(), build, *key)


def _nhwc(shape):
    """Description of an [N, H, W, C] tensor."""
    n, h, w, c = shape
    return dnn.Description((n, c, h, w), dnn.ACDB)


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _check_float32(operator, **tensors):
    for name, tensor in tensors.items():
        if tensor.dtype != paddle.float32:
            raise ValueError(f"{operator}: {name} must be float32, got {tensor.dtype}")


def _check_batch_norm(x, **per_channel):
    _check_float32("batch_norm", x=x, **per_channel)
    if x.ndim != 4:
        raise ValueError(f"batch_norm: x must be [N, H, W, C], got {x.shape}")
    for name, tensor in per_channel.items():
        if tensor.shape != x.shape[3:]:
            raise ValueError(f"batch_norm: {name} must have the {x.shape[3]} channels of x, got {tensor.shape}")
