"""The first pictures: how a merge comes about, and images on which two merges differ."""

from __future__ import annotations

import io

import numpy as np
import streamlit as st
from PIL import Image

from analysis.figures.pictures.build_up import build_up_figure
from analysis.frames.entries import NotRecorded
from analysis.frames.flips import flips_if_known
from analysis.outputs.inputs import load_inputs
from merge_core.errors import SuiteError
from merge_core.merging.recipe import Recipe
from merge_core.suites.recorded import RecordedSuite
from ui import charts
from ui.plain_text import code, plain, show_info
from ui.server import resources
from ui.server.resources import View
from ui.words.first_look import describe_build_up, describe_flips

SIDE = 128  # pixels of an image, at least
MOST = 8  # images: two rows


def build_up_section(view: View, recipe: Recipe | None) -> None:
    """One matrix of the average, a task's change and all changes, with a slider over directions.

    Args:
        view: the suite and tasks.
        recipe: CART's, whose scale is taken; its default where there is none.
    """
    if len(view.tasks) < 2:
        return
    st.subheader("How does a merge come about?", anchor=False)
    task = view.tasks[0]
    try:
        frame = resources.weight_frames(view).build_up(task)
    except (NotRecorded, SuiteError) as error:  # the rest of the page stands without it
        show_info(error)
        return
    layer = str(frame["layer"].iloc[0])
    scale = float(recipe.parameters["scale"]) if recipe is not None else 1.0
    words = describe_build_up(frame, plain(task), len(view.tasks))
    st.markdown(words)
    charts.panel(
        charts.Chart(
            charts.drawn(build_up_figure, frame, task, len(view.tasks), scale),
            key="build_up",
            alt=words,
            caption=f"A part of {code(layer)}. Play, or drag: more and more directions of each "
            "change are added to the average. Above, one change leads to its expert. Below, all "
            "changes together make the merge.",
        ),
        how_to_read=charts.HowToRead(
            "Each square is a weight, red above zero and blue below. An expert is the average of "
            "all experts and its own **change**. A change is a sum of **directions** (singular "
            "vectors), strongest first; the number beside them is the share of the change's "
            "**energy** (sum of squares) that they hold. A merge adds the first directions of all "
            f"changes to the average, {scale:g} times. Rows and columns stand in the order of the "
            f"first direction of {plain(task)}, so that its largest entries are in the corners; "
            f"{frame['row'].max() + 1} of the rows and {frame['column'].max() + 1} of the columns "
            "are drawn.",
            r"\theta_{\mathrm{merge}} = \theta_{\mathrm{avg}} + \lambda \sum_t "
            r"\mathrm{SVD}_k(\theta_t - \theta_{\mathrm{avg}})",
        ),
    )


def flips_section(view: View, average: Recipe, merged: Recipe) -> None:
    """Images that the average gets wrong and another merge gets right, the first of each task.

    Args:
        view: the suite and tasks, which can be evaluated.
        average, merged: the two merges; nothing is shown before they were evaluated.
    """
    frame = flips_if_known(resources.output_frames(view), average, merged)
    if frame is None:
        return
    title = merged.declaration.title
    what = "an image" if view.suite.inputs == "images" else "an input"
    st.subheader(f"What does a merge say of {what}?", anchor=False)
    st.markdown(describe_flips(frame, title, view.suite.inputs))
    righted = frame[(frame["kind"] == "righted") & (frame["place"] >= 0)].head(MOST)
    if isinstance(view.suite, RecordedSuite) or view.suite.inputs != "images" or righted.empty:
        return
    grid = charts.cards(min(4, len(righted)))
    for row in righted.itertuples():
        with grid.container(border=True, height="stretch", gap="xxsmall"):
            picture = _picture(view.key, str(row.task), int(str(row.place)), view)
            st.image(picture, width=SIDE, alt=f"A test image of {row.task}: {row.truth}")
            st.markdown(
                f"**{plain(view.suite.title(str(row.task)))}**: {plain(str(row.truth))}  \n"
                f":red[Average: {plain(str(row.before))}]  \n"
                f":green[{title}: {plain(str(row.after))}]"
            )
    st.caption(
        f"The first test image of each task that the average gets wrong and {title} right, in the "
        "order of the data; not chosen by hand."
    )


@st.cache_data(max_entries=256, show_spinner=False)
def _picture(key: str, task: str, place: int, _view: View) -> bytes:
    """One test image as a PNG, enlarged without smoothing."""
    pixels: np.ndarray = load_inputs(_view.suite, task, "test").images[place]
    image = Image.fromarray(pixels)
    factor = max(1, round(2 * SIDE / max(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
