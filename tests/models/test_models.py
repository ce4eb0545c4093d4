"""The two networks: sizes, names, initial values, batch norm, and the CPU kernels."""

import re

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from fixmatch import kernels
from fixmatch.models import build_model
from fixmatch.models.layers import BatchNorm2D, set_cpu_kernels
from fixmatch.optimizer import decays


@pytest.fixture(autouse=True)
def _stock_operators():
    set_cpu_kernels("off")
    yield
    set_cpu_kernels("auto")


def images(count=4, size=32, seed=0):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal((count, 3, size, size)).astype(np.float32))


@pytest.mark.parametrize(("arch", "classes", "shape", "parameters", "tensors"), [
    ("wideresnet", 10, {"depth": 28, "width": 2}, 1_467_610, 80),
    ("wideresnet", 100, {"depth": 28, "width": 8}, 23_401_012, 80),
    ("resnext", 10, {"depth": 28, "width": 4, "cardinality": 4}, 1_019_722, 68),
    ("resnext", 100, {"depth": 29, "width": 64, "cardinality": 8}, 34_518_948, 95),
])
def test_sizes(arch, classes, shape, parameters, tensors):
    model = build_model(arch, classes, **shape)
    assert sum(p.size for p in model.parameters()) == parameters
    assert len(model.parameters()) == tensors
    assert model.eval()(images(2)).shape == [2, classes]


def test_the_decayed_part_of_the_standard_network():
    decayed, other = 0, 0
    for name, p in build_model("wideresnet", 10).named_parameters():
        decayed, other = (decayed + p.size, other) if decays(name) else (decayed, other + p.size)
    assert (decayed, other) == (1_463_984, 3_626)


def test_wideresnet_names():
    names = [name for name, _ in build_model("wideresnet", 10).named_parameters()]
    pattern = (r"conv1\.weight|block[123]\.layer\.[0-3]\.(bn[12]\.(weight|bias)|conv[12]\.weight)"
               r"|block[123]\.layer\.0\.convShortcut\.weight|bn1\.(weight|bias)|fc\.(weight|bias)")
    assert all(re.fullmatch(pattern, name) for name in names)
    assert len(set(names)) == 80


def test_resnext_names():
    names = [name for name, _ in build_model("resnext", 10).named_parameters()]
    bottleneck = (r"conv_reduce\.weight|bn_reduce\.(weight|bias)|conv_conv\.weight|bn\.(weight|bias)"
                  r"|conv_expand\.weight|bn_expand\.(weight|bias)|shortcut\.shortcut_conv\.weight|shortcut\.shortcut_bn\.(weight|bias)")
    pattern = (rf"conv_1_3x3\.weight|bn_1\.(weight|bias)|stage_([123])\.stage_\2_bottleneck_[01]\.({bottleneck})"
               r"|classifier\.(weight|bias)")
    assert all(re.fullmatch(pattern, name) for name in names)
    assert len(set(names)) == 68


@pytest.mark.parametrize("arch", ["wideresnet", "resnext"])
def test_running_statistics_are_buffers_and_not_parameters(arch):
    model = build_model(arch, 10)
    statistics = {name for name in model.state_dict() if name.endswith(("_mean", "_variance"))}
    norms = [layer for layer in model.sublayers() if isinstance(layer, BatchNorm2D)]
    assert len(statistics) == 2 * len(norms)
    assert statistics == {name for name, _ in model.named_buffers()}
    assert not statistics & {name for name, _ in model.named_parameters()}
    assert {layer.momentum for layer in norms} == {0.999}


def test_bn_momentum_reaches_every_batch_norm():
    model = build_model("resnext", 10, bn_momentum=0.9)
    assert {layer.momentum for layer in model.sublayers() if isinstance(layer, BatchNorm2D)} == {0.9}


@pytest.mark.parametrize(("arch", "shape", "classifier"), [
    ("wideresnet", {"depth": 28, "width": 4}, "fc"), ("resnext", {"depth": 28, "width": 4}, "classifier")])
def test_initial_distributions(arch, shape, classifier):
    """Normal with the reference's deviation: mean, variance and kurtosis within 4.5 standard errors."""
    model = build_model(arch, 10, **shape)
    for name, p in model.named_parameters():
        values = p.numpy().astype(np.float64)
        if name == f"{classifier}.weight":
            std = np.sqrt(2 / sum(values.shape))
        elif values.ndim == 4:
            out_channels, _, height, width = values.shape
            std = np.sqrt(2 / (out_channels * height * width))
        else:
            assert (values == (1 if name.endswith("weight") else 0)).all(), name
            continue
        n = values.size
        assert abs(values.mean()) < 4.5 * std / np.sqrt(n), name
        assert abs(values.var() / std**2 - 1) < 4.5 * np.sqrt(2 / n), name
        assert abs((values**4).mean() / std**4 - 3) < 4.5 * np.sqrt(96 / n), name  # normal, not uniform


def test_seeds_decide_the_initial_values():
    def first(seed):
        paddle.seed(seed)
        return build_model("wideresnet", 10, depth=10, width=1).conv1.weight.numpy()
    assert np.array_equal(first(1), first(1))
    assert not np.array_equal(first(1), first(2))


def test_an_unknown_architecture():
    with pytest.raises(ValueError, match="vgg"):
        build_model("vgg", 10)


@pytest.mark.parametrize("kernel_setting", ["off", "auto"])
def test_later_stages_see_the_raw_input_but_update_their_first_statistics(kernel_setting):
    set_cpu_kernels(kernel_setting)
    model = build_model("wideresnet", 10, depth=10, width=1, bn_momentum=0.9)
    model(images(size=16)).sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {f"block{k}.layer.0.bn1.{part}" for k in (2, 3) for part in ("weight", "bias")}
    for name in ("block1", "block2", "block3"):
        norm = getattr(model, name).layer[0].bn1
        assert abs(norm._mean.numpy()).max() > 0
        assert abs(norm._variance.numpy() - 1).max() > 0


def test_the_first_stage_activates_for_both_paths():
    model = build_model("wideresnet", 10, depth=10, width=2).eval()
    block, x = model.block1.layer[0], images(2, 8).tile([1, 6, 1, 1])[:, :16]
    activated = F.leaky_relu(x / np.sqrt(1 + 1e-5), 0.1)
    expected = block.conv2(block.bn2(block.conv1(activated))) + block.convShortcut(activated)
    np.testing.assert_allclose(block(x).numpy(), expected.numpy(), atol=1e-5)
    later = model.block2.layer[0]
    x = x.tile([1, 2, 1, 1])
    expected = later.conv2(later.bn2(later.conv1(x))) + later.convShortcut(x)
    np.testing.assert_allclose(later(x).numpy(), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("momentum", [0.999, 0.9])
def test_running_statistics_by_hand(momentum):
    norm = BatchNorm2D(2)
    norm.momentum = momentum
    x = np.array([[1, 2, 3, 6], [0, 0, 0, 8]], np.float32).reshape(1, 2, 2, 2)
    y = norm(paddle.to_tensor(x)).numpy()
    mean, biased = np.array([3.0, 2.0]), np.array([3.5, 12.0])
    unbiased = biased * 4 / 3
    np.testing.assert_allclose(norm._mean.numpy(), (1 - momentum) * mean, rtol=1e-5)
    np.testing.assert_allclose(norm._variance.numpy(), momentum + (1 - momentum) * unbiased, rtol=1e-6)
    np.testing.assert_allclose(y[0, 0].ravel(), (x[0, 0].ravel() - 3) / np.sqrt(3.5 + 1e-5), rtol=1e-5)
    norm(paddle.to_tensor(x))
    np.testing.assert_allclose(norm._mean.numpy(), (1 - momentum**2) * mean, rtol=1e-5)
    np.testing.assert_allclose(norm._variance.numpy(), momentum**2 + (1 - momentum**2) * unbiased, rtol=1e-5)


def test_eval_mode_uses_the_running_statistics_and_leaves_them():
    norm = BatchNorm2D(1, ("leaky_relu", 0.1))
    norm._mean.fill_(2.0)
    norm._variance.fill_(4.0)
    norm.eval()
    y = norm(paddle.to_tensor([4.0, 0.0]).reshape([2, 1, 1, 1]))
    np.testing.assert_allclose(y.numpy().ravel(), [1.0, -0.1], rtol=1e-5)
    assert (norm._mean.item(), norm._variance.item()) == (2.0, 4.0)


def test_a_constant_channel_has_no_variance():
    norm = BatchNorm2D(2)
    y = norm(paddle.full([2, 2, 3, 3], 7.0))
    assert (y.numpy() == 0).all()
    np.testing.assert_allclose(norm._variance.numpy(), 0.999, rtol=1e-6)


def test_the_joint_batch_moves_the_weak_images_gradient():
    """Batch statistics are joint: a loss on the other images alone has a gradient with respect to these."""
    model = build_model("wideresnet", 10, depth=10, width=1)
    x = images(4, 8)
    x.stop_gradient = False
    F.cross_entropy(model(x)[2:], paddle.to_tensor([1, 2])).backward()
    assert abs(x.grad.numpy()[:2]).max() > 0


@pytest.mark.parametrize(("arch", "shape"), [
    ("wideresnet", {"depth": 10, "width": 2}), ("resnext", {"depth": 11, "width": 4, "cardinality": 4})])
def test_cpu_kernels_change_nothing_but_rounding(arch, shape):
    if not kernels.status()[0]:
        pytest.skip(kernels.status()[1])

    def pass_through(setting):
        set_cpu_kernels(setting)
        paddle.seed(0)
        model = build_model(arch, 10, bn_momentum=0.9, **shape)
        logits = model(images(8, 16))
        F.cross_entropy(logits, paddle.arange(8)).backward()
        found = {"train": logits} | {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        found |= model.state_dict()
        found["eval"] = model.eval()(images(8, 16, seed=1))
        return {name: tensor.numpy() for name, tensor in found.items()}

    stock, fast = pass_through("off"), pass_through("on")
    assert stock.keys() == fast.keys()
    assert any(not np.array_equal(stock[name], fast[name]) for name in stock)  # they did run
    for name, expected in stock.items():
        scale = max(abs(expected).max(), 1e-3)
        assert abs(fast[name] - expected).max() / scale < 2e-4, name


def test_float64_runs_on_stock_operators():
    paddle.set_default_dtype("float64")
    try:
        model = build_model("wideresnet", 10, depth=10, width=1)
        set_cpu_kernels("auto")
        assert model(images(2, 8).astype("float64")).dtype == paddle.float64
    finally:
        paddle.set_default_dtype("float32")
