"""What a merge takes: time, memory and storage, measured alike for every method."""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.evaluation.evaluator import Evaluator
from analysis.learning.context import SPLIT
from merge_core.errors import OutputError
from merge_core.executors.base import one_thread
from merge_core.factors.store import FactorStore
from merge_core.files import cache_dir, digest_of, write_atomically
from merge_core.merging.engine import MergeSession, prepare, written_dtype
from merge_core.merging.recipe import Recipe
from merge_core.progress import Progress

# Of the rule by which costs are measured: those measured by another one are not comparable.
RULE = "cost-2"
SAMPLING_SECONDS = 0.002
# All that is measured is done by the thread whose time counts.
THREADS = 1
# What takes less than this is measured three times.
SHORT_SECONDS = 0.5
REPEATS = 3


@dataclass(frozen=True)
class Cost:
    """What a merge takes.

    Attributes:
        seconds: of the processor, to learn from data where the method does, to decompose where
            it does, and to merge, for all tasks together; without evaluation.
        peak_mb: anonymous memory above what the process held before, NaN where the system does
            not tell.
        storage_mb: what inference on all tasks has to hold, without heads.
    """

    seconds: float
    peak_mb: float
    storage_mb: float


def cost(
    recipe: Recipe, session: MergeSession, evaluator: Evaluator, progress: Progress | None = None
) -> Cost:
    """What a recipe takes on this machine, measured from cold, and then remembered.

    From cold: the experts (and data that a method learns from) are in memory, nothing was
    decomposed before, whatever the session's own store of factors holds; that one is neither read
    nor written. Suites too large for memory (see :class:`merge_core.merging.engine.MergeSession`)
    are read meanwhile. Time is the processor's, all on one thread: what a merge takes there on an
    idle machine, even if this one is busy. What takes less than half a second is measured three
    times and counts with its shortest time and its highest memory. A cost is remembered by the
    recipe, the content of what it works on, and :data:`RULE`.

    Args:
        recipe: what is measured.
        session: whose suite, tasks and weights in memory are taken.
        evaluator: learns, where the method learns from data, and keeps what it learnt.
        progress: cancels between two parameters or steps of learning.

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: by `progress`.
    """
    path = cache_dir() / "costs" / f"{_key(recipe, session)}.json"
    with suppress(OSError, ValueError, TypeError):
        return Cost(**json.loads(path.read_text()))
    runs = [_measure(recipe, session, evaluator, progress)]
    # What was learnt is kept by the evaluator, so that a second time would not be a cold one.
    if recipe.declaration.learns is None:
        while len(runs) < REPEATS and runs[0][0] < SHORT_SECONDS:
            runs.append(_measure(recipe, session, evaluator, progress))
    seconds, peaks = zip(*runs, strict=True)
    result = Cost(min(seconds), max(peaks), storage_bytes(recipe, session) / 1e6)
    with suppress(OSError, OutputError):
        write_atomically(path, json.dumps(asdict(result)).encode())
    return result


def _key(recipe: Recipe, session: MergeSession) -> str:
    suite, tasks = session.suite, session.groups.tasks
    learns = recipe.declaration.learns is not None
    data = [suite.data_digest(task) for task in tasks] if learns else []
    return digest_of(RULE, recipe.digest(suite), str(THREADS), *data)


def _measure(
    recipe: Recipe, session: MergeSession, evaluator: Evaluator, progress: Progress | None
) -> tuple[float, float]:
    """Seconds and peak (MB) of one merge from cold."""
    tasks, method = session.groups.tasks, recipe.declaration
    # Beside the cache, where factors have room; deleted at the end.
    folder = cache_dir() / f"cold-{uuid.uuid4().hex}"
    cold = MergeSession(session.suite, tasks, FactorStore(folder))
    if cold.groups.keep:
        for held, own in zip(session.groups, cold.groups, strict=True):
            own.members = held.members
            if session.suite.base is not None:
                own.base = held.base
    if method.learns is not None:
        _ = evaluator.outputs.network
        for task in tasks:
            evaluator.outputs.inputs(task, SPLIT, None)
    asked: list[str | None] = [*tasks] if method.indexed else [None]
    try:
        with _peak() as peak:
            start = time.thread_time()
            with one_thread(workers=THREADS):
                learned = evaluator.learn(recipe, cold, progress)
                for one in asked:
                    cold.merge(recipe, progress, one, learned)
            seconds = time.thread_time() - start
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return seconds, max(peak)


@one_thread()
def storage_bytes(recipe: Recipe, session: MergeSession) -> int:
    """Bytes that inference on all tasks has to hold, without heads.

    One model in its output dtype; for methods that need the task, what they say themselves.
    """
    method, run = recipe.declaration, recipe.run(session.groups.tasks)
    if method.storage is not None:
        run = prepare(recipe, session.groups)
    total = 0
    for group in session.groups:
        if method.storage is not None and group.info.is_floating:
            total += method.storage(group, recipe.parameters_of(group.name), run)
        else:
            total += group.info.numel * written_dtype(recipe, group.info.dtype.torch).itemsize
    return total


@contextmanager
def _peak() -> Iterator[list[float]]:
    """Samples, in MB, of the memory above what the process held at first."""
    with suppress(OSError, AttributeError):
        # Memory that was freed before must not serve what is measured (glibc keeps some).
        ctypes.CDLL(None).malloc_trim(0)
    samples = [math.nan]
    first = _anonymous_mb()
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLING_SECONDS):
            samples.append(_anonymous_mb() - first)

    if math.isnan(first):
        yield samples
        return
    samples[0] = 0.0
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def _anonymous_mb() -> float:
    """Memory of this process that no file backs, in MB (Linux)."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1e3
    return math.nan
