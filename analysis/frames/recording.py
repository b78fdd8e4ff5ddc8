"""What a record holds: the questions that pages ask of a suite at their usual settings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import get_args

from analysis.comparison.run import usable_methods
from analysis.comparison.scaling import draw_subsets, task_counts
from analysis.evaluation.evaluator import Evaluator
from analysis.frames.entries import Asked, Frames, Kept
from analysis.frames.flips import first_flips_if_known
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.from_weights import WeightFrames
from analysis.frames.record import record_bytes
from analysis.frames.results import default_recipe
from analysis.frames.scaling import scaling_if_known
from analysis.frames.usual import ANGLE_SHARES, SEARCHED, SHARES, SUBSETS
from analysis.outputs.inputs import Split, has_labels
from analysis.rank_selection.rule import Mode
from analysis.rank_selection.select import (
    Selection,
    SelectionOptions,
    selectable_methods,
)
from analysis.rank_selection.space import SearchSpace, search_space
from analysis.rank_selection.weight_response import PROPORTIONAL
from analysis.spectral.interference import Side
from analysis.spectral.spectra import Part, parts_of
from merge_core.errors import OutputError, RecipeError
from merge_core.factors.store import FactorStore
from merge_core.files import write_atomically
from merge_core.merging.engine import MergeSession
from merge_core.methods import get_method, methods
from merge_core.progress import Progress
from merge_core.suites.bundled import RECORD_SUFFIX
from merge_core.suites.recorded import suite_card
from merge_core.suites.suite import Suite
from merge_core.task_vectors import Origin, TensorGroup

Step = tuple[str, Callable[[], object]]
SIDES: tuple[Side, ...] = get_args(Side)


class Recorder:
    """A store that remembers every question that was answered.

    Args:
        frames: where answers are looked up and kept.

    Attributes:
        answers: what was asked, and its answer, by key.
    """

    computes = True

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self.answers: dict[str, tuple[Asked, Kept]] = {}

    def get(self, asked: Asked) -> Kept | None:
        """The answer, where it is kept."""
        kept = self._frames.get(asked)
        if kept is not None:
            self.answers[asked.key] = (asked, kept)
        return kept

    def put(self, asked: Asked, kept: Kept) -> None:
        """Keep an answer, and remember it."""
        self._frames.put(asked, kept)
        self.answers[asked.key] = (asked, kept)

    def refuse(self, asked: Asked) -> None:
        """Nothing is refused: what is not kept is computed."""


@dataclass(frozen=True)
class _Questions:
    """The usual questions about one suite, in the order of the pages."""

    suite: Suite
    weights: WeightFrames
    outputs: OutputFrames
    measured: bool
    methods: frozenset[str]
    progress: Progress

    @property
    def origins(self) -> tuple[Origin, ...]:
        return ("average", "base") if self.suite.base is not None else ("average",)

    def of_weights(self) -> Iterator[Step]:
        """Spectra and interference, of every layer and then of the whole model."""
        frames = self.weights
        for layer in self.suite.matrices:
            yield layer, partial(self._ask_layer, layer)
        for origin in self.origins:
            for apart in (False, True) if self._is_fused() else (False,):
                yield "all layers", partial(frames.summary, origin, apart)
        if len(self.suite.tasks) > 1:
            yield "a matrix", partial(frames.build_up, self.suite.tasks[0])
            yield "the whole model", partial(self._ask_pairs, None)
            if self.suite.base is not None:
                yield "signs", frames.signs

    def _is_fused(self) -> bool:
        return any(len(self._parts(layer)) > 1 for layer in self.suite.matrices)

    def _parts(self, layer: str) -> tuple[Part, ...]:
        return parts_of(TensorGroup(self.suite, self.suite.tasks, layer, FactorStore()))

    def _ask_layer(self, layer: str) -> None:
        frames = self.weights
        for origin in self.origins:
            for part in self._parts(layer):
                frames.spectrum(layer, origin, part)
                frames.cuts(layer, origin, part)
        if len(self.suite.tasks) > 1:
            self._ask_pairs(layer)
            for share in ANGLE_SHARES:
                self.progress.step(0, 0, layer)
                for side in SIDES:
                    frames.angles(layer, self.origins[0], frames.directions(layer, share), side)

    def _ask_pairs(self, layer: str | None) -> None:
        frames = self.weights
        for origin in self.origins:
            frames.cosines(layer, origin)
            for side in SIDES:
                frames.over_rank(layer, origin, side)
                for share in SHARES:
                    self.progress.step(0, 0, layer or "the whole model")
                    frames.pairs(layer, origin, share, side)
                    if origin == "base":
                        frames.centring(share, side, layer)

    def of_settings(self) -> Iterator[Step]:
        """The choice of rank and scale of the methods that pages ask for first."""
        possible = selectable_methods(self.suite, self.suite.tasks)
        for method in [name for name in SEARCHED if name in self.methods.intersection(possible)]:
            space = search_space(method, self.outputs.reference, self.suite.tasks)
            yield f"rank and scale of {possible[method]}", partial(self._ask_space, space)

    def _ask_space(self, space: SearchSpace) -> None:
        found: list[Selection | None] = []
        if space.base.method in PROPORTIONAL:
            self.weights.proxy_curves(space)
            with suppress(RecipeError):  # no rule gives this merge a setting
                found.append(self._select(space, "weights"))
        if self.measured:
            found.append(self._select(space, "labels"))
            for options in _OTHER_SEARCHES:
                found.append(self.outputs.select_if_known(space, options))
            for recipe in space.recipes():
                self.progress.step(0, 0, f"settings of {space.base.method}")
                self.outputs.knows_recipe(recipe, "val")
        for selection in filter(None, found):
            self._ask_selection(selection)

    def _select(self, space: SearchSpace, mode: Mode) -> Selection:
        quiet = Progress(cancel=self.progress.cancel)
        return self.outputs.select(space, SelectionOptions(mode), quiet)

    def _ask_selection(self, selection: Selection) -> None:
        if selection.space.ranks:
            self.weights.ranks_per_layer(selection.space, selection.rank)
        if self.measured:
            if selection.space.ranks:
                self.outputs.storage_if_known(selection)
            for split in get_args(Split):
                self.outputs.recipe(selection.recipe, split)
            if selection.score == self.suite.measured_by and len(selection.curve):
                self.outputs.task_curves(selection)

    def of_accuracies(self) -> Iterator[Step]:
        """Experts, every quick method asked for at its defaults, and the first result."""
        frames, tasks = self.outputs, self.suite.tasks
        for split in get_args(Split):
            yield "experts", partial(frames.experts, split)
        for name, method in usable_methods(self.suite, tasks).items():
            if method.learns is not None or name not in self.methods:
                continue
            yield method.title, partial(frames.compare, [name], 1, [])
            if not method.indexed:
                recipe = default_recipe(name, frames.reference, tasks)
                for split in get_args(Split):
                    yield method.title, partial(frames.recipe, recipe, split)
        for name, title in selectable_methods(self.suite, tasks).items():
            if name not in self.methods:
                continue
            space = search_space(name, frames.reference, tasks)
            yield title, partial(self._ask_suggested, space)
        yield "first result", self._ask_first
        for repeats in SUBSETS:
            drawn = draw_subsets(tasks, task_counts(len(tasks)), repeats)
            yield "more tasks", partial(scaling_if_known, frames, drawn)

    def _ask_suggested(self, space: SearchSpace) -> None:
        """The setting that a stored search recommends, beside the method's defaults."""
        found = self.outputs.suggestion(space)
        if found is None:
            return
        for split in get_args(Split):
            self.outputs.recipe(found, split)
        if found.parameters != space.base.parameters:
            self.outputs.compare([], 1, tuned=[found])

    def _ask_first(self) -> None:
        self.outputs.first_result(self.outputs.first_recipes())  # its outputs are known from here
        first_flips_if_known(self.outputs)


_MODES: tuple[tuple[Mode, bool], ...] = (("labels", True), ("labels", False), ("inputs", False))
_OTHER_SEARCHES = tuple(
    SelectionOptions(mode, full_grid, every_proxy)
    for mode, full_grid in _MODES
    for every_proxy in (False, True)
)


def record_suite(
    suite: Suite,
    reference: str,
    frames: Frames,
    factors: FactorStore,
    progress: Progress | None = None,
    weights_only: bool = False,
    only: Collection[str] | None = None,
) -> bytes:
    """Ask a suite what pages ask at their usual settings, and pack the answers.

    Args:
        suite: the suite, with its weights.
        reference: how recipes name it.
        frames: where answers are looked up and kept.
        factors: where factors are kept.
        progress: reports each question; cancels between two.
        weights_only: measure no accuracy.
        only: methods that are searched and evaluated; all when None. The first result (average,
            Task Arithmetic and CART) is recorded in any case.

    Returns:
        The bytes of a record.

    Raises:
        RecipeError: an unknown method.
        SuiteError: the experts do not fit together.
        MergeScopeError: unfit inputs.
        Cancelled: by `progress`.

    Example:
        >>> from analysis.frames.store import FrameStore
        >>> stopped = Progress()
        >>> stopped.cancel.set()
        >>> record_suite(load_suite("vision"), "vision", FrameStore(), FactorStore(), stopped)
        Traceback (most recent call last):
        merge_core.errors.Cancelled: Cancelled after 0 of ... steps; nothing was written.
    """
    answers = usual_answers(suite, reference, frames, factors, progress, weights_only, only)
    return record_bytes(suite_card(suite, _is_measured(suite, weights_only)), answers)


def usual_answers(
    suite: Suite,
    reference: str,
    frames: Frames,
    factors: FactorStore,
    progress: Progress | None = None,
    weights_only: bool = False,
    only: Collection[str] | None = None,
) -> list[tuple[Asked, Kept]]:
    """What pages ask of a suite at their usual settings, each question once, with its answer.

    Args:
        suite, reference, frames, factors, progress, weights_only, only: as in
            :func:`record_suite`.

    Raises:
        SuiteError: the experts do not fit together.
        MergeScopeError: unfit inputs.
        Cancelled: by `progress`.

    Example:
        >>> from analysis.frames.store import FrameStore
        >>> suite = load_suite("vision").restrict(["digits"])
        >>> found = usual_answers(suite, "vision", FrameStore(), FactorStore(), None, True)
        >>> found[0][0].name
        'spectral.spectrum'
    """
    progress = progress or Progress()
    wanted = frozenset(methods() if only is None else (get_method(name).name for name in only))
    session = MergeSession(suite, suite.tasks, factors)  # says what does not fit before any work
    measured = _is_measured(suite, weights_only)
    recorder = Recorder(frames)
    questions = _Questions(
        suite,
        WeightFrames(suite, suite.tasks, recorder, factors, hold=True),
        OutputFrames(
            *(reference, suite, suite.tasks, recorder, lambda: session),
            cache(lambda: Evaluator(suite)),
            evaluated=measured,
        ),
        measured,
        wanted,
        Progress(cancel=progress.cancel),
    )
    steps = [*questions.of_weights(), *questions.of_settings()]
    if measured:
        steps += questions.of_accuracies()
    for done, (label, step) in enumerate(steps):
        progress.step(done, len(steps), label)
        step()
    progress.step(len(steps), len(steps), "packing")
    return list(recorder.answers.values())


def _is_measured(suite: Suite, weights_only: bool) -> bool:
    """Whether accuracies are asked for, and can be measured on both splits of every task."""
    return (
        not weights_only
        and suite.can_evaluate
        and all(has_labels(suite, task, split) for task in suite.tasks for split in get_args(Split))
    )


def check_record_path(path: Path) -> None:
    """Refuse a name that no record can have, before any work.

    Raises:
        OutputError: another ending, or a folder.

    Example:
        >>> check_record_path(Path("vision.zip"))
        Traceback (most recent call last):
        merge_core.errors.OutputError: vision.zip: a record's name ends in .mergescope. ...
    """
    if path.suffix != RECORD_SUFFIX:
        raise OutputError(f"{path}: a record's name ends in {RECORD_SUFFIX}. Name it so.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Name a file for the record.")


def write_record(path: Path, data: bytes) -> None:
    """Write a record, whole or not at all.

    Args:
        path: of the file.
        data: of :func:`record_suite`.

    Raises:
        OutputError: it cannot be written.

    Example:
        >>> write_record(Path("vision.mergescope"), b"as record_suite gives it")
    """
    check_record_path(path)
    write_atomically(path, data)
