"""Scores of settings: one number per input, the higher the better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import Split
from analysis.outputs.prediction_store import CLASSES
from analysis.outputs.suite_outputs import Images
from merge_core.errors import RecipeError
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe
from merge_core.progress import Progress

Values = Mapping[str, np.ndarray]
Reference = Literal["labels", "expert"]


@dataclass(frozen=True)
class Score:
    """A score of merges.

    Attributes:
        title: as shown.
        why: why it should follow the accuracy, as a clause.
        source: who proposed it.
        measures: of the merge, names of :data:`analysis.outputs.measures.MEASURES`.
        of: gives the score of each image (N, floats) from the merge's measures (each N) and the
            reference classes (N).
        reference: what the reference classes are: labels, the predictions of the task's expert,
            or nothing (then an empty vector is given).
    """

    title: str
    why: str
    source: str
    measures: tuple[str, ...]
    of: Callable[[Values, np.ndarray], np.ndarray]
    reference: Reference | None = None


def _agreement(values: Values, reference: np.ndarray) -> np.ndarray:
    return (values[CLASSES] == reference).astype(float)


def _measure(name: str, sign: int) -> Callable[[Values, np.ndarray], np.ndarray]:
    return lambda values, _: sign * values[name].astype(float)


SCORES: dict[str, Score] = {
    "accuracy": Score(
        title="Accuracy",
        why="it is what is wanted",
        source="labels",
        measures=(CLASSES,),
        of=_agreement,
        reference="labels",
    ),
    "cross_entropy": Score(
        title="Cross-entropy",
        why="it is what is wanted",
        source="texts",
        measures=("cross_entropy",),
        of=_measure("cross_entropy", -1),
    ),
    "agreement": Score(
        title="Agreement with the experts",
        why="it differs from the accuracy only on inputs that the expert gets wrong",
        source="experts' predictions as pseudo-labels (Lee, ICML workshop 2013)",
        measures=(CLASSES,),
        of=_agreement,
        reference="expert",
    ),
    "overlap": Score(
        title="Overlap with the experts' softmax",
        why="it is the agreement of classes drawn from both softmaxes rather than of the likeliest",
        source="[derived]: one minus the total variation distance, the largest chance that draws "
        "of two distributions agree (maximal coupling)",
        measures=("overlap",),
        of=_measure("overlap", 1),
    ),
    "divergence": Score(
        title="Divergence from the experts",
        why="KL(expert || merge) is what distillation from the experts minimises",
        source="Hinton et al., arXiv:1503.02531",
        measures=("divergence",),
        of=_measure("divergence", -1),
    ),
    "entropy": Score(
        title="Entropy",
        why="wrong predictions tend to be unsure",
        source="AdaMerging, Yang et al., arXiv:2310.02575",
        measures=("entropy",),
        of=_measure("entropy", -1),
    ),
    "l2": Score(
        title="Feature distance to the experts",
        why="heads see what the experts' heads would see",
        source="representation bias (Representation Surgery, Yang et al., arXiv:2402.02705)",
        measures=("l2",),
        of=_measure("l2", -1),
    ),
    "cosine": Score(
        title="Feature cosine to the experts",
        why="heads see the direction that the experts' heads would see",
        source="representation bias (arXiv:2402.02705), up to the features' length",
        measures=("cosine",),
        of=_measure("cosine", -1),
    ),
}

"""By name. What agreement can lose [derived]: an image that the expert gets right is a hit exactly
where merge and expert agree, so accuracy and agreement differ by at most the experts' mean error e,
and the setting of the highest agreement is within 2e of the highest accuracy on the same images."""


def usable_scores(evaluator: Evaluator) -> tuple[str, ...]:
    """Names of the scores that its outputs have: features are those of classifiers alone."""
    return tuple(
        name
        for name, score in SCORES.items()
        if set(score.measures) <= evaluator.outputs.kinds.keys()
    )


def image_scores(
    score: str,
    recipe: Recipe,
    session: MergeSession,
    evaluator: Evaluator,
    images: Images,
    split: Split = "val",
    progress: Progress | None = None,
    following: tuple[Recipe, Images] | None = None,
) -> dict[str, np.ndarray]:
    """A merge's score on images of its tasks; labels are read only for the accuracy.

    Args:
        score: a name of :data:`SCORES`.
        recipe: the merge.
        session: its members.
        evaluator: where outputs are kept.
        images: task to numbers of images.
        split: ``val`` for choosing.
        progress: reports images.
        following: which merge is asked for next, and on which images, where that is known: it
            may be made meanwhile (see :meth:`Evaluator.expect`).

    Returns:
        Task to one number per image (floats, aligned with `images`).

    Raises:
        RecipeError: an unknown score.
        MergeScopeError: unfit inputs.
        Cancelled: between two batches.
    """
    if following is not None:
        evaluator.expect(following[0], session, following[1], split, measures_of([score]))
    return scores_at([score], recipe, session, evaluator, images, split, progress)[score]


def scores_at(
    scores: Sequence[str],
    recipe: Recipe,
    session: MergeSession,
    evaluator: Evaluator,
    images: Images,
    split: Split = "val",
    progress: Progress | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Several scores of a merge from one pass: score to what :func:`image_scores` gives.

    Raises:
        RecipeError: an unknown score.
        MergeScopeError: unfit inputs.
        Cancelled: between two batches.
    """
    measures = measures_of(scores)
    outputs = evaluator.measure_recipe(recipe, session, images, split, measures, progress)
    references = {
        name: _reference(name, evaluator, images, split)
        for name in dict.fromkeys(SCORES[score].reference for score in scores)
    }
    return {
        name: {
            task: _weighted(
                SCORES[name].of(values, references[SCORES[name].reference][task]),
                evaluator.outputs.unit_weights(task, split),
                images[task],
            )
            for task, values in outputs.items()
        }
        for name in scores
    }


def measures_of(scores: Sequence[str]) -> tuple[str, ...]:
    """What has to be measured for some scores.

    Raises:
        RecipeError: an unknown score.

    Example:
        >>> measures_of(["accuracy"])
        ('classes',)
    """
    unknown = [name for name in scores if name not in SCORES]
    if unknown:
        raise RecipeError(f"There is no score {unknown[0]!r}; choose from {', '.join(SCORES)}.")
    return tuple(dict.fromkeys(name for score in scores for name in SCORES[score].measures))


def _weighted(values: np.ndarray, weights: np.ndarray | None, images: np.ndarray) -> np.ndarray:
    return values if weights is None else values * weights[images]


def _reference(
    name: Reference | None, evaluator: Evaluator, images: Images, split: Split
) -> dict[str, np.ndarray]:
    if name == "labels":
        return {
            t: evaluator.outputs.raw_inputs(t, split).labels[mine] for t, mine in images.items()
        }
    if name == "expert":
        outputs = evaluator.measure_experts(images, split)
        return {task: values[CLASSES] for task, values in outputs.items()}
    return {task: np.empty(0) for task in images}
