"""How does it scale?: accuracy over the number of tasks, and over the size of the model."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from analysis.comparison.scaling import METHODS, draw_subsets, summarise_over, task_counts
from analysis.figures import accuracy as figures
from analysis.frames.scaling import scaling, scaling_if_known
from analysis.frames.usual import SUBSETS
from analysis.metrics import METRICS
from merge_core.errors import MergeScopeError
from merge_core.files import digest_of
from merge_core.suites.bundled import bundled_title
from merge_core.suites.data_files import data_identity
from ui import charts, shell
from ui.controls import choice, multiselect
from ui.progress import run_job
from ui.server import resources, session_files
from ui.server.once import once
from ui.server.resources import View
from ui.words.scaling import describe_sizes, describe_tasks

shell.enter()

REPEATS = {count: str(count) for count in SUBSETS}


def measured(
    views: list[View], subsets: list[tuple[str, ...]], title: str, note: str
) -> list[pd.DataFrame] | None:
    """The accuracies of all subsets in each suite, computed in the background where asked for."""
    asked = [(resources.output_frames(view), resources.factor_store(view.suite)) for view in views]
    known = [scaling_if_known(outputs, subsets) for outputs, _ in asked]
    if all(frame is not None for frame in known):
        return [frame for frame in known if frame is not None]
    job = run_job(
        digest_of(
            "scaling", *(view.key for view in views), *("+".join(subset) for subset in subsets)
        ),
        title,
        "Merge and evaluate",
        note,
        lambda progress: [
            scaling(outputs, subsets, factors, progress) for outputs, factors in asked
        ],
    )
    return None if job is None else list(job.result)


def over_tasks(view: View, value: str) -> None:
    """Accuracy over the number of tasks, on random subsets of the chosen ones."""
    st.subheader("What do more tasks cost?", anchor=False)
    repeats = choice(
        "Subsets of each size",
        REPEATS,
        "subsets",
        "Which tasks are merged matters; so several sets of each size are drawn at random, and "
        "each merge is evaluated on its own tasks.",
    )
    subsets = draw_subsets(view.tasks, task_counts(len(view.tasks)), repeats)
    found = measured(
        [view],
        subsets,
        "More and more tasks",
        f"{len(subsets)} subsets of {len(view.tasks)} tasks, {len(METHODS)} methods each, on the "
        "test split. What was evaluated before is not evaluated again.",
    )
    if found is None:
        return
    (frame,) = found
    st.markdown(once(describe_tasks, frame))
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.accuracy_over,
                once(summarise_over, frame, "count", value),
                "count",
                value,
                title="How much is kept as tasks are added?",
            ),
            key="over_tasks",
            alt=once(describe_tasks, frame),
            height=460,
        ),
        how_to_read=charts.HowToRead(
            "Each point is the mean over random subsets of that many tasks, evaluated on the "
            "**test** split of the tasks that were merged; the band is the range from the worst "
            "to the best subset. CART and Task Arithmetic are at the rank and scale that their "
            "rules recommend from the weights of these very experts (CART of two tasks is their "
            "average at any setting); the others are at their published defaults. Subsets share "
            "tasks, so neighbouring points are not independent.",
            r"\tfrac1T\sum_t \frac{\mathrm{acc}_t(\theta_{\mathrm{merged}})}"
            r"{\mathrm{acc}_t(\theta_t)}",
        ),
        numbers=charts.Numbers(frame, "accuracy_over_tasks"),
    )


def suites_alike(view: View) -> dict[str, View]:
    """Other suites on offer that have all chosen tasks and can be evaluated: name to view."""
    found = {}
    for name in session_files.list_offered():
        try:
            key = resources.suite_key(name)
            suite = resources.open_suite(name, key)
            if name == view.name or not set(view.tasks) <= set(suite.tasks):
                continue
            tasks = tuple(task for task in suite.tasks if task in view.tasks)
            other = View(name, key, suite, tasks, suite.matrices[0])
            if resources.is_measurable(other):
                found[name] = other
        except MergeScopeError:  # said where it is opened
            continue
    return found


def on_the_same_data(view: View, others: dict[str, View]) -> list[str]:
    """Those that are evaluated on the very same inputs; all of them where none is."""

    def identities(each: View) -> list[str]:
        found = []
        for task in view.tasks:
            data = each.suite.data(task)
            assert data is not None  # it can be evaluated
            found.append(data_identity(data, each.suite.file, f"data of task {task!r}"))
        return found

    mine = identities(view)
    return [name for name, other in others.items() if identities(other) == mine] or list(others)


def over_sizes(view: View, value: str) -> None:
    """Accuracy of the same tasks in suites of other sizes."""
    st.subheader("Do larger models merge better?", anchor=False)
    others = suites_alike(view)
    if not others:
        st.markdown(
            "No other suite on offer has these tasks. Open one whose experts have another size "
            "and the same task names, and both are compared here."
        )
        return
    rest = on_the_same_data(view, others)
    names = multiselect("Beside", list(others), "beside", rest=rest, shown=bundled_title)
    if not names:
        return
    views = [view, *(others[name] for name in names)]
    found = measured(
        views,
        [view.tasks],
        "Sizes of models",
        f"{len(views)} suites of {len(view.tasks)} tasks, {len(METHODS)} methods each.",
    )
    if found is None:
        return
    frame = pd.concat(
        [
            part.assign(suite=each.name, parameters=resources.count_parameters(each))
            for part, each in zip(found, views, strict=True)
        ],
        ignore_index=True,
    )
    st.markdown(once(describe_sizes, frame))
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.accuracy_over,
                once(summarise_over, frame, "parameters", value),
                "parameters",
                value,
                title="How much is kept at which size?",
            ),
            key="over_sizes",
            alt=once(describe_sizes, frame),
            height=460,
        ),
        how_to_read=charts.HowToRead(
            "The same tasks in suites whose models have other sizes, each merge on the **test** "
            "split. Suites of one size are one point with their range. Models that differ in more "
            "than size differ here too.",
            r"\tfrac1T\sum_t \frac{\mathrm{acc}_t(\theta_{\mathrm{merged}})}"
            r"{\mathrm{acc}_t(\theta_t)}",
        ),
        numbers=charts.Numbers(frame, "accuracy_over_sizes"),
    )


def page() -> None:
    """The page."""
    view = shell.view()
    charts.heading(
        "How does it scale?",
        "What does every further task cost, and do larger models lose less? How much of the "
        "experts a merge keeps, for several methods.",
    )
    if not resources.is_measurable(view):
        shell.explain_no_evaluation(view)
        return
    if len(view.tasks) < 2:
        st.info("A merge needs at least two tasks; choose more in the sidebar.")
        return
    metric = METRICS[view.suite.measured_by]
    value = choice("Shown", {"normalised": "Of the experts", metric.column: metric.title}, "shown")
    over_tasks(view, value)
    over_sizes(view, value)


page()
