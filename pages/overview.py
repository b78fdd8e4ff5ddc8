"""Overview: what this is, the suite, its tasks, and a first result."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict

import numpy as np
import pandas as pd
import streamlit as st
from PIL import Image

from analysis.data_sources.source import UNLABELLED
from analysis.figures import accuracy as figures
from analysis.frames.entries import NotRecorded
from analysis.metrics import mean_over_tasks, metric_of
from analysis.outputs.inputs import load_inputs
from merge_core.merging.recipe import Recipe
from merge_core.methods import get_method
from merge_core.suites.bundled import bundled_name, bundled_records, bundled_title
from merge_core.suites.data_spec import OF_TEXTS
from merge_core.suites.estimates import TIME_NOTE, seconds, time_in_words
from merge_core.suites.preflight import Preflight, preflight
from merge_core.suites.recorded import RecordedSuite
from ui import charts, shell
from ui.plain_text import code, plain, show_info
from ui.progress import run_job
from ui.sections import first_look
from ui.server import resources
from ui.server.once import once
from ui.server.resources import View
from ui.widgets import share_label

shell.enter()

SAMPLES = 6
SCALE = 2
PER_ROW = 4
MOST_WARNINGS = 5  # the table below has them all

Recipes = dict[str, tuple[Recipe, bool]]


@st.cache_data(max_entries=64, show_spinner=False)
def sample_strip(key: str, task: str, _view: View) -> tuple[bytes, str, int, int]:
    """A PNG strip of validation images of different classes, their names, counts."""
    inputs = load_inputs(_view.suite, task, "val")
    named = inputs.labels[0] != UNLABELLED
    classes = np.unique(inputs.labels) if named else np.arange(len(inputs.images))
    step = np.linspace(0, len(classes) - 1, min(SAMPLES, len(classes))).round().astype(int)
    chosen = [int(np.flatnonzero(inputs.labels == classes[i])[0]) for i in step] if named else step
    strip = np.concatenate(list(inputs.images[chosen]), axis=1)
    image = Image.fromarray(strip)
    image = image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    names = (
        ", ".join(inputs.class_names[int(inputs.labels[i])] for i in chosen)
        if named
        else "no labels"
    )
    return stream.getvalue(), names, len(inputs.class_names), len(inputs.labels)


@st.cache_data(max_entries=16, show_spinner="Looking up results …")
def stored_result(
    key: str, tasks: tuple[str, ...], _view: View
) -> tuple[Recipes, pd.DataFrame | None]:
    """The first result if it needs no forward pass, and its recipes."""
    frames = resources.output_frames(_view)
    known = frames.first_result_if_known()
    if known is None:
        frames.expect_first_result()
        return frames.first_recipes(), None
    return known


def describe_settings(recipes: Recipes) -> str:
    """The settings of the recipes that have any, and how they came about."""
    parts = []
    for title, (recipe, chosen) in recipes.items():
        if recipe.parameters:
            values = []
            if "rank" in recipe.parameters:
                values.append(f"rank {share_label(recipe.parameters['rank'])}")
            values.append(f"λ = {recipe.parameters['scale']:g}")
            how = "best on the validation split" if chosen else "default"
            parts.append(f"{title}: {', '.join(values)} ({how})")
    return "; ".join(parts) + "."


def chip_of(model: str, recipes: Recipes) -> str:
    """How the setting of a model of the first result came about, in words."""
    if model == "Experts":
        return "each on its own task"
    if model not in recipes or not recipes[model][0].parameters:
        return "nothing to set"
    return "tuned on validation" if recipes[model][1] else "default setting"


def known_result(view: View) -> tuple[Recipes, pd.DataFrame | None] | None:
    """The first result's recipes, and its frame where it is stored; None if there can be none."""
    if not resources.is_measurable(view):
        return None
    try:
        return stored_result(view.key, view.tasks, view)
    except NotRecorded as error:  # the rest of the page stands without it
        show_info(error)
        return None


def first_section(view: View, known: tuple[Recipes, pd.DataFrame | None] | None) -> None:
    """Base, experts and three merges side by side, on the test split."""
    if known is None:
        if not resources.is_measurable(view):
            shell.explain_no_evaluation(view)
        return
    recipes, frame = known
    st.subheader("What does merging give?", anchor=False)
    if frame is None:
        frames = resources.output_frames(view)
        job = run_job(
            key=f"overview:{view.key}:{','.join(view.tasks)}",
            title="First result",
            button="Evaluate base, experts and three merges",
            note="This choice of tasks has not been evaluated yet; it runs in the background.",
            work=lambda progress: frames.first_result(recipes, progress),
        )
        if job is None:
            return
        frame = job.result
    draw_first(view, recipes, frame)


def draw_first(view: View, recipes: Recipes, frame: pd.DataFrame) -> None:
    """The first result, as cards and as a figure."""
    metric, mean = metric_of(frame), once(mean_over_tasks, frame, by=["model"])
    values = mean.set_index("model")[metric.column]
    cards = charts.cards(len(values))
    for model in values.index:
        row = mean[mean["model"] == model].iloc[0]
        charts.accuracy_card(
            cards,
            model,
            metric.show(row[metric.column]),
            "test",
            chip_of(model, recipes),
            delta=None
            if model in ("Base", "Experts", "Weight average")
            else f"{metric.show_difference(values[model] - values['Weight average'])} vs average",
            delta_color=charts.delta_colour(metric),
            border=True,
            help=f"Mean {metric.noun} over {len(view.tasks)} tasks on the test split; 95 % "
            f"interval {charts.interval_words(metric, row)}; {charts.unit_words(metric)}.",
        )
    st.markdown(describe_settings(recipes))
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.dots_per_task,
                frame,
                title=f"{metric.title} of each task on the test split",
            ),
            key="first_result",
            alt=f"{metric.title} per task of base, average, Task Arithmetic, CART and experts",
            height=470,
        ),
        how_to_read=charts.HowToRead(
            f"The **experts** are {len(view.tasks)} models, one a task. The **base** is what all "
            "of them were fine-tuned from. The other rows are *one* model for all tasks, made "
            "from weights alone, without training. CART adds the leading directions of each "
            f"expert's difference to the average back to the average.{charts.which_way(metric)}",
            get_method("cart").formula,
        ),
        numbers=charts.Numbers(frame, "first_result"),
    )


def card_section(view: View) -> None:
    """What the suite holds."""
    suite = view.suite
    first = suite.expert(suite.tasks[0])
    count = sum(first.info(name).numel for name in first if first.info(name).is_floating)
    cards = charts.cards(4)
    cards.metric("Experts", len(suite.tasks), border=True)
    cards.metric("Parameters each", f"{count / 1e6:.1f} M", border=True)
    cards.metric(
        "Weight matrices",
        len(suite.matrices),
        border=True,
        help="Decomposed by spectral methods; everything else is averaged.",
    )
    cards.metric("Base", "yes" if suite.base is not None else "none", border=True)
    report = preflight(suite, view.tasks)
    for difference in report.blocking[:MOST_WARNINGS]:
        st.warning(
            f"**{plain(difference.member)}**, {code(difference.parameter)}: "
            f"{plain(difference.kind)}, {plain(difference.detail)}. These experts cannot be merged."
        )
    label, icon = "Pre-flight: what a merge will do and take", ":material/checklist:"
    with st.expander(label, icon=icon, key="preflight", on_change="rerun") as opened:
        if opened.open:
            preflight_report(report)


def preflight_report(report: Preflight) -> None:
    """What a merge takes, and what becomes of each parameter."""
    time = ""
    if not report.blocking:
        taken = seconds(report.job)
        time = (
            f" On this machine, when it is quiet, averaging takes "
            f"{time_in_words(taken.entrywise)}, CART {time_in_words(taken.spectral)} ({TIME_NOTE})."
        )
    less = ""
    if report.entrywise_bytes < report.memory_bytes:
        less = f" ({report.entrywise_bytes / 1e6:,.0f} MB by methods that decompose nothing)"
    st.markdown(
        f"`mergescope merge` takes about {report.memory_bytes / 1e6:,.0f} MB of memory{less} and "
        f"{report.disk_bytes / 1e6:,.1f} MB on disk; spectral methods store up to "
        f"{report.factor_bytes / 1e6:,.1f} MB of factors in the cache, so that another rank or "
        f"scale is quick.{time} Spectral methods decompose the weights of attention, MLP and other "
        "inner linear layers, and convolution kernels, and average everything else."
    )
    for note in report.notes:
        st.markdown(f"- {code(note)}")
    plan = pd.DataFrame([asdict(row) for row in report.plan])
    st.dataframe(plan, hide_index=True)
    if report.differences:
        st.dataframe(pd.DataFrame([asdict(d) for d in report.differences]), hide_index=True)


def tasks_section(view: View) -> None:
    """Sample images of each task."""
    st.subheader("The tasks", anchor=False)
    if isinstance(view.suite, RecordedSuite):
        titles = ", ".join(plain(view.suite.title(task)) for task in view.suite.tasks)
        st.markdown(f"{titles}.")
        st.info("A record holds figures alone: no weights, and no images or texts.")
        return
    data = {task: expert.data for task, expert in view.suite.spec.experts.items() if expert.data}
    shown = [task for task, spec in data.items() if spec.kind not in OF_TEXTS]
    if not shown and data:
        st.info("The tasks are of texts, which are not shown.")
        return
    if not shown:
        st.info("This suite names no data, so there are no images to show.")
        return
    draw_tasks(view, [task for task in shown if task in view.tasks])
    others = [task for task in shown if task not in view.tasks]
    if others:
        label, icon = f"{len(others)} more tasks", ":material/collections:"
        with st.expander(label, icon=icon, key="more_tasks", on_change="rerun") as opened:
            if opened.open:
                draw_tasks(view, others)


def draw_tasks(view: View, tasks: list[str]) -> None:
    """A strip of images of each task, two tasks beside each other on a phone."""
    grid = charts.cards(PER_ROW)
    for task in tasks:
        image, names, classes, images = sample_strip(view.key, task, view)
        with grid.container(gap="xxsmall"):
            source = "data:image/png;base64," + base64.b64encode(image).decode()
            st.image(source, width="stretch", alt=f"Sample images of {task}: {names}")
            known = f"{classes} classes" if classes else "no labels"
            title = plain(view.suite.title(task))
            st.markdown(f"**{title}**  \n{known}, {images} validation images")


def links() -> None:
    """Three ways on."""
    ways = (
        ("interference", "Learn why merges fail: interference"),
        ("rank_and_scale", "Explore: play with rank and scale"),
        ("open_checkpoints", "Merge my own models"),
    )
    for place, (name, label) in zip(st.columns(len(ways)), ways, strict=True):
        with place.container(border=True):
            st.page_link(shell.page(name), label=label, icon=":material/arrow_forward:")


def page() -> None:
    """The page."""
    view = shell.view()
    charts.heading(
        "Why does averaging fine-tuned models work, and how can it work better?",
        "MergeScope looks inside a merge of fine-tuned models: how many directions each task "
        "needs, where tasks get into each other's way, and which rank and scale merge best. "
        f"You are looking at **{plain(bundled_title(view.name))}**.",
    )
    known = known_result(view)
    recipes = known[0] if known is not None else {}
    cart = recipes["CART"][0] if "CART" in recipes else None
    first_look.build_up_section(view, cart)
    if cart is not None:
        first_look.flips_section(view, recipes["Weight average"][0], cart)
    first_section(view, known)
    links()
    st.subheader("The suite", anchor=False)
    if about := view.suite.spec.description:
        st.markdown(plain(about))
    card_section(view)
    if bundled_name(view.suite.path):
        st.info(
            "This suite was **made to show an effect at a small size**: its tasks, the look of "
            "their images and the training were changed until the methods differed clearly on "
            "the validation split. What holds for real models rests on published figures and on "
            "suites that you open. data/README.md says how it was built."
        )
    if view.suite.path in bundled_records().values():
        st.info(
            "These are **figures of a real model**: no weights, and no sentence of its data. What "
            "was not recorded says so, on every page. To merge and measure it yourself, build the "
            "suite: `mergescope suite build sentences --data FOLDER --output FOLDER`; "
            "docs/build.md says which data it takes, and how long."
        )
    tasks_section(view)


page()
