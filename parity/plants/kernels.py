"""Known bugs of the operators: in the CPU kernels, in their fallback to Paddle's, and in what chooses between them.

Each is a change to production code that only stage `operators` can be asked to see, since the float64 stages run other
operators on one thread. Some have no effect on a WideResNet, which has no groups, no Mish and no activation after a
sum: they are tried on a ResNeXt.
"""

import collections
from collections.abc import Callable
from functools import partial

import numpy as np
import paddle
import paddle.nn.functional as F

from fixmatch import kernels
from fixmatch.kernels import allocator, loops, onednn, ops
from fixmatch.models import layers, resnext, wideresnet
from parity.plants.plant import Patch, Plant


def _on_fresh_primitives(patch: Patch, put_in: Callable[[Patch], None]) -> None:
    """Puts a bug in where no compiled primitive holds on to the right code."""
    kernels.status()  # remembered, so that their own self-test does not put the stock operators in their place
    patch(onednn._state(), "primitives", collections.OrderedDict())
    put_in(patch)


def _operator(patch: Patch, name: str, result=None, arguments=None, key=None) -> None:
    """Changes one of ops.py's operators: its result, given (result, key, *arguments), its arguments or its key."""
    class Faulty(getattr(ops, name)):
        def __init__(self, *right):
            self.key = right
            super().__init__(*(key(*right) if key else right))

        def __call__(self, *right):
            given = arguments(self.key, *right) if arguments else right
            found = super().__call__(*given)
            return result(found, self.key, *right) if result else found

    patch(ops, name, Faulty)


def _wrap(patch: Patch, owner, attribute: str, changed: Callable) -> None:
    """Replaces a function by changed(function, *arguments)."""
    right = getattr(owner, attribute)
    patch(owner, attribute, lambda *args, **kwargs: changed(right, *args, **kwargs))


def _first_images(tensor, count: int):
    """0 from image `count` on."""
    kept = (paddle.arange(tensor.shape[0]) < count).astype(tensor.dtype)
    return tensor * kept.reshape([-1, *[1] * (tensor.ndim - 1)])


# Convolution: key (x shape NHWC, weight shape OIHW, stride, padding, groups)


def conv_weight_gradient_1x1_zero(patch):
    _operator(patch, "_ConvolutionBackwardWeights", lambda grad, key, *_: grad * (key[1][2] > 1))


def conv_weight_gradient_first_32(patch):
    _operator(patch, "_ConvolutionBackwardWeights", arguments=lambda key, x, grad: (x, _first_images(grad, 32)))


def conv_weight_gradient_odd_batch(patch):
    _operator(patch, "_ConvolutionBackwardWeights",
              arguments=lambda key, x, grad: (x, _first_images(grad, len(grad) // 2 * 2)))


def conv_weight_gradient_last_row(patch):
    def without(key, x, grad):
        return x, paddle.concat([grad[:, :-1], 0 * grad[:, -1:]], axis=1) if grad.shape[1] > 4 else grad

    _operator(patch, "_ConvolutionBackwardWeights", arguments=without)


def conv_weight_gradient_not_reordered(patch):
    class Faulty(ops._ConvolutionBackwardWeights):
        def __init__(self, *key):
            super().__init__(*key)
            self._convert = lambda grad: grad[:int(np.prod(self._weight_shape))]

    patch(ops, "_ConvolutionBackwardWeights", Faulty)


def conv_data_gradient_stride_2_border(patch):
    _operator(patch, "_ConvolutionBackwardData", lambda grad, key, *_: grad if key[2] == (1, 1) else paddle.concat(
        [grad[:, :-1], 0 * grad[:, -1:]], axis=1))


def conv_data_gradient_flipped(patch):
    _operator(patch, "_ConvolutionBackwardData", arguments=lambda key, grad, weight: (grad, weight.flip([2, 3])))


def conv_not_square(patch):
    _operator(patch, "_ConvolutionForward",
              lambda y, *_: y if y.shape[1] == y.shape[2] else y.transpose([0, 2, 1, 3]).reshape(y.shape))


def conv_bfloat16(patch):
    _operator(patch, "_ConvolutionForward",
              arguments=lambda key, x, weight: (x, weight.astype("bfloat16").astype("float32")))


def conv_last_images(patch):
    _operator(patch, "_ConvolutionForward", lambda y, *_: _first_images(y, len(y) // 4 * 4))


def conv_two_threads(patch):
    _operator(patch, "_ConvolutionForward",
              lambda y, *_: y if ops.num_threads() == 1 else _first_images(y, len(y) // 2))


def conv_nan_channel(patch):
    def poisoned(y, *_):
        y[..., -1] = float("nan")
        return y

    _operator(patch, "_ConvolutionForward", poisoned)


def conv_transposed_view(patch):
    def changed(right, x, *args, **kwargs):
        return right(x if x.is_contiguous() else x.transpose([0, 3, 1, 2]).reshape(x.shape), *args, **kwargs)

    _wrap(patch, kernels, "conv2d", changed)


def groups_merged_without_zeros(patch):
    patch(ops, "_merge_groups", lambda weight, groups, merged: weight.tile([1, merged, 1, 1]))


def groups_merged_rolled(patch):
    _wrap(patch, ops, "_merge_groups", lambda right, weight, groups, merged: right(weight, groups, merged).roll(
        weight.shape[1], axis=1))


# Batch norm: key (x shape NHWC, epsilon, given statistics, activation)


def _batch_norm_gradients(patch: Patch, change: Callable) -> None:
    """Changes (x, weight, bias) gradients, given (gradients, key, x, weight, bias, mean, var, ...)."""
    _operator(patch, "_BatchNormBackward", change)


def bn_weight_gradient_zero(patch):
    _batch_norm_gradients(patch, lambda grads, *_: (grads[0], 0 * grads[1], grads[2]))


def bn_bias_gradient_doubled(patch):
    _batch_norm_gradients(patch, lambda grads, *_: (grads[0], grads[1], 2 * grads[2]))


def _without_term(patch: Patch, term: Callable) -> None:
    def changed(grads, key, x, weight, bias, mean, var, *_):
        scale = (var + key[1]) ** -0.5
        missing = term(grads, (x - mean) * scale) * (weight * scale * (x.shape[3] / x.size))
        return (grads[0] if key[2] else grads[0] + missing, *grads[1:])

    _batch_norm_gradients(patch, changed)


def bn_input_gradient_without_mean(patch):
    _without_term(patch, lambda grads, unit: grads[2])


def bn_input_gradient_without_variance(patch):
    _without_term(patch, lambda grads, unit: unit * grads[1])


def bn_forward_unbiased(patch):
    def changed(right, x, weight, bias, epsilon, activation):
        _, mean, var = right(x, weight, bias, epsilon, activation)
        count = x.size // x.shape[3]
        y = kernels.batch_norm_inference(x, mean, var * (count / (count - 1)), weight, bias, epsilon, activation)
        return y, mean, var

    _wrap(patch, kernels, "batch_norm", changed)


def bn_statistics_of_half(patch):
    def changed(right, x, weight, bias, epsilon, activation):
        _, mean, var = right(x[:len(x) // 2], weight, bias, epsilon, activation)
        return kernels.batch_norm_inference(x, mean, var, weight, bias, epsilon, activation), mean, var

    _wrap(patch, kernels, "batch_norm", changed)


def bn_statistics_in_one_chain(patch):
    def changed(x):
        pixels = x.detach().numpy().reshape(-1, x.shape[3])  # numpy adds up rows one after the other
        mean = pixels.sum(axis=0) / np.float32(len(pixels))
        return tuple(map(paddle.to_tensor, (mean, ((pixels - mean) ** 2).sum(axis=0) / np.float32(len(pixels)))))

    patch(ops, "_batch_statistics", changed)


def bn_sums_of_first_thread(patch):
    def changed(function, rows, channels, *arrays):
        sums = np.zeros((ops.num_threads(), 2, channels))
        loops.run(function, rows, channels, *arrays, sums)
        return sums[0] * (len(sums) if function is loops.gradient_sums else 1)

    patch(loops, "sums_of", changed)


def bn_gradient_sums_of_whole_blocks(patch):
    _wrap(patch, loops, "sums_of", lambda right, function, rows, *rest: right(
        function, max(rows // 128 * 128, 1) if function is loops.gradient_sums else rows, *rest))


def bn_eval_batch_statistics(patch):
    patch(kernels, "batch_norm_inference", lambda x, mean, var, *args: kernels.batch_norm(x, *args)[0])


def bn_epsilon(patch):
    _operator(patch, "_BatchNormForward", key=lambda shape, epsilon, *rest: (shape, epsilon / 10, *rest))


def bn_epsilon_gradient(patch):
    _operator(patch, "_BatchNormBackward", key=lambda shape, epsilon, *rest: (shape, epsilon / 10, *rest))


def _statistics(patch: Patch, change: Callable) -> None:
    """Changes the update of the running statistics in float32: change(layer, mean, variance, count) in its place."""
    def changed(right, layer, mean, variance, count):
        if mean.dtype == paddle.float32:
            change(right, layer, mean, variance, count)
        else:
            right(layer, mean, variance, count)

    right = layers.BatchNorm2D._update_running_statistics
    patch(layers.BatchNorm2D, "_update_running_statistics", lambda *args, **kwargs: changed(right, *args, **kwargs))


def bn_running_mean_kept(patch):
    _statistics(patch, lambda right, layer, mean, variance, count: right(
        layer, layer._mean.clone(), variance, count))


def bn_running_variance_biased(patch):
    _statistics(patch, lambda right, layer, mean, variance, count: right(
        layer, mean, variance * ((count - 1) / count), count))


# Activation: key (shape, (algorithm, slope))


def activation_slope_gradient(patch):
    class Faulty(ops._BatchNormBackward):
        def __init__(self, shape, epsilon, given, activation):
            super().__init__(shape, epsilon, given, activation)
            self.settings = self.settings * [1 + (activation[0] == onednn.RELU_FROM_OUTPUT), 1, 1]

    patch(ops, "_BatchNormBackward", Faulty)


def mish_gradient_approximate(patch):
    def rounded(key, known, *others):
        return (known.astype("bfloat16").astype("float32") if key[1][0] == onednn.MISH else known, *others)

    _operator(patch, "_ActivationBackward", arguments=rounded)


def activation_skipped_in_eval(patch):
    _wrap(patch, kernels, "batch_norm_inference", lambda right, *args: right(*args[:-1], None))


# Sum, pooling, classifier, layout, memory


def add_gradient_of_one(patch):
    _wrap(patch, kernels, "add", lambda right, x, y, activation=None: right(x, y.detach() + 0 * y, activation))


def add_gradient_shared(patch):
    patch(ops._Add, "backward", lambda ctx, grad: (grad, grad))


def add_activation_skipped(patch):
    _wrap(patch, kernels, "add", lambda right, x, y, activation=None: right(x, y, None))


def pool_first_row(patch):
    _wrap(patch, kernels, "global_average_pool", lambda right, x: right(x[:, :1]))


def pool_wrong_count(patch):
    _wrap(patch, kernels, "global_average_pool", lambda right, x: right(x) * (x.shape[2] / x.shape[1]))


def linear_bias_frozen(patch):
    _wrap(patch, F, "linear", lambda right, x, weight, bias=None, name=None: right(x, weight, bias.detach()))


def layout_height_width(patch):
    for module in (layers, wideresnet, resnext):
        patch(module, "to_kernel_layout", lambda images: images.transpose([0, 3, 2, 1]))


def allocator_block_in_use(patch):
    blocks: dict[int, object] = {}
    take = allocator._Pool().take  # of a pool of its own, so that the real one's books stay right
    patch(allocator._pool, "take", lambda nbytes: blocks.setdefault(nbytes, None) or blocks.update(
        {nbytes: take(nbytes)}) or blocks[nbytes])
    patch(allocator._pool, "give", lambda block: None)


# Paddle's own operators, where the kernels are off


def stock_conv_stride(patch):
    _wrap(patch, F, "conv2d", lambda right, x, weight, bias=None, stride=1, padding=0, groups=1, **_: right(
        x, weight, bias, 1, padding, 1, groups))


def stock_conv_padding(patch):
    def changed(right, x, weight, bias=None, stride=1, padding=0, groups=1, **_):
        x = F.pad(x, [padding] * 4, mode="replicate") if padding else x
        return right(x, weight, bias, stride, 0, 1, groups)

    _wrap(patch, F, "conv2d", changed)


def stock_conv_groups(patch):
    def changed(right, x, weight, bias=None, stride=1, padding=0, groups=1, **_):
        x = x.roll(weight.shape[1], axis=1) if groups > 1 else x
        return right(x, weight, bias, stride, padding, 1, groups)

    _wrap(patch, F, "conv2d", changed)


def stock_bn_variance_with_epsilon(patch):
    def changed(right, x, weight, bias, epsilon, activation):
        y, mean, variance = right(x, weight, bias, epsilon, activation)
        return y, mean, variance + epsilon

    _wrap(patch, layers, "batch_norm_train", changed)


def stock_add_activation_skipped(patch):
    for module in (wideresnet, resnext):
        _wrap(patch, module, "add", lambda right, x, y, activation=None: x + y)


_TABLE = (  # name, what it does, how; and where not on a WideResNet with the kernels on, the network, their
    # setting and others
    ("conv-weight-gradient-1x1-zero", "no gradient for the weights of 1x1 convolutions", conv_weight_gradient_1x1_zero),
    ("conv-weight-gradient-first-32", "of a batch over 32 only the first 32 images reach the weight gradient",
     conv_weight_gradient_first_32),
    ("conv-weight-gradient-odd-batch", "the last image of an odd batch is lost in the weight gradient",
     conv_weight_gradient_odd_batch),
    ("conv-weight-gradient-last-row", "the last output row is lost in the weight gradient of maps over 4x4",
     conv_weight_gradient_last_row),
    ("conv-weight-gradient-not-reordered", "the weight gradient stays in oneDNN's own layout",
     conv_weight_gradient_not_reordered),
    ("conv-data-gradient-stride-2-border", "at stride 2 the last row of the input gradient is 0",
     conv_data_gradient_stride_2_border),
    ("conv-data-gradient-flipped", "the kernel is turned once too often in the input gradient",
     conv_data_gradient_flipped),
    ("conv-not-square", "height and width swapped in the output of maps that are not square", conv_not_square),
    ("conv-bfloat16", "weights rounded to bfloat16, as by oneDNN's fpmath mode", conv_bfloat16),
    ("conv-last-images", "the last images of a batch that is no multiple of 4 are not computed", conv_last_images),
    ("conv-two-threads", "with two threads or more the second half of the batch is wrong", conv_two_threads),
    ("conv-nan-channel", "NaN in one output channel", conv_nan_channel),
    ("conv-transposed-view", "a transposed view is read as if it lay in memory in its own order", conv_transposed_view),
    ("groups-merged-without-zeros", "weights of other groups repeated off the diagonal of merged ones",
     groups_merged_without_zeros, "resnext"),
    ("groups-merged-rolled", "each output group of merged ones sees its neighbour's input",
     groups_merged_rolled, "resnext"),
    ("bn-weight-gradient-zero", "no gradient for batch norm's weights", bn_weight_gradient_zero),
    ("bn-bias-gradient-doubled", "twice the gradient for batch norm's biases", bn_bias_gradient_doubled),
    ("bn-input-gradient-without-mean", "the input gradient does not go through the batch mean",
     bn_input_gradient_without_mean),
    ("bn-input-gradient-without-variance", "the input gradient does not go through the batch variance",
     bn_input_gradient_without_variance),
    ("bn-forward-unbiased", "normalized by the unbiased variance", bn_forward_unbiased),
    ("bn-statistics-of-half", "the statistics of the first half of the batch", bn_statistics_of_half),
    ("bn-statistics-in-one-chain", "the pixels of a batch added up one after the other in float32",
     bn_statistics_in_one_chain, "wideresnet", "on", ("data.name=cifar10",)),
    ("bn-sums-of-first-thread", "the statistics and the gradients' sums of the first thread alone",
     bn_sums_of_first_thread),
    ("bn-gradient-sums-of-whole-blocks", "the last pixels that fill no block are left out of the gradients' sums",
     bn_gradient_sums_of_whole_blocks),
    ("bn-eval-batch-statistics", "in float32, eval mode normalizes by the batch", bn_eval_batch_statistics),
    ("bn-epsilon", "an epsilon of 1e-6 in the kernel's forward pass", bn_epsilon),
    ("bn-epsilon-gradient", "an epsilon of 1e-6 in the kernel's backward pass", bn_epsilon_gradient),
    ("bn-running-mean-kept", "in float32 the running mean is not updated", bn_running_mean_kept),
    ("bn-running-variance-biased-float32", "in float32 the biased variance is averaged", bn_running_variance_biased),
    ("activation-slope-gradient", "LeakyReLU's slope is doubled in the backward pass only", activation_slope_gradient),
    ("mish-gradient-approximate", "Mish's gradient from inputs in bfloat16", mish_gradient_approximate, "resnext"),
    ("activation-skipped-in-eval", "no activation in eval mode", activation_skipped_in_eval),
    ("add-gradient-of-one", "no gradient for the second input of a residual sum", add_gradient_of_one),
    ("add-gradient-shared", "both inputs of a residual sum are given the same gradient tensor", add_gradient_shared),
    ("add-activation-skipped", "no activation after a residual sum", add_activation_skipped, "resnext"),
    ("pool-first-row", "the mean of the first row only", pool_first_row),
    ("pool-wrong-count", "the sum over a map is divided by the square of its height", pool_wrong_count),
    ("linear-bias-frozen", "the classifier's bias gets no gradient", linear_bias_frozen),
    ("layout-height-width", "height and width are swapped on the way into the kernels' layout", layout_height_width),
    ("allocator-block-in-use", "the memory of outputs is handed out again while they are in use",
     allocator_block_in_use),
    ("stock-conv-stride", "the fallback convolution ignores the stride", stock_conv_stride, "wideresnet", "off"),
    ("stock-conv-padding", "the fallback convolution repeats the border instead of adding zeros",
     stock_conv_padding, "wideresnet", "off"),
    ("stock-conv-groups", "the groups of the fallback convolution see each other's input",
     stock_conv_groups, "resnext", "off"),
    ("stock-bn-variance-with-epsilon", "the fallback's batch variance still has epsilon in it",
     stock_bn_variance_with_epsilon, "wideresnet", "off"),
    ("stock-add-activation-skipped", "the fallback sum has no activation",
     stock_add_activation_skipped, "resnext", "off"),
)


def _plant(name: str, what: str, put_in: Callable, arch: str = "wideresnet", cpu_kernels: str = "on",
           settings: tuple[str, ...] = ()) -> Plant:
    return Plant(name, "operators", what, partial(_on_fresh_primitives, put_in=put_in), arch=arch,
                 cpu_kernels=cpu_kernels, settings=settings)


PLANTS = [_plant(*row) for row in _TABLE]
