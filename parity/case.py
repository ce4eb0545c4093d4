"""What a parity run feeds to both sides: a configuration, initial weights and batches, all from numpy seeds.

B labeled images, M = mu * B unlabeled ones, K classes.
"""

import dataclasses
import itertools
import zlib
from dataclasses import dataclass

import numpy as np

from fixmatch.config import Config, ModelConfig, SSLConfig
from fixmatch.data.loader import Batch

CLASSIC_SEEDS = (100, 300, 1000, 2000, 3000)  # of the paper-reproduction guide

SMALL = {"wideresnet": ModelConfig("wideresnet", 10, 2), "resnext": ModelConfig("resnext", 11, 4, 4)}
PUBLISHED = {"wideresnet": ModelConfig("wideresnet", 28, 2), "resnext": ModelConfig("resnext", 28, 4, 4)}

# Scale of the classifier's weights: so that the mask at a threshold of 0.95 has both values, and no larger, since a
# steep loss amplifies rounding from step to step.
CONFIDENT_LOGITS = {"wideresnet": 16.0, "resnext": 5.0}
_CONFIDENT_ON_REAL_IMAGES = 4.0  # at most, since these runs are the long ones: rounding is amplified 40 times

_LARGE = 5e6  # weights
_UNLABELED = 40  # images in all that a policy keeps account of, more than a step shows
DRAWN = 65_537  # numbers of a larger tensor that are drawn, and repeated: a prime, so that no two rows are alike

# Parameters that never get a gradient in a WideResNet, and so must not be touched by the optimizer.
IDLE = tuple(f"block{b}.layer.0.bn1.{p}" for b in (2, 3) for p in ("weight", "bias"))


@dataclass(frozen=True)
class Case:
    """A shrunken run of `config`: its own network and hyper-parameters, few and small images."""

    config: Config
    num_classes: int
    seed: int = 0
    image_size: int = 8  # pixels; both networks halve it twice
    batch_size: int = 4
    mu: int = 3
    mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, float, float] = (0.2471, 0.2435, 0.2616)
    float32_weights: bool = False  # round them, so that float32 runs start where the float64 one does
    total_steps: int = 20  # of the schedule: so few that the learning rate moves visibly in three
    loader: object = None  # a fixmatch.data.loader.Loader to take batches of real images from instead

    def weights(self, shapes: dict[str, tuple], scale: float = 1.0, salt: str = "") -> dict[str, np.ndarray]:
        """Float64 arrays for Torch-named parameters and buffers of these shapes, each drawn from its own name.

        So each side draws its own, and a layer that only one side has does not shift the others. Batch norms are away
        from 1 and 0, so that weight decay on them shows.
        """
        drawn = {name: np.asarray(self._draw(name, shape, salt, scale)) for name, shape in shapes.items()}
        return {n: a.astype(np.float32).astype(a.dtype) for n, a in drawn.items()} if self.float32_weights else drawn

    def _draw(self, name: str, shape: tuple, salt: str, scale: float) -> np.ndarray:
        if name.endswith("num_batches_tracked"):
            return np.zeros(shape, dtype=np.int64)
        rng = np.random.default_rng([self.seed, zlib.crc32((salt + name).encode())])
        normal = rng.standard_normal(min(int(np.prod(shape)), DRAWN)) * scale
        if len(shape) == 4:
            return np.resize(normal * np.sqrt(2.0 / (shape[0] * shape[2] * shape[3])), shape)
        normal = np.resize(normal, shape)
        if len(shape) == 2:
            confident = CONFIDENT_LOGITS[self.config.model.arch]
            if self.loader is not None:
                confident = min(confident, _CONFIDENT_ON_REAL_IMAGES)
            elif self.large:  # steeper where there are a hundred classes, which does no harm in one step
                confident *= max(1.0, np.log10(self.num_classes))
                confident *= 6.0 if self.batch_size * self.mu < 4 else 1.0  # of so few images one is to count
            return normal * (confident / np.sqrt(shape[1]))
        if name.endswith("running_var"):
            return scale + 0.2 * np.abs(normal)
        return 0.1 * normal + (scale if name.endswith("weight") else 0.0)

    def batch(self, step: int) -> Batch:
        """uint8 images and int64 labels of one step: coloured blobs under noise, or real images from the loader."""
        if self.loader is not None:
            return self.loader.batch(step)
        rng = np.random.default_rng([self.seed, step])
        size, total = self.image_size, self.batch_size * (1 + 2 * self.mu)
        blobs = rng.integers(0, 256, (total, 2, 2, 3)).repeat(size // 2, axis=1).repeat(size // 2, axis=2)
        images = np.clip(blobs + rng.integers(-40, 41, (total, size, size, 3)), 0, 255).astype(np.uint8)
        x, u_w, u_s = np.split(images, [self.batch_size, self.batch_size * (1 + self.mu)])
        targets = rng.integers(0, self.num_classes, len(x) + len(u_w))
        return Batch(x, targets[:len(x)], u_w, u_s, targets[len(x):], rng.permutation(_UNLABELED)[:len(u_w)])

    def label_facts(self) -> tuple[int, np.ndarray]:
        """(how many unlabeled images there are, how many labels each class has [K]): not equally many."""
        if self.loader is not None:
            split = self.loader.split
            return len(split.unlabeled), split.label_counts(self.loader.data.labels, self.num_classes)
        return _UNLABELED, 1 + np.arange(self.num_classes) % 3

    def short_config(self) -> Config:
        """The configuration with a run of `total_steps`.

        Without mixed precision and clipping, which the reference does not have, and seeded by the case.
        """
        run, train, optim = self.config.run, self.config.train, self.config.optim
        return dataclasses.replace(
            self.config, run=dataclasses.replace(run, seed=self.seed),
            train=dataclasses.replace(train, total_steps=self.total_steps, amp="off", clip_grad_norm=0.0),
            optim=dataclasses.replace(optim, warmup_steps=min(optim.warmup_steps, 2)))

    @property
    def large(self) -> bool:
        """Whether comparing all elements of all tensors takes too long before a training."""
        return self.num_weights > _LARGE

    @property
    def num_weights(self) -> int:
        """Of all convolutions but the first and the projections."""
        model = self.config.model
        if model.arch == "wideresnet":
            blocks, widths = (model.depth - 4) // 6, [16, *(16 * model.width * 2**stage for stage in range(3))]
            weights = sum(9 * (a * b + (2 * blocks - 1) * b * b) for a, b in itertools.pairwise(widths))
        else:
            blocks, inner = (model.depth - 2) // 9, [model.cardinality * model.width * 2**stage for stage in range(3)]
            weights = sum(blocks * (2 * 256 * 2**stage * d + 9 * d * d // model.cardinality)
                          for stage, d in enumerate(inner))
        return weights

    def small(self) -> "Case":
        """The same network with half the images or, if it is large, fewer, as a self-check takes it.

        Two labeled images at least, since interleaving one is nothing; and more unlabeled than labeled ones.
        """
        return dataclasses.replace(self, batch_size=2, mu=2 if self.large else 3)

    def with_few_images(self) -> "Case":
        """The same network with two labeled and two unlabeled images, of which a large one takes half a second each.

        A ResNeXt, which takes twice as long, has one of each: both losses count in its step, too.
        """
        return dataclasses.replace(self, batch_size=1 if self.config.model.arch == "resnext" else 2, mu=1)

    def on_a_small_network(self, arch: str = "", blocks: int = 1) -> "Case":
        """The same case with a small network of its own or another architecture, of so many blocks a stage."""
        small = SMALL[arch or self.config.model.arch]
        depth = small.depth + (blocks - 1) * {"wideresnet": 6, "resnext": 9}[small.arch]
        model = dataclasses.replace(self.config.model, arch=small.arch, depth=depth, width=small.width,
                                    cardinality=small.cardinality)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, model=model))

    def with_seed(self, seed: int) -> "Case":
        return dataclasses.replace(self, seed=seed)


def small_case(arch: str, seed: int) -> Case:
    """A small network of this architecture with the reference's hyper-parameters."""
    return Case(Config(model=SMALL[arch]), 10, seed)


def scaled_updates(names: list[str]) -> list[dict]:
    """Updates under the loss scale of float16, in order: {"spoiled": the parameter of which one gradient is infinite,
    or None; "load": a state to go on from, or None; "again": whether to go on through JSON in a new scaler}.

    The parameters whose gradients overflow are one that is not decayed and one that is.
    """
    first, last = names[0], names[-1]
    plain = {"spoiled": None, "load": None, "again": False}
    return [plain, {**plain, "spoiled": last}, {**plain, "again": True}, {**plain, "spoiled": first}, plain,
            {**plain, "load": {"scale": 2.0**23, "good_steps": 1998, "skipped": 7}}, plain, {**plain, "again": True},
            {**plain, "load": {"scale": 2.0**24, "good_steps": 1999, "skipped": 7}}]


def policy_probe(case: Case) -> tuple[SSLConfig, tuple[int, np.ndarray], list[tuple]]:
    """What to try the run's policy on: (settings, facts as `Case.label_facts`, steps).

    A step is (logits_x, logits_u_w, logits_u_s, index_u), float64 and int64. Confidences are of all sizes, so that some
    lie next to each threshold, wherever it is; images come again with another label; the statistics move fast, and
    half of the confidences are so high that FlexMatch learns soon. In every other step no strong view is of the last
    class.
    """
    rng, classes = np.random.default_rng([case.seed, 3]), case.num_classes
    ssl = dataclasses.replace(case.config.ssl, policy_decay=min(case.config.ssl.policy_decay, 0.8))
    images, shown = 130, 120
    steps = []
    for step in range(6):
        sizes = np.concatenate([np.linspace(low, 0.999, shown // 2) for low in (1 / classes + 0.01, 0.9)])
        confidence = rng.permutation(sizes)[:, None]  # [M, 1]
        rest = rng.uniform(0.5, 1.0, (shown, classes))
        label = np.arange(classes) == rng.choice(classes, shown, p=_uneven(classes))[:, None]
        rest[label] = 0
        weak = np.where(label, confidence, (1 - confidence) * rest / rest.sum(axis=1, keepdims=True))
        strong = rng.standard_normal(weak.shape) * 3
        strong[:, -1] -= 40 * (step % 2)
        steps.append((rng.standard_normal((4, classes)) * 3, ssl.temperature * np.log(weak), strong,
                      rng.permutation(images)[:shown]))
    return ssl, (images, 1 + np.arange(classes) % 3), steps


def _uneven(classes: int) -> np.ndarray:
    """Shares of the classes, the last three times the first."""
    shares = np.linspace(1.0, 3.0, classes)
    return shares / shares.sum()


def loss_probes(num_classes: int, seed: int, batch_of_run: int = 64, mu: int = 7) -> dict[str, tuple]:
    """Logits to try the loss on: {name: (logits_x [B, K], targets_x [B], logits_u_w [M, K], logits_u_s [M, K])}.

    Float64, labels int64. "random" has confident and unsure rows, and "run" as many of them as a batch of the run has;
    "tie" has a confidence of exactly 0.5, the threshold that it is to be tried with; "extreme" has logits that a
    saturating cross-entropy gets wrong.
    """
    rng = np.random.default_rng([seed, 1])
    k = num_classes

    def drawn(batch: int, unlabeled: int) -> tuple:
        targets = rng.integers(0, k, batch)
        spread = np.linspace(0.2, 12.0, unlabeled)[:, None]
        return (rng.standard_normal((batch, k)) * 3, targets, rng.standard_normal((unlabeled, k)) * spread,
                rng.standard_normal((unlabeled, k)) * 3)

    batch, unlabeled = 4, 12
    random = x, targets, _, strong = drawn(batch, unlabeled)
    tied = np.full((unlabeled, k), -1000.0)
    tied[:, :2] = 0.0  # softmax gives 0.5, 0.5, 0, ...; the first is taken
    extreme = (rng.standard_normal((batch, k)) * 200, targets, rng.standard_normal((unlabeled, k)) * 200,
               rng.standard_normal((unlabeled, k)) * 200)
    return {"random": random, "tie": (x, targets, tied, strong), "extreme": extreme,
            "run": drawn(batch_of_run, batch_of_run * mu)}
