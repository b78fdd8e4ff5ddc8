"""The table of models that were found, and what the pre-flight says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import pandas as pd
import streamlit as st

from merge_core.opening.roles import FoundModel, Role
from merge_core.suites.estimates import TIME_NOTE, seconds, time_in_words
from merge_core.suites.preflight import preflight
from merge_core.suites.suite import Suite
from ui import charts
from ui.kept import Control, stand
from ui.plain_text import plain, show_info, show_warning
from ui.sections.compatibility import are_one_network, compatibility_section

# What people choose from, and what it means.
ROLES: dict[str, Role] = {
    "expert": "expert",
    "base": "base",
    "classifier": "head",
    "leave out": "left out",
}
FEWEST = 2  # experts that make a merge
NAME = "roles"  # in the address
ROWS = "_members"
LONGEST = 80  # characters of a task's name
Members = tuple[tuple[str, str], ...]  # role and task of each model, in their order
LABELS = {role: label for label, role in ROLES.items()}


def members_frame(found: Sequence[FoundModel]) -> pd.DataFrame:
    """One row per model: ``role``, ``task``, ``model``, ``tensors``, ``megabytes``, ``note``."""
    return pd.DataFrame(
        {
            "role": [LABELS[each.role] for each in found],
            "task": [each.task for each in found],
            "model": [each.shown for each in found],
            "tensors": pd.array([len(each.layout) or None for each in found], dtype="Int64"),
            "megabytes": [each.nbytes / 1e6 or None for each in found],
            "note": [each.note for each in found],
        }
    )


def apply_edits(found: Sequence[FoundModel], frame: pd.DataFrame) -> tuple[FoundModel, ...]:
    """The models with the roles and task names of a frame whose rows stand in their order.

    Nothing else of the frame is used: a browser decides on no path.
    """
    return tuple(
        replace(each, role=ROLES.get(str(role), "left out"), task=str(task or "").strip())
        for each, role, task in zip(found, frame["role"], frame["task"], strict=True)
    )


def members_table(found: Sequence[FoundModel], key: str) -> tuple[FoundModel, ...]:
    """The models in a table in which roles and task names can be changed, and stay so.

    Args:
        found: models with suggestions.
        key: changes when they do.
    """
    suggested = [(LABELS[each.role], each.task) for each in found]

    def read(words: list[str]) -> Members:
        members = list(suggested)
        for word in words:
            place, role, task = word.split(":", 2)
            if not 0 <= int(place) < len(found):
                raise ValueError(place)
            members[int(place)] = (role, task)
        return tuple(members)

    def write(members: Members) -> list[str]:
        places = range(len(found))
        return [f"{i}:{':'.join(members[i])}" for i in places if members[i] != suggested[i]]

    def draw(members: Members) -> Members:
        table = f"members_{key}"
        # The rows under the edits of a visit stay what they were when it began.
        if table not in st.session_state:
            st.session_state[ROWS] = members
        drawn: Members = st.session_state[ROWS]
        frame = members_frame(found).assign(role=[r for r, _ in drawn], task=[t for _, t in drawn])
        frame = _draw_table(frame, table)
        st.session_state[NAME] = tuple(zip(frame["role"], frame["task"].fillna(""), strict=True))
        edited: Members = st.session_state[NAME]
        return edited

    control = Control(
        name=NAME,
        label="Roles and tasks",
        rest=tuple(suggested),
        read=read,
        write=write,
        fits=lambda members: len(members) == len(found) and all(r in ROLES for r, _ in members),
        slot=f"{NAME} of {key}",
    )
    members = stand(control, draw)
    return apply_edits(found, pd.DataFrame(members, columns=["role", "task"]))


def _draw_table(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """The frame as a table in which two columns can be edited; returns it with the edits."""
    columns = st.column_config
    return st.data_editor(
        frame,
        key=key,
        hide_index=True,
        num_rows="fixed",
        disabled=["model", "tensors", "megabytes", "note"],
        column_config={
            "role": columns.SelectboxColumn(
                "Role",
                options=list(ROLES),
                required=True,
                help="Experts are merged. The base is what they were fine-tuned from; some "
                "methods need none. Classifiers go with the expert of their name.",
            ),
            "task": columns.TextColumn(
                "Task", max_chars=LONGEST, required=True, help="Letters, digits and . _ + -"
            ),
            "model": columns.TextColumn("Model", width="medium"),
            "tensors": columns.NumberColumn("Tensors"),
            "megabytes": columns.NumberColumn("MB", format="%.1f"),
            "note": columns.TextColumn("Note", width="large"),
        },
    )


def fit_section(suite: Suite) -> None:
    """What fits, what differs, and what a merge will take."""
    report = preflight(suite)
    if not report.plan:
        reason = next((d.detail for d in report.blocking), "nothing is common to all.")
        show_warning(f"What fits is not known yet: {reason}")
        return
    cards = charts.cards(3)
    cards.metric("Experts", len(suite.tasks), border=True)
    count = sum(math.prod(row.shape) for row in report.plan)
    cards.metric("Merged parameters", f"{count / 1e6:,.1f} M", border=True)
    cards.metric("Merged model on disk", f"{report.disk_bytes / 1e6:,.1f} MB", border=True)
    cards.metric(
        "Memory of a merge",
        f"{report.memory_bytes / 1e6:,.0f} MB",
        border=True,
        help="Estimated peak of 'mergescope merge' with a spectral method, which streams parameter "
        f"by parameter, on as many threads as torch takes here ({report.job.workers}); methods "
        f"that decompose nothing take {report.entrywise_bytes / 1e6:,.0f} MB.",
    )
    if not report.blocking:
        taken = seconds(report.job)
        cards.metric(
            "Time of a merge",
            time_in_words(taken.spectral).removeprefix("about "),
            border=True,
            help=f"Estimate for CART on this machine, when it is quiet; averaging takes "
            f"{time_in_words(taken.entrywise)} ({TIME_NOTE}).",
        )
    cards.metric(
        "Stored factors",
        f"{report.factor_bytes / 1e6:,.1f} MB",
        border=True,
        help="Spectral methods store at most as much in the cache, so that another rank or scale "
        "is quick.",
    )
    members = [*suite.tasks, *([] if suite.spec.base is None else ["base"])]
    frame = pd.DataFrame([asdict(report.fit(member)) for member in members])
    unfit = frame.loc[~frame["fits"], "member"].tolist()
    if unfit:
        st.error(
            f"These do not fit {plain(suite.tasks[0])}: {plain(', '.join(unfit))}. Leave them out, "
            "or choose other roles.",
            icon=":material/error:",
        )
    elif len(suite.tasks) < FEWEST:
        st.warning(
            f"Only one model takes part as an expert: **{plain(suite.tasks[0])}**. A merge "
            "needs two or more. Add another one, or choose the role 'expert' for one that is "
            "left out.",
            icon=":material/warning:",
        )
    elif are_one_network(suite):
        st.success(f"All {len(members)} models fit together.", icon=":material/check_circle:")
    for note in report.notes:
        show_info(note)
    st.dataframe(
        frame.assign(fits=frame["fits"].map({True: "yes", False: "no"})),
        hide_index=True,
        column_config={
            "member": "Model",
            "fits": "Fits",
            "differences": st.column_config.TextColumn("Differences", width="large"),
        },
    )
    compatibility_section(suite, not report.blocking)
    if report.differences:
        with st.expander("Every difference", icon=":material/difference:"):
            st.dataframe(pd.DataFrame([asdict(d) for d in report.differences]), hide_index=True)
    with st.expander("What becomes of each parameter", icon=":material/checklist:"):
        st.dataframe(pd.DataFrame([asdict(row) for row in report.plan]), hide_index=True)
