"""What all sessions share: suites, factors, merges, evaluators, jobs. Values are read-only.

Every cache key is a string or number; a suite is known by the digest of its file and by the size
and time of the files that it names, so that a replaced checkpoint is opened afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import streamlit as st

from analysis.evaluation.evaluator import Evaluator
from analysis.frames.entries import Frames
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.from_weights import WeightFrames
from analysis.frames.record import Record, is_record, load_record
from analysis.frames.store import FrameStore
from analysis.outputs.inputs import Split, has_labels
from merge_core.checkpoints.stored.entry import split_part
from merge_core.factors.store import FactorStore
from merge_core.files import digest_of, file_digest
from merge_core.input_files import file_stamp
from merge_core.merging.engine import MergeSession
from merge_core.suites.bundled import bundled_frames
from merge_core.suites.recorded import RecordedSuite
from merge_core.suites.suite import Suite, load_suite
from merge_core.task_vectors import TensorGroup
from ui.server import session_files
from ui.server.jobs import JobRunner

# Up to this many, pages compute and look up while they are drawn.
LIVE_PARAMETERS = 5_000_000
PRIVATE_BYTES = 64 << 20  # of an uploaded suite's factors in memory


@dataclass(frozen=True)
class View:
    """What the sidebar and the link say: suite, tasks and layer.

    Attributes:
        name: the suite as named in the link and in recipes.
        key: digest that changes when any of its files does.
        suite: the loaded suite.
        tasks: chosen tasks, in the suite's order.
        layer: the chosen weight matrix.
    """

    name: str
    key: str
    suite: Suite
    tasks: tuple[str, ...]
    layer: str


def suite_key(name: str) -> str:
    """A digest of a suite's file, its place, and the size and time of all files that it names.

    Raises:
        SuiteError: the suite's file is missing or wrong.
    """
    path = session_files.list_offered()[name]
    state = stamp(path)
    if is_record(path):
        return digest_of(state)
    described, files = _read_description(str(path), state)
    return digest_of(described, *map(stamp, files))


@st.cache_resource(max_entries=64, show_spinner=False)
def _read_description(path: str, state: str) -> tuple[str, tuple[Path, ...]]:
    """The digest of a suite's file, as it is in that state, and the files that it names."""
    suite = load_suite(Path(path))
    files = [suite.spec.base] if suite.spec.base else []
    for expert in suite.spec.experts.values():
        files += expert.files
    named = (split_part(suite.file(relative))[0] for relative in filter(None, files))
    return digest_of(str(suite.path), file_digest(suite.path)), tuple(named)


def stamp(path: Path) -> str:
    """What tells one state of a file from another, without reading it."""
    return f"{path}:{file_stamp(path)}"


@st.cache_resource(max_entries=32, show_spinner=False)
def open_suite(name: str, key: str) -> Suite:
    """The suite of that name, as it is at that key; of a record, what it says of its suite."""
    path = session_files.list_offered()[name]
    return _open_record(str(path), stamp(path)).suite if is_record(path) else load_suite(path)


@st.cache_resource(max_entries=4, show_spinner="Opening the record …")
def _open_record(path: str, state: str) -> Record:
    """A record, as it is in that state."""
    return load_record(path)


@st.cache_resource(show_spinner=False)
def _shared_factors() -> FactorStore:
    return FactorStore()


@st.cache_resource(max_entries=4, show_spinner=False)
def _private_factors(folder: str) -> FactorStore:
    return FactorStore(Path(folder), memory_bytes=PRIVATE_BYTES)


def factor_store(suite: Suite) -> FactorStore:
    """The server's one factor store; for uploads one beside them, which goes with them."""
    if session_files.has_uploads(suite):
        return _private_factors(str(suite.root / "factors"))
    return _shared_factors()


@st.cache_resource(show_spinner=False)
def shared_frames() -> FrameStore:
    """The server's one store of frames."""
    return FrameStore(shipped=bundled_frames())


@st.cache_resource(max_entries=4, show_spinner=False)
def _private_frames(folder: str) -> FrameStore:
    return FrameStore(Path(folder), memory_bytes=PRIVATE_BYTES)


def frame_store(suite: Suite) -> Frames:
    """The server's one store of frames; for uploads one beside them, which goes with them.

    A record's frames are its own: what a stranger's file claims is shown as that file's alone.
    """
    if isinstance(suite, RecordedSuite):
        return _open_record(str(suite.path), stamp(suite.path)).frames
    if session_files.has_uploads(suite):
        return _private_frames(str(suite.root / "frames"))
    return shared_frames()


@st.cache_resource(show_spinner=False)
def job_runner() -> JobRunner:
    """The one job runner of the server."""
    return JobRunner(is_active=session_files.is_active)


@st.cache_resource(max_entries=4, show_spinner=False)
def _session(key: str, tasks: tuple[str, ...], _suite: Suite) -> MergeSession:
    return MergeSession(_suite, tasks, factor_store(_suite))


def session(view: View, tasks: Sequence[str] | None = None) -> MergeSession:
    """The merge session of the view's tasks (or of others).

    Raises:
        SuiteError: the experts do not fit together.
    """
    return _session(view.key, view.tasks if tasks is None else tuple(tasks), view.suite)


@st.cache_resource(max_entries=4, show_spinner=False)
def _evaluator(key: str, _suite: Suite) -> Evaluator:
    return Evaluator(_suite)


def evaluator(view: View) -> Evaluator:
    """The evaluator of the view's suite.

    Raises:
        SuiteError: the suite cannot be evaluated.
    """
    return _evaluator(view.key, view.suite)


def is_measurable(view: View) -> bool:
    """Whether accuracies of the chosen tasks can be measured: all it takes is there, and labels.

    Of a record, whether they were.
    """
    if isinstance(view.suite, RecordedSuite):
        return view.suite.can_evaluate
    return view.suite.can_evaluate and all(
        has_labels(view.suite, task, split) for task in view.tasks for split in get_args(Split)
    )


@st.cache_resource(max_entries=8, show_spinner=False)
def _weight_frames(key: str, tasks: tuple[str, ...], _suite: Suite) -> WeightFrames:
    return WeightFrames(_suite, tasks, frame_store(_suite), factor_store(_suite))


def weight_frames(view: View) -> WeightFrames:
    """What is asked of the weights of the view's tasks, read where it is kept."""
    return _weight_frames(view.key, view.tasks, view.suite)


@st.cache_resource(max_entries=8, show_spinner=False)
def _output_frames(key: str, name: str, tasks: tuple[str, ...], _view: View) -> OutputFrames:
    return OutputFrames(
        *(name, _view.suite, tasks, frame_store(_view.suite)),
        lambda: session(_view),
        lambda: evaluator(_view),
        evaluated=_view.suite.can_evaluate,
    )


def output_frames(view: View) -> OutputFrames:
    """What is asked of the outputs of the view's tasks, read where it is kept."""
    return _output_frames(view.key, view.name, view.tasks, view)


def count_parameters(view: View) -> int:
    """Numbers in one merged model of the chosen tasks, from the headers alone."""
    return sum(info.numel for info in view.suite.manifest(view.tasks).infos.values())


def is_small(view: View) -> bool:
    """Whether what takes all of a model may be computed while a page is drawn."""
    return count_parameters(view) <= LIVE_PARAMETERS


def group(view: View) -> TensorGroup:
    """The chosen layer across the chosen tasks."""
    return TensorGroup(view.suite, view.tasks, view.layer, factor_store(view.suite))
