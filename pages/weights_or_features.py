"""Weights or features?: soups against ensembles, and what explains their difference."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from analysis.averaging import curvature as taylor
from analysis.averaging import similarity, soups
from analysis.averaging.soups import Statistics
from analysis.figures import ensembles as figures
from analysis.figures.similarity import agreement_map, cka_layers
from analysis.outputs.inputs import SPLIT_NAMES, Split
from merge_core.files import digest_of
from merge_core.progress import Progress
from merge_core.suites.pool import REGIMES
from ui import charts, shell, sidebar
from ui.controls import choice
from ui.progress import run_job
from ui.server import pool_resources
from ui.server.pool_resources import PoolView

shell.enter()


@st.cache_data(max_entries=64, show_spinner="Running the members and their soups …")
def frame_over_members(
    key: str, members: tuple[int, ...], split: Split, statistics: Statistics, _view: PoolView
) -> pd.DataFrame:
    """Accuracy of every rule for the first n members."""
    return pool_resources.frames(_view).rules(split, statistics)


@st.cache_data(max_entries=64, show_spinner=False)
def agreement_frame(
    key: str, members: tuple[int, ...], split: Split, statistics: Statistics, _view: PoolView
) -> pd.DataFrame:
    """How often two models predict alike."""
    return pool_resources.frames(_view).agreement(split, statistics)


@st.cache_data(max_entries=64, show_spinner=False)
def trace_frame(
    key: str, members: tuple[int, ...], statistics: Statistics, _view: PoolView
) -> pd.DataFrame:
    """The greedy soup's steps."""
    return pool_resources.frames(_view).greedy(statistics)


@st.cache_data(max_entries=64, show_spinner=False)
def gap_frames(
    key: str, members: tuple[int, ...], split: Split, statistics: Statistics, _view: PoolView
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The covariance term, its summary, and the summary of soup against ensemble."""
    frames = pool_resources.frames(_view)
    return (
        frames.covariance(split),
        frames.covariance_summary(split),
        frames.gap(split, statistics),
    )


def at(frame: pd.DataFrame, rule: str) -> pd.Series:
    """A rule's row with all members."""
    return frame[(frame["n"] == frame["n"].max()) & (frame["rule"] == rule)].iloc[0]


def describe_accuracies(frame: pd.DataFrame, chance: float) -> str:
    """What the accuracies of all members say, in a sentence or two."""
    single, soup = at(frame, "individuals"), at(frame, "uniform_soup")
    ensemble = at(frame, "logit_ensemble")
    n = int(frame["n"].max())
    if n == 1:
        return "With one member every rule is that member. Choose more of them in the sidebar."
    gain = 100 * (ensemble["accuracy"] - single["accuracy"])
    passes = f"{n} forward passes an image"
    text = (
        f"The logit ensemble of {n} members is **{abs(gain):.1f} points "
        f"{'above' if gain >= 0 else 'below'}** a single member, at {passes}. "
    )
    step = 100 * (soup["accuracy"] - single["accuracy"])
    if soup["low"] <= chance <= soup["high"]:
        text += (
            f"Their uniform soup, one pass, cannot be told from guessing "
            f"({soup['accuracy']:.1%}; chance is {chance:.1%})."
        )
    else:
        text += (
            f"Their uniform soup, one pass, is {abs(step):.1f} points "
            f"{'above' if step >= 0 else 'below'} a single member ({soup['accuracy']:.1%})."
        )
    if non_finite := int(frame[frame["n"] == n]["non_finite"].max()):
        text += f" {non_finite} images get non-finite logits from a rule and count as wrong."
    return text


@shell.fragment
def rules_section() -> None:
    """Accuracy of each rule, over the number of members, against its cost, and why."""
    view = shell.pool_view()
    split, statistics = choose(view)
    frame = frame_over_members(view.key, view.members, split, statistics, view)
    chance = 1 / len(pool_resources.evaluator(view).class_names)
    draw_cards(frame, split)
    st.markdown(describe_accuracies(frame, chance))
    draw_rules(frame, chance, split, view)
    draw_starts(view, frame, split, statistics)
    draw_costs(
        frame, chance, agreement_frame(view.key, view.members, split, statistics, view), view
    )
    draw_greedy(view, statistics)
    draw_gap(view, split, statistics)
    draw_similarity(view)


def choose(view: PoolView) -> tuple[Split, Statistics]:
    """Which images, and what becomes of BatchNorm's statistics in soups."""
    left, right = st.columns(2)
    splits: dict[Split, str] = {"test": "Test", "val": "Validation"}
    handling: dict[Statistics, str] = {"average": "Averaged", "reestimate": "Re-estimated"}
    with left:
        split = choice(
            "Images",
            splits,
            "split",
            "Greedy soup and best individual are picked on validation, whatever is shown here.",
        )
    statistics: Statistics = "average"
    if soups.has_batchnorm(pool_resources.evaluator(view)):
        with right:
            statistics = choice(
                "BatchNorm statistics of soups",
                handling,
                "bn",
                "A soup's activations differ from its members'. Re-estimated: means and variances "
                "are computed anew on training images.",
            )
    return split, statistics


def draw_cards(frame: pd.DataFrame, split: Split) -> None:
    """What four of the rules reach with all members."""
    single = at(frame, "individuals")
    cards = charts.cards(4)
    for rule, title in zip(
        ("individuals", "uniform_soup", "logit_ensemble", "feature_ensemble_averaged_head"),
        ("Individuals", "Uniform soup", "Logit ensemble", "Feature ensemble"),
        strict=True,
    ):
        row = at(frame, rule)
        charts.accuracy_card(
            cards,
            title,
            f"{row['accuracy']:.1%}",
            SPLIT_NAMES[split],
            f"{row['n']:.0f} members",
            delta=None
            if rule == "individuals"
            else f"{100 * (row['accuracy'] - single['accuracy']):+.1f} points",
            border=True,
            help=f"{row['label']}: {SPLIT_NAMES[split]} split, 95 % interval {row['low']:.1%} to "
            f"{row['high']:.1%}; {row['passes']} forward passes per image.",
        )


def draw_rules(frame: pd.DataFrame, chance: float, split: Split, view: PoolView) -> None:
    """Every rule with all members, and over the number of members."""
    full = frame[frame["n"] == frame["n"].max()]
    where = f"{view.pool.title} ({SPLIT_NAMES[split]})"
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.rules_dots, full, title=f"Which rule wins? {where}", chance=chance
            ),
            key="rules",
            alt=f"Accuracy of each rule for {view.pool.title}",
            height=460,
        ),
        charts.Chart(
            charts.drawn(
                figures.accuracy_over_n,
                frame,
                title="What does one more member bring?",
                chance=chance,
            ),
            key="over_n",
            alt="Accuracy of each rule over the number of members",
            height=460,
        ),
        columns=2,
        how_to_read=charts.HowToRead(
            "**Individuals** are the members one by one; the band runs from the worst to the "
            "best. A **soup** is one model with averaged weights and costs one forward pass. A "
            "**logit** (or probability) **ensemble** averages outputs, a **feature ensemble** "
            "averages φ, the input of the last linear layer, and applies the first member's head "
            "or the averaged one. Bars are 95 % Wilson intervals of these images, not of other "
            "trainings. Dotted: guessing.",
            r"\text{soup } f\bigl(x;\tfrac1N\textstyle\sum_i\theta_i\bigr),\quad "
            r"\text{ensemble } \tfrac1N\sum_i f(x;\theta_i),\quad "
            r"\text{features } \bar W\bar\varphi(x)+\bar b",
        ),
        numbers=charts.Numbers(frame, f"rules_{view.name}"),
    )


def draw_starts(view: PoolView, frame: pd.DataFrame, split: Split, statistics: Statistics) -> None:
    """The same question for models that began elsewhere, side by side."""
    found = sidebar.other_start(view)
    if found is None or len(view.members) < 2:
        return
    st.subheader("Does it matter where training began?", anchor=False)
    start, other = found
    theirs = frame_over_members(other.key, other.members, split, statistics, other)
    here = REGIMES[view.pool.spec.regime].capitalize()
    soup, single = (
        [at(each, rule)["accuracy"] for each in (frame, theirs)]
        for rule in ("uniform_soup", "individuals")
    )
    gains = [100 * (s - i) for s, i in zip(soup, single, strict=True)]
    st.markdown(
        f"{here}: the uniform soup is **{gains[0]:+.1f} points** against a single member. "
        f"{start}: **{gains[1]:+.1f} points**."
    )
    chance = 1 / len(pool_resources.evaluator(view).class_names)
    shown = [(here, frame), (start, theirs)]
    charts.panel(
        *(
            charts.Chart(
                charts.drawn(figures.accuracy_over_n, each, title=name, chance=chance),
                key=f"start_{place}",
                alt=f"Accuracy of each rule over the number of members, {name.lower()}: uniform "
                f"soup {at(each, 'uniform_soup')['accuracy']:.1%}",
                height=440,
            )
            for place, (name, each) in enumerate(shown)
        ),
        key="starts",
        columns=2,
        how_to_read=charts.HowToRead(
            "Both pools have one task, one architecture and as many members. **Shared start**: "
            "all members went on from one short training, so that their weights mean the same "
            "and can be averaged. **Independent starts**: each has its own random beginning; "
            "their units stand in other orders, and an average of weights mixes unlike units, "
            "while an average of outputs does not care.",
            r"f\bigl(x;\tfrac1N\textstyle\sum_i\theta_i\bigr) \quad\text{against}\quad "
            r"\tfrac1N\sum_i f(x;\theta_i)",
        ),
        numbers=charts.Numbers(
            pd.concat([each.assign(start=name) for name, each in shown], ignore_index=True),
            "starts",
        ),
    )


def draw_costs(frame: pd.DataFrame, chance: float, pairs: pd.DataFrame, view: PoolView) -> None:
    """Accuracy against forward passes, and how often two models predict alike."""
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.accuracy_against_cost,
                frame,
                title="What does accuracy cost in forward passes?",
                chance=chance,
            ),
            key="cost",
            alt="Accuracy against forward passes per image",
            height=500,
        ),
        charts.Chart(
            charts.drawn(agreement_map, pairs, title="How often do two models predict alike?"),
            key="agreement",
            alt="Share of equal predictions for each pair of models",
            height=500,
        ),
        columns=2,
        how_to_read=charts.HowToRead(
            "Left: a soup stays at one pass however many members it has; an ensemble runs each of "
            "them. Right: share of images on which two models predict the same class. Members "
            "that err on different images are what an ensemble gains from.",
            r"a_{ij} = \frac1M\sum_x \bigl[\arg\max f(x;\theta_i) = \arg\max f(x;\theta_j)\bigr]",
        ),
        numbers=charts.Numbers(pairs, f"agreement_{view.name}"),
    )


def draw_greedy(view: PoolView, statistics: Statistics) -> None:
    """The greedy soup's trace."""
    st.subheader("Which members may go into the pot?", anchor=False)
    trace = trace_frame(view.key, view.members, statistics, view)
    kept = trace[trace["kept"]]
    st.markdown(
        f"Greedy soup, picked on the **validation** split: {len(kept)} of {len(trace)} members "
        f"kept ({', '.join(str(m) for m in kept['member'])})."
    )
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.greedy_trace,
                trace,
                title="Validation accuracy as members are tried, best first",
            ),
            key="greedy",
            alt="Validation accuracy of the candidate soup at each step",
            height=400,
        ),
        how_to_read=charts.HowToRead(
            "Members are sorted by validation accuracy. Each is tried in the soup and stays "
            "unless the soup's validation accuracy falls. The running mean weighs all kept "
            "members alike. With independent starts the first member usually stays alone.",
            r"S \leftarrow S\cup\{i\}\ \text{ if }\ \mathrm{acc}_{val}\bigl(\bar\theta_{S\cup\{i\}}"
            r"\bigr)\ge \mathrm{acc}_{val}\bigl(\bar\theta_S\bigr)",
        ),
        numbers=charts.Numbers(trace, f"greedy_{view.name}"),
    )


def draw_gap(view: PoolView, split: Split, statistics: Statistics) -> None:
    """What separates the rules: the covariance term and the curvature."""
    st.subheader("Where do the rules part?", anchor=False)
    term, covariance, gap = gap_frames(view.key, view.members, split, statistics, view)
    about, apart = covariance.iloc[0], gap.iloc[0]
    cards = charts.cards(4)
    cards.metric(
        "Covariance term",
        f"{about['ratio']:.1%}",
        help="Root mean square of logit ensemble − feature ensemble with averaged head, relative "
        "to the ensemble's logits.",
    )
    cards.metric(
        "Predictions it changes",
        f"{about['changed']:.1%}",
        help="Share of images on which those two ensembles predict different classes.",
    )
    cards.metric(
        "Soup − ensemble",
        f"{apart['ratio']:.1%}",
        help="Root mean square of the logits' difference, relative to the ensemble's logits.",
    )
    cards.metric(
        "Predictions that differ",
        f"{apart['changed']:.1%}",
        help="Share of images on which soup and logit ensemble predict different classes.",
    )
    left, right = st.columns(2)
    with right:
        curvature = chart_curvature(view)
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.covariance_scatter,
                term,
                title="What do heads and features lose when averaged apart?",
            ),
            key="covariance",
            alt="Logits of the averaged-head feature ensemble against the logit ensemble's",
            height=430,
            caption="What lies off the line is the covariance term, an identity that holds here "
            f"to {about['deviation']:.0e} logits (their size is {about['rms_logits']:.3g}).",
        ),
        curvature,
        key="gap",
        columns=[left, right],
        how_to_read=charts.HowToRead(
            "Left: heads and features vary together over the members; averaging each by itself "
            "loses exactly their covariance, the distance to the line. Right: for a network that "
            "is linear in its parameters the soup is the ensemble. The second-order term, from "
            "the curvature H at the averaged weights, predicts their difference as long as the "
            "members are close together; the line is exact agreement. With independent starts the "
            "members are too far apart for any expansion.",
            r"\bar f - (\bar W\bar\varphi+\bar b)=\tfrac1N\sum_i (W_i-\bar W)"
            r"(\varphi_i-\bar\varphi),"
            r"\qquad f(\bar\theta)-\bar f\approx-\tfrac12\,\mathrm{tr}\bigl(H\,"
            r"\mathrm{Cov}\,\theta\bigr)",
        ),
        numbers=charts.Numbers(term, f"covariance_{view.name}"),
    )


def chart_curvature(view: PoolView) -> charts.Chart | None:
    """Soup − ensemble against its second-order prediction, on demand."""
    evaluator = pool_resources.evaluator(view)
    if len(view.members) < 2:
        st.info("One member has no spread to predict from. Choose two or more.")
        return None

    def work(progress: Progress) -> pd.DataFrame:
        return taylor.predicted_gap(evaluator, view.members, progress=progress)

    members = ",".join(map(str, view.members))
    job = run_job(
        digest_of("taylor", view.key, members),
        "Second-order prediction",
        "Predict soup − ensemble from the curvature",
        f"Takes second derivatives along {len(view.members)} directions on "
        f"100 test images; some seconds for the bundled pools.",
        work,
    )
    if job is None:
        return None
    said = taylor.gap_summary(job.result).iloc[0]
    return charts.Chart(
        charts.drawn(
            figures.gap_scatter, job.result, title="Soup − logit ensemble against its prediction"
        ),
        key="taylor",
        alt="Measured soup minus ensemble against the second-order prediction",
        height=430,
        caption=f"Correlation {said['correlation']:.2f}, slope {said['slope']:.2f} (1 would be "
        "exact); test images, BatchNorm statistics averaged.",
        numbers=charts.Numbers(job.result, f"taylor_{view.name}"),
    )


def draw_similarity(view: PoolView) -> None:
    """Layer-wise CKA between members, on demand where it takes long."""
    st.subheader("Do the members see alike, layer by layer?", anchor=False)
    evaluator = pool_resources.evaluator(view)
    if len(view.members) < 2:
        st.info("Similarity needs two members or more.")
        return

    def work(progress: Progress) -> pd.DataFrame:
        return similarity.cka_frame(evaluator, view.members, progress=progress)

    members = ",".join(map(str, view.members))
    job = run_job(
        digest_of("cka", view.key, members),
        "Similarity of layers",
        "Compare the members' layers",
        f"Runs {len(view.members)} members on 256 test images.",
        work,
    )
    if job is None:
        return
    charts.panel(
        charts.Chart(
            charts.drawn(
                cka_layers,
                similarity.mean_cka(job.result),
                title="Linear CKA between members, from input to output",
            ),
            key="cka",
            alt="Linear CKA of each pair of members over the layers",
            height=430,
        ),
        how_to_read=charts.HowToRead(
            "1 means that two members represent the images alike up to a rotation and a scale of "
            "their units; averaging weights needs more than that, namely the same units in the "
            "same places. Independent members can be alike in this sense and still not average.",
            r"\mathrm{CKA}(X,Y)=\frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F\,\|Y^\top Y\|_F}"
            r"\quad(\text{columns centred})",
        ),
        numbers=charts.Numbers(job.result, f"cka_{view.name}"),
    )


charts.heading(
    "Average the weights, or the outputs?",
    "Several models of one task can be joined into one by averaging their **weights** (a soup, "
    "one forward pass) or asked together by averaging their **features or outputs** (an "
    "ensemble, one pass each). Whether the two agree depends on where training began.",
)
rules_section()
