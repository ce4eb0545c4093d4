"""State between the frameworks, both ways."""

import numpy as np
import pytest

from parity.weights import paddle_to_torch, torch_to_paddle


def test_weights_map_both_ways_and_are_strict():
    rng = np.random.default_rng(0)
    state = {"conv1.weight": rng.random((4, 3, 3, 3)), "bn1.weight": rng.random(4), "bn1.running_mean": rng.random(4),
             "bn1.running_var": rng.random(4), "bn1.num_batches_tracked": np.array(0), "fc.weight": rng.random((5, 5)),
             "fc.bias": rng.random(5)}
    ours = torch_to_paddle(state)
    assert set(ours) == {"conv1.weight", "bn1.weight", "bn1._mean", "bn1._variance", "fc.weight", "fc.bias"}
    np.testing.assert_array_equal(ours["fc.weight"], state["fc.weight"].T)
    back = paddle_to_torch(ours)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)
    for bad in ({"fc.wieght": rng.random((2, 2))}, {"fc.bias": rng.random((2, 2))}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            torch_to_paddle(bad)
        with pytest.raises(ValueError, match=next(iter(bad))):
            paddle_to_torch(bad)
