"""Rank and scale: accuracy over both, and the point that merges best."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from analysis.figures import accuracy as figures
from analysis.sweep import (
    best_point,
    grid,
    known_sweep,
    mean_over_tasks,
    normalised_by_experts,
    sweep,
)
from merge_core.methods import get_method
from merge_core.recipe import make_recipe
from ui import charts, resources, shell
from ui.progress import run_job
from ui.resources import View
from ui.widgets import choice, share_label

shell.enter()

CENTRED, ORIGINAL = "cart", "low_rank_task_arithmetic"


@st.cache_data(max_entries=16, show_spinner="Looking up what is known …")
def stored(key: str, tasks: tuple[str, ...], method: str, _view: View) -> pd.DataFrame | None:
    """The sweep of a method's usual grid if every point was evaluated before."""
    recipes = grid(method, _view.name, tasks)
    return known_sweep(recipes, resources.session(_view), resources.evaluator(_view))


@st.cache_data(max_entries=16, show_spinner="Evaluating the experts …")
def expert_accuracy(key: str, tasks: tuple[str, ...], _view: View) -> pd.DataFrame:
    """Each expert on its own task, validation split."""
    return resources.evaluator(_view).experts(tasks)


def obtained(view: View, methods: list[str]) -> pd.DataFrame | None:
    """The sweeps of these methods, or None while they have still to be run (and offers that)."""
    known = [stored(view.key, view.tasks, method, view) for method in methods]
    if all(frame is not None for frame in known):
        return pd.concat(known, ignore_index=True)
    recipes = [r for method in methods for r in grid(method, view.name, view.tasks)]
    session, evaluator = resources.session(view), resources.evaluator(view)
    images = sum(len(evaluator.inputs(t, "val", None)[1]) for t in view.tasks)
    job = run_job(
        key=f"sweep:{view.key}:{','.join(view.tasks)}",
        title="Sweep over rank and scale",
        button="Run the sweep",
        note=f"This choice of tasks has not been swept yet: {len(recipes)} merges, each evaluated "
        f"on {images:,} validation images. It runs in the background, can be cancelled, and goes "
        "on from where it stopped.",
        work=lambda progress: sweep(recipes, session, evaluator, progress=progress),
    )
    if job is None:
        return None
    stored.clear()
    result: pd.DataFrame = job.result
    return result


def pick(point: pd.Series) -> None:
    """Take a setting over into the two sliders."""
    st.session_state["at_rank"] = float(point["rank"])
    st.session_state["at_scale"] = float(point["scale"])


def pick_clicked() -> None:
    """A click on the map chooses that point (the two sliders are its keyboard twins)."""
    points = st.session_state["rank_scale_map"]["selection"]["points"]
    if points:
        data = points[0]["customdata"]
        values = data if isinstance(data, list) else [data["0"], data["1"]]
        pick(pd.Series({"rank": values[0], "scale": values[1]}))


@shell.fragment
def section(frame: pd.DataFrame, view: View) -> None:
    """Map, curves and the chosen point."""
    experts = expert_accuracy(view.key, view.tasks, view)
    method = CENTRED
    if view.suite.base is not None:
        method = choice(
            "Low-rank task vectors",
            {CENTRED: "Centred (CART)", ORIGINAL: "Original (about the base)"},
            "vectors",
            "Centred vectors are added to the average, original ones to the base.",
        )
    mean = mean_over_tasks(frame)
    mine = mean[mean["method"] == method]
    best = best_point(mine)
    ranks = sorted(float(value) for value in mine["rank"].unique())
    scales = sorted(float(value) for value in mine["scale"].unique())
    left, middle, right = st.columns([3, 3, 2], vertical_alignment="bottom")
    rank = left.select_slider(
        "Rank (share of directions)",
        ranks,
        value=float(best["rank"]),
        format_func=share_label,
        key="at_rank",
        bind="query-params",
        help="Directions kept of each task vector, as a share of min(m, n) of each matrix.",
    )
    scale = middle.select_slider(
        "Scaling coefficient λ",
        scales,
        value=float(best["scale"]),
        key="at_scale",
        bind="query-params",
        help="How strongly the kept directions are added; typical values are 1 to 3 for CART.",
    )
    right.button("Go to the best point", on_click=pick, args=(best,), width="stretch")
    here = mine[(mine["rank"] == rank) & (mine["scale"] == scale)].iloc[0]
    average = mine[mine["rank"] == 1.0]["accuracy"].max() if method == CENTRED else None

    cards = st.columns(4)
    cards[0].metric(
        "Chosen point",
        f"{here['accuracy']:.1%}",
        help=f"Mean over tasks on the validation split, 95 % interval {here['low']:.1%} to "
        f"{here['high']:.1%}.",
    )
    cards[1].metric(
        "Best point",
        f"{best['accuracy']:.1%}",
        delta=f"at {share_label(best['rank'])}, λ = {best['scale']:g}",
        delta_color="off",
        delta_arrow="off",
    )
    cards[2].metric("Experts", f"{experts['accuracy'].mean():.1%}")
    if average is not None:
        cards[3].metric("Average of the weights", f"{average:.1%}")

    left, right = st.columns(2)
    with left:
        charts.show(
            figures.rank_scale_map(
                mine,
                title="Which pair merges best?",
                chosen=(rank, scale),
                best=(best["rank"], best["scale"]),
            ),
            key="rank_scale_map",
            alt="Mean validation accuracy over rank and scale",
            height=460,
            on_select=pick_clicked,
            selection_mode="points",
        )
    with right:
        curves = pd.concat(
            [
                _at_scale(mean, name, scale if name == method else None)
                for name in dict.fromkeys([CENTRED, ORIGINAL])
                if name in set(mean["method"])
            ],
            ignore_index=True,
        )
        charts.show(
            figures.accuracy_over_rank(
                curves,
                title="How does accuracy move with the rank?",
                references={
                    "Experts": experts["accuracy"].mean(),
                    **({"Average": average} if average is not None else {}),
                },
                chosen_rank=rank,
            ),
            key="accuracy_over_rank",
            alt="Mean accuracy over rank, centred against original task vectors",
            height=460,
        )
    charts.how_to_read(
        "map",
        "At rank 100 % the centred vectors cancel and CART is the plain average; at rank 0 it "
        "is the average too. Where accuracy rises and falls in between, one sees **the bell**. "
        "Little of each task is kept on its left, and a large λ overstretches that little; on "
        "its right the vectors cancel more and more. Original vectors (about the base) do not "
        "cancel: at full rank they end at Task Arithmetic on the matrices. The band is the 95 % "
        "sampling interval of the mean over these tasks. The point is chosen on the validation "
        "split; the Overview reports the test split.",
        r"\theta = \theta_{avg} + \lambda \sum_t \mathrm{SVD}_k(\theta_t - \theta_{avg}),\qquad "
        r"k = \max(1, \lfloor \rho r \rfloor)",
    )
    charts.numbers(mean, "rank_and_scale", key="mean")

    st.subheader("Which task wants which rank?", anchor=False)
    relative = st.toggle(
        "As a share of each expert's accuracy",
        key="relative",
        bind="query-params",
        help="Divides by the expert's own accuracy, so that hard and easy tasks compare.",
    )
    per_task = frame[(frame["method"] == method) & (frame["scale"] == scale)]
    per_task = normalised_by_experts(per_task, experts)
    charts.show(
        figures.tasks_over_rank(
            per_task,
            "normalised" if relative else "accuracy",
            title=f"Accuracy of each task at λ = {scale:g}",
            chosen_rank=rank,
        ),
        key="tasks_over_rank",
        alt="Accuracy of each task over rank",
        height=420,
    )
    charts.numbers(per_task, f"tasks_over_rank_{method}", key="tasks")
    parameters = {"rank": rank, "scale": scale}
    document = {"suite": view.name, "tasks": view.tasks, "method": method, "parameters": parameters}
    recipe = make_recipe(document)
    st.page_link(
        shell.page("merge_lab"),
        label=f"Open {get_method(method).title} at this point in the Merge lab",
        icon=":material/science:",
        query_params=shell.lab_query(recipe),
    )


def _at_scale(mean: pd.DataFrame, method: str, scale: float | None) -> pd.DataFrame:
    """Accuracy over rank of a method at one scale, its best one where None is given."""
    mine = mean[mean["method"] == method]
    scale = best_point(mine)["scale"] if scale is None else scale
    return mine[mine["scale"] == scale]


charts.heading(
    "Which rank, and which scale?",
    "Two numbers decide a low-rank merge: how many directions of each task are kept, and how "
    "strongly they are added. Both are measured here on the validation split.",
)
current = shell.view()
if current.suite.can_evaluate:
    wanted = [CENTRED] if current.suite.base is None else [CENTRED, ORIGINAL]
    if len(current.tasks) == 2:
        st.warning(get_method("cart").warnings(2, None)[0])
    swept = obtained(current, wanted)
    if swept is not None:
        section(swept, current)
else:
    shell.explain_no_evaluation(current)
