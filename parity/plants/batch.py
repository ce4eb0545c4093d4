"""Bugs in how the three parts of a batch go through the network and come apart again.

B labeled images, M unlabeled ones.
"""

from collections.abc import Callable
from functools import partial

import paddle

from fixmatch import losses
from fixmatch import step as algorithm
from parity.plants.plant import Patch, Plant


def _weak_and_strong_swapped(patch: Patch) -> None:
    right = losses.fixmatch_loss
    patch(algorithm, "fixmatch_loss", lambda x, t, w, s, threshold, temperature, lambda_u, pseudo: right(
        x, t, s, w, threshold, temperature, lambda_u))


def _joint_forward(patch: Patch, changed: Callable) -> None:
    """A joint forward pass that is changed(right one, state, images, B, M)."""
    forward, train_step = algorithm.forward, algorithm.train_step

    def changed_step(state, batch, ssl):
        sizes = len(batch.x), len(batch.u_w)
        algorithm.forward = lambda s, images: changed(forward, s, images, *sizes)
        try:
            return train_step(state, batch, ssl)
        finally:
            algorithm.forward = forward

    patch(algorithm, "train_step", changed_step)


def _alternating_rows(forward, state, images, b, m):
    z = forward(state, images)
    return paddle.concat([z[:b], z[b::2], z[b + 1::2]])


def _weak_in_eval_mode(forward, state, images, b, m):
    state.model.eval()
    with paddle.no_grad():
        weak = forward(state, images[b:b + m])
    state.model.train()
    z = forward(state, paddle.concat([images[:b], images[b + m:]]))
    return paddle.concat([z[:b], weak, z[b:]])


def _weak_without_gradient(forward, state, images, b, m):
    joint = forward(state, images)
    with paddle.no_grad():
        weak = forward(state, images)[b:b + m]
    z = forward(state, paddle.concat([images[:b], images[b + m:]]))
    return paddle.concat([z[:b], weak, z[b:]]) + 0.0 * joint


def _each_part_alone(forward, state, images, b, m):
    return paddle.concat([forward(state, part) for part in paddle.split(images, [b, m, m])])


def _interleave(x, size):
    return x.reshape([-1, size, *x.shape[1:]]).swapaxes(0, 1).reshape(x.shape)


def _interleaved(forward, state, images, b, m):
    return forward(state, _interleave(images, 2 * (m // b) + 1))


def _interleaved_twice(forward, state, images, b, m):
    return _interleave(_interleaved(forward, state, images, b, m), 2 * (m // b) + 1)


def _in_parts(right, state, images, b, m):
    return paddle.concat([right(state, part) for part in images.split([512, len(images) - 512])]
                         ) if len(images) > 512 else right(state, images)


PLANTS = [
    Plant("weak-and-strong-swapped", "backward", "pseudo-labels from the strong views", _weak_and_strong_swapped),
    Plant("strided-chunk", "backward", "weak and strong logits taken from alternating rows",
          partial(_joint_forward, changed=_alternating_rows)),
    Plant("eval-mode-pseudo-labels", "operators", "weak logits from running statistics",
          partial(_joint_forward, changed=_weak_in_eval_mode)),
    Plant("no-grad-weak-branch", "operators", "the weak views get no gradient through the batch statistics",
          partial(_joint_forward, changed=_weak_without_gradient)),
    Plant("separate-forwards", "operators", "one forward pass for each part, with batch statistics of its own",
          partial(_joint_forward, changed=_each_part_alone)),
    Plant("forward-in-parts", "operators", "more than 512 images go through the network in parts, to save memory",
          partial(_joint_forward, changed=_in_parts)),
    Plant("interleave-not-undone", "backward", "logits left in the interleaved order",
          partial(_joint_forward, changed=_interleaved)),
    Plant("interleave-undone-wrongly", "backward", "interleaved a second time instead of its inverse",
          partial(_joint_forward, changed=_interleaved_twice)),
]
