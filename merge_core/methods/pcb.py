"""PCB-Merging: parameters compete by size within a task and by agreement across tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from merge_core.errors import RecipeError
from merge_core.methods.blockwise import merge_entrywise
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.methods.selection import Passes, as_it_is, count_kept, kth_largest, sum_pairs
from merge_core.progress import Progress
from merge_core.task_vectors import TensorGroup, TensorGroups

TAIL = 1e-4  # the share that the authors' code clips at either end of the magnitudes
TIED = 2.0**-48  # scores that differ by less, relative to the threshold, are rounding apart


class PcbParameters(MethodParameters):
    """Parameters of PCB-Merging."""

    variant: Literal["paper", "code"] = parameter(
        "paper",
        "The paper's balancing (softmax over the model) or the one of the authors' code "
        "(exponential times tanh, tails clipped, weights from the score above the threshold).",
    )
    density: float = parameter(
        0.1,
        "Share r of the entries of each task vector that stay, those of the highest score over "
        "the whole model.",
        minimum=0.001,
        maximum=1.0,
        typical="0.05 to 0.2; 0.1 in the authors' vision code, 0.05 in its search",
        show=(0.01, 1),
    )
    scale: float = parameter(
        1.2,
        "Scaling coefficient λ of the merged task vector; per-task weights multiply it.",
        minimum=-10,
        maximum=10,
        typical="0.8 to 1.3 in the authors' search, starting from 1 to 1.2",
        show=(0, 3),
    )


Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Balance:
    """What PCB measures over the whole model, and the settings that it was measured for.

    Attributes:
        variant, density: of the recipe.
        score: of a block of task vectors (T x n), how each entry competes; all in float64, as an
            outlier among the entries leaves the scores of the others close together.
        threshold, most: T scores: the smallest kept, and the largest.
        alive: T, whether a task vector is not zero; one that is takes no part.
        clip: T x 2, the magnitudes between which the code's variant clips; None for the paper's.
    """

    variant: str
    density: float
    score: Score
    threshold: Tensor
    most: Tensor
    alive: Tensor
    clip: Tensor | None


def _unit(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(x − low) / (high − low) of each row of x, 0 where nothing lies between."""
    between = high - low
    step = torch.where(between > 0, between, torch.inf)
    return (values - low[:, None]) / step[:, None]


def _pairs(tau: Tensor) -> Iterator[tuple[int, Tensor]]:
    """For each task i, the products τ_i τ_j with the tasks j ≥ i: those before have them already.

    A product is made once for both of its tasks, as all that is made of it is.
    """
    for i, vector in enumerate(tau):
        yield i, vector * tau[i:]


def _exponentials(
    tau: Tensor, low: Tensor, high: Tensor, subtracted: Tensor | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each task i, exp(T (Norm(τ_i²) − 1)) as n, and exp(Norm(τ_i τ_j) − subtracted_ij).

    The second as (T − i) x n, for the tasks j ≥ i. A softmax does not see the constant e^(−T),
    which keeps many tasks from overflowing.

    Args:
        tau: T x n.
        low, high: T x T, of each product over the whole model; symmetric.
        subtracted: T x T, symmetric; zeros when None.
    """
    between = high - low
    slope = torch.where(between >= torch.finfo(low.dtype).tiny, 1 / between, 0.0)
    for i, products in _pairs(tau):
        # Near numbers are subtracted before they are stretched.
        unit = products.sub_(low[i, i:, None]).mul_(slope[i, i:, None])
        own = (len(tau) * (unit[0] - 1)).exp_()
        yield i, own, (unit if subtracted is None else unit.sub_(subtracted[i, i:, None])).exp_()


def _paper_score(tau: Tensor, low: Tensor, high: Tensor, intra: Tensor, inter: Tensor) -> Tensor:
    """β of a block: softmax(T Norm(τ²)) · Σ_j softmax(Norm(τ_i τ_j)), both times the entries D.

    Args:
        tau: T x n.
        low, high: T x T, of each product over the whole model.
        intra, inter: T and T x T means of the exponentials over the whole model: a softmax
            divides by the sum, D times as much, and that factor cancels in the weighted mean.
    """
    balance, others = torch.empty_like(tau), torch.zeros_like(tau)
    for i, own, pairs in _exponentials(tau, low, high, inter.log()):
        torch.div(own, intra[i], out=balance[i])
        others[i] += pairs.sum(dim=0)
        others[i + 1 :] += pairs[1:]
    return balance.mul_(others)


def _code_score(tau: Tensor, clip: Tensor) -> Tensor:
    """exp(T · minmax(|τ|)² − T) · tanh(τ_i Σ_j τ_j) of a block, with clipped magnitudes."""
    own = _unit(_clip(tau, clip).abs(), clip[:, 0], clip[:, 1])
    return (len(tau) * (own**2 - 1)).exp() * (tau * tau.sum(dim=0)).tanh()


def _clip(tau: Tensor, clip: Tensor) -> Tensor:
    return tau.sign() * tau.abs().clamp(clip[:, :1], clip[:, 1:])


def _paper_balance(passes: Passes, density: float) -> Balance:
    tasks = passes.tasks
    low = torch.full((tasks, tasks), torch.inf, dtype=torch.float64)
    high = -low

    def extremes(tau: Tensor) -> Tensor:
        found = low.new_empty(2, tasks, tasks)
        for i, products in _pairs(tau):
            found[:, i, i:] = found[:, i:, i] = torch.stack(products.aminmax(dim=1))
        return found

    def take_outermost(parts: list[Tensor]) -> Tensor:
        least, most = torch.stack(parts, dim=1)
        return torch.stack((least.amin(dim=0), most.amax(dim=0)))

    for least, most in passes.run("products", extremes, take_outermost):
        low, high = torch.minimum(low, least), torch.maximum(high, most)
    intra = torch.zeros(tasks, dtype=torch.float64)
    inter = torch.zeros_like(low)

    def sums(tau: Tensor) -> tuple[Tensor, Tensor]:
        intra, inter = low.new_empty(tasks), torch.empty_like(low)
        for i, own, pairs in _exponentials(tau, low, high):
            intra[i] = own.sum()
            inter[i, i:] = inter[i:, i] = pairs.sum(dim=1)
        return intra, inter

    for own, pairs in passes.run("sums of exponentials", sums, sum_pairs):
        intra += own / passes.entries
        inter += pairs / passes.entries
    score = partial(_paper_score, low=low, high=high, intra=intra, inter=inter)
    ranks = (count_kept(density, passes.entries), 1)
    threshold, most = kth_largest(passes, score, ranks, "scores").unbind(dim=1)
    return Balance("paper", density, score, threshold, most, high.diagonal() > 0, None)


def _code_balance(passes: Passes, density: float) -> Balance:
    count = passes.entries
    # The authors' places in ascending order, turned into ranks from the largest.
    positions = (int(count * TAIL), int(count * (1 - TAIL) - 1), count - 1)
    found = kth_largest(passes, torch.abs, [count - p for p in positions], "magnitudes")
    clip, greatest = found[:, :2], found[:, 2]
    score = partial(_code_score, clip=clip)
    ranks = (count - min(int(count * (1 - density)), count - 1), 1)
    threshold, most = kth_largest(passes, score, ranks, "scores").unbind(dim=1)
    return Balance("code", density, score, threshold, most, greatest > 0, clip)


def measure(
    groups: TensorGroups, parameters: PcbParameters, run: Run, progress: Progress
) -> Balance:
    """The whole-model statistics of either variant, in four passes; fewer of a small model.

    Args:
        groups: all parameters.
        parameters: the method's parameters.
        run: the task vectors' origin; per-task weights come in after the balancing.
        progress: reports each parameter of each pass.
    """
    paper = parameters.variant == "paper"
    plain, selections = (2, 1) if paper else (0, 2)
    passes = Passes(groups, run.origin, as_it_is, progress, plain, selections, torch.float64)
    return (_paper_balance if paper else _code_balance)(passes, parameters.density)


def _merge_block(tau: Tensor, balance: Balance, run: Run) -> Tensor:
    """Σ λ_t β_t τ_t / Σ β_t of a block: T x n to n; zero where no entry is kept."""
    score = balance.score(tau)
    kept = score >= (balance.threshold - TIED * balance.threshold.abs())[:, None]
    if balance.clip is None:
        weight, least = score * kept.to(score.dtype), torch.finfo(torch.float64).tiny
    else:
        tau, least = _clip(tau, balance.clip), 1e-12  # the authors' floor
        above = _unit(score, balance.threshold, balance.most)
        tied = (balance.most == balance.threshold)[:, None]  # a single entry is kept, or equals
        weight = torch.where(tied, kept.to(score.dtype), above.clamp_min(0))
    weight = weight * balance.alive[:, None]
    return (run.apply_weights(tau) * weight).sum(dim=0) / weight.sum(dim=0).clamp_min(least)


def merge(group: TensorGroup, parameters: PcbParameters, run: Run) -> Tensor:
    """θ_0 + λ τ_m of one parameter."""
    balance = run.state
    if (balance.variant, balance.density) != (parameters.variant, parameters.density):
        raise RecipeError(
            "PCB-Merging ranks entries over the whole model, so that an override can change its "
            "scale but neither its variant nor its density."
        )

    def update(tau: Tensor, _: slice) -> Tensor:
        return parameters.scale * _merge_block(tau, balance, run)

    # Weights come in after the balancing.
    return merge_entrywise(group, replace(run, weights=()), update, torch.float64)


METHOD = Method(
    name="pcb",
    title="PCB-Merging",
    order=14,
    summary="Scores every entry of every task vector by its size within the task and by its "
    "agreement with the other tasks, keeps the entries of the highest score, and averages them "
    "weighted by it.",
    formula=r"\theta = \theta_0 + \lambda \frac{\sum_t w_t \hat\beta_t \odot \tau_t}"
    r"{\sum_t \hat\beta_t},\quad \hat\beta_t = \mathrm{top}_r(\beta_t),\; \beta_t = "
    r"\mathrm{softmax}(T\, \mathrm{Norm}(\tau_t^2)) \odot "
    r"\textstyle\sum_s \mathrm{softmax}(\mathrm{Norm}(\tau_t \odot \tau_s))",
    source="Du et al., Parameter competition balancing for model merging, arXiv:2410.02396, "
    "section 3",
    parameters=PcbParameters,
    merge=merge,
    origins=("base",),
    weighted=True,
    deviations="Softmax, Norm and top r run over all parameters of the model as one vector; Norm "
    "is min-max, as in the authors' code. The variant 'code' is their pcb-merging.py: "
    "β = exp(T·minmax(|τ|)²)·tanh(τ_t Σ_s τ_s), magnitudes clipped at 0.01 % of either end, "
    "weights minmax(max(β, threshold)); its tanh depends on the unit of the weights. Scores are "
    "computed and ranked in float64 (float32 in their code), and equal to the smallest kept one "
    "are kept too. Per-task weights are given, not searched. A zero task vector takes no part (0/0 "
    "in their code).",
    prepare=measure,
    revisions={"base": 1},
)
