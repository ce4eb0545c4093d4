"""For each kind of layer call: what it is given, what production makes of it, and what it must make.

Each function yields the pairs of one probe. Sums are kept from cancelling, since rounding is judged against the result:
inputs and upstream gradients have a mean of 0.5, and batch norm's upstream gradient follows its input.
"""

from collections.abc import Iterator

import numpy as np
import paddle

from parity.operators import truth
from parity.operators.judge import Pair
from parity.operators.probe import Probe

BN_EPSILON = 1e-5  # the reference's, which is Torch's default


def pairs(probe: Probe) -> Iterator[Pair]:
    run = {"conv2d": _conv2d, "batch norm": _batch_norm, "add": _add, "average pool": _pool, "linear": _linear,
           "layout": _layout}[probe.call.kind]
    yield from run(probe)


def _conv2d(probe: Probe) -> Iterator[Pair]:
    call, layer = probe.call, probe.call.run
    x, weight = probe.images(call.channels, 0.5), probe.noise(*layer.weight.shape)
    weight /= np.float32(np.sqrt(weight[0].size))
    layer.weight.set_value(weight)
    leaf = probe.leaf(x)
    layer.eval()
    with paddle.no_grad():  # of other images than in train mode: that output is not to reach this one
        in_eval_mode = probe.forward(probe.leaf(_rolled(x))) if "eval" in probe.modes else None
    layer.train()
    output = probe.forward(leaf)
    size = tuple((side - 1) // call.stride + 1 for side in probe.size)
    grad = probe.noise(probe.distinct, *size, call.outputs, mean=0.5)
    probe.backward(output, grad)
    expected = truth.conv2d(_double(x), _double(weight), _double(grad), probe.counts, call.stride, call.groups)
    if in_eval_mode is not None:
        yield from probe.pairs({"output": in_eval_mode}, {"output": _rolled(expected["output"])}, " in eval mode")
    yield from probe.pairs(_with_gradients(output, leaf, layer), expected)


def _batch_norm(probe: Probe) -> Iterator[Pair]:
    channels, layer = probe.call.channels, probe.call.run
    spread = np.exp(probe.rng.uniform(np.log(0.02), 0, channels)).astype(np.float32)  # small: there epsilon counts
    noise, centre = probe.images(channels), spread * probe.noise(channels)
    x = centre + spread * noise
    weight, bias = probe.rng.uniform(0.5, 1.5, channels).astype(np.float32), np.float32(0.3) * probe.noise(channels)
    layer.weight.set_value(weight)
    layer.bias.set_value(bias)
    of_batch = truth.batch_statistics(_double(x), probe.counts)
    for mode in probe.modes:
        # The old running statistics are as large as what one update adds, so that both show.
        share = 1 - probe.momentum if mode == "train" else 1.0
        old = [(share * value).astype(np.float32)
               for value in (centre + 0.3 * spread, spread**2 * probe.rng.uniform(0.5, 2, channels))]
        used = of_batch if mode == "train" else [_double(statistic) for statistic in old]
        norm = truth.BatchNorm(_double(x), *used, _double(weight), _double(bias), BN_EPSILON, probe.call.activation)
        grad = probe.away_from_kink(np.float32(0.3) + np.float32(0.5) * noise + probe.noise(*x.shape), norm.z)
        expected = norm.results(_double(grad), probe.counts, through_statistics=mode == "train")
        expected |= _expected_statistics(probe, of_batch, [_double(statistic) for statistic in old], mode)
        share = share or 1.0
        units = {"batch mean": spread, "running mean": share * spread, "batch variance": spread**2,
                 "running variance": share * spread**2, "input gradient": 1 / spread}
        yield from probe.pairs(_run_batch_norm(probe, x, old, grad, mode), expected, f" in {mode} mode", units)


def _expected_statistics(probe: Probe, of_batch, old, mode: str) -> dict[str, np.ndarray]:
    """The running variance averages the unbiased batch variance; in eval mode nothing changes."""
    values = probe.batch * probe.size[0] * probe.size[1]
    mean, variance = of_batch
    fresh = mean, variance * (values / max(values - 1, 1))
    new = old if mode == "eval" else [probe.momentum * was + (1 - probe.momentum) * one
                                      for was, one in zip(old, fresh, strict=True)]
    return {"batch mean": mean, "batch variance": variance, "running mean": new[0], "running variance": new[1]}


def _run_batch_norm(probe: Probe, x, old, grad, mode: str) -> dict:
    """What production gives; in train mode also the batch statistics that it hands to the running ones."""
    layer, given = probe.call.run, {}
    getattr(layer, mode)()
    for buffer, value in zip((layer._mean, layer._variance), old, strict=True):
        buffer.set_value(value)
    update = layer._update_running_statistics

    def watched(mean, variance, count):
        given.update({"batch mean": mean, "batch variance": variance})
        update(mean, variance, count)

    layer._update_running_statistics = watched
    try:
        leaf = probe.leaf(x)
        output = probe.forward(leaf)
    finally:
        del layer._update_running_statistics
    probe.backward(output, grad)
    found = _with_gradients(output, leaf, layer)
    statistics = given | {"running mean": layer._mean, "running variance": layer._variance}
    return {"output": found.pop("output"), **statistics, **found}


def _add(probe: Probe) -> Iterator[Pair]:
    call = probe.call
    x, y, more = (probe.images(call.channels) for _ in range(3))
    grad = probe.away_from_kink(probe.images(call.channels, 0.5), _double(x) + _double(y))
    one, other = probe.leaf(x), probe.leaf(y)
    summand = one * 1.0  # is used twice, as a block's input is: what arrives for it must not reach the other
    output = probe.forward(summand, other, *([] if call.activation is None else [call.activation]))
    upstream = [probe.tensor(grad).astype(output.dtype), probe.tensor(more)]
    paddle.autograd.backward([output, summand * 1.0], upstream)
    expected = truth.add(_double(x), _double(y), _double(grad), call.activation)
    of_both = expected.pop("gradient of each input")
    expected |= {"gradient of the first input": of_both + _double(more), "gradient of the second input": of_both}
    yield from probe.pairs({"output": output, "gradient of the first input": one.grad,
                            "gradient of the second input": other.grad}, expected)


def _pool(probe: Probe) -> Iterator[Pair]:
    x, grad = probe.images(probe.call.channels, 0.5), probe.noise(probe.distinct, probe.call.channels)
    leaf = probe.leaf(x)
    output = probe.forward(leaf)
    probe.backward(output, grad)
    yield from probe.pairs({"output": output, "input gradient": leaf.grad},
                           truth.average_pool(_double(x), _double(grad)))


def _linear(probe: Probe) -> Iterator[Pair]:
    layer = probe.call.run
    x, grad = (probe.noise(probe.distinct, size, mean=0.5) for size in (probe.call.channels, probe.call.outputs))
    weight, bias = (probe.noise(*tensor.shape) for tensor in (layer.weight, layer.bias))
    layer.weight.set_value(weight)
    layer.bias.set_value(bias)
    leaf = probe.leaf(x)
    output = probe.forward(leaf)
    probe.backward(output, grad)
    yield from probe.pairs(_with_gradients(output, leaf, layer),
                           truth.linear(_double(x), _double(weight), _double(bias), _double(grad), probe.counts))


def _layout(probe: Probe) -> Iterator[Pair]:
    images = probe.images(probe.call.channels)
    batch = paddle.to_tensor(np.ascontiguousarray(probe.whole(images).transpose(0, 3, 1, 2)))
    yield from probe.pairs({"output": probe.call.run(batch)}, {"output": _double(images)})


def _with_gradients(output, leaf, layer) -> dict:
    """The output and all gradients, which are taken away from the parameters."""
    found = {"output": output}
    if not leaf.stop_gradient:
        found["input gradient"] = leaf.grad
    for name, parameter in layer.named_parameters():
        found[f"{name} gradient"] = None if parameter.grad is None else parameter.grad.clone()
        parameter.clear_gradient(False)
    return found


def _rolled(images: np.ndarray) -> np.ndarray:
    """Each image in the place of the next."""
    return np.roll(images, 1, axis=0)


def _double(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)
