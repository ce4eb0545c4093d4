"""The policies of pseudo-labels, by hand, and against their mirror in Torch over many steps."""

import math

import numpy as np
import paddle
import pytest
from running import TINY, After

import fixmatch
from fixmatch import checkpoint, run, thresholds
from fixmatch.config import SSLConfig
from fixmatch.losses import pseudo_label

EVEN = np.ones(2)


def logits(*probabilities):
    """Logits [M, K] whose softmax is these rows."""
    return paddle.to_tensor(np.log(np.array(probabilities)).astype(np.float32))


def start(ssl: SSLConfig, num_unlabeled: int = 4, counts=EVEN):
    return thresholds.initial_state(ssl, len(counts), num_unlabeled, np.array(counts))


def step(ssl: SSLConfig, state, *probabilities, index=(0, 1), labeled=((0.5, 0.5),)):
    return thresholds.pseudo_labels(logits(*labeled), logits(*probabilities), np.array(index), state, ssl)


def test_fixed_is_the_paper_s_threshold_bit_for_bit():
    rng = np.random.default_rng(0)
    x = paddle.to_tensor((4 * rng.standard_normal((64, 10))).astype(np.float32))
    found, state = thresholds.pseudo_labels(x, x, np.arange(64), {}, SSLConfig())
    assert state == {}
    for ours, expected in zip(found, pseudo_label(x, 0.95, 1.0), strict=True):
        assert np.array_equal(ours.numpy(), expected.numpy())


def test_flexmatch_by_hand():
    """Four unlabeled images, tau 0.9. At first no class is learned, so the bar is 0 and everything counts."""
    ssl = SSLConfig(policy="flexmatch", threshold=0.9)
    found, state = step(ssl, start(ssl), (0.95, 0.05), (0.3, 0.7))
    assert found.weight.tolist() == [1, 1]
    assert found.labels.tolist() == [0, 1]
    assert state["assigned"].tolist() == [0, -1, -1, -1]  # the second was not sure enough to be remembered
    np.testing.assert_allclose(state["learned"].numpy(), [1 / 3, 0])  # the warm-up: three images have no label yet
    found, state = step(ssl, state, (0.17, 0.83), (0.92, 0.08), index=(2, 3))
    # the bar of class 0 is 0.9 * (1/3) / (2 - 1/3) = 0.18, that of class 1 still 0
    np.testing.assert_allclose(thresholds.class_thresholds(start(ssl), ssl).numpy(), [0, 0])
    assert found.weight.tolist() == [1, 1]
    assert state["assigned"].tolist() == [0, -1, -1, 0]
    np.testing.assert_allclose(state["learned"].numpy(), [1, 0])  # two of class 0, two of none
    np.testing.assert_allclose(thresholds.class_thresholds(state, ssl).numpy(), [0.9, 0], atol=1e-7)
    found, state = step(ssl, state, (0.89, 0.11), (0.09, 0.91), index=(0, 1))
    assert found.weight.tolist() == [0, 1]  # 0.89 is under the full bar of class 0
    assert state["assigned"].tolist() == [0, 1, -1, 0]  # the first keeps what it had
    np.testing.assert_allclose(state["learned"].numpy(), [1, 0.5])


def test_flexmatch_takes_back_a_label_that_changed():
    ssl = SSLConfig(policy="flexmatch", threshold=0.9)
    _, state = step(ssl, start(ssl, 2), (0.95, 0.05), (0.95, 0.05))
    _, state = step(ssl, state, (0.05, 0.95), (0.5, 0.5))
    assert state["assigned"].tolist() == [1, 0]


def test_freematch_by_hand():
    """Decay 0.5: level = (1/2 + 0.8) / 2, share = (1/2 + mean) / 2, histogram likewise."""
    ssl = SSLConfig(policy="freematch", policy_decay=0.5)
    found, state = step(ssl, start(ssl), (0.9, 0.1), (0.7, 0.3))
    assert float(state["level"]) == pytest.approx(0.65)
    np.testing.assert_allclose(state["share"].numpy(), [0.65, 0.35], rtol=1e-6)
    np.testing.assert_allclose(state["histogram"].numpy(), [0.75, 0.25], rtol=1e-6)
    assert found.weight.tolist() == [1, 1]
    np.testing.assert_allclose(thresholds.class_thresholds(state, ssl).numpy(), [0.65, 0.35], rtol=1e-6)
    found, _ = step(ssl, state, (0.66, 0.34), (0.4, 0.6))
    # level (0.65 + 0.63) / 2 = 0.64, share ((0.65 + 0.53) / 2, (0.35 + 0.47) / 2) = (0.59, 0.41), bars 0.64 and 0.4447
    assert found.weight.tolist() == [1, 1]


def test_freematch_s_fairness_by_hand():
    """One of two counts: its mean (0.8, 0.2) over its histogram (1, 0) is (1, 0) after normalization."""
    state = {"share": paddle.to_tensor([0.6, 0.4]), "histogram": paddle.to_tensor([0.5, 0.5])}
    strong = logits((0.8, 0.2), (0.1, 0.9))
    one = thresholds.fairness(strong, paddle.to_tensor([1.0, 0.0]), state)
    assert float(one) == pytest.approx(0.6 * math.log(1 + 1e-12) + 0.4 * math.log(1e-12), rel=1e-5)
    both = thresholds.fairness(strong, paddle.to_tensor([1.0, 1.0]), state)  # means 0.45, 0.55 over halves
    assert float(both) == pytest.approx(0.6 * math.log(0.45) + 0.4 * math.log(0.55), rel=1e-5)
    assert float(thresholds.fairness(strong, paddle.to_tensor([0.0, 0.0]), state)) == 0


def test_softmatch_by_hand():
    """Decay 0: mean 0.8, unbiased variance of (0.9, 0.7) is 0.02; 0.7 weighs exp(-0.01 / (2 * 0.02 / 4))."""
    ssl = SSLConfig(policy="softmatch", policy_decay=0.0)
    found, state = step(ssl, start(ssl), (0.9, 0.1), (0.3, 0.7))
    assert float(state["mean"]) == pytest.approx(0.8)
    assert float(state["variance"]) == pytest.approx(0.02, rel=1e-5)
    np.testing.assert_allclose(found.weight.numpy(), [1, math.exp(-1)], rtol=1e-5)


def test_alignment_by_hand():
    """The network says class 0 too often: (0.8, 0.2) on the whole; towards uniform its 0.6 becomes 0.2727."""
    ssl = SSLConfig(align="uniform", threshold=0.7)
    found, state = step(ssl, start(ssl), (0.6, 0.4), (1.0 - 1e-7, 1e-7))
    np.testing.assert_allclose(state["aligned_from"].numpy(), [0.8, 0.2], rtol=1e-5)
    share = 0.4 * 0.5 / 0.2
    assert float(found.confidence[0]) == pytest.approx(share / (share + 0.6 * 0.5 / 0.8), rel=1e-4)
    assert found.labels.tolist() == [1, 0]
    assert found.weight.tolist() == [1, 1]


def test_softmatch_takes_its_label_from_the_network():
    ssl = SSLConfig(policy="softmatch", align="uniform")
    found, _ = step(ssl, start(ssl), (0.6, 0.4), (1.0 - 1e-7, 1e-7))
    assert found.labels.tolist() == [0, 0]


def test_alignment_to_the_labels_and_to_the_model():
    labels = SSLConfig(align="labels")
    np.testing.assert_allclose(start(labels, counts=(30, 10))["aligned_to"].numpy(), [0.75, 0.25])
    model = SSLConfig(align="model", policy_decay=0.5)
    _, state = step(model, start(model), (0.6, 0.4), (0.6, 0.4), labeled=((0.9, 0.1), (0.7, 0.3)))
    np.testing.assert_allclose(state["aligned_to"].numpy(), [0.8, 0.2], rtol=1e-6)  # the first is taken whole
    _, state = step(model, state, (0.6, 0.4), (0.6, 0.4), labeled=((0.4, 0.6),))
    np.testing.assert_allclose(state["aligned_to"].numpy(), [0.6, 0.4], rtol=1e-6)


def test_no_gradient_goes_through_a_pseudo_label():
    weak = logits((0.9, 0.1), (0.3, 0.7))
    weak.stop_gradient = False
    for policy in thresholds.POLICIES:
        ssl = SSLConfig(policy=policy, align="model")
        found, state = thresholds.pseudo_labels(weak, weak, np.array([0, 1]), start(ssl), ssl)
        assert all(t.stop_gradient for t in (*found, *state.values()))


@pytest.mark.parametrize("settings", [["ssl.policy=flexmatch"], ["ssl.policy=softmatch", "ssl.align=model"]])
def test_a_resumed_run_has_the_statistics_of_one_never_stopped(settings, tmp_path):
    settings = [*TINY, *settings, "ssl.policy_decay=0.5", "train.eval_every=2", "ssl.threshold=0.3"][
        :None if "flexmatch" in settings[0] else -1]
    for folder, lengths in (("whole", [4]), ("stopped", [2, 4])):
        for steps in lengths:
            config = fixmatch.load_config("digits", [*settings, f"run.dir={tmp_path}/{folder}", "train.total_steps=4"])
            if steps < 4:  # the schedule is that of the whole run
                with pytest.raises(run.Interrupted):
                    run.train(config, recorder=After(steps))
            else:
                run.train(config, resume=folder == "stopped")
    whole, stopped = (checkpoint.load(tmp_path / folder / "checkpoints/latest") for folder in ("whole", "stopped"))
    assert whole.part("thresholds")
    assert whole.arrays.keys() == stopped.arrays.keys()
    assert all(np.array_equal(a, stopped.arrays[name]) for name, a in whole.arrays.items())
    last = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()[-2]
    assert '"class_thresholds": [' in last


@pytest.mark.parametrize("align", ["none", "uniform", "labels", "model"])
@pytest.mark.parametrize("policy", thresholds.POLICIES)
def test_ten_steps_are_the_mirror_s(policy, align):
    """In float64, with images seen more than once and class counts that are not equal."""
    torch = pytest.importorskip("torch")
    from parity.mirror import thresholds as mirror
    from parity.reference import precision as torch_precision
    from parity.subject import precision

    ssl, counts = SSLConfig(policy=policy, align=align, policy_decay=0.8), [3, 1, 2, 2, 4]
    rng = np.random.default_rng(1)
    with precision("float64"), torch_precision("float64"):
        ours, theirs = (side.initial_state(ssl, 5, 40, np.array(counts)) for side in (thresholds, mirror))
        for _ in range(10):
            x, weak, strong = (rng.standard_normal((n, 5)) * rng.uniform(0.5, 6, (n, 1)) for n in (4, 16, 16))
            index = rng.permutation(40)[:16]
            found, ours = thresholds.pseudo_labels(paddle.to_tensor(x), paddle.to_tensor(weak), index, ours, ssl)
            expected, theirs = mirror.pseudo_labels(torch.from_numpy(x), torch.from_numpy(weak), index, theirs, ssl)
            for name, value in expected._asdict().items():
                np.testing.assert_allclose(getattr(found, name).numpy(), value.numpy(), rtol=1e-12, err_msg=name)
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name].numpy(), value.numpy(), rtol=1e-12, err_msg=name)
            if policy == "freematch":
                a, b = paddle.to_tensor(strong, stop_gradient=False), torch.tensor(strong, requires_grad=True)
                (ours_term, theirs_term) = (thresholds.fairness(a, found.weight, ours),
                                            mirror.fairness(b, expected.weight, theirs))
                np.testing.assert_allclose(ours_term.item(), theirs_term.item(), rtol=1e-12)
                if theirs_term.requires_grad:
                    ours_term.backward()
                    theirs_term.backward()
                    np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-9, atol=1e-14)
