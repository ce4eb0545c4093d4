"""Short runs on the digits, and what tests of their use share."""

import threading

import numpy as np
from running import TINY

import fixmatch


def train(folder, *overrides: str):
    """A run in `folder`, which is returned. Averages move fast, so that probabilities differ from image to image."""
    fixmatch.train(fixmatch.load_config("digits", [*TINY, f"run.dir={folder}", "train.total_steps=60",
                                                   "train.eval_every=60", "ema.decay=0.9",
                                                   "model.bn_momentum=0.9", *overrides]))
    return folder


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
    return powers / powers.sum(axis=1, keepdims=True)


def in_threads(classifier, images: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference to `expected` that four threads see, which ask at the same time for different parts."""
    worst = []

    def ask(first: int):
        for count in range(1, 12):
            found = classifier.predict(images[first:first + count]).probabilities
            worst.append(np.abs(found - expected[first:first + count]).max())

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(worst) == 44
    return max(worst)
