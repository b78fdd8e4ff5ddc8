"""Patterns in weights: classifiers as pictures, blends of them, and filters of deeper networks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st
from torch import Tensor

from analysis.figures import templates as figures
from analysis.outputs.pool_outputs import PoolEvaluator, tensors_of
from analysis.patterns import blending, templates
from analysis.patterns.images import Normalisation
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import PoolError
from merge_core.suites.pool import Pool
from ui import charts, shell
from ui.sections import filters
from ui.sections.filters import NORMALISATIONS
from ui.server import pool_resources
from ui.widgets import choice

shell.enter()

LAMBDAS = tuple(float(lam) for lam in np.linspace(0, 1, 21))
MOST_CLASSES, PER_FIGURE = 10, 5
MEASUREMENTS = {
    "diagonal": "Cosine with the own class",
    "off_diagonal": "Cosine with other classes",
    "largest": "Own class is the nearest",
    "norm": "Norm",
    "roughness": "Roughness",
    "test_accuracy": "Test accuracy",
}


@st.cache_data(max_entries=16, show_spinner="Measuring the classifiers …")
def over_decay(key: str, _evaluator: PoolEvaluator) -> pd.DataFrame:
    """What weight decay does to templates."""
    return templates.decay_frame(_evaluator)


@st.cache_data(max_entries=16, show_spinner="Measuring the snapshots …")
def over_training(key: str, _evaluator: PoolEvaluator) -> pd.DataFrame:
    """What training time does to templates."""
    return templates.training_frame(_evaluator)


def choose_classifier(pool: Pool) -> tuple[int, Checkpoint, str]:
    """A member of a linear pool, at some point of its training: number, weights, name."""
    left, middle, right = st.columns(3)
    members = pool.spec.members
    decays = sorted({member.weight_decay or 0.0 for member in members})
    decay = left.select_slider(
        "Weight decay",
        decays,
        value=decays[-1],
        format_func=lambda value: f"{value:g}",
        key="decay",
        bind="query-params",
        help="Pulls all weights towards zero; what does not lower the loss vanishes.",
    )
    numbers = [i for i, member in enumerate(members) if (member.weight_decay or 0.0) == decay]
    number = middle.selectbox(
        "Model",
        numbers,
        format_func=lambda i: f"seed {members[i].seed}",
        key=f"model_{decays.index(decay)}",
        help="Classifiers that differ in their random start and in the order of the images.",
    )
    snapshots = members[number].trajectory
    if len(snapshots) < 2:
        right.caption("No snapshots of this model's training are kept (see another seed).")
        return number, pool.member(number), f"decay {decay:g}, seed {members[number].seed}"
    epochs = [snapshot.epoch for snapshot in snapshots]
    epoch = right.select_slider(
        "Epoch",
        epochs,
        value=epochs[-1],
        format_func=lambda value: f"{value:g}",
        key="epoch",
        bind="query-params",
        help="The classifier as it was after so many passes over the training images.",
    )
    checkpoint = pool.snapshot(number, epochs.index(epoch))
    return number, checkpoint, f"decay {decay:g}, seed {members[number].seed}, epoch {epoch:g}"


@shell.fragment
def classifier_section() -> None:
    """Templates beside class means; weight decay and training time."""
    pools = {
        pool.title: pool
        for pool in pool_resources.described_pools().values()
        if pool.spec.architecture.name == "linear"
    }
    if not pools:
        st.info(
            "No pool of linear classifiers is on offer. Build one with `mergescope pool build`."
        )
        return
    st.subheader("What does a linear classifier look for?", anchor=False)
    left, right = st.columns([2, 3])
    title = left.selectbox(
        "Linear classifiers of", list(pools), key="classifiers", bind="query-params"
    )
    with right:
        kind = choice(
            "Grey levels",
            NORMALISATIONS,
            "levels",
            "Symmetric: divided by the largest magnitude, zero is mid-grey. Min-max: the smallest "
            "weight black, the largest white; the sign is lost.",
        )
    key, pool = pool_resources.open_pool(pools[title])
    evaluator = pool_resources.pool_evaluator(key, pool)
    number, checkpoint, name = choose_classifier(pool)
    weights = tensors_of(checkpoint)
    images = templates.pool_templates(evaluator, weights)
    means = templates.class_means(evaluator)
    names = evaluator.class_names
    chosen = list(range(len(names)))
    if len(names) > MOST_CLASSES:
        chosen = st.multiselect(
            "Classes",
            chosen,
            default=chosen[:MOST_CLASSES],
            format_func=names.__getitem__,
            max_selections=2 * MOST_CLASSES,
            key="classes",
        )
        if not chosen:
            st.info("Choose at least one class.")
            return
    rows = {
        "Template": images,
        "Class mean": means.means,
        "Mean − overall mean": means.centred,
    }
    decay = pool.spec.members[number].weight_decay
    if decay:
        rows["Stationary prediction"] = templates.stationary_templates(evaluator, weights, decay)
    compared = {
        which: templates.diagonal_dominance(templates.cosine_frame(images, other, names))
        for which, other in (("means", means.means), ("centred", means.centred))
    }
    cards = charts.cards(4)
    cards.metric(
        "Cosine, own class",
        f"{compared['centred'].diagonal:.2f}",
        help="Mean cosine of a template with the centred mean of its class, μ_c − μ.",
    )
    cards.metric(
        "Cosine, other classes",
        f"{compared['centred'].off_diagonal:.2f}",
        help="Mean cosine of a template with the centred means of the other classes.",
    )
    cards.metric(
        "Nearest to own class",
        f"{compared['centred'].largest:.0%}",
        delta=f"{compared['means'].largest:.0%} by plain means",
        delta_color="off",
        delta_arrow="off",
        help="Share of templates whose largest cosine with the (centred) class means is with "
        "their own class.",
    )
    logits = evaluator.merge(checkpoint.digest, lambda: weights, "test").logits
    right_ones = (logits.argmax(dim=1).numpy() == evaluator.labels("test")).mean()
    cards.metric("Test accuracy", f"{right_ones:.1%}")
    # Side by side on a wide page, below each other on a phone.
    halves = [chosen[i : i + PER_FIGURE] for i in range(0, len(chosen), PER_FIGURE)]
    for place, half in enumerate(halves):
        if place % 2 == 0:
            columns = st.columns(2)
        with columns[place % 2]:
            charts.show(
                figures.template_grid(
                    {row: values[half] for row, values in rows.items()},
                    [names[i] for i in half],
                    title=f"A linear classifier's templates, {names[half[0]]} to {names[half[-1]]}",
                    kind=kind,
                    columns=PER_FIGURE,
                ),
                key=f"templates_{place}",
                alt=f"Templates of {title}, {name}, with class means and centred class means",
            )
    charts.how_to_read(
        "templates",
        "A linear classifier scores an image by its product with one **template** per class: the "
        "class's row of weights, drawn as an image. With weight decay d, training without a "
        "gradient left would end at the **stationary prediction**, a sum of the training images "
        "weighted by the model's own errors; to first order it is the class mean **minus the "
        "overall mean**, not the class mean itself. The bias is left out.",
        r"W_c = \frac{1}{d\,n}\sum_i\bigl(\mathbf 1[y_i=c]-p_{ic}\bigr)\,x_i"
        r"\;\approx\;\frac{\pi_c}{d}\,(\mu_c-\mu)",
    )
    similarity_columns(key, evaluator, images, means, rows, names)
    blend_section(pool, evaluator, weights, number, kind)


def similarity_columns(
    key: str,
    evaluator: PoolEvaluator,
    images: np.ndarray,
    means: templates.ClassMeans,
    rows: dict[str, np.ndarray],
    names: tuple[str, ...],
) -> None:
    """The cosine matrix, and what decay and training do to it."""
    left, right = st.columns(2)
    with left:
        options = {
            "Mean − overall mean": "Centred means",
            "Class mean": "Means",
            "Stationary prediction": "Stationary prediction",
        }
        against = choice(
            "Templates against", {k: v for k, v in options.items() if k in rows}, "against"
        )
        frame = templates.cosine_frame(images, rows[against], names)
        charts.show(
            figures.cosine_map(
                frame, title="Which class does a template resemble?", columns=options[against]
            ),
            key="cosines",
            alt=f"Cosine of each template with each class's {options[against]}",
            height=500,
        )
        charts.numbers(frame, "template_cosines", key="cosines")
    with right:
        value = st.selectbox(
            "Measurement",
            list(MEASUREMENTS),
            format_func=MEASUREMENTS.__getitem__,
            key="measure",
            bind="query-params",
            help="Roughness compares neighbouring pixels: 0 is smooth, 1 is noise (Geary's C).",
        )
        axes = {"weight_decay": "Over weight decay", "epoch": "Over training"}
        axis = choice("Drawn", axes, "over")
        measured = over_decay(key, evaluator)
        if axis == "epoch":
            try:
                measured = over_training(key, evaluator)
            except PoolError as error:
                st.info(str(error))
                return
        charts.show(
            figures.dominance_lines(
                measured, axis, value, title=f"{MEASUREMENTS[value]}: {axes[axis].lower()}"
            ),
            key="over_decay",
            alt=f"{MEASUREMENTS[value]} {axes[axis].lower()}",
            height=440,
        )
        charts.numbers(measured, "templates_measured", key="measured")
    charts.how_to_read(
        "cosines",
        "Left: a bright diagonal says that templates look like the images of their own class. "
        "Right: the mean over classifiers, with the range over seeds.",
        r"\cos(W_c,\mu_k-\mu)=\frac{\langle W_c,\mu_k-\mu\rangle}{\|W_c\|\,\|\mu_k-\mu\|}",
    )


def blend_section(
    pool: Pool,
    evaluator: PoolEvaluator,
    weights: dict[str, Tensor],
    number: int,
    kind: Normalisation,
) -> None:
    """Blends of two classes, or of two models."""
    st.subheader("What does a blend of two templates respond to?", anchor=False)
    names = evaluator.class_names
    ways = {"classes": "Two classes of this model", "models": "One class of two models"}
    way = choice("Blend", ways if len(pool) > 1 else {"classes": ways["classes"]}, "blend")
    left, middle, right = st.columns(3)
    first = left.selectbox(
        "First class" if way == "classes" else "Class",
        range(len(names)),
        format_func=names.__getitem__,
        key="first",
    )
    images = templates.pool_templates(evaluator, weights)
    if way == "classes":
        second = middle.selectbox(
            "Second class",
            [i for i in range(len(names)) if i != first],
            format_func=names.__getitem__,
            index=min(4, len(names) - 2),
            key=f"second_{first}",
        )
        pair, labels = (images[first], images[second]), (names[first], names[second])
    else:
        members = pool.spec.members
        other = middle.selectbox(
            "Other model",
            [i for i in range(len(pool)) if i != number],
            format_func=lambda i: f"decay {members[i].weight_decay or 0:g}, seed {members[i].seed}",
            key=f"other_{number}",
        )
        others = evaluator.weights(other)
        pair = (images[first], templates.pool_templates(evaluator, others)[first])
        labels = ("this model", "other model")
    lam = right.select_slider(
        "λ",
        LAMBDAS,
        value=0.5,
        format_func=lambda value: f"{value:g}",
        key="lam",
        bind="query-params",
        help="1 is the first template alone, 0 the second.",
    )
    left, right = st.columns(2)
    with left:
        charts.show(
            figures.blend_strip(
                pair[0],
                pair[1],
                lam,
                labels,
                title="Two templates, their blend, their difference",
                kind=kind,
            ),
            key="strip",
            alt=f"Templates {labels[0]} and {labels[1]}, their blend and their difference",
        )
    with right:
        if way == "classes":
            frame = blending.blend_response(evaluator, weights, first, second, LAMBDAS)
            figure = figures.response_lines(
                frame, "logit", labels, title="Who responds to the blend?"
            )
        else:
            frame = blending.model_response(evaluator, weights, others, first, LAMBDAS)
            figure = figures.model_response_lines(
                frame, "accuracy", names[first], labels, title="What does the blend recognise?"
            )
        figure.add_vline(x=lam, line={"color": "#888888", "dash": "dot", "width": 1.5})
        charts.show(figure, key="response", alt="Response of test images along λ", height=380)
    charts.how_to_read(
        "blend",
        "A blend of two templates answers to images of both classes: its logit is exactly linear "
        "in λ, on every image. Blending two whole classifiers of one task is a soup, and for "
        "linear classifiers a soup **is** the ensemble of the two.",
        r"\bigl(\lambda W_a + (1-\lambda)W_b\bigr)\cdot x = \lambda\,W_a\cdot x + (1-\lambda)\,"
        r"W_b\cdot x",
    )
    charts.numbers(frame, "blend_response", key="blend")


charts.heading(
    "What patterns do weights hold?",
    "A linear classifier's weights are pictures; so are the first filters of deep networks. What "
    "they show depends on weight decay and training time, and it is what averaging mixes.",
)
classifier_section()
filters.deeper_section()
