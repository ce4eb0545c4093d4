"""The strong augmentations to choose from, by the names that `augment.strong` takes.

RandAugment differs from one FixMatch code base to the next, and so do the published results; CTAugment is the paper's
second variant. A policy says what is drawn at random, and a plan is what was drawn and how it changes images.
"""

from typing import Protocol

import numpy as np

from fixmatch.data.augment.ctaugment import Policy as CTAugmentPolicy
from fixmatch.data.augment.google import Google
from fixmatch.data.augment.randaugment import RandAugment
from fixmatch.data.augment.torchssl import TorchSSL


class Plan(Protocol):
    """The random choices for N images, image axis first."""

    def take(self, part) -> "Plan":
        """The plan of images[part], where `part` is a slice, a mask or an array of indices."""

    def render(self, images: np.ndarray, index: np.ndarray, flip: np.ndarray, corner: np.ndarray) -> np.ndarray:
        """New views, uint8 [N, H, W, 3]: flip and crop as in pixels.render, and then what this plan says."""


class Policy(Protocol):
    """A strong augmentation. Each is made without arguments, and then as it is when a run begins."""

    def draw(self, rng: np.random.Generator, n_images: int) -> Plan:
        """A random plan for `n_images` images. All its random numbers come from `rng`."""


POLICIES: dict[str, type[Policy]] = {"reference": RandAugment, "google": Google, "torchssl": TorchSSL,
                                     "ctaugment": CTAugmentPolicy}
