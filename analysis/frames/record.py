"""A record: a suite's card and its frames in one file, which shows a suite without its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from analysis.frames.entries import Asked, Kept, NotRecorded
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.from_weights import WeightFrames
from analysis.frames.pack import Damaged, Pack, pack, read_pack
from merge_core.errors import CheckpointError, MergeScopeError, SuiteError, explain_validation
from merge_core.factors.store import FactorStore
from merge_core.input_files import expand_path
from merge_core.suites.bundled import RECORD_SUFFIX
from merge_core.suites.recorded import RecordedSuite, SuiteCard

CARD = "card.json"
CARD_BYTES = 10_000_000
CARD_VALUES = 2_000_000
# Decides which rule recommends; a record keeps what was recommended when it was made.
NOT_COMPARED = "evidence"
SHOWN_VALUES = 12
TITLES = {
    "spectral.spectrum": "the spectrum",
    "spectral.cuts": "the bounds of noise",
    "spectral.summary": "the map of all layers",
    "spectral.cosines": "the cosine of task vectors",
    "spectral.pairs": "the overlap of each pair",
    "spectral.over_rank": "interference over the rank",
    "spectral.centring": "what centring does to each layer",
    "spectral.angles": "the angles between subspaces",
    "spectral.signs": "the clashes of signs",
    "spectral.build_up": "the picture of a matrix",
    "rank.proxy_curves": "what the rules say of every rank",
    "rank.weight_picks": "what every rule picks",
    "rank.per_layer": "the ranks of each layer",
    "rank.suggestion": "the recommended setting",
    "rank.selection": "this choice of rank and scale",
    "rank.task_curves": "the accuracy of each task over the rank",
    "rank.storage": "the comparison of ranks per layer",
    "accuracy.experts": "the accuracy of the experts",
    "accuracy.recipe": "the accuracy of this setting",
    "accuracy.first_result": "the first result",
    "accuracy.flips": "the inputs on which two merges differ",
    "accuracy.scaling": "the accuracy over the number of tasks",
    "accuracy.comparison": "this comparison",
}


class RecordFrames:
    """The answers in a record, which are all that there are.

    Args:
        held: what the file holds.
        tasks: how many the suite has: frames are recorded of all of them together.
    """

    computes = False

    def __init__(self, held: Pack, tasks: int) -> None:
        self._held = held
        self._tasks = tasks
        self._known = {_compared(asked).key: asked for asked in held.questions.values()}

    def get(self, asked: Asked) -> Kept | None:
        """The answer to a question, None where it was not recorded."""
        known = self._known.get(_compared(asked).key)
        try:
            return None if known is None else self._held.get(known)
        except Damaged:
            return None

    def put(self, asked: Asked, kept: Kept) -> None:
        """A record is only read."""

    def refuse(self, asked: Asked) -> None:
        """Say what was not recorded, and what was that is nearest to it.

        Raises:
            NotRecorded: always.
        """
        title = TITLES.get(asked.name, "this")
        alike = [known for known in self._known.values() if known.name == asked.name]
        if not alike:
            raise NotRecorded(f"This record does not hold {title}.")
        mine = [known for known in alike if known.inputs == asked.inputs]
        if not mine:
            raise NotRecorded(
                f"This record holds {title} of all {self._tasks} tasks together. Choose all tasks."
            )
        if asked.key in {replace(known, version=asked.version).key for known in mine}:
            raise NotRecorded(
                f"This record holds {title} as another version of MergeScope understood it, or "
                "damaged. Ask for a new record."
            )
        nearest = min(mine, key=lambda known: _distance(asked.arguments, known.arguments))
        changed = _differences(asked.arguments, nearest.arguments)
        words = ", ".join(f"{name} {_word(value)}" for name, _, value in changed[:SHOWN_VALUES])
        wanted = ", ".join(f"{name} {_word(value)}" for name, value, _ in changed[:SHOWN_VALUES])
        raise NotRecorded(
            f"This record does not hold {title} at {wanted}; the nearest that it holds is {words}.",
            nearest.arguments,
        )


def _compared(asked: Asked) -> Asked:
    arguments = {name: v for name, v in asked.arguments.items() if name != NOT_COMPARED}
    return replace(asked, arguments=arguments)


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments by name, those of a method by theirs."""
    for name, value in values.items():
        if name == "parameters" and isinstance(value, dict):
            yield from value.items()
        elif name != NOT_COMPARED:
            yield name, value


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    one, other = dict(_flat(first)), dict(_flat(second))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [(name, one.get(name), other.get(name)) for name in names]


def _distance(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """How far two questions are apart: factors between numbers, and much for anything else."""
    return sum(_apart(one, other) for _, one, other in _differences(first, second))


def _apart(one: Any, other: Any) -> float:
    numbers = [x for x in (one, other) if isinstance(x, int | float) and not isinstance(x, bool)]
    if len(numbers) == 2 and min(numbers) > 0 and max(numbers) < math.inf:
        # A share of directions and a number of them are no factors of each other.
        far = 50.0 if (one <= 1) != (other <= 1) and type(one) is not type(other) else 0.0
        return far + abs(math.log(one / other))
    return 100.0 if len(numbers) < 2 else 10.0


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{'none' if value is None else value!s:.80}"


@dataclass(frozen=True)
class Record:
    """A record that was opened.

    Attributes:
        path: of the file.
        suite: what it says of its suite, which has no weights.
        frames: the answers that it holds.
    """

    path: Path
    suite: RecordedSuite
    frames: RecordFrames

    @property
    def weights(self) -> WeightFrames:
        """Frames about the weights of all tasks."""
        return WeightFrames(self.suite, self.suite.tasks, self.frames, FactorStore())

    @property
    def outputs(self) -> OutputFrames:
        """Frames about outputs on all tasks."""
        suite = self.suite

        def none_here() -> Any:
            raise NotRecorded("This record holds no weights. Open the suite itself to merge.")

        return OutputFrames(
            *(suite.name, suite, suite.tasks, self.frames, none_here, none_here),
            evaluated=suite.can_evaluate,
        )


def record_bytes(card: SuiteCard, entries: Iterable[tuple[Asked, Kept]]) -> bytes:
    """A record as the bytes of its file.

    Args:
        card: what it says of its suite.
        entries: questions and answers, each question once.

    Example:
        >>> from merge_core.suites.recorded import suite_card
        >>> len(record_bytes(suite_card(load_suite("vision"), measured=False), [])) < 10_000
        True
    """
    shortened = ((asked, _shorten(kept)) for asked, kept in entries)
    return pack(shortened, {CARD: card.model_dump_json(exclude_defaults=True).encode()})


def _shorten(kept: Kept) -> Kept:
    """The answer with numbers of seven digits, which take half the place.

    Numbers that are written with six digits at most (ranks, scales, shares) stay as they are.
    """
    frames = {}
    for name, frame in kept.frames.items():
        columns = {
            column: [x if float(f"{x:.6g}") == x else float(np.float32(x)) for x in frame[column]]
            for column in frame.columns
            if frame[column].dtype == np.float64
        }
        frames[name] = frame.assign(**columns) if len(frame) else frame
    return Kept(frames, kept.values)


def load_record(path: str | Path) -> Record:
    """Open a record; nothing in it is run, and what it claims is bounded.

    Args:
        path: a file that ``mergescope record`` wrote.

    Raises:
        SuiteError: missing, damaged, too large, or no record.

    Example:
        >>> from merge_core.suites.recorded import suite_card
        >>> card = suite_card(load_suite("vision"), measured=False)
        >>> _ = Path("vision.mergescope").write_bytes(record_bytes(card, []))
        >>> record = load_record("vision.mergescope")
        >>> record.suite.tasks == load_suite("vision").tasks
        True
    """
    path = expand_path(path, SuiteError)
    try:
        held = read_pack(path)
        text = held.part(CARD, CARD_BYTES)
        if sum(map(text.count, (b",", b"[", b"{"))) > CARD_VALUES:
            raise Damaged("its card holds more values than any")
        suite = RecordedSuite(SuiteCard.model_validate_json(text), path)
        _ = suite.matrices, suite.base
    except OSError as error:
        raise SuiteError(
            f"{path} cannot be read ({error.strerror}). Give a {RECORD_SUFFIX} file."
        ) from error
    except ValidationError as error:
        raise _no_record(path, f"its card: {explain_validation(error)}") from error
    except (Damaged, CheckpointError, RecursionError) as error:
        raise _no_record(path, str(error) or "it is nested too deeply") from error
    return Record(path, suite, RecordFrames(held, len(suite.tasks)))


def _no_record(path: Path, reason: str) -> MergeScopeError:
    return SuiteError(
        f"{path} is not a record that can be opened: {reason}. Ask for it again, or make one with "
        "'mergescope record'."
    )


def is_record(path: str | Path) -> bool:
    """Whether a name is that of a record.

    Example:
        >>> is_record("vision.mergescope"), is_record("vision")
        (True, False)
    """
    return str(path).endswith(RECORD_SUFFIX)
