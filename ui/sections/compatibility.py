"""Whether the members of a new suite belong together: by their files, and by their weights."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict

import pandas as pd
import streamlit as st

from merge_core.compatibility.compare import COMPARED, collect_companions, compare_companions
from merge_core.compatibility.findings import Finding
from merge_core.compatibility.kinship import Kinships, measure_kinship
from merge_core.errors import CheckpointError
from merge_core.files import digest_of
from merge_core.suites.suite import Suite
from ui.plain_text import show_error, show_warning
from ui.server.resources import stamp

STRANGERS = (
    "Read: {entries:,} weights of {matrices} matrices. Two networks of different random starts "
    "have a cosine of 0 ± {deviation:.1g}"
)


def compatibility_section(suite: Suite, fits: bool) -> None:
    """What differs in the files beside the weights, and how experts stand to their base.

    Args:
        suite: the suite; members that are not here show only what is known of them.
        fits: whether the members' tensors fit together, so that their weights can be compared.
    """
    state = _state(suite)
    _show_findings(_compare(suite, state))
    if fits:
        try:
            _show_kinships(_measure(suite, state))
        except CheckpointError as error:
            show_error(error)


def are_one_network(suite: Suite) -> bool:
    """Whether the files beside the weights let members be merged."""
    return not any(f.level == "refused" for f in _compare(suite, _state(suite)))


def findings_frame(findings: tuple[Finding, ...]) -> pd.DataFrame:
    """One row a finding: ``level``, ``file``, ``field``, ``values``, ``meaning``."""
    return pd.DataFrame([asdict(finding) for finding in findings])


def _show_findings(findings: tuple[Finding, ...]) -> None:
    if not findings:
        return
    counts = {level: sum(f.level == level for f in findings) for level in ("refused", "warned")}
    if counts["refused"]:
        st.error(
            "These are not one network: the same weights mean something else in some members. A "
            "merge is refused.",
            icon=":material/error:",
        )
    elif counts["warned"]:
        st.warning(
            "The files beside the weights differ; the merged model has those of the base, or of "
            "an expert.",
            icon=":material/warning:",
        )
    columns = st.column_config
    st.dataframe(
        findings_frame(findings),
        hide_index=True,
        column_config={
            "level": "Level",
            "file": "File",
            "field": "Field",
            "values": columns.TextColumn("Who has what", width="large"),
            "meaning": columns.TextColumn("Meaning", width="medium"),
        },
    )


def _state(suite: Suite) -> str:
    """What tells one state of a suite's members, and of the files beside them, from another."""
    stamps = [suite.spec.model_dump_json(), str(suite.path)]
    for files in collect_companions(suite, suite.tasks).values():
        stamps += [stamp(files.folder / name) for name in COMPARED]
    for task in (None, *suite.tasks):
        with suppress(CheckpointError):  # said by the pre-flight
            member = suite.base if task is None else suite.expert(task)
            stamps += [stamp(path) for path in member.files] if member is not None else []
    return digest_of(*stamps)


@st.cache_data(max_entries=8, show_spinner="Comparing configurations and tokenizers …")
def _compare(_suite: Suite, state: str) -> tuple[Finding, ...]:
    """What differs between the files beside the weights in that state."""
    return compare_companions(_suite)


@st.cache_data(max_entries=8, show_spinner="Looking at the weights …")
def _measure(_suite: Suite, state: str) -> Kinships | None:
    """How the experts of a suite in that state stand to their base."""
    return measure_kinship(_suite)


def _show_kinships(found: Kinships | None) -> None:
    if found is None:
        return
    for warning in found.warnings:
        show_warning(f"{warning[0].upper()}{warning[1:]}.")
    what = "base" if found.has_base else "mean"
    columns = st.column_config
    st.dataframe(
        pd.DataFrame([asdict(row) for row in found.rows]),
        hide_index=True,
        column_config={
            "member": "Expert",
            "verdict": "Verdict" if found.has_base else "Verdict (no base)",
            "distance": columns.NumberColumn(
                "Distance",
                format="%.3f",
                help=f"‖expert − {what}‖ / ‖{what}‖; about 1.41 for two networks of different "
                "random starts.",
            ),
            "cosine": columns.NumberColumn(
                "Cosine",
                format="%.3f",
                help="Of expert and base; without a base, of the two experts most alike.",
            ),
            "nearest": "Most alike",
            "update_cosine": columns.NumberColumn(
                "Cosine of updates",
                format="%.3f",
                help="Of what both changed about the base; above 0.5 they share a later start.",
            ),
        },
    )
    st.caption(
        STRANGERS.format(entries=found.entries, matrices=found.matrices, deviation=found.deviation)
        + (", and a distance of about 1.41." if found.has_base else ".")
    )
