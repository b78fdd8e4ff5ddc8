"""The part of "Patterns in weights" about blends of two templates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import streamlit as st
from torch import Tensor

from analysis.figures.pictures import templates as figures
from analysis.outputs.pool_outputs import PoolEvaluator
from analysis.patterns import blending, templates
from analysis.patterns.images import Normalisation
from ui import charts
from ui.controls import choice, selectbox, steps

LAMBDAS = tuple(float(lam) for lam in np.linspace(0, 1, 21))


@dataclass(frozen=True)
class Blend:
    """Two templates to blend, and what their blends answer.

    Attributes:
        pair: the two templates.
        labels: their names.
        response: over λ.
        draw: gives the figure of the response, a λ marked in it.
    """

    pair: tuple[np.ndarray, np.ndarray]
    labels: tuple[str, str]
    response: pd.DataFrame
    draw: Callable[[float], charts.Drawn]


def blend_section(
    evaluator: PoolEvaluator, weights: dict[str, Tensor], number: int, kind: Normalisation
) -> None:
    """Blends of two classes of a linear classifier, or of one class of two.

    Args:
        evaluator: of the pool.
        weights: of the classifier.
        number: of the member that it is.
        kind: how grey levels are chosen.
    """
    st.subheader("What does a blend of two templates respond to?", anchor=False)
    ways = {"classes": "Two classes of this model", "models": "One class of two models"}
    if len(evaluator.pool) < 2:
        del ways["models"]
    way = choice("Blend", ways, "blend")
    left, middle, right = st.columns(3)
    with left:
        first = selectbox(
            "First class" if way == "classes" else "Class",
            range(len(evaluator.class_names)),
            "first",
            words=evaluator.class_names.__getitem__,
        )
    with middle:
        if way == "classes":
            blend = blend_classes(evaluator, weights, first)
        else:
            blend = blend_models(evaluator, weights, first, number)
    with right:
        lam = steps(
            "λ",
            LAMBDAS,
            "lam",
            rest=0.5,
            words=lambda value: f"{value:g}",
            help="1 is the first template alone, 0 the second.",
        )
    strip = charts.drawn(
        figures.blend_strip,
        *blend.pair,
        lam,
        blend.labels,
        title="Two templates, their blend, their difference",
        kind=kind,
    )
    one, other = blend.labels
    charts.panel(
        charts.Chart(
            strip,
            key="strip",
            alt=f"Templates {one} and {other}, their blend and their difference",
        ),
        charts.Chart(
            blend.draw(lam), key="response", alt="Response of test images along λ", height=380
        ),
        key="blend",
        columns=2,
        how_to_read=charts.HowToRead(
            "A blend of two templates answers to images of both classes: its logit is exactly "
            "linear in λ, on every image. Blending two whole classifiers of one task is a soup, "
            "and for linear classifiers a soup **is** the ensemble of the two.",
            r"\bigl(\lambda W_a + (1-\lambda)W_b\bigr)\cdot x = \lambda\,W_a\cdot x + "
            r"(1-\lambda)\,W_b\cdot x",
        ),
        numbers=charts.Numbers(blend.response, "blend_response"),
    )


def blend_classes(evaluator: PoolEvaluator, weights: dict[str, Tensor], first: int) -> Blend:
    """The templates of two classes of one model."""
    names = evaluator.class_names
    others = [i for i in range(len(names)) if i != first]
    second = selectbox(
        "Second class",
        others,
        "second",
        rest=others[min(4, len(others) - 1)],
        words=names.__getitem__,
    )
    images = templates.pool_templates(evaluator, weights)
    labels = (names[first], names[second])
    frame = blending.blend_response(evaluator, weights, first, second, LAMBDAS)
    return Blend(
        (images[first], images[second]),
        labels,
        frame,
        partial(
            charts.drawn,
            figures.response_lines,
            frame,
            "logit",
            labels,
            "Who responds to the blend?",
        ),
    )


def blend_models(
    evaluator: PoolEvaluator, weights: dict[str, Tensor], first: int, number: int
) -> Blend:
    """The templates of one class of this member and of another one."""
    members = evaluator.pool.spec.members
    other = selectbox(
        "Other model",
        [i for i in range(len(members)) if i != number],
        "other",
        words=lambda i: f"decay {members[i].weight_decay or 0:g}, seed {members[i].seed}",
    )
    others = evaluator.weights(other)
    labels = ("this model", "other model")
    frame = blending.model_response(evaluator, weights, others, first, LAMBDAS)
    return Blend(
        (
            templates.pool_templates(evaluator, weights)[first],
            templates.pool_templates(evaluator, others)[first],
        ),
        labels,
        frame,
        partial(
            charts.drawn,
            figures.model_response_lines,
            frame,
            "accuracy",
            evaluator.class_names[first],
            labels,
            "What does the blend recognise?",
        ),
    )
