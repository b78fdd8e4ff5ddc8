"""Compare: any set of methods on one suite, with intervals, costs and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
import streamlit as st

from analysis import accuracy
from analysis.accuracy import Hits
from analysis.comparison.published import published_results
from analysis.comparison.run import SEEDS, Comparison, usable_methods
from analysis.comparison.seeds import join_seeds, titles_without_seeds
from analysis.figures import compare as figures
from analysis.metrics import metric_of
from merge_core.files import digest_of
from merge_core.merging.recipe import Recipe
from merge_core.methods import get_method
from ui import charts, shell
from ui.controls import choice, multiselect, tabs
from ui.plain_text import show_info
from ui.progress import run_job
from ui.sections.own_recipes import own_recipes
from ui.sections.suggested import describe_setting, find_suggestion
from ui.server import resources
from ui.server.once import once
from ui.server.resources import View

shell.enter()

BUDGETS = {1: "Its defaults", 4: "Best of 4", 16: "Best of 16"}
# The tests of paired differences, by metric.
EXACT = {
    "accuracy": "McNemar's exact test",
    "cross_entropy": "a test by random signs, on the safe side,",
}
COSTS = {"seconds": "Time", "storage_mb": "Storage", "peak_mb": "Memory"}


def choose(view: View) -> tuple[list[str], int]:
    """Methods and how they are set."""
    offered = usable_methods(view.suite, view.tasks)
    quick = [name for name, method in offered.items() if method.learns is None]
    names = multiselect(
        "Methods",
        offered,
        "methods",
        rest=which_are_known(view, quick, 1),
        words=lambda name: offered[name].title,
        help="Those that learn from data take longest; add them when you have minutes.",
    )
    budget = choice(
        "Each at",
        BUDGETS,
        "budget",
        "Best of n: n settings spread over each method's usual range, chosen on the validation "
        "split; the same number for every method. Methods that learn from data stay at their "
        "defaults, which the table says. Your own recipes stay as they are.",
    )
    return names, budget


def which_are_known(view: View, names: list[str], budget: int) -> list[str]:
    """Methods that can be compared: of a record, those that it holds."""
    frames = resources.output_frames(view)
    if frames.frames.computes:
        return names
    return [name for name in names if frames.compare_if_known([name], budget) is not None]


def without_missing(view: View, names: list[str], budget: int) -> list[str]:
    """The methods without those that a record does not hold, which are named; all if none is."""
    known = which_are_known(view, names, budget)
    missing = [get_method(name).title for name in names if name not in known]
    if not known or not missing:
        return names
    show_info(f"This record does not hold the comparison of {', '.join(missing)}.")
    return known


def tuned_recipes(view: View, names: list[str]) -> list[Recipe]:
    """The settings of these methods that a stored search chose, where they are not the defaults."""
    found = [find_suggestion(view.key, view.tasks, name, view) for name in names]
    return [
        recipe
        for recipe in found
        if recipe is not None and describe_setting(recipe, None) != "default setting"
    ]


def size_of(names: list[str], tuned: list[Recipe], own: list[Recipe]) -> str:
    """``3 methods, 1 stored setting tuned on validation and 1 recipe of your own``."""
    counts = (
        (len(names), "method", ""),
        (len(tuned), "stored setting", " tuned on validation"),
        (len(own), "recipe", " of your own"),
    )
    parts = [f"{n} {word}{'s' if n > 1 else ''}{rest}" for n, word, rest in counts if n]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def ranking(result: Comparison) -> None:
    """Who is best, and where the differences are real."""
    metric = metric_of(result.summary)
    references = {"experts": float(result.experts[metric.column].mean())}
    if result.base is not None:
        references["base"] = result.base
    joined = once(join_seeds, result.summary, result.recipes)
    single, told = apart(joined, result.recipes)
    drawn = []
    for frame, key, title in (
        (single, "dots", "Which method keeps most of the tasks?"),
        (told, "told", "And if each task is known?"),
    ):
        if frame.empty:
            continue
        best = frame.iloc[0]
        drawn.append(
            charts.Chart(
                charts.drawn(figures.method_dots, frame, title=title, references=references),
                key=key,
                alt=f"Mean test {metric.noun} of each method with its interval: {len(frame)} "
                f"methods, best {best['label']} at {metric.show(best[metric.column])}",
                caption=describe_settings(frame),
            )
        )
    # Of the seeds of a method the first stands in the pairs; its range stands in the ranking.
    hits = first_seeds(result.hits, result.recipes)
    pairs = once(accuracy.paired_differences, hits)
    drawn.append(
        charts.Chart(
            charts.drawn(
                figures.paired_map,
                pairs,
                [*single["label"], *told["label"]],
                title="Which differences are real?",
                metric=metric,
            ),
            key="pairs",
            alt=f"Pairwise differences of mean {metric.noun} of {len(joined)} methods",
        )
    )
    charts.panel(
        *drawn,
        key="ranking",
        columns=2,
        how_to_read=charts.HowToRead(
            f"Dots: mean {metric.noun} over the tasks on the **test** split with its 95 % "
            "interval, and the worst task; the number is the place. Methods that need to be told "
            "which task an input is of hold more than one model, and are ranked by themselves. A "
            "method whose seed changes the merge is one row: the mean over its seeds, and their "
            "range. Map: row minus column on the **same inputs**, in "
            f"{metric.points}, by place: first the methods that give "
            "one model, then the others (of seeds the first one); a dot marks differences that "
            f"stay significant at 5 % in {EXACT[metric.column]}, over all tasks at once, after "
            "Holm's correction for the number of pairs. They speak of these experts and tasks, not "
            "of others. "
            + once(accuracy.words_for_few_images, result.hits)
            + charts.which_way(metric),
            r"\bar d = \tfrac1T\sum_t \tfrac1{n_t}\sum_i d_{ti},\qquad "
            r"p = P\Big(\Big|\tfrac1T\sum_t \tfrac1{n_t}\sum_i \varepsilon_{ti} d_{ti}\Big| "
            r"\ge |\bar d|\Big),\quad \varepsilon_{ti} = \pm 1",
        ),
        numbers=charts.Numbers(pairs, "paired_differences"),
    )


def apart(
    summary: pd.DataFrame, recipes: Mapping[str, Recipe]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of methods that give one model, and of those that must know an input's task."""
    titles = titles_without_seeds(recipes)
    indexed = {titles[label] for label, each in recipes.items() if each.declaration.indexed}
    told = summary["label"].isin(indexed)
    return summary[~told], summary[told]


def first_seeds(hits: Mapping[str, Hits], recipes: Mapping[str, Recipe]) -> dict[str, Hits]:
    """What each method gets right, of several seeds the first, by its name without a seed."""
    found: dict[str, Hits] = {}
    for label, title in titles_without_seeds(recipes).items():
        found.setdefault(title, hits[label])
    return found


def describe_settings(frame: pd.DataFrame) -> str:
    """Which split the numbers are of, and how the settings came about."""
    counts = frame["chosen"].value_counts()
    ways = ", ".join(f"{way} ({n})" for way, n in counts.items())
    return f"Test split. Settings: {ways}."


def table(result: Comparison) -> None:
    """Everything in one table."""
    charts.table(result.summary, "comparison", key="comparison", words={"label": "Method"})
    if len(result.seeds):
        st.markdown(
            "Methods whose seed changes the merge, over their seeds: mean, standard deviation, "
            "least and most."
        )
        charts.table(result.seeds, "seeds", key="seeds")


def tasks(result: Comparison) -> None:
    """Per task, as a radar and as a table."""
    order = result.summary["label"].tolist()
    chosen = multiselect(
        "Drawn (at most six)", order, "drawn", rest=order[:4], most=figures.MOST_ON_RADAR
    )
    left, right = st.columns(2)
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.task_radar, result.tasks, chosen, title="Which tasks does a method keep?"
            ),
            key="radar",
            alt=f"{metric_of(result.tasks).title} of the chosen methods over tasks",
        ),
        columns=[left],
    )
    with right:
        column = metric_of(result.tasks).column
        wide = result.tasks.pivot(index="label", columns="task", values=column)
        wide = wide.loc[order, result.experts["task"]]
        charts.table(
            wide.reset_index(),
            "tasks",
            key="tasks",
            words={"label": "Method"} | {task: task for task in map(str, wide)},
        )


def costs(result: Comparison) -> None:
    """Accuracy against time, memory or storage."""
    quantity = choice("Cost", COSTS, "cost")
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.cost_scatter,
                once(join_seeds, result.summary, result.recipes),
                quantity,
                title=f"What does {metric_of(result.summary).noun} cost?",
            ),
            key="costs",
            alt=f"{metric_of(result.summary).title} against {COSTS[quantity].lower()}",
            caption="Time (of the processor) and memory: to learn, decompose and merge for all "
            "tasks, from experts in memory with nothing decomposed before, measured once on this "
            "machine. Storage: backbones for all tasks; a merge is one model, methods that know "
            "the task hold what their compact form needs.",
        )
    )


def published_figures() -> None:
    """What papers report, apart from everything measured here."""
    frame = published_results()
    sources = {source: source[0].upper() + source[1:] for source in frame["source"].unique()}
    source = choice("Source", sources, "source")
    mine = frame[frame["source"] == source].drop(columns="source")
    st.markdown(
        "Published test accuracies of CLIP models, on the protocol with the corrected DTD split; "
        "figures of papers that used the leaking split are left out. **Not comparable with the "
        "measured ones** on this page: other models, other tasks."
    )
    words = {"low": "Accuracy (%), lowest", "high": "Accuracy (%), highest"}
    charts.table(mine, "published", key="published", words=words)


def page() -> None:
    """The page."""
    view = shell.view()
    charts.heading(
        "Which method merges best here?",
        "Every method on the same experts and the same test inputs, with what it needs and what "
        "it costs.",
    )
    if not resources.is_measurable(view):
        shell.explain_no_evaluation(view)
        published_figures()
        return
    names, budget = choose(view)
    names = without_missing(view, names, budget)
    own, tuned = own_recipes(view), tuned_recipes(view, names)
    if not names and not own:
        st.info("Choose at least one method, or add a recipe of your own.")
        return
    frames = resources.output_frames(view)
    result = frames.compare_if_known(names, budget, own, tuned)
    if result is None:
        frames.expect_comparison(names, budget, own, tuned)
        result = run_comparison(view, names, budget, own, tuned)
    if result is None:
        st.subheader("What papers report", anchor=False)
        published_figures()
        return
    for place, draw in zip(tabs(TABS, "show"), TABS.values(), strict=True):
        with place:
            draw(result)


def run_comparison(
    view: View, names: list[str], budget: int, own: list[Recipe], tuned: list[Recipe]
) -> Comparison | None:
    """The comparison, run in the background when it is asked for; None while there is none."""
    frames = resources.output_frames(view)
    job = run_job(
        digest_of(
            *("compare", view.key, *view.tasks, *names, str(budget)),
            *(recipe.to_query() for recipe in (*own, *tuned)),
            str(len(tuned)),
        ),
        "Comparison",
        "Compare these methods",
        f"{size_of(names, tuned, own)} on {len(view.tasks)} tasks, {SEEDS} seeds each for methods "
        "whose seed changes the merge. What was evaluated before is not evaluated again.",
        lambda progress: frames.compare(names, budget, own, tuned, progress),
    )
    return None if job is None else job.result


TABS: dict[str, Callable[[Comparison], None]] = {
    "Ranking": ranking,
    "Table": table,
    "Tasks": tasks,
    "Costs": costs,
    "Published": lambda _: published_figures(),
}
page()
