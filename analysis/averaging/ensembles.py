"""Averages of a pool's weights, logits, probabilities or features, and how accurate each is.

φ is the input of the last linear layer, W and b are that layer. Members' outputs come from the
evaluator's store, so that only soups need a forward pass. Sums are float64. An image without
finite logits is never predicted: it counts as wrong, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.accuracy import wilson_interval
from analysis.averaging.soups import (
    UNDECIDED,
    Statistics,
    greedy_soup,
    predict_classes,
    rank_by_validation,
    soup_outputs,
)
from analysis.outputs.pool_outputs import PoolEvaluator, PoolSplit
from merge_core.progress import Progress

Rule = Literal[
    "individuals",
    "best_individual",
    "uniform_soup",
    "greedy_soup",
    "logit_ensemble",
    "probability_ensemble",
    "feature_ensemble_first_head",
    "feature_ensemble_averaged_head",
]
RULES: dict[Rule, str] = {
    "individuals": "individuals (mean)",
    "best_individual": "best individual (by validation)",
    "uniform_soup": "uniform soup",
    "greedy_soup": "greedy soup",
    "logit_ensemble": "logit ensemble",
    "probability_ensemble": "probability ensemble",
    "feature_ensemble_first_head": "feature ensemble, first head",
    "feature_ensemble_averaged_head": "feature ensemble, averaged head",
}
# These run every member on every image; the others run one model.
ENSEMBLES: tuple[Rule, ...] = tuple(rule for rule in RULES if "ensemble" in rule)


class _Sums:
    """Running sums over members, so that an ensemble of one more member reads only that one."""

    def __init__(self, evaluator: PoolEvaluator, split: PoolSplit) -> None:
        self._evaluator = evaluator
        self._split = split
        self.count = 0

    def add(self, member: int) -> None:
        outputs = self._evaluator.member(member, self._split)
        features, logits = outputs.features.double(), outputs.logits.double()
        weight, bias = head(self._evaluator, member)
        shares = torch.log_softmax(logits, dim=1)
        if self.count == 0:
            self._first = weight, bias
            self._logits, self._features, self._shares = logits, features, shares
            self._weight, self._bias = weight, bias
        else:
            self._logits = self._logits + logits
            self._features = self._features + features
            self._shares = torch.logaddexp(self._shares, shares)
            self._weight, self._bias = self._weight + weight, self._bias + bias
        self.count += 1

    def logits(self, rule: Rule) -> Tensor:
        """N x classes of an ensemble of the members so far."""
        n = self.count
        if rule == "logit_ensemble":
            return self._logits / n
        if rule == "probability_ensemble":
            return self._shares - np.log(n)
        if rule == "feature_ensemble_first_head":
            weight, bias = self._first
            return self._features / n @ weight.T + bias
        return self._features / n @ (self._weight / n).T + self._bias / n


def head(evaluator: PoolEvaluator, member: int) -> tuple[Tensor, Tensor]:
    """A member's last layer: weight (classes x width) and bias (classes, zeros if none), float64.

    Only these two tensors are read.

    Raises:
        MergeScopeError: an unreadable file, or one without that layer.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> weight, bias = head(PoolEvaluator(load_pool("digits-mlp-shared")), 0)
        >>> tuple(weight.shape), float(bias.abs().max())
        ((10, 64), 0.0)
    """
    checkpoint = evaluator.pool.member(member)
    name = evaluator.network.head_name
    weight = checkpoint.tensor(f"{name}.weight").double()
    bias = f"{name}.bias"
    zeros = torch.zeros(len(weight), dtype=torch.float64)
    return weight, checkpoint.tensor(bias).double() if bias in checkpoint else zeros


def rule_logits(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    rule: Rule,
    split: PoolSplit,
    statistics: Statistics = "average",
) -> Tensor:
    """Logits of a rule for the images of a split.

    Args:
        evaluator: of the pool.
        members: member numbers; their order matters only to the first head.
        rule: any of :data:`RULES` but ``individuals``, which are many models.
        split: which images; choices are made on validation whatever this is.
        statistics: what happens to BatchNorm in soups.

    Returns:
        float64, N x classes; log probabilities for the probability ensemble.

    Raises:
        ValueError: for ``individuals``.
        MergeScopeError: unfit members or data.

    Source: Rethinking Weight-Averaged Model-merging, arXiv:2411.09263, section 4; the features
    are taken after the final norm.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> logits = rule_logits(evaluator, [0, 1], "logit_ensemble", "test")
        >>> each = [evaluator.member(i, "test").logits.double() for i in (0, 1)]
        >>> torch.allclose(logits, sum(each) / 2)
        True
    """
    if rule == "individuals":
        raise ValueError("individuals are many models, which have no joint logits")
    if rule in ENSEMBLES:
        sums = _Sums(evaluator, split)
        for member in members:
            sums.add(member)
        return sums.logits(rule)
    used = _members_of_rule(evaluator, members, rule, statistics)
    return soup_outputs(evaluator, used, split, statistics).logits.double()


def _members_of_rule(
    evaluator: PoolEvaluator, members: Sequence[int], rule: Rule, statistics: Statistics
) -> tuple[int, ...]:
    """The members that a rule's predictions rest on."""
    if rule == "best_individual":
        return (rank_by_validation(evaluator, members)[0][0],)
    if rule == "greedy_soup":
        return greedy_soup(evaluator, members, statistics)[0]
    return tuple(members)


def rules_frame(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    split: PoolSplit = "test",
    statistics: Statistics = "average",
    rules: Sequence[Rule] = tuple(RULES),
) -> pd.DataFrame:
    """Accuracy of every rule on one split.

    Args:
        evaluator: of the pool.
        members: member numbers; the first one gives the first head.
        split: which images.
        statistics: what happens to BatchNorm in soups.
        rules: only these; greedy soups take up to one forward pass per member on validation.

    Returns:
        One row per rule: rule, label, accuracy, low, high (shares; Wilson 95 %), correct,
        images, passes (forward passes per image), models (members that the rule rests on),
        non_finite (images without finite logits), worst, best (lowest and highest accuracy of a
        single member; NaN but for individuals). For individuals accuracy and correct are means
        over members, the interval is that of one model with this mean, and non_finite counts
        images where any member gives no finite logits.

    Raises:
        MergeScopeError: unfit members or data.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> frame = rules_frame(evaluator, [0, 1, 2], rules=["uniform_soup", "logit_ensemble"])
        >>> frame[["label", "passes"]].values.tolist()
        [['uniform soup', 1], ['logit ensemble', 3]]
    """
    sums = _Sums(evaluator, split)
    for member in members:
        sums.add(member)
    return _frame(evaluator, members, split, statistics, rules, sums)


def accuracy_over_members(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    split: PoolSplit = "test",
    statistics: Statistics = "average",
    rules: Sequence[Rule] = tuple(RULES),
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Accuracy of every rule for the first n of the chosen members, n = 1 to all.

    The greedy soup, which takes a validation pass for each member that it tries, is made of all
    of them only.

    Args:
        evaluator: of the pool.
        members: member numbers, in the order in which they come in.
        split: which images.
        statistics: what happens to BatchNorm in soups.
        rules: only these.
        progress: told after each n.

    Returns:
        The columns of :func:`rules_frame` after n; no greedy soup but at the last n.

    Raises:
        MergeScopeError: unfit members or data.
        Cancelled: by `progress`.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> accuracy_over_members(evaluator, [0, 1, 2], rules=["uniform_soup"])["n"].tolist()
        [1, 2, 3]
    """
    sums = _Sums(evaluator, split)
    parts = []
    for n, member in enumerate(members, start=1):
        sums.add(member)
        some = rules if n == len(members) else [rule for rule in rules if rule != "greedy_soup"]
        part = _frame(evaluator, members[:n], split, statistics, some, sums)
        part.insert(0, "n", n)
        parts.append(part)
        if progress is not None:
            progress.step(n, len(members), f"{n} of {len(members)} members")
    return pd.concat(parts, ignore_index=True)


def _frame(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    split: PoolSplit,
    statistics: Statistics,
    rules: Sequence[Rule],
    sums: _Sums,
) -> pd.DataFrame:
    labels = evaluator.labels(split)
    rows = []
    for rule in rules:
        used = _members_of_rule(evaluator, members, rule, statistics)
        if rule == "individuals":
            each = np.stack([predict_classes(evaluator.member(m, split).logits) for m in members])
        elif rule in ENSEMBLES:
            each = predict_classes(sums.logits(rule))[None]
        else:
            each = predict_classes(soup_outputs(evaluator, used, split, statistics).logits)[None]
        hits = (each == labels).sum(axis=1)
        correct = float(hits.mean())
        low, high = wilson_interval(np.array(correct), np.array(len(labels)))
        single = hits / len(labels) if rule == "individuals" else np.array([np.nan])
        rows.append(
            {
                "rule": rule,
                "label": RULES[rule],
                "accuracy": correct / len(labels),
                "low": float(low),
                "high": float(high),
                "correct": correct,
                "images": len(labels),
                "passes": len(members) if rule in ENSEMBLES else 1,
                "models": len(used),
                "non_finite": int((each == UNDECIDED).any(axis=0).sum()),
                "worst": float(single.min()),
                "best": float(single.max()),
            }
        )
    return pd.DataFrame(rows)


def agreement(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    split: PoolSplit = "test",
    statistics: Statistics = "average",
) -> pd.DataFrame:
    """How often members, their soup and their logit ensemble predict alike.

    Returns:
        One row per ordered pair: first, second (``member 0``, ..., ``uniform soup``,
        ``logit ensemble``), agreement (share of equal predictions; an image without finite
        logits agrees with nothing), error_overlap (of the images that either gets wrong, the
        share that both get wrong; NaN where neither errs).

    Raises:
        MergeScopeError: unfit members or data.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> frame = agreement(PoolEvaluator(load_pool("digits-mlp-shared")), [0])
        >>> frame["first"].unique().tolist(), frame["agreement"].unique().tolist()
        (['member 0', 'uniform soup', 'logit ensemble'], [1.0])
    """
    classes = {f"member {m}": predict_classes(evaluator.member(m, split).logits) for m in members}
    for rule in ("uniform_soup", "logit_ensemble"):
        joint = rule_logits(evaluator, members, rule, split, statistics)
        classes[RULES[rule]] = predict_classes(joint)
    labels = evaluator.labels(split)
    rows = []
    for first, a in classes.items():
        for second, b in classes.items():
            either = int(((a != labels) | (b != labels)).sum())
            both = int(((a != labels) & (b != labels)).sum())
            alike = float(np.mean((a == b) & (a != UNDECIDED)))
            rows.append((first, second, alike, both / either if either else np.nan))
    return pd.DataFrame(rows, columns=["first", "second", "agreement", "error_overlap"])
