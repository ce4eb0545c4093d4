"""Going on from a checkpoint: all of it or not at all, and with nothing lost."""

import dataclasses
import shutil

import numpy as np
import pytest
from running import TINY

import fixmatch
from fixmatch import checkpoint
from fixmatch.checkpoint import CheckpointError
from fixmatch.config import Config, ModelConfig, TrainConfig
from fixmatch.data.loader import Batch
from fixmatch.models import idle_parameters
from fixmatch.step import build_state, train_step


def tiny(folder, *overrides: str) -> fixmatch.Config:
    return fixmatch.load_config("digits", [*TINY, f"run.dir={folder}", "train.total_steps=4", "train.eval_every=2",
                                           *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 4 steps, evaluated and saved after 2 and 4."""
    folder = tmp_path_factory.mktemp("resume") / "run"
    fixmatch.train(tiny(folder))
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def change(folder, arrays=None, **facts):
    """Saves the latest checkpoint again with some arrays and facts changed; an array that is None is left out."""
    latest = folder / "checkpoints/latest"
    saved = checkpoint.load(latest)
    kept = {name: a for name, a in {**saved.arrays, **(arrays or {})}.items() if a is not None}
    checkpoint.save(latest, kept, dataclasses.replace(saved.manifest, **facts))


@pytest.mark.parametrize("shape", [ModelConfig("wideresnet", depth=10, width=1), ModelConfig("wideresnet", depth=16),
                                   ModelConfig("resnext", depth=11, width=4, cardinality=2)])
def test_momentum_is_of_every_parameter_that_is_not_idle(shape):
    state = build_state(Config(model=shape, train=TrainConfig(total_steps=1)), 3, (0.5,) * 3, (0.5,) * 3)
    images, labels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8), np.arange(3)
    train_step(state, Batch(images, labels, images, images, labels), Config().ssl)
    every = {name for name, _ in state.model.named_parameters()}
    assert state.optimizer.state().keys() == every - idle_parameters(state.model)
    assert (idle_parameters(state.model) == set()) == (shape.arch == "resnext")


@pytest.mark.parametrize(("name", "damage"), [
    ("momentum/conv1.weight", None), ("momentum/fc.bias", lambda a: a.astype(np.float64)),
    ("momentum/fc.weight", lambda a: a.T), ("momentum/fc.wieght", np.float32(1)), ("ema/fc.bias", None),
    ("model/fc.bias", lambda a: a[:-1]), ("augment/rates", np.ones((5, 19, 2, 17)))])
def test_arrays_that_do_not_fit_are_one_line(copy, name, damage):
    """Each would be skipped in silence by Paddle's own set_state_dict."""
    arrays = checkpoint.load(copy / "checkpoints/latest").arrays
    change(copy, {name: damage(arrays[name]) if callable(damage) else damage})
    with pytest.raises(CheckpointError, match=name.split("/")[1]) as caught:
        fixmatch.train(tiny(copy, "train.total_steps=5"), resume=True)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_without_any_momentum_says_so(copy, capsys):
    arrays = checkpoint.load(copy / "checkpoints/latest").arrays
    change(copy, {name: None for name in arrays if name.startswith("momentum/")})
    fixmatch.train(tiny(copy, "train.total_steps=5"), resume=True)
    assert "has no momentum, so it starts from zero" in capsys.readouterr().out


def test_saving_right_after_loading_keeps_the_momentum(copy):
    """Paddle makes its buffers at the first step, so a run that is resumed and does none has them from its loading."""
    before = checkpoint.load(copy / "checkpoints/latest")
    change(copy, evaluated_step=2, history={name: [1.0] for name in ("raw", "ema")})  # so that it is saved once more
    fixmatch.train(tiny(copy), resume=True)
    after = checkpoint.load(copy / "checkpoints/latest")
    assert after.manifest.evaluated_step == 4
    assert after.part("momentum").keys() == before.part("momentum").keys() != set()
    assert all(np.array_equal(a, after.arrays[name]) for name, a in before.arrays.items())
