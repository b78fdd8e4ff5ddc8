"""What rules that look at each matrix alone, or share a budget out, keep of every matrix."""

from __future__ import annotations

import pandas as pd

from analysis.rank_selection.allocation import ALLOCATIONS, allocate, uniform_ranks
from analysis.rank_selection.space import SearchSpace
from analysis.rank_selection.weight_proxies import layer_ranks
from merge_core.progress import Progress
from merge_core.task_vectors import TensorGroups


def ranks_per_layer(
    groups: TensorGroups, space: SearchSpace, share: float, progress: Progress | None = None
) -> pd.DataFrame:
    """Directions of each matrix by every rule, beside the same share everywhere.

    Args:
        groups: the suite's parameters; those not decomposed are passed over.
        space: a method with a rank.
        share: the uniform share, and the budget of the allocations, in (0, 1].
        progress: told after each matrix of each pass.

    Returns:
        One row per rule and matrix: rule (title), kind (``budget``: in the storage of the uniform
        share; ``own``: each matrix by its own spectrum, whatever it takes), parameter, rank
        (directions), share (of the matrix's directions).

    Raises:
        SuiteError: origin "base" without a base.
        Cancelled: by `progress`.

    Example:
        >>> from analysis.rank_selection.space import search_space
        >>> suite, tasks = load_suite("vision"), ["digits", "letters", "dots"]
        >>> groups = TensorGroups(suite, tasks, FactorStore())
        >>> groups.members = [g for g in groups.members if g.name == "blocks.0.attn.proj.weight"]
        >>> space = search_space("cart", "vision", groups.tasks)
        >>> frame = ranks_per_layer(groups, space, share=0.08)
        >>> frame[frame["kind"] == "budget"]["rank"].tolist()  # one matrix takes the whole budget
        [20, 20, 20]
    """
    origin = space.base.run(groups.tasks).origin
    own = layer_ranks(groups, space, progress).assign(kind="own")
    full = uniform_ranks(groups, 1.0)
    rows = [
        (title, "budget", parameter, k, k / full[parameter])
        for name, (title, _) in ALLOCATIONS.items()
        for parameter, k in allocate(groups, origin, share, name, progress).items()
    ]
    columns = ["rule", "kind", "parameter", "rank", "share"]
    budget = pd.DataFrame(rows, columns=columns)
    return pd.concat([budget, own.rename(columns={"title": "rule"})[columns]], ignore_index=True)
