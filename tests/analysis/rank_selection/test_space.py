"""The settings among which a search chooses."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.rank_selection.space import POINTS, RANKS, edge_words, search_space
from merge_core.errors import RecipeError


def test_sums_of_many_task_vectors_are_scaled_down() -> None:
    tasks = [f"task-{i}" for i in range(20)]
    eight, twenty = (search_space("task_arithmetic", "vision", tasks[:n]).scales for n in (8, 20))
    np.testing.assert_allclose(np.array(twenty) * 20, np.array(eight) * 8)
    assert search_space("task_arithmetic", "vision").scales == eight
    for method in ("cart", "ties"):
        few, many = (search_space(method, "vision", tasks[:n]).scales for n in (8, 20))
        assert few == many


def test_usual_ranks_are_equal_steps_in_the_logarithm_from_one_percent_to_all() -> None:
    assert (RANKS[0], RANKS[-1], len(RANKS)) == (0.01, 1.0, POINTS)
    steps = np.diff(np.log(RANKS))
    assert np.allclose(steps, np.log(100) / (POINTS - 1), atol=0.05)


def test_recipes_have_ranks_outermost() -> None:
    space = search_space("cart", "vision", ["letters", "digits"], [8, 0.5], [2.5, 1])
    settings = [(r.parameters["rank"], r.parameters["scale"]) for r in space.recipes()]
    assert settings == [(0.5, 1.0), (0.5, 2.5), (8, 1.0), (8, 2.5)]
    assert space.size == 4
    assert all(r.tasks == ("letters", "digits") and r.suite == "vision" for r in space.recipes())


def test_whole_ranks_are_directions_and_shares_are_shares() -> None:
    (one,) = search_space("cart", "vision", None, [1], [1.0]).recipes()
    (whole,) = search_space("cart", "vision", None, [1.0], [1]).recipes()
    assert type(one.parameters["rank"]) is int
    assert type(whole.parameters["rank"]) is float


def test_a_method_without_a_rank_has_one_axis() -> None:
    space = search_space("task_arithmetic", "vision")
    assert space.ranks == ()
    assert space.size == len(space.recipes()) == POINTS
    assert space.scales[-1] == 1.5  # where the slider ends
    assert all("rank" not in recipe.parameters for recipe in space.recipes())


def test_a_setting_between_the_points() -> None:
    recipe = search_space("cart", "vision", None, [0.1], [1.0]).recipe(0.1234, 2.7)
    assert (recipe.parameters["rank"], recipe.parameters["scale"]) == (0.1234, 2.7)


@pytest.mark.parametrize(
    ("method", "axes", "says"),
    [
        ("average", {}, "neither a rank nor a scale"),
        ("task_arithmetic", {"ranks": [0.1]}, "leave --ranks out"),
        ("cart", {"ranks": [0.1, 0.1]}, "names 0.1 twice"),
        ("cart", {"ranks": [1, 1.0]}, "1 is one direction, 1.0 all of them"),
        ("cart", {"scales": []}, "--scales names no value"),
        ("cart", {"ranks": [1.5]}, "rank"),
        ("cart", {"scales": [float("nan")]}, "scale"),
        ("no_such", {}, "no_such"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    method: str, axes: dict[str, list[float]], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        search_space(method, "vision", None, **axes)


def test_the_ends_of_every_axis_are_said() -> None:
    space = search_space("cart", "vision")
    nan = float("nan")
    assert edge_words(space, 0.113, 5.6) == ""
    assert "scale 8 is the highest of the grid: a better one may lie beyond" in edge_words(
        space, 0.113, 8.0
    )
    assert "rank 0.01 is the lowest" in edge_words(space, 0.01, 2.0)
    assert "all directions, so that nothing lies beyond" in edge_words(space, 1.0, 2.0)
    assert "scale 0.4 is the lowest" in edge_words(space, nan, 0.4)
    assert "gives 9.2" in edge_words(space, 0.2, 8.0, (0.2, 9.2))
    both = edge_words(space, 0.01, 8.0)
    assert both.count("grid") == 2
    # An axis of one value was asked for, and has no ends.
    assert edge_words(search_space("cart", "vision", None, [0.1], [1.0]), 0.1, 1.0) == ""
