"""A production run in seconds: a configuration with few steps, few and small images. Needs no Torch."""

import contextlib
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import paddle

from fixmatch import inputs
from fixmatch import step as algorithm
from fixmatch.config import Config
from fixmatch.data.dataset import Dataset, Source
from fixmatch.kernels import allocator
from fixmatch.models import build_model
from parity.case import CONFIDENT_LOGITS, Case


@contextlib.contextmanager
def training_on(source: Source) -> Iterator[None]:
    """Production runs read `source` in the place of their data set, start with a confident network, and are silent.

    Their operators' outputs share memory as those of a batch of the run's size do, however small they are. Nothing that
    they write is to outlast a power cut.
    """
    with (mock.patch.object(inputs, "load_source", return_value=source),
          mock.patch.object(allocator, "POOL_FROM", 1),
          mock.patch.object(algorithm, "build_model", _confident_model), mock.patch.object(os, "fsync"),
          contextlib.redirect_stdout(io.StringIO())):
        yield


def _confident_model(arch: str, num_classes: int, **shape):
    """A fresh network whose classifier is so steep that some pseudo-labels count from the first step on."""
    model = build_model(arch, num_classes, **shape)
    classifier = next(layer for layer in model.sublayers() if isinstance(layer, paddle.nn.Linear))
    features = classifier.weight.shape[0]
    with paddle.no_grad():
        classifier.weight.scale_(CONFIDENT_LOGITS[arch] * ((features + num_classes) / (2 * features)) ** 0.5)
    return model


def short_config(case: Case, folder: pathlib.Path, steps: int, eval_every: int = 2) -> Config:
    """The case's configuration with a batch, a data set and a number of steps that take seconds."""
    config, train = case.config, case.config.train
    sections = {
        "run": {"dir": str(folder), "log_every": 1, "report": False},
        "model": {"init": ""},
        "data": {"num_labeled": case.num_classes, "labels_per_class": (), "split_file": "", "fold": None},
        "train": {"batch_size": min(train.batch_size, case.batch_size), "mu": min(train.mu, case.mu),
                  "total_steps": steps, "eval_every": eval_every, "eval_batch_size": 7},
        "ssl": {"supervised_steps": min(config.ssl.supervised_steps, 1)},
        "optim": {"warmup_steps": min(config.optim.warmup_steps, 2)},
        "parity": {"enabled": False}}
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **changes)
                                          for name, changes in sections.items()})


def small_source(case: Case) -> Source:
    """Coloured blobs under noise, a few of each class, whose mean colour tells the class."""
    rng, k, size = np.random.default_rng([case.seed, 8]), case.num_classes, case.image_size
    tested = 9 if case.large else 17  # in batches of 7, the last one partial
    labels = np.concatenate([np.arange(k).repeat(3), rng.integers(0, k, tested)])
    blobs = rng.integers(0, 256, (k, 2, 2, 3))[labels].repeat(size // 2, axis=1).repeat(size // 2, axis=2)
    images = np.clip(blobs + rng.integers(-40, 41, (len(labels), size, size, 3)), 0, 255).astype(np.uint8)
    train, test = slice(None, -tested), slice(-tested, None)
    return Source(case.config.data.name, tuple(f"class {i}" for i in range(k)), Dataset(images[train], labels[train]),
                  Dataset(images[test], labels[test]), case.mean, case.std, flip=case.config.augment.flip is not False)
