"""Patterns in weights: classifiers as pictures, blends of them, and filters of deeper networks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import streamlit as st
from torch import Tensor

from analysis.figures.pictures import templates as figures
from analysis.outputs.pool_outputs import PoolEvaluator, tensors_of
from analysis.patterns import templates
from analysis.patterns.images import Normalisation
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import PoolError
from merge_core.suites.pool import Pool
from ui import charts, shell
from ui.controls import choice, multiselect, selectbox, steps
from ui.plain_text import show_info
from ui.sections import filters
from ui.sections.blend import blend_section
from ui.sections.filters import NORMALISATIONS
from ui.server import pool_resources

shell.enter()

MOST_CLASSES, PER_FIGURE = 10, 5
# Rows of pictures, as the figure names them.
TEMPLATE, MEAN, CENTRED = "Template", "Class mean", "Mean − overall mean"
STATIONARY = "Stationary prediction"
MEASUREMENTS = {
    "diagonal": "Cosine with the own class",
    "off_diagonal": "Cosine with other classes",
    "largest": "Own class is the nearest",
    "norm": "Norm",
    "roughness": "Roughness",
    "test_accuracy": "Test accuracy",
}


@st.cache_data(max_entries=16, show_spinner="Measuring the classifiers …")
def measure_over_decay(key: str, _evaluator: PoolEvaluator) -> pd.DataFrame:
    """What weight decay does to templates."""
    return pool_resources.frames_of(key, _evaluator.pool).over_decay()


@st.cache_data(max_entries=16, show_spinner="Measuring the snapshots …")
def measure_over_training(key: str, _evaluator: PoolEvaluator) -> pd.DataFrame:
    """What training time does to templates."""
    return pool_resources.frames_of(key, _evaluator.pool).over_training()


@dataclass(frozen=True)
class Classifier:
    """A linear classifier of a pool, at some point of its training.

    Attributes:
        key: digest of the pool.
        evaluator: of the pool.
        number: of the member.
        checkpoint: the member at that point.
        label: which one it is, in words.
    """

    key: str
    evaluator: PoolEvaluator
    number: int
    checkpoint: Checkpoint
    label: str

    @property
    def pool(self) -> Pool:
        """The pool that it is of."""
        return self.evaluator.pool

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.evaluator.class_names

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """All tensors."""
        return tensors_of(self.checkpoint)


def choose_classifier(key: str, pool: Pool) -> Classifier:
    """A member of a linear pool, at some point of its training."""
    left, middle, right = st.columns(3)
    evaluator = pool_resources.pool_evaluator(key, pool)
    members = pool.spec.members
    decays = sorted({member.weight_decay or 0.0 for member in members})
    with left:
        decay = steps(
            "Weight decay",
            decays,
            "decay",
            rest=decays[-1],
            words=lambda value: f"{value:g}",
            help="Pulls all weights towards zero; what does not lower the loss vanishes.",
        )
    numbers = [i for i, member in enumerate(members) if (member.weight_decay or 0.0) == decay]
    with middle:
        number = selectbox(
            "Model",
            numbers,
            "model",
            words=lambda i: f"seed {members[i].seed}",
            help="Classifiers that differ in their random start and in the order of the images.",
            slot=f"model of {pool.name}, {decay:g}",
        )
    label = f"decay {decay:g}, seed {members[number].seed}"
    snapshots = members[number].trajectory
    if len(snapshots) < 2:
        right.caption("No snapshots of this model's training are kept (see another seed).")
        return Classifier(key, evaluator, number, pool.member(number), label)
    epochs = [snapshot.epoch for snapshot in snapshots]
    with right:
        epoch = steps(
            "Epoch",
            epochs,
            "epoch",
            rest=epochs[-1],
            words=lambda value: f"{value:g}",
            help="The classifier as it was after so many passes over the training images.",
        )
    checkpoint = pool.snapshot(number, epochs.index(epoch))
    return Classifier(key, evaluator, number, checkpoint, f"{label}, epoch {epoch:g}")


def choose_classes(names: tuple[str, ...]) -> list[int]:
    """Which classes' templates are drawn; all of them where they are few."""
    every = list(range(len(names)))
    if len(names) <= MOST_CLASSES:
        return every
    return multiselect(
        "Classes",
        every,
        "classes",
        rest=every[:MOST_CLASSES],
        words=names.__getitem__,
        most=2 * MOST_CLASSES,
    )


@shell.fragment
def classifier_section() -> None:
    """Templates beside class means; weight decay and training time."""
    pools = {
        pool.title: pool
        for pool in pool_resources.describe_pools().values()
        if pool.spec.architecture.name == "linear"
    }
    if not pools:
        st.info(
            "No pool of linear classifiers is on offer. Build one with `mergescope pool build`."
        )
        return
    st.subheader("What does a linear classifier look for?", anchor=False)
    left, right = st.columns([2, 3])
    with left:
        title = selectbox("Linear classifiers of", pools, "classifiers")
    with right:
        kind = choice(
            "Grey levels",
            NORMALISATIONS,
            "levels",
            "Symmetric: divided by the largest magnitude, zero is mid-grey. Min-max: the smallest "
            "weight black, the largest white; the sign is lost.",
        )
    classifier = choose_classifier(*pool_resources.open_pool(pools[title]))
    chosen = choose_classes(classifier.classes)
    if not chosen:
        st.info("Choose at least one class.")
        return
    rows = picture_rows(classifier)
    draw_measurements(classifier, rows)
    draw_templates(classifier, rows, chosen, kind)
    draw_similarity(classifier, rows)
    blend_section(classifier.evaluator, classifier.weights, classifier.number, kind)


def picture_rows(classifier: Classifier) -> dict[str, np.ndarray]:
    """Templates and what they are compared with, a picture for each class, by name."""
    evaluator = classifier.evaluator
    means = templates.class_means(evaluator)
    rows = {
        TEMPLATE: templates.pool_templates(evaluator, classifier.weights),
        MEAN: means.means,
        CENTRED: means.centred,
    }
    decay = classifier.pool.spec.members[classifier.number].weight_decay
    if decay:
        rows[STATIONARY] = templates.stationary_templates(evaluator, classifier.weights, decay)
    return rows


def draw_measurements(classifier: Classifier, rows: dict[str, np.ndarray]) -> None:
    """How alike templates and class means are, and how often the classifier is right."""
    compared = {
        row: templates.diagonal_dominance(
            templates.cosine_frame(rows[TEMPLATE], rows[row], classifier.classes)
        )
        for row in (MEAN, CENTRED)
    }
    cards = charts.cards(4)
    cards.metric(
        "Cosine, own class",
        f"{compared[CENTRED].diagonal:.2f}",
        help="Mean cosine of a template with the centred mean of its class, μ_c − μ.",
    )
    cards.metric(
        "Cosine, other classes",
        f"{compared[CENTRED].off_diagonal:.2f}",
        help="Mean cosine of a template with the centred means of the other classes.",
    )
    cards.metric(
        "Nearest to own class",
        f"{compared[CENTRED].largest:.0%}",
        delta=f"{compared[MEAN].largest:.0%} by plain means",
        delta_color="off",
        delta_arrow="off",
        help="Share of templates whose largest cosine with the (centred) class means is with "
        "their own class.",
    )
    evaluator = classifier.evaluator
    outputs = evaluator.merge(classifier.checkpoint.digest, lambda: classifier.weights, "test")
    right = (outputs.logits.argmax(dim=1).numpy() == evaluator.labels("test")).mean()
    charts.accuracy_card(cards, "Test accuracy", f"{right:.1%}", "test", classifier.label)


def draw_templates(
    classifier: Classifier,
    rows: dict[str, np.ndarray],
    chosen: list[int],
    kind: Normalisation,
) -> None:
    """Pictures of the chosen classes, in figures that a phone can show one below the other."""
    names = classifier.classes
    parts = [chosen[i : i + PER_FIGURE] for i in range(0, len(chosen), PER_FIGURE)]
    charts.panel(
        *(
            charts.Chart(
                charts.drawn(
                    figures.template_grid,
                    {row: values[part] for row, values in rows.items()},
                    [names[i] for i in part],
                    title=f"A linear classifier's templates, {names[part[0]]} to {names[part[-1]]}",
                    kind=kind,
                    columns=PER_FIGURE,
                ),
                key=f"templates_{place}",
                alt=f"Templates of {classifier.pool.title}, {classifier.label}, with class means "
                "and centred class means",
            )
            for place, part in enumerate(parts)
        ),
        key="templates",
        columns=2,
        how_to_read=charts.HowToRead(
            "A linear classifier scores an image by its product with one **template** per class: "
            "the class's row of weights, drawn as an image. With weight decay d, training without "
            "a gradient left would end at the **stationary prediction**, a sum of the training "
            "images weighted by the model's own errors; to first order it is the class mean "
            "**minus the overall mean**, not the class mean itself. The bias is left out.",
            r"W_c = \frac{1}{d\,n}\sum_i\bigl(\mathbf 1[y_i=c]-p_{ic}\bigr)\,x_i"
            r"\;\approx\;\frac{\pi_c}{d}\,(\mu_c-\mu)",
        ),
    )


def draw_similarity(classifier: Classifier, rows: dict[str, np.ndarray]) -> None:
    """The cosine matrix, and what decay and training do to it."""
    places = st.columns(2)
    with places[0]:
        cosines = chart_cosines(classifier, rows)
    with places[1]:
        measured = chart_measurement(classifier)
    charts.panel(
        cosines,
        measured,
        columns=places,
        how_to_read=charts.HowToRead(
            "Left: a bright diagonal says that templates look like the images of their own class. "
            "Right: the mean over classifiers, with the range over seeds.",
            r"\cos(W_c,\mu_k-\mu)=\frac{\langle W_c,\mu_k-\mu\rangle}{\|W_c\|\,\|\mu_k-\mu\|}",
        ),
    )


def chart_cosines(classifier: Classifier, rows: dict[str, np.ndarray]) -> charts.Chart:
    """Which class each template resembles."""
    options = {CENTRED: "Centred means", MEAN: "Means", STATIONARY: STATIONARY}
    against = choice(
        "Templates against", {k: v for k, v in options.items() if k in rows}, "against"
    )
    frame = templates.cosine_frame(rows[TEMPLATE], rows[against], classifier.classes)
    return charts.Chart(
        charts.drawn(
            figures.cosine_map,
            frame,
            title="Which class does a template resemble?",
            columns=options[against],
        ),
        key="cosines",
        alt=f"Cosine of each template with each class's {options[against]}",
        height=500,
        numbers=charts.Numbers(frame, "template_cosines"),
    )


def chart_measurement(classifier: Classifier) -> charts.Chart | None:
    """A measurement over weight decay or over training, where snapshots are kept."""
    value = selectbox(
        "Measurement",
        MEASUREMENTS,
        "measure",
        words=MEASUREMENTS.__getitem__,
        help="Roughness compares neighbouring pixels: 0 is smooth, 1 is noise (Geary's C).",
    )
    axes = {"weight_decay": "Over weight decay", "epoch": "Over training"}
    axis = choice("Drawn", axes, "over")
    try:
        measure = measure_over_training if axis == "epoch" else measure_over_decay
        measured = measure(classifier.key, classifier.evaluator)
    except PoolError as error:
        show_info(error)
        return None
    return charts.Chart(
        charts.drawn(
            figures.dominance_lines,
            measured,
            axis,
            value,
            title=f"{MEASUREMENTS[value]}: {axes[axis].lower()}",
        ),
        key="over_decay",
        alt=f"{MEASUREMENTS[value]} {axes[axis].lower()}",
        height=440,
        numbers=charts.Numbers(measured, "templates_measured"),
    )


charts.heading(
    "What patterns do weights hold?",
    "A linear classifier's weights are pictures; so are the first filters of deep networks. What "
    "they show depends on weight decay and training time, and it is what averaging mixes.",
)
classifier_section()
filters.filters_section()
