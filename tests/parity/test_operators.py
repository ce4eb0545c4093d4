"""Stage operators: its float64 side is Torch's, it sees every call of the network at the run's size, and it finds each
planted bug of the kernels and names the operator and the tensor."""

import dataclasses

import numpy as np
import paddle
import pytest
from running import first_of

from fixmatch import kernels
from fixmatch.config import (
    Config,
    DataConfig,
    ModelConfig,
    RuntimeConfig,
    SSLConfig,
    TrainConfig,
    from_dict,
    load_config,
)
from fixmatch.kernels import openmp, ops
from fixmatch.models import layers, wideresnet
from parity import operators, plants
from parity.case import Case
from parity.operators import calls, truth
from parity.operators.judge import Pair, errors, gates, judge

PLANTS = {name: bug for name, bug in plants.PLANTS.items() if bug.kind == "kernels"}
USABLE, REASON = kernels.status()
needs_kernels = pytest.mark.skipif(not USABLE, reason=REASON)
MODELS = {"wideresnet": ModelConfig("wideresnet", 10, 2), "resnext": ModelConfig("resnext", 11, 4, 4)}
ACTIVATIONS = [None, "mish", ("leaky_relu", 0.1)]
ROUNDOFF = 2.0**-24


def case(arch="wideresnet", cpu_kernels="auto", seed=0, **changes) -> Case:
    """Digits: images of 8x8, batches of 16 + 2 * 7 * 16 = 240."""
    config = Config(data=DataConfig("digits"), model=MODELS[arch], train=TrainConfig(batch_size=16, mu=7),
                    runtime=RuntimeConfig(device="cpu", cpu_kernels=cpu_kernels))
    return Case(dataclasses.replace(config, **changes), num_classes=10, seed=seed)


# The float64 side against Torch


def torch_results(function, inputs, grad):
    torch = pytest.importorskip("torch")
    tensors = [torch.tensor(a, requires_grad=True) for a in inputs]
    output = function(*tensors)
    output.backward(torch.tensor(grad))
    return [output.detach().numpy(), *(t.grad.numpy() for t in tensors)]


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max())


@pytest.mark.parametrize(("kernel", "stride", "groups"),
                         [(3, 1, 1), (3, 2, 1), (1, 1, 1), (1, 2, 1), (3, 1, 4), (3, 2, 4)])
@pytest.mark.parametrize("size", [(7, 4), (4, 6), (1, 2)])
def test_convolution_is_torchs(kernel, stride, groups, size):
    functional = pytest.importorskip("torch").nn.functional
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, *size, 8)), rng.standard_normal((12, 8 // groups, kernel, kernel))
    counts = np.array([2, 1, 1])
    repeated = np.array([0, 1, 2, 0])
    grad = rng.standard_normal((3, (size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1, 12))
    output, x_grad, weight_grad = torch_results(
        lambda x, w: nhwc(functional.conv2d(x.permute(0, 3, 1, 2), w, None, stride, kernel // 2, 1, groups)),
        [x[repeated], weight], grad[repeated])
    assert_equal(truth.conv2d(x, weight, grad, counts, stride, groups).values(), [output[:3], x_grad[:3], weight_grad])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_torchs(activation, training):
    functional = pytest.importorskip("torch").nn.functional
    from parity.mirror.models.layers import activate

    rng = np.random.default_rng(0)
    x, grad = 3 * rng.standard_normal((3, 4, 5, 6)) + 1, rng.standard_normal((3, 4, 5, 6))
    weight, bias, mean = rng.standard_normal((3, 6))
    variance, counts, repeated = rng.uniform(0.5, 2, 6), np.array([2, 2, 1]), np.array([0, 1, 2, 0, 1])
    torch = pytest.importorskip("torch")

    def reference(x, w, b):
        running = torch.tensor(mean), torch.tensor(variance)
        return nhwc(activate(functional.batch_norm(x.permute(0, 3, 1, 2), *running, w, b, training, 0.1, 1e-5),
                             activation))

    expected = torch_results(reference, [x[repeated], weight, bias], grad[repeated])
    used = truth.batch_statistics(x, counts) if training else (mean, variance)
    np.testing.assert_allclose(truth.batch_statistics(x, counts)[1], x[repeated].var(axis=(0, 1, 2)), rtol=1e-12)
    found = truth.BatchNorm(x, *used, weight, bias, 1e-5, activation).results(grad, counts, training)
    assert_equal(found.values(), [expected[0][:3], expected[1][:3], *expected[2:]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sum_pooling_and_classifier_are_torchs(activation):
    functional = pytest.importorskip("torch").nn.functional
    from parity.mirror.models.layers import activate, global_average_pool

    rng = np.random.default_rng(0)
    x, y, grad = 5 * rng.standard_normal((3, 2, 4, 5, 6))
    found = truth.add(x, y, grad, activation)
    output, x_grad, y_grad = torch_results(lambda x, y: activate(x + y, activation), [x, y], grad)
    assert_equal([*found.values(), found["gradient of each input"]], [output, x_grad, y_grad])
    pooled = torch_results(lambda x: global_average_pool(x.permute(0, 3, 1, 2)), [x], grad[:, 0, 0])
    assert_equal(truth.average_pool(x, grad[:, 0, 0]).values(), pooled)
    features, weight, bias, out = x[:, 0, 0], rng.standard_normal((6, 3)), rng.standard_normal(3), grad[:, 0, 0, :3]
    linear = torch_results(lambda x, w, b: functional.linear(x, w.T, b), [features, weight, bias], out)
    assert_equal(truth.linear(features, weight, bias, out, np.ones(2)).values(), linear)


# Calls and sizes


def test_all_calls_of_wrn_28_2():
    found = calls.distinct_calls(case(data=DataConfig("cifar10"), model=ModelConfig("wideresnet", 28, 2)))
    assert [(call.label, *call.size) for call in found] == [
        ("layout 3", 32, 32), ("conv2d 3x3 3->16", 32, 32), ("batch norm 16 leaky_relu", 32, 32),
        ("conv2d 3x3 16->32", 32, 32), ("batch norm 32 leaky_relu", 32, 32), ("conv2d 3x3 32->32", 32, 32),
        ("conv2d 1x1 16->32", 32, 32), ("add 32", 32, 32),
        ("conv2d 3x3 32->64 stride 2", 32, 32), ("batch norm 64 leaky_relu", 16, 16), ("conv2d 3x3 64->64", 16, 16),
        ("conv2d 1x1 32->64 stride 2", 32, 32), ("add 64", 16, 16),
        ("conv2d 3x3 64->128 stride 2", 16, 16), ("batch norm 128 leaky_relu", 8, 8), ("conv2d 3x3 128->128", 8, 8),
        ("conv2d 1x1 64->128 stride 2", 16, 16), ("add 128", 8, 8),
        ("average pool 128", 8, 8), ("linear 128->10", 1, 1)]
    assert [call.layer for call in found[1:4]] == ["conv1", "block1.layer.0.bn1", "block1.layer.0.conv1"]
    assert [call.label for call in found if not call.input_gradient] == ["layout 3", "conv2d 3x3 3->16"]


def test_each_call_is_tried_odd_over_32_not_square_and_as_in_the_run():
    shapes: dict[str, dict[int, str]] = {}
    for row in operators.rows(case()):
        if row.tensor == "joint forward/images":
            continue
        label, _, size = row.tensor.partition("/")[0].partition(", ")
        batch, *hw = (int(number) for number in size.split("x"))
        shapes.setdefault(label, {})[batch] = tuple(hw)
    for label, by_batch in shapes.items():
        assert sorted(by_batch) == [5, 33, 240], label
        if not label.startswith("linear"):
            assert by_batch[5][0] != by_batch[5][1]
            assert by_batch[33][0] != by_batch[33][1]
    assert shapes["conv2d 3x3 3->16"][240] == (8, 8)
    assert shapes["conv2d 3x3 128->128"][240] == (2, 2)


def test_a_call_of_many_weights_is_tried_with_a_batch_that_is_odd_and_over_32(monkeypatch):
    monkeypatch.setattr(operators, "_MANY_WEIGHTS", 100_000)  # a convolution 128->128 has more
    for thorough, batches in ((False, {33, 240}), (True, {5, 33, 240})):
        names = (row.tensor.partition("/")[0].partition(", ") for row in operators.rows(case(), thorough))
        assert {int(size.split("x")[0]) for label, _, size in names if label == "conv2d 3x3 128->128"} == batches


@pytest.mark.parametrize("recipe", ["digits", "cifar10_40", "cifar10_40_resnext", "cifar100_400"])
def test_no_half_of_a_batch_repeats_the_other(recipe):
    """Where it did, images of one half in the place of the other's would be no difference."""
    config = load_config(recipe)
    run = Case(config, 100 if config.data.name == "cifar100" else 10)
    found = calls.distinct_calls(run)
    batches = [one for call in found for one in operators._batches(run, call, 1 / len(found), 1, operators._SMALL)]
    assert [(batch, distinct) for batch, _, distinct in batches if batch // 2 % distinct == 0] == []


@needs_kernels
def test_an_output_that_is_written_over_is_seen(monkeypatch):
    right, held = ops._ConvolutionForward.__call__, {}

    def into_what_it_gave_before(self, x, weight):
        output = right(self, x, weight)
        kept = held.setdefault(id(self), output)
        kept.copy_(output, False)
        return kept.detach()

    monkeypatch.setattr(ops._ConvolutionForward, "__call__", into_what_it_gave_before)
    failed = [row.tensor for row in operators.rows(case()) if not row.passed]
    assert "conv2d 3x3 16->32, 5x9x6/output in eval mode" in failed


def test_the_size_of_the_run():
    assert calls.batch_size(case()) == 240
    assert calls.batch_size(case(ssl=SSLConfig(mode="none"))) == 16
    sizes = {name: calls.image_size(case(data=DataConfig(name))) for name in ("digits", "cifar10", "svhn", "stl10")}
    assert sizes == {"digits": 8, "cifar10": 32, "svhn": 32, "stl10": 96}
    assert calls.image_size(case(data=DataConfig("folder", image_size=48))) == 48


def test_a_layer_without_a_truth_fails(monkeypatch):
    monkeypatch.setattr(wideresnet, "xavier_linear", lambda features, classes: paddle.nn.Sequential(
        paddle.nn.Dropout(0.5), layers.xavier_linear(features, classes)))
    failed = [row for row in operators.rows(case()) if not row.passed]
    assert [(row.tensor, row.why) for row in failed] == [("Dropout/call", "fc.0: no float64 truth for this layer")]


# Gates


def pair(ours, exact, terms=1, of_images=False):
    return Pair("x", np.asarray(ours, dtype=np.float32), np.asarray(exact, dtype=np.float64), of_images, terms)


def test_gates_by_hand():
    assert errors(pair([3.0, 4.5], [3.0, 4.0])) == (0.5, 0.125, 0.1)
    assert gates(1, ROUNDOFF) == (pytest.approx(1.01e-4, rel=0.01), pytest.approx(1.01e-5, rel=0.01))
    assert gates(960 * 32 * 32, ROUNDOFF)[1] == pytest.approx(10 * 991.5 * ROUNDOFF, rel=1e-3)
    assert judge(pair([1 + 2e-6, 1], [1, 1]), "t", "conv1", ROUNDOFF).passed
    assert not judge(pair([1 + 3e-5, 1], [1, 1]), "t", "conv1", ROUNDOFF).passed  # L2
    one_of_many = np.ones(10**6)
    one_of_many[7] += 5e-4  # L2 5e-7
    assert not judge(pair(one_of_many, np.ones(10**6)), "t", "conv1", ROUNDOFF).passed


def test_what_cannot_be_compared_fails():
    assert judge(pair([1, np.nan], [1, 1]), "t", "conv1", ROUNDOFF).why == "NaN or infinity (conv1)"
    assert judge(pair([1, np.inf], [1, 1], terms=10**9), "t", "conv1", ROUNDOFF).why == "NaN or infinity (conv1)"
    assert "shape (2,), must be (3,)" in judge(pair([1, 1], [1, 1, 1]), "t", "conv1", ROUNDOFF).why
    assert judge(Pair("x", None, np.ones(2), False, 1), "t", "conv1", ROUNDOFF).why == "missing (conv1)"


def test_a_truth_of_zero_is_no_divisor():
    assert judge(pair([0, 0], [0, 0]), "t", "bn", ROUNDOFF).passed
    assert not judge(pair([1e-9, 0], [0, 0]), "t", "bn", ROUNDOFF).passed


def test_the_worst_image_of_a_repeated_batch_is_shown():
    exact = np.array([[1.0, 2.0], [3.0, 4.0]])
    batch = exact[[0, 1, 0, 1, 0]].astype(np.float32)
    assert judge(pair(batch, exact, of_images=True), "t", "conv1", ROUNDOFF).passed
    batch[3, 1] = 5
    row = judge(pair(batch, exact, of_images=True), "t", "conv1", ROUNDOFF)
    assert "(conv1, image 3)" in row.why
    assert row.ours.tolist() == [3, 5]
    assert row.reference.tolist() == [3, 4]


# The stage as a whole


@pytest.mark.parametrize("seed", first_of(range(3), 1))
@pytest.mark.parametrize("arch", list(MODELS))
@pytest.mark.parametrize("cpu_kernels", ["auto", "off"])
def test_no_false_alarm(arch, cpu_kernels, seed):
    assert not [(row.tensor, row.why) for row in operators.rows(case(arch, cpu_kernels, seed)) if not row.passed]


def test_running_statistics_with_a_momentum_of_one_or_none():
    for momentum in (0.0, 1.0):
        model = dataclasses.replace(MODELS["wideresnet"], bn_momentum=momentum)
        assert not [row.tensor for row in operators.rows(case(model=model)) if not row.passed]


@needs_kernels
def test_it_leaves_threads_kernels_and_device_as_they_were():
    before, setting = openmp.num_threads(), layers._cpu_kernels
    found = operators.rows(case(cpu_kernels="off"), threads=before + 1)
    next(found)
    assert (openmp.num_threads(), layers._cpu_kernels) == (before + 1, "off")
    found.close()
    assert (openmp.num_threads(), layers._cpu_kernels) == (before, setting)


FIRST = {  # plant -> operator and tensor of the first row that fails
    "conv-weight-gradient-1x1-zero": ("conv2d 1x1", "weight gradient"),
    "conv-weight-gradient-first-32": ("conv2d 3x3 3->16, 33x", "weight gradient"),
    "conv-weight-gradient-odd-batch": ("conv2d 3x3 3->16, 5x", "weight gradient"),
    "conv-weight-gradient-last-row": ("conv2d", "weight gradient"),
    "conv-weight-gradient-not-reordered": ("conv2d", "weight gradient"),
    "conv-data-gradient-stride-2-border": ("conv2d 3x3 32->64 stride 2", "input gradient"),
    "conv-data-gradient-flipped": ("conv2d 3x3", "input gradient"),
    "conv-not-square": ("conv2d", "output in eval mode"),
    "conv-bfloat16": ("conv2d", "output in eval mode"),
    "conv-last-images": ("conv2d 3x3 3->16, 5x", "output in eval mode"),
    "conv-two-threads": ("conv2d", "output in eval mode"),
    "conv-nan-channel": ("conv2d", "output in eval mode"),
    "conv-transposed-view": ("conv2d 3x3 3->16", "output in eval mode"),
    "groups-merged-without-zeros": ("conv2d 3x3 16->16 groups 4", "output in eval mode"),
    "groups-merged-rolled": ("conv2d 3x3 16->16 groups 4", "output in eval mode"),
    "bn-weight-gradient-zero": ("batch norm", "weight gradient in train mode"),
    "bn-bias-gradient-doubled": ("batch norm", "bias gradient in train mode"),
    "bn-input-gradient-without-mean": ("batch norm", "input gradient in train mode"),
    "bn-input-gradient-without-variance": ("batch norm", "input gradient in train mode"),
    "bn-forward-unbiased": ("batch norm", "output in train mode"),
    "bn-statistics-of-half": ("batch norm", "output in train mode"),
    "bn-statistics-in-one-chain": ("batch norm 16 leaky_relu, 960x32x32", "output in train mode"),
    "bn-sums-of-first-thread": ("batch norm", "output in train mode"),
    "bn-gradient-sums-of-whole-blocks": ("batch norm", "input gradient in train mode"),
    "bn-eval-batch-statistics": ("batch norm", "output in eval mode"),
    "bn-epsilon": ("batch norm", "output in train mode"),
    "bn-epsilon-gradient": ("batch norm", "input gradient in train mode"),
    "bn-running-mean-kept": ("batch norm", "running mean in train mode"),
    "bn-running-variance-biased-float32": ("batch norm", "running variance in train mode"),
    "activation-slope-gradient": ("batch norm 16 leaky_relu", "input gradient in train mode"),
    "mish-gradient-approximate": ("batch norm 64 mish", "input gradient in train mode"),
    "activation-skipped-in-eval": ("batch norm 16 leaky_relu", "output in eval mode"),
    "add-gradient-of-one": ("add", "gradient of the second input"),
    "add-gradient-shared": ("add", "gradient of the second input"),
    "add-activation-skipped": ("add 256 mish", "output"),
    "pool-first-row": ("average pool", "output"),
    "pool-wrong-count": ("average pool", "output"),
    "linear-bias-frozen": ("linear", "bias gradient"),
    "layout-height-width": ("layout", "output"),
    "allocator-block-in-use": ("batch norm 32 leaky_relu, 240x", "output in train mode"),
    "stock-conv-stride": ("conv2d 3x3 32->64 stride 2", "call"),
    "stock-conv-padding": ("conv2d 3x3", "output in eval mode"),
    "stock-conv-groups": ("conv2d 3x3 16->16 groups 4", "output in eval mode"),
    "stock-bn-variance-with-epsilon": ("batch norm", "batch variance in train mode"),
    "stock-add-activation-skipped": ("add 256 mish", "output"),
}


def test_every_plant_is_tried():
    assert FIRST.keys() == PLANTS.keys()


@needs_kernels
@pytest.mark.parametrize("name", list(PLANTS))
def test_a_plant_is_found_where_it_is(name, monkeypatch):
    PLANTS[name].put_in(monkeypatch.setattr)
    tried = case(PLANTS[name].arch, PLANTS[name].cpu_kernels)
    if PLANTS[name].settings:  # of the published batch and images
        tried = dataclasses.replace(tried, config=from_dict({}, name, [
            "model.depth=10", "train.batch_size=64", *PLANTS[name].settings]))
    failed = next((row for row in operators.rows(tried, threads=2) if not row.passed), None)
    assert failed is not None
    operator, tensor = FIRST[name]
    assert failed.tensor.startswith(operator), failed.why
    assert failed.name() == tensor
    assert failed.why
