"""Merge lab: choose a method and its parameters, see every task, compare, download."""

from __future__ import annotations

from contextlib import suppress

import pandas as pd
import streamlit as st

from analysis.evaluation.model_card import results_of
from analysis.figures import accuracy as figures
from analysis.frames.entries import NotRecorded
from analysis.metrics import mean_over_tasks, metric_of
from analysis.outputs.inputs import SPLIT_NAMES, Split
from merge_core.errors import MergeScopeError, RecipeError
from merge_core.merging.recipe import Recipe, make_recipe, recipe_from_query
from merge_core.methods import get_method, methods
from merge_core.methods.declaration import Method
from merge_core.output.model_card import Result, model_card
from merge_core.output.model_folder import merged_bytes
from merge_core.output.provenance import provenance
from merge_core.suites.recorded import RecordedSuite
from ui import charts, shell
from ui.controls import choice, selectbox
from ui.controls import text as text_control
from ui.plain_text import plain, show_info, show_warning
from ui.progress import run_job
from ui.sections.own_recipes import link_form
from ui.sections.recipe_options import recipe_options
from ui.sections.suggested import describe_setting, find_suggestion, offer_suggestion
from ui.server import resources
from ui.server.once import once
from ui.server.resources import View
from ui.widgets import controls, share_label

shell.enter()

DTYPES = ("input", "float32", "float16", "bfloat16")
DOWNLOAD_BYTES = 1_000_000_000


def is_mergeable(view: View, method: Method) -> bool:
    """Whether a method makes one model of the chosen tasks from their weights alone."""
    return (
        (view.suite.base is not None or not method.needs_base())
        and method.tasks in (None, len(view.tasks))
        and not method.indexed
        and method.learns is None
    )


def choose_recipe(view: View) -> Recipe:
    """Method and parameters from widgets that the declaration makes."""
    available = [name for name, method in methods().items() if is_mergeable(view, method)]
    name = selectbox(
        "Method",
        available,
        "method",
        rest="cart",
        words=lambda name: get_method(name).title,
        help="Methods that need a base are listed only where the suite names one, those for two "
        "experts only while two tasks are chosen.",
    )
    method = get_method(name)
    st.markdown(method.summary)
    parameters = controls(method)
    with st.expander("More of the recipe", icon=":material/tune:"):
        options = recipe_options(view, method)
    dtype = selectbox(
        "Number format of the file",
        DTYPES,
        "dtype",
        help="'input' keeps each parameter's own; the merge itself is computed in float32.",
    )
    with st.expander("Formula and source", icon=":material/function:"):
        st.latex(method.formula)
        st.markdown(
            f"{method.source}\n\n**Needs** {', '.join(method.needs) or 'nothing else'}. "
            f"**Only averages** {method.averaged}. **Deviations:** {method.deviations}"
        )
    return make_recipe(
        {
            "suite": view.name,
            "tasks": view.tasks,
            "method": name,
            "parameters": parameters,
            **options,
            "dtype": dtype,
        }
    )


@st.cache_data(max_entries=64, show_spinner="Merging and evaluating …")
def accuracy(
    key: str, tasks: tuple[str, ...], query: str, split: Split, _view: View
) -> pd.DataFrame:
    """Per-task accuracy of a recipe, given as its link."""
    recipe = recipe_from_query(query)
    return resources.output_frames(_view).recipe(recipe, split)


@st.cache_data(max_entries=8, show_spinner="Evaluating the experts …")
def references(key: str, tasks: tuple[str, ...], split: Split, _view: View) -> pd.DataFrame:
    """Per-task accuracy of the experts on their own tasks."""
    return resources.output_frames(_view).experts(split)


def pinned_recipe(view: View) -> Recipe | None:
    """The recipe to compare with, from the text field (and so from the link)."""
    text = text_control(
        "Compare with",
        "pin",
        placeholder="Pin the current recipe, or paste one",
        help="A recipe written as a link's query, such as method=average. Pinning fills it in.",
    ).strip()
    if not text:
        return None
    try:
        recipe = recipe_from_query(text)
    except RecipeError as error:
        show_warning(f"The pinned recipe cannot be read: {error}")
        return None
    recipe = recipe.model_copy(update={"suite": view.name, "tasks": view.tasks})
    st.caption(f"Pinned: {plain(title_of(recipe))}")
    return recipe


def title_of(recipe: Recipe) -> str:
    """A recipe in a few words, such as ``CART, rank 8 %, scale 2``."""
    method = get_method(recipe.method)
    ranks = {spec.name for spec in method.specs if spec.kind == "rank"}
    words = []
    for name, value in recipe.parameters.items():
        if name in ranks and isinstance(value, float):
            words.append(f"{name} {share_label(value)}")
        else:
            words.append(
                f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} {value}"
            )
    return ", ".join([method.title, *words])


def pin_current(recipe: Recipe) -> None:
    """Take the current recipe as the one to compare with."""
    st.session_state["pin"] = link_form(recipe)


def draw_cards(
    mine: pd.DataFrame, experts: pd.DataFrame, where: str, setting: str, delta: float | None
) -> None:
    """The merge's accuracies as numbers.

    Args:
        mine: per task, of the merge.
        experts: per task, of each expert.
        where: which split.
        setting: how the recipe's setting came about, in words.
        delta: mean accuracy against the pinned recipe's.
    """
    metric, mean = metric_of(mine), once(mean_over_tasks, mine).iloc[0]
    values, own = (each[metric.column].to_numpy() for each in (mine, experts))
    cards = charts.cards(4)
    charts.accuracy_card(
        cards,
        f"Mean {metric.noun}",
        metric.show(mean[metric.column]),
        where,
        setting,
        delta=None
        if delta is None
        else f"{metric.show_difference(delta)} {metric.points} against the pinned one",
        delta_color=charts.delta_colour(metric),
        help=f"95 % interval {charts.interval_words(metric, mean)}, mean over tasks; "
        f"{charts.unit_words(metric)}.",
    )
    charts.accuracy_card(
        cards,
        "Experts",
        metric.show(own.mean()),
        where,
        "each on its own task",
        help="Each expert on its own task, mean over tasks.",
    )
    right = own > 0
    relative = metric.relative(values[right], own[right])
    charts.accuracy_card(
        cards,
        "Normalised",
        f"{relative.mean():.1%}" if right.any() else "–",
        where,
        setting,
        help=f"Each expert's {metric.noun} over the merge's, mean over tasks."
        if metric.lower_is_better
        else "Each task's accuracy over its expert's, mean.",
    )
    worst = mine.iloc[int((metric.sign * values).argmin())]
    charts.accuracy_card(
        cards,
        f"Worst task: {plain(worst['task'])}",
        metric.show(worst[metric.column]),
        where,
        setting,
    )


def result(
    view: View, recipe: Recipe, other: Recipe | None, split: Split, setting: str
) -> list[Result]:
    """Per-task accuracy of the recipe beside the experts and the pinned recipe.

    Args:
        view: suite and tasks.
        recipe: the current one.
        other: the pinned one.
        split: whose images.
        setting: how the recipe's setting came about, in words.

    Returns:
        The recipe's accuracies, for its card; none where it is not evaluated yet.
    """
    kept, size = resources.output_frames(view), resources.count_parameters(view)
    needed = [r for r in (recipe, other) if r is not None]
    if not resources.is_small(view) and not (
        kept.knows_experts(split) and all(kept.knows_recipe(r, split) for r in needed)
    ):
        job = run_job(
            key="lab:" + view.key + ":".join(r.to_query() for r in needed) + split,
            title="Merge and evaluate",
            button="Merge and evaluate",
            note=f"This suite's models have {size / 1e6:,.0f} M parameters; evaluating the merge "
            "and the experts takes a while and runs in the background.",
            work=lambda progress: [
                kept.experts(split, progress),
                *(kept.recipe(r, split, progress) for r in needed),
            ],
        )
        if job is None:
            return []
    experts = references(view.key, view.tasks, split, view)
    mine = accuracy(view.key, view.tasks, recipe.to_query(), split, view)
    shown = [experts.assign(model="Experts"), mine.assign(model=title_of(recipe))]
    delta = None
    if other is not None and other != recipe:
        theirs = accuracy(view.key, view.tasks, other.to_query(), split, view)
        shown.append(theirs.assign(model="Pinned: " + title_of(other)))
        column = metric_of(mine).column
        delta = float(mine[column].mean() - theirs[column].mean())
    draw_cards(mine, experts, SPLIT_NAMES[split], setting, delta)
    drawn = pd.concat(shown, ignore_index=True)
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.dots_per_task, drawn, title="How well does the merged model do each task?"
            ),
            key="per_task",
            alt=f"{metric_of(mine).title} of each task: experts, current recipe, pinned recipe",
            height=430,
        ),
        how_to_read=charts.HowToRead(
            f"One row is one task; a dot is a model's {metric_of(mine).noun} and its bar the 95 % "
            "sampling interval. The gap between the expert and the merge is what merging costs "
            "that task. "
            "Where the bars of two recipes overlap widely, these inputs do not tell them apart."
            + charts.which_way(metric_of(mine)),
            recipe.declaration.formula,
        ),
        numbers=charts.Numbers(drawn, f"{metric_of(mine).column}_{recipe.method}"),
    )
    return results_of(mine, split)


def choose(view: View) -> tuple[Recipe, Recipe | None, Recipe | None]:
    """The recipe from its controls, the pinned one, and the one that is recommended."""
    recipe = choose_recipe(view)
    for warning in recipe.warnings(view.tasks):
        show_warning(warning)
    suggestion = find_suggestion(view.key, view.tasks, recipe.method, view)
    offer_suggestion(recipe, suggestion)
    st.button(
        "Pin this recipe for comparison",
        on_click=pin_current,
        args=(recipe,),
        icon=":material/push_pin:",
        width="stretch",
    )
    other = pinned_recipe(view)
    return recipe, other, suggestion


def offer_nearest(view: View, error: NotRecorded) -> None:
    """A link to the most similar setting that a record holds."""
    nearest = error.nearest or {}
    named = {name: nearest[name] for name in ("method", "parameters") if name in nearest}
    with suppress(MergeScopeError):  # a record may hold anything
        recipe = make_recipe({**named, "suite": view.name, "tasks": view.tasks})
        st.page_link(
            shell.page("merge_lab"),
            label="Show the nearest setting that is recorded",
            icon=":material/near_me:",
            query_params=shell.lab_query(recipe),
        )


def offer_downloads(view: View, recipe: Recipe, results: list[Result]) -> None:
    """The merged checkpoint, its recipe and its card; a record has no weights to merge."""
    if isinstance(view.suite, RecordedSuite):
        st.info("A record holds no weights, so nothing can be merged here.")
        return
    session = resources.session(view)
    name = f"{view.name}_{recipe.method}"
    size = view.suite.expert(view.tasks[0]).nbytes
    buttons = st.columns(3)
    buttons[0].download_button(
        "Merged checkpoint",
        disabled=size > DOWNLOAD_BYTES,
        help=None
        if size <= DOWNLOAD_BYTES
        else f"This model has {size / 1e9:.1f} GB, too much for the browser: take the recipe "
        "and merge on the command line, which streams.",
        data=lambda: merged_bytes(recipe, session.groups, view.suite),
        file_name=f"{name}.safetensors",
        mime="application/octet-stream",
        on_click="ignore",
        icon=":material/download:",
        type="primary",
        width="stretch",
    )
    buttons[1].download_button(
        "Recipe (YAML)",
        data=lambda: recipe.publish(view.suite).to_yaml(),
        file_name=f"{name}.yaml",
        mime="text/yaml",
        on_click="ignore",
        width="stretch",
    )
    buttons[2].download_button(
        "Model card",
        data=lambda: model_card(recipe, view.suite, provenance(recipe, view.suite), results),
        file_name="README.md",
        mime="text/markdown",
        on_click="ignore",
        width="stretch",
    )
    st.markdown(
        "The file's header holds the recipe, the digests of all inputs and the versions. The "
        "same merge on the command line: `mergescope merge recipe.yaml --output FOLDER`."
    )


@shell.fragment
def lab() -> None:
    """Controls on the left, results on the right."""
    view = shell.view()
    left, right = st.columns([1, 2], gap="large")
    with left:
        recipe, other, suggestion = choose(view)
    with right:
        results: list[Result] = []
        if view.suite.can_evaluate:
            splits: dict[Split, str] = {
                "val": "Validation (to choose)",
                "test": "Test (to report)",
            }
            split = choice(
                "Inputs",
                splits,
                "split",
                "Choose settings on the validation split; look at the test split once, at the end.",
            )
            setting = describe_setting(recipe, suggestion)
            try:
                results = result(view, recipe, other, split, setting)
            except NotRecorded as error:
                show_info(error)
                offer_nearest(view, error)
        else:
            shell.explain_no_evaluation(view)
        st.subheader("Take it with you", anchor=False)
        st.code(recipe.to_yaml(), language="yaml", wrap_lines=True)
        offer_downloads(view, recipe, results)
        st.page_link(
            shell.page("compare"),
            label="Compare this recipe with other methods",
            icon=":material/leaderboard:",
            query_params={"suite": view.name, "tasks": list(view.tasks), "own": link_form(recipe)},
        )


charts.heading(
    "What does this merge do to each task?",
    "Choose a method, set its parameters, and compare with the experts or with a pinned recipe.",
)
lab()
