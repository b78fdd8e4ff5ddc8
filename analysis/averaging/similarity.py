"""How alike the members' representations are, layer by layer: linear CKA."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.averaging.gaps import sample_indices
from analysis.networks.plain import PlainNetwork
from analysis.outputs.pool_outputs import PoolEvaluator, PoolSplit
from merge_core.executors.base import one_thread
from merge_core.executors.local import Threads
from merge_core.progress import Progress

MOST_INNER = 6
FEATURES, LOGITS = "features", "logits"


def layers_of(evaluator: PoolEvaluator) -> tuple[str, ...]:
    """Layers to compare, from input to output: at most six inner ones, features and logits.

    Inner layers are the affine layers of plain networks (before their rectifier) and the stages
    or blocks that timm names in ``feature_info``, evenly thinned.

    Raises:
        PoolError: the architecture cannot be built.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> layers_of(PoolEvaluator(load_pool("digits-mlp-shared")))
        ('hidden.0', 'hidden.1', 'features', 'logits')
    """
    module: Any = evaluator.network.module
    if isinstance(module, PlainNetwork):
        inner = [name for name, _ in module.affine_layers()]
    else:
        inner = [str(entry["module"]) for entry in getattr(module, "feature_info", ())]
    known = {name for name, _ in module.named_modules()} - {evaluator.network.head_name}
    inner = [name for name in inner if name in known]
    indices = np.linspace(0, len(inner) - 1, min(len(inner), MOST_INNER)).round().astype(int)
    return (*(inner[i] for i in indices), FEATURES, LOGITS)


def centred_gram(activations: Tensor) -> Tensor:
    """H X Xᵀ H scaled to norm 1: what linear CKA needs of a layer; float64, N x N.

    Linear CKA of two layers, ‖Yᵀ X‖_F² / (‖Xᵀ X‖_F ‖Yᵀ Y‖_F) with columns centred, is the sum of
    products of their entries. It ignores rotations and isotropic scaling of either layer.

    Args:
        activations: N images x anything; further axes are flattened.

    Returns:
        A matrix of zeros for activations that do not vary over images.

    Source: Kornblith et al., arXiv:1905.00414, equations 3 and 4, linear kernel.

    Example:
        >>> X = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
        >>> turned = X @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
        >>> round(float((centred_gram(X) * centred_gram(3 * turned)).sum()), 4)  # CKA
        1.0
    """
    values = activations.flatten(1).double()
    values = values - values.mean(dim=0)
    gram = values @ values.T
    norm = gram.norm()
    return gram / norm if norm > 0 else gram


@one_thread()
def cka_frame(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    split: PoolSplit = "test",
    limit: int = 256,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Linear CKA of every layer between every two members.

    Biased, as in the paper: on small trained networks and 256 images this raises values by at most
    0.01, and unrelated activations (images shuffled) have up to 0.06, not 0.

    Args:
        evaluator: of the pool.
        members: member numbers.
        split: which images.
        limit: the number of images (see :func:`analysis.averaging.gaps.sample_indices`).
        progress: told after each member.

    Returns:
        One row per layer and ordered pair of members: layer, depth (from 0), first, second
        (member numbers), cka (NaN where a layer's activations are not finite).

    Raises:
        MergeScopeError: unfit members or data.
        Cancelled: by `progress`.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> frame = cka_frame(PoolEvaluator(load_pool("digits-mlp-shared")), [0, 1], limit=50)
        >>> itself = frame[frame["first"] == frame["second"]]
        >>> itself["cka"].round(3).unique().tolist()
        [1.0]
    """
    indices = sample_indices(len(evaluator.labels(split)), limit)
    images = evaluator.images(split)[indices]
    layers = layers_of(evaluator)

    def grams_of(member: int) -> list[Tensor]:
        outputs = evaluator.member(member, split)
        held = {FEATURES: outputs.features[indices], LOGITS: outputs.logits[indices]}
        held |= _activations(evaluator, member, [n for n in layers if n not in held], images)
        return [centred_gram(held[layer]) for layer in layers]

    grams: list[list[Tensor]] = []
    found = Threads().map(grams_of, members)
    for done, (member, own) in enumerate(zip(members, found, strict=True), start=1):
        grams.append(own)
        if progress is not None:
            progress.step(done, len(members), f"layers of member {member}")
    rows = []
    for depth, layer in enumerate(layers):
        stacked = torch.stack([own[depth].flatten() for own in grams])
        values = (stacked @ stacked.T).tolist()
        rows += [
            (layer, depth, first, second, values[i][j])
            for i, first in enumerate(members)
            for j, second in enumerate(members)
        ]
    return pd.DataFrame(rows, columns=["layer", "depth", "first", "second", "cka"])


@torch.no_grad()
def _activations(
    evaluator: PoolEvaluator, member: int, layers: Sequence[str], images: Tensor
) -> dict[str, Tensor]:
    """Outputs of inner layers, of a copy of the network: other threads may run the evaluator's."""
    weights = evaluator.weights(member)
    network = copy.deepcopy(evaluator.network.module)
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    held: dict[str, Tensor] = {}
    for layer in layers:
        network.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: held.__setitem__(layer, output)
        )
    network(images)
    return held


def mean_cka(frame: pd.DataFrame) -> pd.DataFrame:
    """CKA over pairs of different members, per layer.

    Args:
        frame: of :func:`cka_frame`.

    Returns:
        One row per layer: layer, depth, mean, lowest, highest, pairs; empty for one member.

    Example:
        >>> frame = pd.DataFrame({"layer": "head", "depth": 0, "first": 0, "second": [1, 2]})
        >>> mean_cka(frame.assign(cka=[0.5, 1.0]))["mean"].tolist()
        [0.75]
    """
    pairs = frame[frame["first"] < frame["second"]]
    grouped = pairs.groupby(["layer", "depth"], sort=False)["cka"]
    return grouped.agg(mean="mean", lowest="min", highest="max", pairs="size").reset_index()
