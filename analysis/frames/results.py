"""Results that are more than one frame, in the form in which they are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparison.run import OWN, SEARCHED, Comparison, label_of
from analysis.frames.entries import Kept
from analysis.metrics import ACCURACY, Metric, metric_of
from analysis.rank_selection.select import Selection, SelectionOptions, recipe_at
from analysis.rank_selection.space import SearchSpace
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.methods import get_method

# How settings of a comparison come about, in the words of :mod:`analysis.comparison.run`.
CHOSEN = re.compile(
    r"default( \(not tuned\)| \(nothing to tune\))?|best of \d+ on validation|"
    rf"{SEARCHED}|{OWN}"
)

FirstResult = tuple[dict[str, tuple[Recipe, bool]], pd.DataFrame]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _read_number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def pack_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe without its suite and tasks, which are those that a question is asked of."""
    return recipe.model_dump(mode="json", exclude={"suite", "tasks", "inputs"})


def unpack_recipe(document: Mapping[str, Any], suite: str, tasks: Sequence[str]) -> Recipe:
    """The recipe on a suite, as it is called here, and tasks.

    Raises:
        RecipeError: it is none.
    """
    return make_recipe({**document, "suite": suite, "tasks": tuple(tasks)})


def pack_selection(found: Selection) -> Kept:
    """A selection; what only the run that found it took is left out."""
    frames = {"points": found.points, "curve": found.curve, "picks": found.picks}
    if found.accuracy is not None:
        frames["accuracy"] = found.accuracy.to_frame().T.astype(float)
    if found.report is not None:
        frames["report"] = found.report
    frames = {name: frame.reset_index(drop=True) for name, frame in frames.items()}
    values = {
        "rank": _number(found.rank),
        "scale": _number(found.scale),
        "rule": found.rule,
        "why": found.why,
        "score": found.score,
        "asked_images": int(found.asked_images),
        "grid_images": int(found.grid_images),
        "low_rank_bytes": None if found.low_rank_bytes is None else int(found.low_rank_bytes),
        "model_bytes": int(found.model_bytes),
    }
    return Kept(frames, values)


def unpack_selection(kept: Kept, space: SearchSpace, options: SelectionOptions) -> Selection:
    """The selection among the settings that were asked for."""
    frames, values = kept.frames, kept.values
    rank, scale = _read_number(values["rank"]), _read_number(values["scale"])
    if values["rule"] not in set(frames["picks"]["proxy"]):
        raise ValueError("a rule that picked nothing")
    accuracy = frames["accuracy"].iloc[0] if "accuracy" in frames else None
    return Selection(
        mode=options.mode,
        full_grid=options.exhaustive,
        space=space,
        recipe=recipe_at(space, rank, scale),
        rank=rank,
        scale=scale,
        rule=str(values["rule"]),
        why=str(values["why"]),
        accuracy=accuracy,
        report=frames.get("report"),
        points=frames["points"],
        curve=frames["curve"],
        score=str(values["score"]),
        picks=frames["picks"],
        asked_images=int(values["asked_images"]),
        grid_images=int(values["grid_images"]),
        forward_images=0,
        seconds=0.0,
        low_rank_bytes=None if space.ranks == () else int(values["low_rank_bytes"]),
        model_bytes=int(values["model_bytes"]),
    )


def pack_first(found: FirstResult) -> Kept:
    """The first result, and how each setting of it came about."""
    recipes, frame = found
    entries = [[pack_recipe(recipe), chosen] for recipe, chosen in recipes.values()]
    return Kept({"frame": frame}, {"recipes": entries})


def unpack_first(kept: Kept, suite: str, tasks: Sequence[str]) -> FirstResult:
    """The first result of a suite as it is called here."""
    recipes = {}
    for document, chosen in kept.values["recipes"]:
        recipe = unpack_recipe(document, suite, tasks)
        recipes[recipe.declaration.title] = (recipe, bool(chosen))
    if not set(kept.frames["frame"]["model"]) <= {"Base", "Experts", *recipes}:
        raise ValueError("a model that no recipe makes")
    return recipes, kept.frames["frame"]


def pack_comparison(found: Comparison) -> Kept:
    """A comparison; which images are right is a text of 0 and 1 for each label and task.

    Of other scores than hits it is a text of numbers, apart by spaces.
    """
    rows = [
        (label, task, _write_scores(vector))
        for label, by_task in found.hits.items()
        for task, vector in by_task.items()
    ]
    frames = {
        "hits": pd.DataFrame(rows, columns=["label", "task", "hits"]).astype("str"),
        "summary": found.summary,
        "seeds": found.seeds,
        "tasks": found.tasks,
        "experts": found.experts,
    }
    frames = {name: frame.reset_index(drop=True) for name, frame in frames.items()}
    recipes = [[label, pack_recipe(recipe)] for label, recipe in found.recipes.items()]
    return Kept(frames, {"recipes": recipes, "base": found.base})


def _write_scores(vector: np.ndarray) -> str:
    if vector.dtype == bool:
        return "".join("1" if hit else "0" for hit in vector)
    return " ".join(repr(float(value)) for value in vector)


def _read_scores(text: str, metric: Metric) -> np.ndarray:
    if metric is not ACCURACY:
        values = np.array([float(value) for value in text.split()])
        if not len(values) or not np.isfinite(values).all():
            raise ValueError("scores that are none")
        return values
    if set(text) - {"0", "1"}:
        raise ValueError("hits that are none")
    hits: np.ndarray = np.frombuffer(text.encode(), np.uint8) == ord("1")
    return hits


def unpack_comparison(kept: Kept, suite: str, tasks: Sequence[str]) -> Comparison:
    """The comparison of recipes on a suite as it is called here."""
    frames = kept.frames
    metric = metric_of(frames["tasks"])
    hits: dict[str, dict[str, np.ndarray]] = {}
    for label, task, text in frames["hits"].itertuples(index=False):
        hits.setdefault(label, {})[task] = _read_scores(text, metric)
    recipes = {
        label: unpack_recipe(document, suite, tasks) for label, document in kept.values["recipes"]
    }
    for label, recipe in recipes.items():
        title = recipe.declaration.title
        if label not in (title, f"{title}, seed {recipe.seed}", label_of(recipe)):
            raise ValueError("a label that is not its recipe's")
    summary = frames["summary"]
    if not all(CHOSEN.fullmatch(words) for words in summary["chosen"]):
        raise ValueError("settings that came about in no known way")
    labels = set(recipes)
    if not set(hits) == set(summary["label"]) == set(frames["tasks"]["label"]) == labels:
        raise ValueError("results of other recipes")
    base = kept.values["base"]
    return Comparison(
        hits,
        summary,
        frames["seeds"],
        frames["tasks"],
        recipes,
        frames["experts"],
        None if base is None else float(base),
    )


def join_comparisons(parts: Sequence[Comparison]) -> Comparison:
    """One comparison of what was compared apart, on the same images.

    Args:
        parts: of the same suite, tasks and images; at least one.

    Returns:
        The rows of all, the best first; of equal labels the first.
    """

    def stacked(name: str) -> pd.DataFrame:
        frames = [getattr(part, name) for part in parts]
        filled = [frame for frame in frames if len(frame)] or frames[:1]
        return pd.concat(filled, ignore_index=True)

    summary = stacked("summary").drop_duplicates("label")
    return Comparison(
        {label: hits for part in reversed(parts) for label, hits in part.hits.items()},
        metric_of(summary).rank(summary).reset_index(drop=True),
        stacked("seeds").drop_duplicates("title", ignore_index=True),
        stacked("tasks").drop_duplicates(["label", "task"], ignore_index=True),
        {label: recipe for part in parts for label, recipe in part.recipes.items()},
        parts[0].experts,
        parts[0].base,
    )


def default_recipe(name: str, suite: str, tasks: Sequence[str]) -> Recipe:
    """A method at its defaults."""
    return make_recipe({"suite": suite, "tasks": tuple(tasks), "method": get_method(name).name})
