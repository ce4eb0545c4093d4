"""The CPU kernels against stock operators: values, gradients, memory, forks, threads. Skipped where the kernels
cannot be used."""

import collections
import concurrent.futures
import gc
import pathlib
import subprocess
import sys
import time

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ROOT, first_of, growth

from fixmatch import kernels
from fixmatch.kernels import allocator, onednn, openmp, ops, selftest

USABLE, REASON = kernels.status()
needs_kernels = pytest.mark.skipif(not USABLE, reason=REASON)
HERE = pathlib.Path(__file__).resolve().parent
ACTIVATIONS = (None, "mish", ("leaky_relu", 0.1), ("leaky_relu", 1.0))
examples = settings(max_examples=40, deadline=None, derandomize=True)


def to_tensor(array, dtype, contiguous=True):
    """A tensor with gradient; a non-contiguous one is a transposed view."""
    array = np.asarray(array, dtype=dtype)
    tensor = paddle.to_tensor(array if contiguous else array.T)
    if not contiguous:
        tensor = tensor.transpose(list(range(array.ndim))[::-1])
    tensor.stop_gradient = False
    return tensor


def run(function, inputs, y_grad, dtype="float32", contiguous=True):
    """function(*inputs) and the gradients with respect to its inputs, as float64 arrays."""
    tensors = [to_tensor(a, dtype, contiguous) for a in inputs]
    y = function(*tensors)
    gradients = paddle.grad(y, tensors, to_tensor(y_grad, dtype, contiguous))
    return [t.numpy().astype("float64") for t in (y, *gradients)]


def check(kernel, stock, inputs, y_grad, contiguous=True, tolerance=1e-6):
    """Both in float32 against stock in float64: the kernel is within the tolerance, or at least as close as stock is,
    times three.

    The second and third gradients are sums over positions, of terms of size 1: where all channels' sums cancel by
    chance, the error is judged by the size that such a sum usually has. They may be off by three times as much, since
    the order of summation goes by the number of threads.
    """
    inputs, y_grad = [a.astype("float32") for a in inputs], y_grad.astype("float32")
    exact = run(stock, inputs, y_grad, "float64")
    ours, theirs = run(kernel, inputs, y_grad, contiguous=contiguous), run(stock, inputs, y_grad)
    for name, want, got, stock_got in zip(("y", "x", "second", "third"), exact, ours, theirs, strict=False):
        is_sum = name in ("second", "third")
        scale = max(np.abs(want).max(), np.sqrt(y_grad.size / want.size) if is_sum else 1e-30)
        error, stock_error = np.abs(got - want).max() / scale, np.abs(stock_got - want).max() / scale
        allowed = max(3 * tolerance if is_sum else tolerance, 3 * stock_error)
        assert error <= allowed, f"{name}: {error:.1e}, stock {stock_error:.1e}"


def stock_conv2d(x, weight, stride, padding, groups=1):
    y = F.conv2d(x.transpose([0, 3, 1, 2]), weight, None, stride, padding, 1, groups)
    return y.transpose([0, 2, 3, 1])


def stock_activation(x, activation):
    if activation is None:
        return x
    return F.mish(x) if activation == "mish" else F.leaky_relu(x, activation[1])


def stock_batch_norm(x, weight, bias, activation, mean=None, var=None):
    given_statistics = mean is not None
    mean = paddle.zeros_like(weight) if mean is None else mean.astype(x.dtype)
    var = paddle.ones_like(weight) if var is None else var.astype(x.dtype)
    y = F.batch_norm(x.transpose([0, 3, 1, 2]), mean, var, weight, bias, training=not given_statistics, epsilon=1e-5)
    return stock_activation(y.transpose([0, 2, 3, 1]), activation)


@st.composite
def convolutions(draw):
    """(x shape, weight shape, stride, padding, groups) with an output of at least one pixel."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 4, 8]))
    kernel, padding = draw(st.sampled_from([(1, 0), (3, 1), (3, 0), (5, 2), ((3, 1), (1, 0))]))
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    sizes = st.integers(5, 12) if padding == 0 else st.integers(1, 12)
    channels = groups * draw(st.sampled_from([1, 3, 4, 5, 8, 16, 17]))
    x_shape = (draw(st.integers(1, 4)), draw(sizes), draw(sizes), channels)
    weight_shape = (groups * draw(st.sampled_from([1, 2, 4, 8, 9, 16])), x_shape[3] // groups, *kernel)
    return x_shape, weight_shape, draw(st.sampled_from([1, 2, (2, 1)])), padding, groups


@needs_kernels
@examples
@given(convolutions(), st.booleans(), st.integers(0, 99))
def test_conv2d_equals_stock(shapes, contiguous, seed):
    x_shape, weight_shape, *geometry = shapes
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal(x_shape), rng.standard_normal(weight_shape)
    y_shape = stock_conv2d(paddle.zeros(x_shape), paddle.zeros(weight_shape), *geometry).shape
    check(lambda *t: kernels.conv2d(*t, *geometry), lambda *t: stock_conv2d(*t, *geometry), [x, weight],
          rng.standard_normal(y_shape), contiguous)


@needs_kernels
@pytest.mark.parametrize(("channels", "groups"), [((16, 16), 4), ((32, 32), 4), ((64, 64), 4), ((512, 512), 8)])
def test_the_grouped_convolutions_of_resnext(channels, groups):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 8, channels[0]))
    weight = rng.standard_normal((channels[1], channels[0] // groups, 3, 3))
    check(lambda *t: kernels.conv2d(*t, 2, 1, groups), lambda *t: stock_conv2d(*t, 2, 1, groups), [x, weight],
          rng.standard_normal((2, 4, 4, channels[1])))


@needs_kernels
@examples
@given(st.tuples(st.integers(1, 5), st.integers(3, 9), st.integers(3, 9), st.integers(1, 40)),
       st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans(), st.integers(0, 99))
def test_batch_norm_equals_stock(shape, activation, statistics_given, contiguous, seed):
    rng = np.random.default_rng(seed)
    channels = shape[3]
    x, y_grad = 2 * rng.standard_normal(shape) + rng.standard_normal(channels), rng.standard_normal(shape)
    weight, bias = rng.uniform(0.5, 2, channels), rng.standard_normal(channels)
    if not statistics_given:
        check(lambda *t: kernels.batch_norm(*t, 1e-5, activation)[0], lambda *t: stock_batch_norm(*t, activation),
              [x, weight, bias], y_grad, contiguous)
        return
    mean = paddle.to_tensor(rng.standard_normal(channels).astype("float32"))
    var = paddle.to_tensor(rng.uniform(0.5, 2, channels).astype("float32"))
    check(lambda x, w, b: kernels.batch_norm_inference(x, mean, var, w, b, 1e-5, activation),
          lambda x, w, b: stock_batch_norm(x, w, b, activation, mean, var), [x, weight, bias], y_grad, contiguous)


@needs_kernels
@examples
@given(st.tuples(*[st.integers(1, 9)] * 4), st.sampled_from(ACTIVATIONS), st.booleans(), st.integers(0, 99))
def test_add_and_pool_equal_stock(shape, activation, contiguous, seed):
    rng = np.random.default_rng(seed)
    x, y, grad = rng.standard_normal((3, *shape))
    check(lambda x, y: kernels.add(x, y, activation), lambda x, y: stock_activation(x + y, activation), [x, y], grad,
          contiguous)
    check(kernels.global_average_pool, lambda x: x.mean(axis=[1, 2]), [x], grad[:, 0, 0], contiguous)


@needs_kernels
def test_batch_statistics_by_hand():
    x = paddle.to_tensor([[[[1.0, 0.0]], [[3.0, 8.0]]]])  # channel 0 holds 1 and 3
    x.stop_gradient = False
    weight, bias = paddle.to_tensor([2.0, 1.0]), paddle.to_tensor([0.0, -1.0])
    y, mean, var = kernels.batch_norm(x, weight, bias, 0.0, ("leaky_relu", 0.5))
    assert mean.tolist() == [2.0, 4.0]
    assert var.tolist() == [1.0, 16.0]  # biased
    assert mean.stop_gradient
    assert var.stop_gradient
    assert y[0, :, 0, 0].tolist() == [-1.0, 2.0]


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("center", "far"), [(1.0, 0.0), (30.0, 0.0), (1.0, 1e4)])
def test_batch_norm_of_a_batch_of_the_published_settings_is_exact_to_float32(threads, center, far):
    """960 images of 32x32: added up one after the other, the variance was off by 1e-3. `far` is where the first is."""
    rng, (channels, epsilon, slope) = np.random.default_rng(0), (3, 1e-5, 0.1)
    x = (rng.standard_normal((960, 32, 32, channels)) * [1, 2, 0.5] + center).astype(np.float32)
    x[0, 0, 0] += far
    y_grad = rng.standard_normal(x.shape).astype(np.float32) + np.float32(0.3) * (x - np.float32(center))
    weight, bias = np.float32([1.5, 0.5, 1]), np.float32([0.1, -0.2, 0.3])
    leaves = [paddle.to_tensor(a, stop_gradient=False) for a in (x, weight, bias)]
    before = openmp.num_threads()
    try:
        kernels.set_num_threads(threads)
        y, mean, var = kernels.batch_norm(*leaves, epsilon, ("leaky_relu", slope))
        y.backward(paddle.to_tensor(y_grad))
    finally:
        kernels.set_num_threads(before)
    axes, x = (0, 1, 2), x.astype(np.float64)
    expected_mean, expected_var = x.mean(axes), x.var(axes)
    inverse_std = (expected_var + epsilon) ** -0.5
    unit = (x - expected_mean) * inverse_std
    z = unit * weight + bias
    g = np.where(z > 0, 1, slope) * y_grad
    weight_grad, bias_grad = (g * unit).sum(axes), g.sum(axes)
    x_grad = weight * inverse_std * (g - (bias_grad + unit * weight_grad) / (x.size / channels))
    np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=3e-7)
    np.testing.assert_allclose(var.numpy(), expected_var, rtol=2e-6)
    for found, expected in ((y, np.where(z > 0, z, slope * z)), (leaves[1].grad, weight_grad),
                            (leaves[2].grad, bias_grad)):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    apart = np.abs(leaves[0].grad.numpy() - x_grad)
    apart[0, 0, 0] = 0  # a thousand deviations away, where large numbers cancel
    assert apart[np.abs(z) > 1e-4].max() < 1e-5 * np.abs(x_grad).max()  # nearer to 0 rounding decides on the slope


@needs_kernels
def test_more_threads_than_pixels():
    x, before = paddle.to_tensor(np.float32([1, 3, 8]).reshape(3, 1, 1, 1)), openmp.num_threads()
    try:
        kernels.set_num_threads(8)
        y, mean, var = kernels.batch_norm(x, paddle.ones([1]), paddle.zeros([1]), 0.0, None)
    finally:
        kernels.set_num_threads(before)
    assert mean.item() == 4
    np.testing.assert_allclose(var.item(), 26 / 3, rtol=1e-6)
    np.testing.assert_allclose(y.flatten().numpy(), np.array([-3, -1, 4]) / (26 / 3) ** 0.5, rtol=1e-6)


@needs_kernels
def test_one_image_of_one_pixel_is_its_bias():
    x = paddle.to_tensor(np.full((1, 1, 1, 3), 7, dtype="float32"))
    y, mean, var = kernels.batch_norm(x, paddle.ones([3]), paddle.to_tensor([1.0, 2.0, 3.0]), 1e-5, None)
    assert y.flatten().tolist() == [1.0, 2.0, 3.0]
    assert mean.tolist() == [7.0] * 3
    assert var.tolist() == [0.0] * 3


@needs_kernels
def test_the_derivative_at_zero_is_torchs():
    x, ones = to_tensor(np.zeros((1, 1, 1, 2)), "float32"), paddle.ones([2])
    y = kernels.batch_norm_inference(x, paddle.zeros([2]), ones, ones, paddle.zeros([2]), 0.0, ("leaky_relu", 0.25))
    y.sum().backward()
    assert x.grad.flatten().tolist() == [0.25, 0.25]


@needs_kernels
def test_gradients_only_where_wanted():
    weight = to_tensor(np.ones((4, 2, 1, 1)), "float32")
    image = paddle.ones([1, 3, 3, 2])
    kernels.conv2d(image, weight, 1, 0).sum().backward()
    assert image.grad is None
    assert weight.grad.flatten().tolist() == [9.0] * 8
    with paddle.no_grad():
        assert kernels.conv2d(image, weight, 1, 0).stop_gradient


@needs_kernels
def test_gradients_of_a_sum_do_not_share_memory():
    x, y = (to_tensor(np.ones((1, 2, 2, 3)), "float32") for _ in range(2))
    for _ in range(2):
        (kernels.add(x, y) + kernels.add(x, x)).sum().backward()
    assert x.grad.flatten().tolist() == [6.0] * 12
    assert y.grad.flatten().tolist() == [2.0] * 12


@needs_kernels
@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", -0.1), ("leaky_relu",), 3])
def test_unknown_activations_are_named(activation):
    with pytest.raises(ValueError, match="activation"):
        kernels.batch_norm(paddle.ones([1, 2, 2, 3]), paddle.ones([3]), paddle.ones([3]), 1e-5, activation)


@needs_kernels
@pytest.mark.parametrize(("x", "weight", "groups", "message"), [
    ([1, 4, 4, 3], [8, 4, 3, 3], 1, "do not fit"),
    ([1, 4, 4, 8], [6, 2, 3, 3], 4, "do not fit"),
    ([4, 4, 8], [6, 8, 3, 3], 1, "do not fit"),
    ([1, 2, 2, 8], [6, 8, 5, 5], 1, "larger than"),
])
def test_shapes_that_do_not_fit_are_named(x, weight, groups, message):
    with pytest.raises(ValueError, match=message):
        kernels.conv2d(paddle.ones(x), paddle.ones(weight), 1, 0, groups)


@needs_kernels
def test_other_types_and_channel_counts_are_refused():
    ones = paddle.ones([3])
    with pytest.raises(ValueError, match="x must be float32"):
        kernels.batch_norm(paddle.ones([1, 2, 2, 3], dtype="float64"), ones, ones, 1e-5, None)
    with pytest.raises(ValueError, match="bias must have the 3 channels"):
        kernels.batch_norm(paddle.ones([1, 2, 2, 3]), ones, paddle.ones([2]), 1e-5, None)
    with pytest.raises(ValueError, match="same shape"):
        kernels.add(paddle.ones([1, 2, 2, 3]), paddle.ones([1, 2, 1, 3]))


def layers(x, weight, scale, shift):
    """Every operator once, with a batch norm whose output nobody uses."""
    kernels.batch_norm(x, scale, shift, 1e-5, ("leaky_relu", 0.1))
    y = kernels.conv2d(x, weight, 1, 1, 4)
    y, mean, var = kernels.batch_norm(y, scale, shift, 1e-5, "mish")
    y = kernels.batch_norm_inference(y, mean, var, scale, shift, 1e-5, ("leaky_relu", 0.1))
    return kernels.global_average_pool(kernels.add(x, y, "mish")).sum()


def layer_inputs(batch=8, size=8):
    rng = np.random.default_rng(0)
    shapes = ((batch, size, size, 16), (16, 4, 3, 3), (16,), (16,))
    return [to_tensor(rng.standard_normal(shape), "float32") for shape in shapes]


def resident_mb():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.fixture
def one_thread():
    """Small shapes on a busy machine spend their time waiting for the other threads."""
    before = openmp.num_threads()
    kernels.set_num_threads(1)
    yield
    kernels.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.usefixtures("one_thread")
def test_memory_is_flat(backward):
    inputs = layer_inputs()  # each tensor of the shape of x holds 33 kB, each step about ten

    def steps(count):
        for _ in range(count):
            loss = layers(*inputs)
            if backward:
                loss.backward()
                for tensor in inputs:
                    tensor.clear_gradient()

    steps(50)
    gc.collect()
    before = resident_mb()
    steps(500)
    gc.collect()
    assert resident_mb() - before < 4  # one such tensor a step would be 16


@needs_kernels
@pytest.mark.usefixtures("one_thread")
def test_memory_of_big_tensors_is_flat():
    inputs = layer_inputs(32, 32)  # 2 MB each: from the pool

    def steps(count):
        for _ in range(count):
            layers(*inputs).backward()
            for tensor in inputs:
                tensor.clear_gradient()

    steps(5)
    before = resident_mb()
    steps(40)
    assert resident_mb() - before < 20  # one such tensor a step would be 80


@needs_kernels
def test_blocks_return_to_the_pool_with_their_last_tensor():
    shape = [1, 600, 600, 3]
    first = allocator.empty(shape)
    address, view = first.data_ptr(), first.detach().reshape([-1])
    del first
    gc.collect()
    assert allocator.empty(shape).data_ptr() != address  # the view still holds it
    del view
    gc.collect()
    assert allocator.empty(shape).data_ptr() == address


@needs_kernels
def test_a_block_costs_nothing_after_its_end():
    lost = growth(lambda: allocator.empty([1, 600, 600, 3]), calls=1000, rounds=5)
    assert lost < 100  # by paddle.utils.dlpack.from_dlpack 2,000


@needs_kernels
def test_the_pool_gives_up_idle_blocks_for_other_sizes():
    pool = allocator._Pool()
    for size in (2, 3, 4, 5):
        pool.give(pool.take(size << 20))
    assert [len(block) >> 20 for block in pool._idle] == [5]
    block = pool.take(5 << 20)
    assert not pool._idle
    pool.give(block)
    assert pool.take(5 << 20) is block


@needs_kernels
def test_changing_shapes_keep_the_cache_bounded(monkeypatch):
    monkeypatch.setattr(onednn, "CACHED_PRIMITIVES", 5)
    weight = paddle.ones([2, 2, 3, 3])
    monkeypatch.setattr(onednn._state(), "primitives", collections.OrderedDict())
    for size in range(3, 20):
        assert kernels.conv2d(paddle.ones([1, size, size, 2]), weight, 1, 0)[0, 0, 0, 0].item() == 18
    assert len(onednn._state().primitives) == 5


@needs_kernels
def test_python_threads_do_not_share_arguments():
    def value(seed):
        x = paddle.full([2, 9, 9, 16], float(seed))
        weight = paddle.ones([16, 16, 1, 1])
        return {round(kernels.conv2d(x, weight, 1, 0).mean().item(), 3) for _ in range(20)}

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(value, range(8))) == [{16.0 * seed} for seed in range(8)]


@needs_kernels
def test_any_number_of_threads_gives_the_same_numbers():
    before = openmp.num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            kernels.set_num_threads(threads)
            inputs = layer_inputs()
            layers(*inputs).backward()
            results.append([t.grad.numpy() for t in inputs])
    finally:
        kernels.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6 * np.abs(want).max())
    with pytest.raises(ValueError, match="at least 1"):
        kernels.set_num_threads(0)


def test_status_is_a_bool_and_one_line():
    assert isinstance(USABLE, bool)
    assert REASON.count("\n") == 0
    assert REASON


@needs_kernels
def test_status_is_quick():
    start = time.process_time()
    usable, _ = selftest.status.__wrapped__()
    assert usable
    assert (time.process_time() - start) / openmp.num_threads() < 0.3


def test_status_says_no_to_a_library_it_does_not_know(monkeypatch):
    monkeypatch.setattr(onednn, "KNOWN_VERSIONS", ((2, 7),))
    monkeypatch.setattr(onednn, "load", onednn.load.__wrapped__)
    usable, reason = selftest.status.__wrapped__()
    assert not usable
    assert "stock operators" in reason


@needs_kernels
@pytest.mark.parametrize("operator", ["conv2d", "batch_norm"])
def test_status_says_no_to_a_wrong_result(monkeypatch, operator):
    original = getattr(ops, operator)

    def wrong(*arguments):
        result = original(*arguments)
        return (result[0] * 1.001, *result[1:]) if isinstance(result, tuple) else result * 1.001

    monkeypatch.setattr(ops, operator, wrong)
    usable, reason = selftest.status.__wrapped__()
    assert not usable
    assert f"self-test: {operator}" in reason


def test_default_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert openmp.default_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert openmp.default_threads() >= 1


STEP = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}, {root!r} + '/tests/helpers']
{imports}
import fixmatch, paddle
from test_kernels import layers, layer_inputs
from fixmatch import kernels
assert kernels.status()[0], kernels.status()
kernels.set_num_threads(2)
def step():
    inputs = layer_inputs()
    layers(*inputs).backward()
    return float(inputs[1].grad.abs().sum())
"""
FORK = STEP + """
expected = step()
child = os.fork()
if child == 0:
    signal.alarm(50)  # a child that hangs must not outlive the test
    ok = abs(step() - expected) <= 1e-4 * expected
    kernels.set_num_threads(2)
    ok = ok and abs(step() - expected) <= 1e-4 * expected
    os._exit(0 if ok else 7)
assert abs(step() - expected) <= 1e-4 * expected  # the parent goes on
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(code)
"""
RANKS = STEP + """
import paddle.distributed as dist
dist.init_parallel_env()
value = paddle.to_tensor([step(), 1.0])
dist.all_reduce(value)
total, ranks = value.tolist()
assert ranks == 2.0 and abs(total - 2 * step()) <= 1e-4 * total, value
print("rank done", dist.get_rank())
"""


def script(text, imports=""):
    return text.format(root=str(ROOT), tests=str(HERE), imports=imports)


@needs_kernels
@pytest.mark.parametrize("imports", first_of(["import paddle, torch", "import paddle", "import torch"], 1))
def test_a_forked_child_can_compute(imports):
    if "torch" in imports:
        pytest.importorskip("torch")
    command = [sys.executable, "-W", "ignore", "-c", script(FORK, imports)]
    done = subprocess.run(command, timeout=60, check=False, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@needs_kernels
def test_two_ranks_under_gloo(tmp_path):
    (tmp_path / "ranks.py").write_text(script(RANKS))
    command = [sys.executable, "-W", "ignore", "-m", "paddle.distributed.launch", "--nproc_per_node", "2",
               "--backend", "gloo", "--log_dir", tmp_path / "log", tmp_path / "ranks.py"]
    done = subprocess.run(command, timeout=120, check=False, text=True, capture_output=True, cwd=tmp_path)
    logs = "".join(path.read_text() for path in (tmp_path / "log").iterdir() if path.is_file())
    assert done.returncode == 0, logs


ALONE = """
import fixmatch
from fixmatch import kernels
from fixmatch.kernels import onednn as dnn, ops
assert kernels.status()[0], kernels.status()
shape, weight = (2, 4, 4, 16), (16, 16, 3, 3)
for activation in ((dnn.RELU_FROM_OUTPUT, 0.3), (dnn.MISH, 0.0)):
    ops._ActivationBackward(shape, activation)
    ops._BatchNormBackward(shape, 1e-5, False, activation)
    ops._BatchNormBackward(shape, 1e-5, True, activation)
ops._ConvolutionBackwardData(shape, weight, (1, 1), (1, 1), 1)
ops._ConvolutionBackwardWeights(shape, weight, (1, 1), (1, 1), 1)
ops._AddForward(shape, (dnn.MISH, 0.0))
"""


@needs_kernels
def test_every_operation_can_be_compiled_before_any_other():
    """What oneDNN reads while it compiles one is alive then: a description that was freed crashed the process."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
