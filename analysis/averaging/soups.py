"""Soups: models whose weights are the mean of members' weights, and their normalisation.

Choices are made on the validation split; the training images only re-estimate statistics.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from analysis.networks.stateless import BATCH, Outputs, State
from analysis.outputs.pool_outputs import PoolEvaluator, PoolSplit
from merge_core.errors import PoolError
from merge_core.executors.base import one_thread
from merge_core.files import digest_of
from merge_core.progress import Progress

Statistics = Literal["average", "reestimate"]
UNDECIDED = -1


class RunningMean:
    """The mean of states that are given one at a time; only the mean is held, in float64.

    Example:
        >>> mean = RunningMean()
        >>> for value in (1.0, 3.0):
        ...     mean.add({"weight": torch.tensor([value])}, "a member")
        >>> mean.weights()
        {'weight': tensor([2.])}
    """

    def __init__(self) -> None:
        self.count = 0
        self._means: dict[str, Tensor] = {}

    def add(self, state: State, what: str) -> None:
        """Take one more state in.

        Args:
            state: tensors by name; integer ones (counters) are kept from the first state.
            what: names the state in messages.

        Raises:
            PoolError: names or shapes differ from those of the states before.
        """
        if self.count == 0:
            self._means = {
                name: value.to(torch.float64, copy=True) if value.is_floating_point() else value
                for name, value in state.items()
            }
        elif state.keys() != self._means.keys():
            name = min(state.keys() ^ self._means.keys())
            raise PoolError(
                f"Weights cannot be averaged: {name!r} is not in all members ({what} differs). "
                "Give members of one architecture."
            )
        self.count += 1
        for name, mean in self._means.items():
            if state[name].shape != mean.shape:
                raise PoolError(
                    f"Weights cannot be averaged: {name!r} of {what} has shape "
                    f"{tuple(state[name].shape)}, others have {tuple(mean.shape)}. "
                    "Give members of one architecture."
                )
            if mean.is_floating_point() and self.count > 1:
                mean += (state[name].double() - mean) / self.count

    def weights(self) -> dict[str, Tensor]:
        """The mean so far, floating tensors as float32."""
        return {
            name: mean.float() if mean.is_floating_point() else mean
            for name, mean in self._means.items()
        }


@one_thread()
def uniform_soup(evaluator: PoolEvaluator, members: Sequence[int]) -> dict[str, Tensor]:
    """f(x; mean θ_i): the mean of the members' floating tensors, buffers included.

    Args:
        evaluator: of the pool.
        members: member numbers, at least one; integer buffers come from the first.

    Returns:
        One tensor per name, floating ones float32, averaged in float64.

    Raises:
        PoolError: names or shapes that differ between members.
        CheckpointError: an unreadable member.

    Source: Wortsman et al., arXiv:2203.05482, section 2.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> soup, first, second = (uniform_soup(evaluator, some) for some in ([0, 1], [0], [1]))
        >>> mean = (first["head.weight"] + second["head.weight"]) / 2
        >>> torch.allclose(soup["head.weight"], mean)
        True
    """
    mean = RunningMean()
    for member in members:
        mean.add(evaluator.weights(member), f"member {member}")
    return mean.weights()


def _batchnorms(module: nn.Module) -> dict[str, Any]:
    """BatchNorm layers that keep running statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


def has_batchnorm(evaluator: PoolEvaluator) -> bool:
    """Whether the architecture keeps BatchNorm statistics, so that their handling is a choice.

    Raises:
        PoolError: the architecture cannot be built.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> has_batchnorm(PoolEvaluator(load_pool("digits-mlp-shared")))
        False
    """
    return bool(_batchnorms(evaluator.network.module))


@torch.no_grad()
def reestimate_batchnorm(evaluator: PoolEvaluator, weights: State) -> dict[str, Tensor]:
    """The same weights with BatchNorm statistics computed anew on the pool's training images.

    Only the BatchNorm layers run in training mode. Each batch weighs alike (batches are as even
    as can be), and variances are the unbiased ones that BatchNorm itself stores.

    Args:
        evaluator: of the pool; its own network stays as it is.
        weights: fill the architecture.

    Returns:
        `weights` but for running means, variances and counters; `weights` itself, copied, where
        there is no BatchNorm.

    Raises:
        PoolError: unfit weights or data, or fewer than two training images.

    Source: Izmailov et al., arXiv:1803.05407, section 3.2 (statistics of averaged weights).

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> weights = evaluator.weights(0)
        >>> reestimate_batchnorm(evaluator, weights).keys() == weights.keys()
        True
    """
    evaluator.network.check(weights)
    network = copy.deepcopy(evaluator.network.module)
    layers = _batchnorms(network)
    if not layers:
        return dict(weights)
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    images = evaluator.images("train")
    if len(images) < 2:
        raise PoolError(
            f"BatchNorm statistics need at least two training images; the data of pool "
            f"{evaluator.pool.name!r} hold {len(images)}. Average the statistics instead."
        )
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average over the batches
        layer.train()
    for batch in images.chunk(math.ceil(len(images) / BATCH)):
        network(batch)
    buffers = {
        f"{name}.{buffer}": value
        for name, layer in layers.items()
        for buffer, value in layer.named_buffers(recurse=False)
    }
    return {**weights, **buffers}


def soup_weights(
    evaluator: PoolEvaluator, members: Sequence[int], statistics: Statistics = "average"
) -> dict[str, Tensor]:
    """The uniform soup with its BatchNorm statistics averaged or re-estimated.

    Raises:
        MergeScopeError: as :func:`uniform_soup` and :func:`reestimate_batchnorm`.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> tuple(soup_weights(evaluator, [0, 1, 2], "reestimate")["head.weight"].shape)
        (10, 64)
    """
    weights = uniform_soup(evaluator, members)
    return reestimate_batchnorm(evaluator, weights) if statistics == "reestimate" else weights


def soup_outputs(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    split: PoolSplit,
    statistics: Statistics = "average",
) -> Outputs:
    """Features and logits of the uniform soup; a set of members is run at most once.

    Args:
        evaluator: of the pool.
        members: in any order. One alone is run as it is, with the statistics of its training:
            there is nothing to average.
        split: which images.
        statistics: what happens to BatchNorm; without BatchNorm both are the same.

    Raises:
        MergeScopeError: unfit members or data.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> soup_outputs(evaluator, [0, 1, 2], "test").logits.shape
        torch.Size([500, 10])
    """
    chosen = tuple(sorted(members))
    if len(chosen) == 1:
        return evaluator.member(chosen[0], split)
    if not has_batchnorm(evaluator):
        statistics = "average"
    digests = (evaluator.pool.member(member).digest for member in chosen)
    return evaluator.merge(
        digest_of("uniform soup", statistics, *digests),
        lambda: soup_weights(evaluator, chosen, statistics),
        split,
    )


def predict_classes(logits: Tensor) -> np.ndarray:
    """Predicted classes (int64, N); :data:`UNDECIDED` where a logit is not finite.

    Args:
        logits: N x classes.

    Example:
        >>> predict_classes(torch.tensor([[0.0, 2.0], [1.0, 0.0], [float("nan"), 1.0]])).tolist()
        [1, 0, -1]
    """
    classes = logits.argmax(dim=1)
    classes[~torch.isfinite(logits).all(dim=1)] = UNDECIDED
    return classes.numpy()


def accuracy_of(evaluator: PoolEvaluator, logits: Tensor, split: PoolSplit) -> float:
    """Share of a split's images that are classified correctly; undecided ones are not.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> accuracy_of(evaluator, evaluator.member(0, "test").logits, "test") > 0.8
        True
    """
    return float(np.mean(predict_classes(logits) == evaluator.labels(split)))


def rank_by_validation(evaluator: PoolEvaluator, members: Sequence[int]) -> list[tuple[int, float]]:
    """Members with their accuracy on the validation split, best first, ties by number.

    Raises:
        MergeScopeError: unfit members or data.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-linear"))
        >>> (_, first), (_, second) = rank_by_validation(evaluator, [0, 11])
        >>> first >= second
        True
    """
    scored = [
        (member, accuracy_of(evaluator, evaluator.member(member, "val").logits, "val"))
        for member in members
    ]
    return sorted(scored, key=lambda entry: (-entry[1], entry[0]))


def greedy_soup(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    statistics: Statistics = "average",
    progress: Progress | None = None,
) -> tuple[tuple[int, ...], pd.DataFrame]:
    """Members joined from the best on, each kept unless the soup gets worse on validation.

    Args:
        evaluator: of the pool.
        members: in any order.
        statistics: what happens to BatchNorm in every candidate.
        progress: told after each member.

    Returns:
        The members kept, in the order in which they joined, and the trace, one row per member:
        step (from 1), member, member_accuracy, accuracy (of the candidate soup, with this
        member), kept. Accuracies are shares of the validation images.

    Raises:
        MergeScopeError: unfit members or data.
        Cancelled: by `progress`.

    Source: Wortsman et al., arXiv:2203.05482, recipe 1.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> kept, trace = greedy_soup(PoolEvaluator(load_pool("digits-mlp-shared")), [0, 1, 2])
        >>> list(kept) == trace[trace["kept"]]["member"].tolist()
        True
    """
    kept: tuple[int, ...] = ()
    best = -1.0
    rows = []
    for step, (member, own) in enumerate(rank_by_validation(evaluator, members), start=1):
        candidate = (*kept, member)
        logits = soup_outputs(evaluator, candidate, "val", statistics).logits
        accuracy = accuracy_of(evaluator, logits, "val")
        joins = accuracy >= best
        if joins:
            kept, best = candidate, accuracy
        rows.append((step, member, own, accuracy, joins))
        if progress is not None:
            progress.step(step, len(members), f"greedy soup, member {member}")
    columns = ["step", "member", "member_accuracy", "accuracy", "kept"]
    return kept, pd.DataFrame(rows, columns=columns)


@one_thread()
def mean_norms(evaluator: PoolEvaluator, members: Sequence[int]) -> dict[str, float]:
    """Mean Frobenius norm over members of every parameter (no buffers), in float64.

    Raises:
        MergeScopeError: an unreadable member, or one that does not fill the architecture.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> list(mean_norms(PoolEvaluator(load_pool("digits-mlp-shared")), [0, 1]))
        ['hidden.0.weight', 'hidden.1.weight', 'head.weight']
    """
    names = [name for name, _ in evaluator.network.module.named_parameters()]
    norms = dict.fromkeys(names, 0.0)
    for member in members:
        weights = evaluator.weights(member)
        evaluator.network.check(weights)
        for name in names:
            norms[name] += float(weights[name].double().norm()) / len(members)
    return norms


@one_thread()
def restore_norms(weights: State, norms: Mapping[str, float]) -> dict[str, Tensor]:
    """Weights with each tensor rescaled to a given norm: a soup of the members' magnitude.

    Args:
        weights: of a soup.
        norms: Frobenius norm by tensor name, as of :func:`mean_norms`: all parameters, biases
            and norm scales among them. What it does not name (running statistics) stays, and so
            does a tensor of zeros.

    Example:
        >>> restore_norms({"weight": torch.tensor([3.0, 4.0])}, {"weight": 10.0})
        {'weight': tensor([6., 8.])}
    """
    restored = dict(weights)
    for name, target in norms.items():
        own = float(weights[name].double().norm())
        if own > 0:
            restored[name] = (weights[name].double() * (target / own)).to(weights[name].dtype)
    return restored
