"""Magnitude and stability: parameters multiplied by m, averaging as a smaller norm, and noise."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import streamlit as st

from analysis.figures import magnitude as figures
from analysis.figures import regularisation as noise_figures
from analysis.magnitude import sweep
from analysis.magnitude.homogeneity import (
    LAWS,
    Law,
    What,
    affine_depth,
    dominance,
    exact_degree,
    laws,
)
from analysis.magnitude.robustness import CORRUPTIONS, Corruption
from analysis.magnitude.sweep import WHO, Who
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.files import digest_of
from ui import charts, shell
from ui.controls import choice, selectbox, steps
from ui.progress import run_job
from ui.sections.norms import norms_section
from ui.server import pool_resources
from ui.server.pool_resources import PoolView

shell.enter()

MAGNITUDES = tuple(float(m) for m in np.logspace(-3, 3, 25))
SIGMAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
SHORT_WHAT: dict[What, str] = {
    "parameters": "All parameters",
    "weights": "Weights only",
    "state": "Whole state",
    "layer": "One layer",
}

SHORT_LAWS: dict[Law, str] = {"homogeneous": "mᴸ", "large": "Large m", "small": "Small m"}


def names(view: PoolView) -> str:
    """The chosen members as part of a key."""
    return ",".join(map(str, view.members))


@st.cache_data(max_entries=64, show_spinner=False)
def predicted_frame(
    key: str,
    members: tuple[int, ...],
    who: Who,
    what: What,
    layer: str | None,
    law: Law,
    _view: PoolView,
) -> pd.DataFrame:
    """The sweep that a power law predicts."""
    return pool_resources.frames(_view).predicted(MAGNITUDES, who, what, layer, law)


def factor_label(m: float) -> str:
    """A factor with two digits, such as ``0.56``."""
    return f"{m:.2g}" if m < 100 else f"{m:.0f}"


def choose(view: PoolView, evaluator: PoolEvaluator) -> tuple[Who, What, str | None]:
    """Who is scaled, and what."""
    # Not beside each other: in a column the options would be cut off instead of broken.
    shown: dict[Who, str] = dict(WHO) if len(view.members) > 1 else {"all": WHO["all"]}
    who: Who = choice(
        "Who is multiplied by m",
        {key: label.capitalize() for key, label in shown.items()},
        "who",
        "The others stay as they are; soups and ensembles are of all chosen members.",
    )
    what: What = choice(
        "What is multiplied by m",
        SHORT_WHAT,
        "what",
        "Weights: parameters of two dimensions or more. Whole state: BatchNorm's running "
        "statistics too, as in the paper's code.",
    )
    layer = None
    if what == "layer":
        options = sweep.layer_names(evaluator.network.module)
        layer = selectbox("Layer", options, "scaled")
    return who, what, layer


def describe_law(evaluator: PoolEvaluator, what: What, layer: str | None) -> str:
    """What mathematics says about this choice."""
    scaled = sweep.scaled_names(evaluator.network.module, what, layer)
    degree = exact_degree(evaluator, scaled)
    depth = affine_depth(evaluator, scaled)
    if degree is not None:
        return (
            "This choice is **exactly homogeneous**: "
            rf"$f(x; m\theta) = m^{{{degree}}} f(x; \theta)$ for every $m > 0$, so no prediction "
            "can move; only confidence does."
        )
    if len(laws(evaluator, scaled)) > 1:
        return (
            f"{depth} affine layers with **biases**: not homogeneous. For large m the biases that "
            f"grow more slowly vanish and the logits follow $m^{{{depth}}}$; for small m the last "
            "bias alone decides."
        )
    return (
        "This network is **not homogeneous** in these parameters (normalisation, attention or "
        f"biases); the dashed line shows what it would do if its {depth} affine layers were."
    )


@shell.fragment
def scaling_section() -> None:
    """The sweep over m."""
    view = shell.pool_view()
    evaluator = pool_resources.evaluator(view)
    who, what, layer = choose(view, evaluator)

    frames = pool_resources.frames(view)
    frame = frames.sweep_if_known(MAGNITUDES, who, what, layer)
    if frame is None:
        job = run_job(
            digest_of("magnitude", view.key, names(view), who, what, layer or ""),
            "Scaling by m",
            "Sweep m again",
            f"25 values of m between 0.001 and 1000 for {len(view.members)} members.",
            lambda progress: frames.sweep(MAGNITUDES, who, what, layer, progress),
            at_once=True,
        )
        frame = None if job is None else job.result
    st.markdown(describe_law(evaluator, what, layer))
    if frame is None:
        return
    scaled = sweep.scaled_names(evaluator.network.module, what, layer)
    m, law = choose_factor(laws(evaluator, scaled))
    overlay = predicted_frame(view.key, view.members, who, what, layer, law, view)
    draw_scaling(frame, overlay, view, who, m)
    if who != "all":
        draw_dominance(view, affine_depth(evaluator, scaled), m)


def choose_factor(known: Iterable[Law]) -> tuple[float, Law]:
    """The marked m, and one of the laws that predict the sweep here."""
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    with left:
        m = steps(
            "m",
            MAGNITUDES,
            "m",
            rest=1.0,
            words=factor_label,
            help="The marked factor; 1 leaves the members as they are.",
        )
    with right:
        law: Law = choice(
            "Prediction drawn over it",
            {key: SHORT_LAWS[key] for key in known},
            "law",
            "; ".join(f"{key}: {LAWS[key]}" for key in known),
        )
    return m, law


def draw_scaling(
    frame: pd.DataFrame, overlay: pd.DataFrame, view: PoolView, who: Who, m: float
) -> None:
    """Every measure over m, and what it is at the marked one."""
    st.markdown(f"At **m = {factor_label(m)}**, accuracy and the share of unchanged predictions:")
    cards = charts.cards(4)
    here = frame[np.isclose(frame["magnitude"], m)].set_index("subject")
    for subject, title in zip(
        ("individuals", "uniform_soup", "logit_ensemble", "norm_restored"),
        ("Individuals", "Uniform soup", "Logit ensemble", "Norm-restored"),
        strict=True,
    ):
        if subject not in here.index:
            continue
        row = here.loc[subject]
        charts.accuracy_card(
            cards,
            title,
            f"{row['accuracy']:.1%}",
            "test",
            f"m = {factor_label(m)}",
            delta=f"{row['stability']:.1%} unchanged",
            delta_color="off",
            delta_arrow="off",
            border=True,
            help="Accuracy on the test split, and the share of predictions that are the same as "
            "at m = 1.",
        )
    lost = frame[frame["non_finite"] > 0]
    if len(lost):
        worst = lost.sort_values("non_finite").iloc[-1]
        st.warning(
            f"Non-finite logits at {lost['magnitude'].nunique()} values of m, up to "
            f"{worst['non_finite']:.0%} of the images (m = {factor_label(worst['magnitude'])}). "
            "Such images count as wrong and as changed."
        )
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.magnitude_grid,
                frame,
                overlay,
                title=f"Parameters times m: {view.pool.title}, {WHO[who]}",
                chosen=m,
            ),
            key="magnitude",
            alt="Accuracy, stability, confidence, entropy, calibration error and logit norm over m",
            height=1000,
        ),
        how_to_read=charts.HowToRead(
            "Every line is measured on the test split at 25 factors m; the dashed grey line is "
            "the prediction chosen above. **Stability** is the share of images whose predicted "
            "class is the one at m = 1. **Calibration error** compares confidence with accuracy "
            "in 15 bins. Logits are computed in float64 where float32 would lose them. A factor "
            "that multiplies all logits alike changes confidence and entropy, never a prediction.",
            r"f(x; m\theta) = m^L f(x;\theta)\ \text{(no biases)},\qquad "
            r"f(x; m\theta) = m^L f\bigl(x;\,W_l,\ m^{1-l} b_l\bigr)\ \text{(with biases)}",
        ),
        numbers=charts.Numbers(frame, f"magnitude_{view.name}"),
    )


def draw_dominance(view: PoolView, depth: int, m: float) -> None:
    """How one scaled member outweighs the others in a network of so many affine layers."""
    frame = dominance([depth], len(view.members), MAGNITUDES)
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.dominance_lines,
                frame,
                title="Who decides: one member scaled by m, the others not",
                chosen=m,
            ),
            key="dominance",
            alt="Share of the scaled member in the soup's weights and in the ensemble's logits",
            height=400,
        ),
        how_to_read=charts.HowToRead(
            "In a logit ensemble one scaled member counts as m^L : 1 against each other (L = "
            f"{depth} affine layers, if the network were homogeneous); in a soup only as m : 1. "
            "The curves are this arithmetic for members of equal norms, not a measurement.",
            r"\frac{m^L}{m^L + N - 1}\quad\text{against}\quad \frac{m}{m + N - 1}",
        ),
        numbers=charts.Numbers(frame, f"dominance_{view.name}"),
    )


@shell.fragment
def robustness_section() -> None:
    """Weight noise and corrupted images."""
    view = shell.pool_view()
    st.subheader("Is an average harder to disturb?", anchor=False)
    places = st.columns(2)
    with places[0]:
        noise = chart_noise(view)
    with places[1]:
        corrupted = chart_corruption(view)
    charts.panel(
        noise,
        corrupted,
        key="robustness",
        columns=places,
        how_to_read=charts.HowToRead(
            "The **norm-restored soup** is the soup with every parameter tensor scaled back to "
            "its members' mean norm: what it shares with the soup comes from the direction of the "
            "weights, what it does not from their size. The same noise is drawn for all models.",
            r"\theta \leftarrow \theta + \sigma\, r\,\varepsilon,\quad \varepsilon\sim N(0, I),\; "
            r"r \text{ the root mean square of each tensor}",
        ),
    )


def chart_noise(view: PoolView) -> charts.Chart | None:
    """Accuracy under noise on the weights, once it has been measured."""
    frames = pool_resources.frames(view)
    unit = choice(
        "Noise on the weights, in units of",
        {"own": "The model's own size", "members": "The members' size"},
        "unit",
        "The average is smaller than its members. In units of its own size all models are "
        "disturbed alike; in the members' size the same noise hits a smaller model.",
    )
    relative = unit == "own"
    frame = frames.noise_if_known(SIGMAS, relative)
    if frame is None:
        job = run_job(
            digest_of("weight noise", view.key, names(view), str(relative)),
            "Noise on the weights",
            "Disturb the weights",
            f"{len(SIGMAS)} strengths, 3 seeds, {len(view.members)} members and two soups on the "
            "test split.",
            lambda progress: frames.noise(SIGMAS, relative, progress),
        )
        if job is None:
            return None
        frame = job.result
    return charts.Chart(
        charts.drawn(
            noise_figures.noise_lines, frame, relative, title="Accuracy under weight noise"
        ),
        key="noise",
        alt="Accuracy over the strength of weight noise",
        height=430,
        numbers=charts.Numbers(frame, f"weight_noise_{view.name}"),
    )


def chart_corruption(view: PoolView) -> charts.Chart | None:
    """Accuracy on corrupted images, once it has been measured."""
    frames = pool_resources.frames(view)
    corruption: Corruption = selectbox(
        "Corruption of the images",
        CORRUPTIONS,
        "corruption",
        words=lambda name: CORRUPTIONS[name].split(" (")[0].capitalize(),
    )
    frame = frames.corrupted_if_known(corruption)
    if frame is None:
        job = run_job(
            digest_of("corruption", view.key, names(view), corruption),
            "Corrupted images",
            "Corrupt the images",
            f"6 severities for {len(view.members)} members, their soups and their ensemble.",
            lambda progress: frames.corrupted(corruption, progress),
        )
        if job is None:
            return None
        frame = job.result
    return charts.Chart(
        charts.drawn(
            noise_figures.corruption_lines, frame, corruption, title="Accuracy on corrupted images"
        ),
        key="corrupted",
        alt="Accuracy over the severity of a corruption",
        height=430,
        numbers=charts.Numbers(frame, f"{corruption}_{view.name}"),
    )


charts.heading(
    "What happens when parameters shrink or grow?",
    "Multiply a network's parameters by m: some networks do not notice, others break. Averaging "
    "shrinks weights too, so their **size** is one of the things that an average changes.",
)
scaling_section()
norms_section()
robustness_section()
