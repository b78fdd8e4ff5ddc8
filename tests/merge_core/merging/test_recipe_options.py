"""What a recipe says besides method and parameters: origin, weights, overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_core.errors import RecipeError, SuiteError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe, recipe_from_query, recipe_from_yaml
from merge_core.methods.declaration import digest_values
from merge_core.suites.suite import Suite

TASKS = ("a", "b", "c")
MATRIX, BIAS = "blocks.0.mlp.fc2.weight", "blocks.0.attn.qkv.bias"
FULL: dict[str, Any] = {
    "tasks": TASKS,
    "method": "ties",
    "parameters": {"density": 0.5},
    "origin": "average",
    "weights": {"a": 2, "c": 0.5},
    "overrides": [{"match": "blocks.0.*", "parameters": {"density": 0.9}}],
    "seed": 3,
}


@pytest.fixture(scope="module")
def suite(synthetic_suite: Callable[..., Suite]) -> Suite:
    return synthetic_suite(TASKS, dtype=torch.float64)


def merge(suite: Suite, **document: Any) -> dict[str, Tensor]:
    return MergeSession(suite, None, FactorStore()).merge(make_recipe(document))


def experts(suite: Suite, name: str) -> Tensor:
    return torch.stack([suite.expert(task).tensor(name) for task in TASKS])


def base(suite: Suite, name: str) -> Tensor:
    assert suite.base is not None
    return suite.base.tensor(name)


def test_every_option_survives_yaml_and_link() -> None:
    recipe = make_recipe(FULL)
    assert recipe_from_yaml(recipe.to_yaml()) == recipe
    assert recipe_from_query(recipe.to_query()) == recipe
    plain = make_recipe({"method": "cart"}).to_yaml()
    assert not {"weights", "overrides", "then", "origin"} & {
        line.split(":")[0] for line in plain.splitlines()
    }


def test_options_change_the_digest_and_their_absence_does_not(suite: Suite) -> None:
    plain = {k: v for k, v in FULL.items() if k not in ("origin", "weights", "overrides")}
    variants = [plain] + [{**plain, k: FULL[k]} for k in ("origin", "weights", "overrides")]
    digests = {make_recipe(document).digest(suite) for document in variants}
    assert len(digests) == 4
    explicit = make_recipe({**plain, "weights": {}, "overrides": [], "then": []})
    assert explicit.digest(suite) == make_recipe(plain).digest(suite)


def test_the_average_under_weights(suite: Suite) -> None:
    merged = merge(suite, method="average", weights={"a": 3, "c": 0})
    wanted = (3 * experts(suite, MATRIX)[0] + experts(suite, MATRIX)[1]) / 4
    torch.testing.assert_close(merged[MATRIX], wanted, rtol=1e-12, atol=1e-12)
    alone = merge(suite, method="average", weights={"a": 0, "b": 0})
    assert torch.equal(alone[BIAS], experts(suite, BIAS)[2])


def test_task_arithmetic_with_a_coefficient_for_each_task(suite: Suite) -> None:
    merged = merge(
        suite,
        method="task_arithmetic",
        parameters={"scale": 0.5},
        weights={"a": 1, "b": -2, "c": 0.2},
    )
    for name in (MATRIX, BIAS):
        tau = experts(suite, name) - base(suite, name)
        wanted = base(suite, name) + 0.5 * tau[0] - tau[1] + 0.1 * tau[2]
        torch.testing.assert_close(merged[name], wanted, rtol=1e-12, atol=1e-12)


def test_weights_of_one_change_nothing(suite: Suite) -> None:
    for method in ("average", "task_arithmetic", "ties"):
        plain = merge(suite, method=method)
        same = merge(suite, method=method, weights=dict.fromkeys(TASKS, 1.0))
        assert all(torch.equal(plain[name], same[name]) for name in plain)


def test_ties_about_the_average(suite: Suite) -> None:
    """By hand, entry by entry: trim half, elect, disjoint mean, about θ_avg."""
    merged = merge(
        suite,
        method="ties",
        origin="average",
        parameters={"density": 0.5, "trim": "tensor"},
    )
    C = experts(suite, MATRIX) - experts(suite, MATRIX).mean(0)
    keep = C[0].numel() // 2
    trimmed = torch.zeros_like(C)
    for t in range(3):
        top = C[t].abs().flatten().argsort(descending=True)[:keep]
        trimmed[t].view(-1)[top] = C[t].flatten()[top]
    update = torch.zeros_like(C[0])
    for place in range(update.numel()):
        column = trimmed.reshape(3, -1)[:, place]
        if bool((column != 0).all()):
            continue  # Σ C_t = 0: the vote of all three is even
        agreeing = column[column.sign() == column.sum().sign()]
        agreeing = agreeing[agreeing != 0]
        update.view(-1)[place] = agreeing.mean() if len(agreeing) else 0
    wanted = experts(suite, MATRIX).mean(0) + update
    torch.testing.assert_close(merged[MATRIX], wanted, rtol=1e-6, atol=1e-7)


def test_overrides_hold_where_they_match_and_the_last_one_counts(suite: Suite) -> None:
    overrides = [
        {"match": "blocks.*", "parameters": {"scale": 0.0}},
        {"match": "*.mlp.fc?.weight", "parameters": {"scale": 2.0}},
    ]
    merged = merge(suite, method="task_arithmetic", parameters={"scale": 1.0}, overrides=overrides)
    for name, scale in (("norm.weight", 1.0), (BIAS, 0.0), (MATRIX, 2.0)):
        tau = (experts(suite, name) - base(suite, name)).sum(0)
        torch.testing.assert_close(
            merged[name], base(suite, name) + scale * tau, rtol=1e-12, atol=1e-12
        )


def test_ranks_of_single_layers(suite: Suite) -> None:
    overrides = [{"match": MATRIX, "parameters": {"rank": 1}}]
    merged = merge(suite, method="cart", parameters={"rank": 1.0}, overrides=overrides)
    C = experts(suite, MATRIX) - experts(suite, MATRIX).mean(0)
    U, S, Vh = torch.linalg.svd(C)
    wanted = experts(suite, MATRIX).mean(0) + ((U[..., :1] * S[..., None, :1]) @ Vh[:, :1]).sum(0)
    torch.testing.assert_close(merged[MATRIX], wanted, rtol=1e-5, atol=1e-6)
    other = "blocks.0.attn.qkv.weight"  # at full rank: the average
    torch.testing.assert_close(merged[other], experts(suite, other).mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"method": "cart", "origin": "base"}, r"no task vectors about the base.*average"),
        ({"method": "average", "origin": "base"}, "takes no task vectors"),
        ({"method": "iso_c", "weights": {"a": 2}}, "no per-task weights"),
        ({"method": "ties", "tasks": ["a"], "weights": {"b": 2}}, "does not merge 'b'"),
        ({"method": "ties", "weights": {"a": float("nan")}}, "weights"),
        (
            {"method": "cart", "overrides": [{"match": "*", "parameters": {"rank": 7.5}}]},
            "rank",
        ),
        (
            {"method": "cart", "overrides": [{"match": "*", "parameters": {"depth": 1}}]},
            "no parameter 'depth'",
        ),
        ({"method": "cart", "overrides": [{"match": "*", "parameters": {}}]}, "overrides"),
        ({"method": "cart", "then": [{"method": "nothing"}]}, "no post-processor 'nothing'"),
    ],
)
def test_what_a_method_cannot_take_is_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(document)


def test_links_that_hold_no_json_are_refused() -> None:
    with pytest.raises(RecipeError, match="weights is not JSON"):
        recipe_from_query("method=ties&weights={a:1")


def test_weights_of_tasks_that_are_not_merged_are_refused(suite: Suite) -> None:
    with pytest.raises(SuiteError, match="gives a weight to 'elsewhere'"):
        merge(suite, method="average", weights={"elsewhere": 2})
    with pytest.raises(RecipeError, match="must not sum to zero"):
        merge(suite, method="average", weights={"a": 1, "b": -1, "c": 0})


def test_the_base_is_needed_only_about_the_base(synthetic_suite: Callable[..., Suite]) -> None:
    suite = synthetic_suite(TASKS, with_base=False)
    with pytest.raises(SuiteError, match=r"TIES needs the base.*average, .*cart"):
        merge(suite, method="ties")
    assert torch.isfinite(merge(suite, method="ties", origin="average")[MATRIX]).all()


def test_a_recipe_is_a_value() -> None:
    recipe = make_recipe(FULL)
    assert isinstance(recipe, Recipe)
    assert recipe.run(TASKS).weights == (2.0, 1.0, 0.5)
    assert recipe.run(TASKS).origin == "average"
    assert make_recipe({"method": "ties", "weights": {"a": 1}}).run(TASKS).weights == ()


def test_predictions_from_before_a_parameter_was_added_are_still_known(suite: Suite) -> None:
    """`combine` came to TIES later: at its default the digest is that of a recipe without it."""
    plain = make_recipe({"method": "ties"})
    assert plain.parameters["combine"] == "mean"
    assert "combine" not in digest_values(plain.checked_parameters)
    other = plain.with_parameters(combine="sum")
    assert digest_values(other.checked_parameters)["combine"] == "sum"
    assert other.digest(suite) != plain.digest(suite)
