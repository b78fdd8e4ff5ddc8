"""The settings among which rank and scale are chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merge_core.errors import RecipeError
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.methods import get_method

NAN = math.nan
POINTS = 20
LEAST_SHARE = 0.01
# Equal steps in log rank: the accuracy changes with the number of directions kept by factors.
RANKS: tuple[float, ...] = tuple(
    round(LEAST_SHARE ** (1 - i / (POINTS - 1)), 3) for i in range(POINTS)
)


SUMS_OF_TASK_VECTORS: tuple[str, ...] = ("task_arithmetic", "low_rank_task_arithmetic")
SUMMED = 8  # tasks up to which the slider's scales are those of a sum


@dataclass(frozen=True)
class SearchSpace:
    """A recipe of which rank, scale or both are still open.

    Attributes:
        base: everything else.
        ranks: shares in (0, 1] or numbers of directions, ascending; empty where the method has
            no rank.
        scales: scaling coefficients, ascending; empty where the method has none.
    """

    base: Recipe
    ranks: tuple[float | int, ...]
    scales: tuple[float, ...]

    @property
    def size(self) -> int:
        """Number of settings."""
        return max(len(self.ranks), 1) * max(len(self.scales), 1)

    def recipe(self, rank: float | int | None = None, scale: float | None = None) -> Recipe:
        """The recipe of one setting, which may lie between the points.

        Args:
            rank: for methods with a rank; None leaves the base's.
            scale: for methods with a scale; None leaves the base's.

        Raises:
            RecipeError: a value out of range, or for a method that has no such parameter.
        """
        given = {"rank": rank, "scale": scale}
        return self.base.with_parameters(**{n: v for n, v in given.items() if v is not None})

    def recipes(self) -> list[Recipe]:
        """All settings, ranks outermost, so that each truncation is made once."""
        return [
            self.recipe(rank, scale)
            for rank in self.ranks or (None,)
            for scale in self.scales or (None,)
        ]


def search_space(
    method: str,
    suite: str,
    tasks: Sequence[str] | None = None,
    ranks: Sequence[float | int] | None = None,
    scales: Sequence[float] | None = None,
) -> SearchSpace:
    """The settings of a method with a rank, a scale, or both.

    Args:
        method: its name.
        suite: as in recipes.
        tasks: chosen tasks (all when None).
        ranks: shares (floats) or numbers of directions (integers); :data:`RANKS` when None.
        scales: scaling coefficients; when None, :data:`POINTS` equal steps up to the largest
            that the method's slider offers; of sums of more than :data:`SUMMED` task vectors up
            to so much less, since they are as long at 1/T as one vector is.

    Raises:
        RecipeError: the method has neither, values are given for one that it has not, are named
            twice, none is given, or one is out of range.

    Example:
        >>> space = search_space("cart", "vision", ranks=[0.04, 0.08], scales=[1.0, 2.0, 3.0])
        >>> space.size, space.recipes()[0].parameters
        (6, {'rank': 0.04, 'scale': 1.0})
    """
    specs = {spec.name: spec for spec in get_method(method).specs}
    if not specs.keys() & {"rank", "scale"}:
        raise RecipeError(f"The method {method!r} has neither a rank nor a scale to sweep.")
    axes: dict[str, tuple[float | int, ...]] = {"rank": (), "scale": ()}
    for name, given in (("rank", ranks), ("scale", scales)):
        if name in specs:
            usual = RANKS if name == "rank" else _steps(_highest(method, specs[name].high, tasks))
            axes[name] = tuple(sorted(usual if given is None else given))
            _check(name, axes[name])
        elif given is not None:
            raise RecipeError(f"The method {method!r} has no {name}; leave --{name}s out.")
    document = {
        "suite": suite,
        "tasks": None if tasks is None else tuple(tasks),
        "method": method,
    }
    space = SearchSpace(make_recipe(document), axes["rank"], axes["scale"])
    space.recipes()  # refuses values out of range
    return space


def _highest(method: str, offered: float, tasks: Sequence[str] | None) -> float:
    """The largest scale of the grid; a sum of many task vectors needs less, in inverse ratio."""
    if method not in SUMS_OF_TASK_VECTORS or tasks is None:
        return offered
    return offered * min(1.0, SUMMED / len(tasks))


def _steps(highest: float) -> tuple[float, ...]:
    return tuple(round(highest * (i + 1) / POINTS, 4) for i in range(POINTS))


def _check(name: str, values: Sequence[float | int]) -> None:
    if not values:
        raise RecipeError(f"--{name}s names no value.")
    # Two rows of one setting would count as independent samples.
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        hint = " (1 is one direction, 1.0 all of them: sweep either)" if 1 in twice else ""
        raise RecipeError(f"--{name}s names {twice[0]:g} twice{hint}.")


def edge_words(
    space: SearchSpace, rank: float, scale: float, asked: tuple[float, float] = (NAN, NAN)
) -> str:
    """What is to be said of a setting at the end of an axis, in sentences; empty inside the grid.

    Args:
        space: the settings that it was chosen from.
        rank, scale: the setting; NaN where the method has none.
        asked: rank and scale that a rule gave before they were brought into the grid.

    Example:
        >>> space = search_space("cart", "vision", scales=[1.0, 8.0])
        >>> edge_words(space, 0.113, 8.0, (0.113, 9.2))
        'The scale 8 is the highest of the grid, and the rule itself gives 9.2.'
        >>> edge_words(space, 0.113, 5.0)
        ''
    """
    said = []
    axes = (("rank", rank, space.ranks, asked[0]), ("scale", scale, space.scales, asked[1]))
    for name, value, axis, own in axes:
        if len(axis) < 2 or math.isnan(value):
            continue
        ends = ((min(axis), "lowest"), (max(axis), "highest"))
        end = next((word for at, word in ends if math.isclose(value, at, rel_tol=1e-3)), None)
        if end is None:
            continue
        if not math.isnan(own) and not math.isclose(own, value, rel_tol=2e-3):
            rest = f", and the rule itself gives {own:.3g}"
        elif name == "rank" and isinstance(max(axis), float) and value == 1:
            rest = ": all directions, so that nothing lies beyond"
        else:
            rest = ": a better one may lie beyond"
        said.append(f"The {name} {value:.3g} is the {end} of the grid{rest}.")
    return " ".join(said)
