"""Rank and scale from inputs without their labels."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import Split
from analysis.rank_selection.adaptive import adaptive_search
from analysis.rank_selection.scores import SCORES, usable_scores
from analysis.rank_selection.space import SearchSpace
from merge_core.merging.engine import MergeSession
from merge_core.progress import Progress

INPUT_PROXIES: tuple[str, ...] = tuple(
    name
    for name, score in SCORES.items()
    if score.reference != "labels" and name != "cross_entropy"
)
"""The scores that read no label; of a language model its texts are the labels."""


def recommend_from_inputs(
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator,
    seed: int = 0,
    split: Split = "val",
    proxies: Sequence[str] = INPUT_PROXIES,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The setting that each proxy finds best, by the adaptive search of that proxy's score.

    Args:
        space: the settings.
        session: the merges.
        evaluator: where outputs are kept.
        seed: of the searches.
        split: whose inputs.
        proxies: names of :data:`INPUT_PROXIES`.
        progress: reports each proxy.

    Returns:
        One row per proxy: proxy, title, rank, scale (NaN where the method has none), why, source,
        images (forward images that its search asked for, run now or known before).

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: inside a search.
    """
    progress = progress or Progress()
    rows = []
    usable = usable_scores(evaluator)
    proxies = [name for name in proxies if name in usable]
    for done, name in enumerate(proxies):
        score = SCORES[name]
        progress.step(done, len(proxies), score.title)
        inner = Progress(cancel=progress.cancel)
        search = adaptive_search(
            space, session, evaluator, score=name, split=split, seed=seed, progress=inner
        )
        rows.append(
            {
                "proxy": name,
                "title": score.title,
                "rank": search.rank,
                "scale": search.scale,
                "why": score.why,
                "source": score.source,
                "images": search.asked_images,
            }
        )
    progress.step(len(proxies), len(proxies), "proxies from inputs")
    frame = pd.DataFrame(
        rows, columns=["proxy", "title", "rank", "scale", "why", "source", "images"]
    )
    return frame.astype({"rank": float, "scale": float})
