"""Losses, schedule, optimizer, EMA and evaluation against numbers worked out by hand or by plain NumPy."""

import math
import time
import types

import numpy as np
import paddle
import pytest
from running import growth

from fixmatch import monitor as monitor_module
from fixmatch import step as algorithm
from fixmatch.config import Config, ModelConfig, RunConfig, SSLConfig, TrainConfig
from fixmatch.data.loader import Batch
from fixmatch.ema import EMA
from fixmatch.evaluation import evaluate, score, summarize
from fixmatch.losses import FixMatchLoss, cross_entropy, fixmatch_loss, pseudo_label
from fixmatch.metrics import Window, commonest_class, row_of
from fixmatch.metrics_file import drop_later_lines
from fixmatch.models import build_model
from fixmatch.models.layers import BatchNorm2D
from fixmatch.monitor import Monitor, describe, duration
from fixmatch.normalize import Normalize
from fixmatch.optimizer import TwoGroupSGD, decays
from fixmatch.schedule import build_scheduler, cosine_7_16


def tensor(values, **options):
    return paddle.to_tensor(values, dtype=options.pop("dtype", "float32"), **options)


def labels(*values):
    return paddle.to_tensor(values, dtype="int64")


def logits_of(*probabilities):
    return tensor(np.log(probabilities))


# --- losses


def test_the_loss_by_hand():
    losses = fixmatch_loss(
        logits_of([0.5, 0.25, 0.25], [0.1, 0.1, 0.8]), labels(0, 1),
        logits_of([0.96, 0.03, 0.01], [0.4, 0.5, 0.1], [0.01, 0.02, 0.97], [0.2, 0.2, 0.6]),
        logits_of([0.25, 0.5, 0.25], [0.1, 0.1, 0.8], [0.1, 0.4, 0.5], [0.9, 0.05, 0.05]), lambda_u=0.5)
    loss_x, loss_u = (math.log(2) + math.log(10)) / 2, (math.log(4) + math.log(2)) / 4  # over all 4
    assert losses.loss_x.item() == pytest.approx(loss_x, rel=1e-6)
    assert losses.loss_u.item() == pytest.approx(loss_u, rel=1e-6)
    assert losses.loss.item() == pytest.approx(loss_x + 0.5 * loss_u, rel=1e-6)
    assert losses.mask.tolist() == [1, 0, 1, 0]
    assert losses.pseudo_labels.tolist() == [0, 1, 2, 2]
    np.testing.assert_allclose(losses.confidence.numpy(), [0.96, 0.5, 0.97, 0.6], rtol=1e-6)


def test_a_confidence_exactly_at_the_threshold_counts():
    assert pseudo_label(tensor([[3.0, 3.0]]), 0.5, 1.0)[2].tolist() == [1]
    just_above = float(np.nextafter(np.float32(0.5), np.float32(1)))
    assert pseudo_label(tensor([[3.0, 3.0]]), just_above, 1.0)[2].tolist() == [0]


def test_the_default_threshold_is_compared_in_the_dtype_of_the_logits():
    """0.95 in float32 lies below 0.95 in float64: a confidence of float32(0.95) counts, as it does in Torch."""
    rng = np.random.default_rng(0)
    logits = np.zeros((20_000, 10), np.float32)
    logits[:, 0] = np.log(0.95 / 0.05 * 9) + rng.uniform(-2e-6, 2e-6, 20_000)
    confidence, _, mask = pseudo_label(paddle.to_tensor(logits), 0.95, 1.0)
    assert np.array_equal(mask.numpy() == 1, confidence.numpy() >= np.float32(0.95))
    assert (confidence.numpy() == np.float32(0.95)).any()


def test_temperature_moves_the_mask_and_nothing_else():
    weak, strong = logits_of([0.6, 0.3, 0.1], [0.98, 0.01, 0.01]), logits_of([0.2, 0.5, 0.3], [0.5, 0.25, 0.25])
    arguments = logits_of([0.5, 0.25, 0.25]), labels(0), weak, strong
    warm, cold = fixmatch_loss(*arguments, temperature=1.0), fixmatch_loss(*arguments, temperature=0.1)
    assert (warm.mask.tolist(), cold.mask.tolist()) == ([0, 1], [1, 1])
    assert warm.pseudo_labels.tolist() == cold.pseudo_labels.tolist()
    assert warm.loss_u.item() == pytest.approx(math.log(2) / 2, rel=1e-6)
    assert cold.loss_u.item() == pytest.approx((math.log(5) + math.log(2)) / 2, rel=1e-6)  # hard labels: no T in it


def test_a_large_loss_does_not_saturate():
    loss = cross_entropy(tensor([[500.0, 0.0], [0.0, 80.0]]), labels(1, 0))
    assert loss.tolist() == [500, 80]


def test_large_logits_do_not_overflow():
    assert cross_entropy(tensor([[3e38, 0.0]]), labels(0)).tolist() == [0]


def test_gradients_by_hand():
    x = tensor([[0.0, 0.0]], stop_gradient=False)
    weak = tensor([[9.0, 0.0], [0.0, 0.1]], stop_gradient=False)
    strong = tensor([[0.0, 0.0], [0.0, 0.0]], stop_gradient=False)
    fixmatch_loss(x, labels(1), weak, strong, lambda_u=3.0).loss.backward()
    np.testing.assert_allclose(x.grad.numpy(), [[0.5, -0.5]], rtol=1e-6)
    np.testing.assert_allclose(strong.grad.numpy(), [[-0.75, 0.75], [0, 0]], rtol=1e-6)  # 3 * (p - onehot) / 2, masked
    assert weak.grad is None
    assert all(part.stop_gradient for part in pseudo_label(weak, 0.95, 1.0))


# --- schedule


@pytest.mark.parametrize(("step", "total", "warmup", "factor"), [
    (0, 100, 0, 1.0),
    (50, 100, 0, math.cos(7 * math.pi / 32)),
    (100, 100, 0, 0.19509032201612825),
    (300, 100, 0, 0.0),
    (0, 110, 10, 0.0),
    (5, 110, 10, 0.5),
    (10, 110, 10, 1.0),
    (60, 110, 10, math.cos(7 * math.pi / 32)),
    (110, 110, 10, 0.19509032201612825),
])
def test_the_schedule_by_hand(step, total, warmup, factor):
    assert cosine_7_16(step, total, warmup) == pytest.approx(factor, abs=1e-15)


def test_the_scheduler_counts_steps():
    scheduler = build_scheduler(0.03, total_steps=4, warmup_steps=2)
    seen = []
    for _ in range(5):
        seen.append(scheduler.get_lr())
        scheduler.step()
    assert seen == pytest.approx([0, 0.015, 0.03, 0.03 * math.cos(7 * math.pi / 32), 0.03 * math.cos(7 * math.pi / 16)])


# --- optimizer


class Small(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.conv = paddle.nn.Linear(3, 2)
        self.bn = BatchNorm2D(2)
        self.unused = paddle.nn.Linear(2, 2)

    def forward(self, x):
        return self.bn(self.conv(x).reshape([-1, 2, 1, 1])).flatten(1)


@pytest.fixture
def double():
    paddle.set_default_dtype("float64")
    yield
    paddle.set_default_dtype("float32")


def gradients(model, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(p.shape) for name, p in model.named_parameters() if not name.startswith("unused")}


def put_gradients(model, grads):
    """Through a backward pass, as a loss linear in every parameter."""
    sum((p * paddle.to_tensor(grads[name])).sum() for name, p in model.named_parameters() if name in grads).backward()


@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_of_sgd_in_plain_numpy(double, nesterov):
    """Coefficients are sums of powers of two: Paddle keeps them in float32."""
    lr, momentum, decay = 0.125, 0.875, 0.015625
    model = Small()
    optimizer = TwoGroupSGD(model, lr, momentum, decay, nesterov)
    w = {name: p.numpy().copy() for name, p in model.named_parameters()}
    v = {name: np.zeros_like(a) for name, a in w.items()}
    for step in range(3):
        grads = gradients(model, step)
        put_gradients(model, grads)
        optimizer.step()
        optimizer.clear_grad()
        for name, g in grads.items():
            g = g + (decay * w[name] if name == "conv.weight" else 0)
            v[name] = momentum * v[name] + g
            w[name] = w[name] - lr * (g + momentum * v[name] if nesterov else v[name])
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.numpy(), w[name], rtol=1e-13, atol=1e-15, err_msg=name)


def test_what_is_decayed():
    assert decays("conv1.weight")
    assert decays("fc.weight")
    assert decays("block1.layer.0.convShortcut.weight")
    assert not decays("fc.bias")
    assert not decays("block1.layer.0.bn1.weight")
    assert not decays("stage_1.stage_1_bottleneck_0.shortcut.shortcut_bn.weight")


def test_a_parameter_without_gradient_is_untouched_even_after_a_step_that_gave_it_one():
    model = Small()
    optimizer = TwoGroupSGD(model, 0.1, weight_decay=0.5)
    before = model.unused.weight.numpy().copy()
    put_gradients(model, gradients(model, 0))
    optimizer.step()
    optimizer.clear_grad()
    assert np.array_equal(model.unused.weight.numpy(), before)
    assert "unused.weight" not in optimizer.state()
    moved = model.conv.weight.numpy().copy()
    put_gradients(model, {"bn.bias": np.ones(2, np.float32)})
    optimizer.step()
    assert np.array_equal(model.conv.weight.numpy(), moved)  # no gradient this time: neither decay nor momentum


def test_momentum_goes_over_into_a_model_with_other_names(double):
    first = Small()
    one = TwoGroupSGD(first, 0.1)
    put_gradients(first, gradients(first, 0))
    one.step()
    one.clear_grad()
    state = {name: paddle.to_tensor(v.numpy()) for name, v in one.state().items()}
    assert set(state) == {name for name, _ in first.named_parameters() if not name.startswith("unused")}

    [Small() for _ in range(2)]  # so that Paddle's own names of the next one differ
    second = Small()
    assert first.conv.weight.name != second.conv.weight.name
    second.set_state_dict(first.state_dict())
    two = TwoGroupSGD(second, 0.1)
    two.load_state(state)
    for model, optimizer in ((first, one), (second, two)):
        put_gradients(model, gradients(model, 1))
        optimizer.step()
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert np.array_equal(a.numpy(), b.numpy()), name
    assert all(np.array_equal(one.state()[name].numpy(), v.numpy()) for name, v in two.state().items())


def test_clipping_is_off_by_default_and_bounds_each_group_when_on(double):
    for clip, factor in ((0.0, 1.0), (1.0, 1 / 500.0)):
        model = Small()
        optimizer = TwoGroupSGD(model, 1.0, momentum=0.9, weight_decay=0.0, nesterov=False, clip_grad_norm=clip)
        before = model.conv.weight.numpy().copy()
        grads = {"conv.weight": np.zeros((3, 2))}
        grads["conv.weight"][0] = 300.0, 400.0
        put_gradients(model, grads)
        optimizer.step()
        np.testing.assert_allclose(before - model.conv.weight.numpy(), grads["conv.weight"] * factor, rtol=1e-6)


# --- EMA


def test_parameters_are_averaged_and_buffers_copied():
    model = Small()
    ema = EMA(model, decay=0.75)
    average = ema.average
    start = {name: t.numpy().copy() for name, t in average.state_dict().items()}
    assert all(np.array_equal(start[name], t.numpy()) for name, t in model.state_dict().items())
    for t in model.state_dict().values():
        t.set_value(t + 4.0)
    for _ in range(2):
        ema.update()
    buffers = {name for name, _ in model.named_buffers()}
    assert buffers == {"bn._mean", "bn._variance"}
    for name, t in average.state_dict().items():
        moved = 4.0 if name in buffers else 4.0 * (1 - 0.75**2)
        np.testing.assert_allclose(t.numpy(), start[name] + moved, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(model.bn.bias.numpy(), 4.0)  # the live model is only read


def test_the_average_is_in_eval_mode_without_gradients_and_apart_from_the_model():
    model = Small()
    ema = EMA(model, decay=0.5)
    average = ema.average
    ema.update()
    assert not average.training
    assert all(p.stop_gradient for p in average.parameters())
    model.bn._mean.fill_(9.0)
    assert average.bn._mean.numpy().max() == 0


# --- normalization and evaluation


def test_a_step_leaves_nothing_behind():
    rng = np.random.default_rng(0)
    x, u_w, u_s = (rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for n in (2, 4, 4))
    batch = Batch(x, np.array([1, 3]), u_w, u_s, np.array([0, 1, 2, -1]))
    config = Config(run=RunConfig(log_every=10), model=ModelConfig(depth=10, width=1))
    state = algorithm.build_state(config, 10, (0.5,) * 3, (0.2,) * 3)
    monitor = Monitor(None, config)

    def step():
        monitor.record(10, algorithm.train_step(state, batch, config.ssl), batch, 0.03, 0.0)

    assert growth(step, calls=100, rounds=6) < 100  # a paddle.to_tensor a step would be 200


def test_normalize_by_hand():
    pixels = np.zeros((1, 2, 2, 3), np.uint8)
    pixels[0, 1, 0] = 255, 51, 102
    out = Normalize((0.5, 0.1, 0.4), (0.25, 0.5, 0.2))(pixels).numpy()
    assert out.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(out[0, :, 1, 0], [2.0, 0.2, 0.0], atol=1e-6)
    np.testing.assert_allclose(out[0, :, 0, 0], [-2.0, -0.2, -2.0], atol=1e-6)


def test_scores_by_hand():
    logits = np.array([[3, 2, 1, 0, -1, -2], [0, 5, 1, 1, 1, 1], [9, 8, 7, 6, 5, 4], [1, 1, 1, 1, 1, 1.0]])
    found = score(logits, np.array([0, 1, 5, 0]), np.array([1.0, 2.0, 3.0, 6.0]))
    assert (found.top1, found.top5, found.loss) == (75.0, 75.0, 3.0)
    assert found.per_class == [100.0, 100.0, None, None, None, 0.0]
    assert found.confusion[5] == [1, 0, 0, 0, 0, 0]
    assert np.sum(found.confusion) == 4


def test_a_prediction_that_is_no_number_is_wrong():
    assert score(np.array([[np.nan, 0.0]]), np.array([0]), np.array([np.nan])).top1 == 0.0


@pytest.mark.parametrize("batch_size", [1, 7, 20, 100])
def test_evaluation_sees_every_image_whatever_the_batch_size(batch_size):
    from fixmatch.data.dataset import Dataset

    rng = np.random.default_rng(0)
    data = Dataset(rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), rng.integers(0, 10, 20))
    paddle.seed(3)
    model = build_model("wideresnet", 10, depth=10, width=1)
    before = model.state_dict()["bn1._mean"].numpy().copy()
    found = evaluate(model, Normalize((0.5,) * 3, (0.5,) * 3), data, batch_size)
    assert np.sum(found.confusion) == 20
    assert found.loss == pytest.approx(evaluate(model, Normalize((0.5,) * 3, (0.5,) * 3), data, 20).loss, rel=1e-5)
    assert model.training
    assert np.array_equal(model.state_dict()["bn1._mean"].numpy(), before)


def test_the_summary_by_hand():
    assert summarize([90.0, *range(20)]) == {"last": 19, "best": 90.0, "mean_last_20": 9.5, "median_last_20": 9.5}
    assert summarize([1.0, 4.0, 1.0])["mean_last_20"] == 2.0


# --- monitor


def monitored(targets_u, pseudo_labels, mask) -> dict:
    """What a monitor averages from one step with these unlabeled images."""
    zero, empty = paddle.zeros([]), np.zeros(0, np.int64)
    losses = FixMatchLoss(zero, zero, zero, tensor(mask), tensor(mask), labels(*pseudo_labels))
    window = Window()
    window.rows.append(row_of(losses, Batch(empty, empty, empty, empty, np.array(targets_u))).numpy())
    return window.averages()


def test_pseudo_labels_are_judged_where_all_classes_are_known():
    found = monitored([0, 1, 2, 3], [0, 2, 2, 2], [1, 1, 1, 0])
    assert found["mask"] == pytest.approx(0.75)
    assert found["pseudo_label_accuracy"] == pytest.approx(50)
    assert found["impurity"] == pytest.approx(100 / 3)
    assert monitored([0, 1], [0, 2], [0, 0])["impurity"] is None  # none is confident
    for targets in ([-1, -1], [0, -1]):  # often the labeled ones alone are known, and they are right
        found = monitored(targets, [0, 1], [1, 1])
        assert found.keys() == {"loss", "loss_x", "loss_u", "mask"}


def test_a_monitor_without_a_folder_keeps_no_rows():
    zero, none, images = paddle.zeros([]), paddle.zeros([0]), np.zeros((3, 1), np.uint8)
    monitor = Monitor(None, Config(), world_size=2)
    batch = Batch(images, np.zeros(3, np.int64), images, images, np.zeros(3, np.int64))
    monitor.record(1, FixMatchLoss(zero, zero, zero, none, none, none), batch, 0.03, 0.0)  # supervised
    three = paddle.zeros([3])
    monitor.record(2, FixMatchLoss(zero, zero, zero, three, three, labels(0, 0, 0)), batch, 0.03, 0.0)
    monitor.flush()
    assert (monitor.window.rows, monitor.window.pending, monitor.images) == ([], [], 2 * (3 + 9))


def test_the_time_left_is_judged_without_the_first_step_which_is_a_slow_one(tmp_path, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(monitor_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0], time=time.time))
    config = Config(RunConfig(log_every=1), train=TrainConfig(total_steps=32, batch_size=1), ssl=SSLConfig(mode="none"))
    monitor = Monitor(tmp_path, config, first_step=20)
    zero, none, image = paddle.zeros([]), paddle.zeros([0]), np.zeros((1, 1), np.uint8)
    caplog.set_level("INFO", "fixmatch")
    for step, seconds in (21, 500), (22, 4), (23, 2):
        now[0] += seconds
        batch = Batch(image, np.zeros(1, np.int64), image[:0], image[:0], np.zeros(0, np.int64))
        monitor.record(step, FixMatchLoss(zero, zero, zero, none, none, none), batch, 0.03, 0.0)
    monitor.close()
    said = [record.getMessage().partition("img/s")[2].strip() for record in caplog.records]
    assert said == ["", "left 40 s", "left 27 s"]  # 10 steps of 4 s; 9 steps of 3 s


def test_the_commonest_class_of_the_confident_pseudo_labels():
    zero = paddle.zeros([])
    losses = FixMatchLoss(zero, zero, zero, mask=tensor([1, 1, 1, 0, 1, 0]), confidence=tensor([1.0] * 6),
                          pseudo_labels=labels(2, 2, 0, 0, 2, 0))
    assert commonest_class(losses) == {"top_class": 2, "top_class_share": 0.75}
    losses = losses._replace(mask=tensor([0.0] * 6))
    assert commonest_class(losses) == {"top_class": None, "top_class_share": None}


@pytest.mark.parametrize(("seconds", "shown"), [
    (0.4, "0 s"), (59.6, "1 min 00 s"), (3600, "1 h 00 min"), (86_399, "23 h 59 min"), (86_400, "1 d 0 h"),
    (16_473_203, "190 d 15 h")])
def test_durations_in_two_units(seconds, shown):
    assert duration(seconds) == shown


def test_top_5_of_few_classes_is_left_out():
    few, many = (score(np.eye(k), np.arange(k), np.ones(k)) for k in (5, 6))
    assert "top-5" not in describe({"raw": few, "ema": few})
    assert describe({"raw": many, "ema": many}).count("top-5 100.00 %") == 2


def test_only_whole_lines_up_to_the_step_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train, evaluation = '{"kind": "train", "step": %d}\n', '{"kind": "eval", "step": %d}\n'
    others = '5\n[]\n{"kind": "train", "step": "a"}\n{}\n' + "[" * 100_000 + '\n{"kind": "train", "step": 1, "x": "'
    path.write_bytes(b"".join([(train % 1 + evaluation % 1 + others).encode(), b'\xff"}\n', b"\0" * 2**21 + b"\n",
                               (train % 3 + train % 2 + evaluation % 2 + train % 1).encode()[:-1]]))
    drop_later_lines(path, 2, 1)
    assert path.read_text() == train % 1 + evaluation % 1 + train % 2
