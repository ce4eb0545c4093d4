"""Bugs in training with several processes, none of which a single process can show.

They are put into every rank of stage `ranks`. The process that launches them has them, too, and must stay right alone.
"""

from functools import partial

import numpy as np
import paddle
import paddle.distributed as dist

from fixmatch import distributed, evaluation, inputs, optimizer, trainer
from fixmatch import step as algorithm
from fixmatch.data.dataset import Dataset
from fixmatch.normalize import to_device
from parity.plants.plant import Patch, Plant


def _alone() -> bool:
    return dist.get_world_size() == 1


def _not_averaged(patch: Patch) -> None:
    patch(distributed, "parallel", lambda model: model)


def _before_the_optimizer(patch: Patch, change) -> None:
    """Gradients of each rank alone, to which change(optimizer) does something just before they are used."""
    right = algorithm.update

    def changed(state, loss):
        step = state.optimizer.step

        def changed_step(*args):
            with paddle.no_grad():
                change(state.optimizer)
            return step(*args)

        state.optimizer.step = step if _alone() else changed_step
        right(state, loss)
        state.optimizer.step = step

    _not_averaged(patch)
    patch(algorithm, "update", changed)


def _average(tensors) -> None:
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor.scale_(1 / dist.get_world_size())


def _with_gradient(self, chosen) -> list:
    return [p.grad for name, p in self.parameters.items() if p.grad is not None and chosen(name)]


def _first_half_averaged(self) -> None:
    gradients = _with_gradient(self, lambda name: True)
    _average(gradients[:len(gradients) // 2])


def _decayed_group_averaged(self) -> None:
    _average(_with_gradient(self, optimizer.decays))


def _averaged_in_half_precision(self) -> None:
    for gradient in _with_gradient(self, lambda name: True):
        short = gradient.astype("float16").astype(gradient.dtype)
        _average([short])
        gradient.copy_(short, False)


def _those_of_rank_0(self) -> None:
    for gradient in _with_gradient(self, lambda name: True):
        dist.broadcast(gradient, src=0)


def _summed(patch: Patch) -> None:
    right = algorithm.update
    patch(algorithm, "update", lambda state, loss: right(state, loss * dist.get_world_size()))


def _weights_averaged_instead(patch: Patch) -> None:
    right = optimizer.TwoGroupSGD.step

    def changed(self, *args):
        right(self, *args)
        if not _alone():
            with paddle.no_grad():
                _average(self.parameters.values())

    _not_averaged(patch)
    patch(optimizer.TwoGroupSGD, "step", changed)


def _every_other_step(patch: Patch) -> None:
    """Gradients are averaged at the second step only, as where accumulation over two steps is left on."""
    right = algorithm.forward

    def changed(state, images):
        state.steps = getattr(state, "steps", 0) + 1
        if _alone() or state.steps % 2 == 0:
            return right(state, images)
        with state.network.no_sync():
            return right(state, images)

    patch(algorithm, "forward", changed)


def _average_before_the_step(patch: Patch) -> None:
    right = algorithm.update

    def changed(state, loss):
        if dist.get_rank() == 0:
            return right(state, loss)
        state.ema.update()
        update, state.ema.update = state.ema.update, lambda: None
        right(state, loss)
        state.ema.update = update

    patch(algorithm, "update", changed)


def _other_weights(patch: Patch) -> None:
    right = algorithm.build_state

    def changed(*args):
        state = right(*args)
        with paddle.no_grad():
            for network in (state.model, state.ema.average):
                for parameter in network.parameters():
                    parameter.scale_(1 + 1e-3 * dist.get_rank())
        return state

    patch(algorithm, "build_state", changed)


def _same_share(patch: Patch) -> None:
    right = inputs.build_loader
    patch(inputs, "build_loader", lambda config, source, split, rank=0, world_size=1: right(config, source, split))


def _flag_of_this_rank(patch: Patch) -> None:
    patch(distributed, "anywhere", lambda flag: flag)


def _flag_of_rank_0(patch: Patch) -> None:
    patch(distributed, "anywhere", lambda flag: bool(distributed.gather(np.array([int(flag)]))[0]))


def _flag_of_all(patch: Patch) -> None:
    patch(distributed, "anywhere", lambda flag: bool(distributed.gather(np.array([int(flag)])).all()))


def _gathered_in_float32(patch: Patch) -> None:
    right = distributed.gather
    patch(distributed, "gather", lambda array: right(array.astype(np.float32)).astype(array.dtype))


def _own_part_first(patch: Patch) -> None:
    def changed(array):
        if _alone():
            return array
        parts, rank = [], dist.get_rank()
        dist.all_gather(parts, to_device(array))
        return np.concatenate([part.numpy() for part in [parts[rank], *parts[:rank], *parts[rank + 1:]]])

    patch(distributed, "gather", changed)


def _scores_of_own_share(patch: Patch) -> None:
    def changed(model, normalize, data, batch_size):
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        part = Dataset(data.images[mine], data.labels[mine])
        logits, losses = evaluation.predict(model, normalize, part, batch_size)
        return evaluation.score(logits, part.labels, losses)

    patch(trainer, "evaluate", changed)


def _scored_shares(patch: Patch, change) -> None:
    """Scores of change(the shares of all ranks): array [ranks, images a share, K + 1] of logits and losses."""
    gather, right = distributed.gather, trainer.evaluate

    def changed_gather(array):
        shares = gather(array).reshape(dist.get_world_size(), *array.shape)
        return change(shares).reshape(-1, *array.shape[1:])

    def changed(*args):
        distributed.gather = changed_gather
        try:
            return right(*args)
        finally:
            distributed.gather = gather

    patch(trainer, "evaluate", changed)


def _statistics(patch: Patch, change) -> None:
    """Running statistics for evaluations and probes by change(buffer), in the place of rank 0's."""
    def changed(model):
        for buffer in model.buffers() if not _alone() else ():
            with paddle.no_grad():
                change(buffer)

    patch(distributed, "take_statistics", changed)


def _own_statistics(patch: Patch) -> None:
    patch(distributed, "gather_tensor", lambda tensor: tensor)


PLANTS = [
    Plant("ranks-policy-of-own-images", "ranks", "ssl.policy has statistics of each rank's own images", _own_statistics,
          settings=("ssl.policy=flexmatch",)),
    Plant("ranks-gradients-not-averaged", "ranks", "every rank trains a network of its own", _not_averaged),
    Plant("ranks-gradients-summed", "ranks", "gradients of the ranks are added, not averaged", _summed),
    Plant("ranks-first-half-averaged", "ranks", "gradients of the first half of the parameters are averaged",
          partial(_before_the_optimizer, change=_first_half_averaged)),
    Plant("ranks-decayed-group-averaged", "ranks", "gradients of the undecayed group stay each rank's own",
          partial(_before_the_optimizer, change=_decayed_group_averaged)),
    Plant("ranks-averaged-in-float16", "ranks", "gradients are sent in half precision",
          partial(_before_the_optimizer, change=_averaged_in_half_precision)),
    Plant("ranks-gradients-of-rank-0", "ranks", "all ranks take the gradients of rank 0",
          partial(_before_the_optimizer, change=_those_of_rank_0)),
    Plant("ranks-weights-averaged-instead", "ranks", "weights are averaged after each step, gradients are not",
          _weights_averaged_instead),
    Plant("ranks-every-other-step", "ranks", "gradients are averaged at every other step only", _every_other_step),
    Plant("ranks-average-before-step", "ranks", "the average lags one step behind on rank 1", _average_before_the_step),
    Plant("ranks-start-apart", "ranks", "ranks start from different weights", _other_weights),
    Plant("ranks-same-share", "ranks", "all ranks train on the same share of the images", _same_share),
    Plant("ranks-stop-of-this-rank", "ranks", "a signal stops only the rank that receives it", _flag_of_this_rank),
    Plant("ranks-stop-of-rank-0", "ranks", "a signal to another rank than 0 is not obeyed", _flag_of_rank_0),
    Plant("ranks-stop-of-all", "ranks", "a signal is obeyed only if every rank receives it", _flag_of_all),
    Plant("ranks-gather-float32", "ranks", "gather sends everything in single precision", _gathered_in_float32),
    Plant("ranks-own-part-first", "ranks", "gather puts the rank's own part first", _own_part_first),
    Plant("ranks-own-share-scored", "ranks", "each rank scores its own test images alone", _scores_of_own_share),
    Plant("ranks-first-share-twice", "ranks", "the first share of the test images counts in the place of the second",
          partial(_scored_shares, change=lambda shares: np.stack([shares[0]] * len(shares)))),
    Plant("ranks-last-share-dropped", "ranks", "the predictions of the last rank are lost",
          partial(_scored_shares, change=lambda shares: np.stack([*shares[:-1], 0 * shares[-1]]))),
    Plant("ranks-shares-reversed", "ranks", "shares of the test images in the reverse order of ranks",
          partial(_scored_shares, change=lambda shares: shares[::-1])),
    Plant("ranks-own-statistics", "ranks", "each rank evaluates with its own running statistics",
          partial(_statistics, change=lambda buffer: None)),
    Plant("ranks-statistics-of-rank-1", "ranks", "running statistics of another rank than 0",
          partial(_statistics, change=lambda buffer: dist.broadcast(buffer, src=1))),
    Plant("ranks-statistics-averaged", "ranks", "running statistics are averaged over ranks",
          partial(_statistics, change=lambda buffer: _average([buffer]))),
    Plant("ranks-checkpoint-of-each", "ranks", "a resumed rank goes on from what it has, not from rank 0's checkpoint",
          lambda patch: patch(distributed, "of_rank_0", lambda arrays: arrays)),
    Plant("ranks-differences-unseen", "ranks", "ranks with other settings or weights train together",
          lambda patch: patch(distributed, "difference", lambda facts: None)),
]
