"""Proxies from weights against float64 definitions, brute force and identities."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from analysis.rank_selection.space import RANKS, SearchSpace, search_space
from analysis.rank_selection.weight_proxies import (
    CURVES,
    PROXIES,
    _balance,
    _knee,
    defined_for,
    layer_ranks,
    proxy_curves,
    recommend_from_weights,
)
from analysis.rank_selection.weight_response import (
    PROPORTIONAL,
    act,
    responses,
    targets,
    update,
    whole_model,
)
from analysis.rank_selection.weight_rules import RULES, Spectrum, rule_ranks
from analysis.spectral.interference import interference_over_rank, mean_over_layers
from analysis.spectral.noise_bounds import gavish_donoho_cut, noise_edge
from merge_core.errors import Cancelled
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroups
from tests.analysis.tiny_suite import FC, MATRICES, QKV, TASKS, task_vectors, write_suite

RANKED = ("cart", "low_rank_task_arithmetic")
SEEDS = settings(max_examples=10, deadline=None)


def matrix(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(len(tensor), -1).double().numpy()


def low_rank(A: np.ndarray, k: int) -> np.ndarray:
    U, s, Vh = np.linalg.svd(A, full_matrices=False)
    return (U[:, :k] * s[:k]) @ Vh[:k]


def origin_of(method: str) -> str:
    return "average" if method == "cart" else "base"


def by_hand(suite: Suite, method: str, name: str, share: float) -> tuple[np.ndarray, list]:
    """D and the task vectors of one matrix, in float64, from the files."""
    C = [matrix(t) for t in task_vectors(suite, name, origin_of(method))]
    k = max(1, int(share * min(C[0].shape) + 1e-9))
    return np.sum([low_rank(c, k) for c in C], axis=0), C


def error(scale: float, D: np.ndarray, C: list[np.ndarray]) -> float:
    """mean_t ‖(λD − C_t) C_tᵀ‖² / ‖C_t C_tᵀ‖²."""
    return float(
        np.mean([np.sum(((scale * D - c) @ c.T) ** 2) / np.sum((c @ c.T) ** 2) for c in C])
    )


def at(frame: pd.DataFrame, rank: float) -> pd.Series:
    (row,) = [row for _, row in frame.iterrows() if row["rank"] == rank]
    return row


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return search_space("cart", "vision", TASKS)


@pytest.mark.parametrize("method", PROPORTIONAL)
def test_every_method_listed_is_its_origin_plus_the_scale_times_the_update(
    suite: Suite, store: FactorStore, method: str
) -> None:
    session = MergeSession(suite, None, store)
    space = search_space(method, "vision", TASKS)
    recipe = space.recipe(0.4 if space.ranks else None, 1.0)
    merged = session.merge(recipe.with_parameters(scale=-1.7))
    for group in session.groups:
        if group.decomposed:
            about = group.origin(recipe.run(group.tasks).origin)
            expected = matrix(about) - 1.7 * matrix(update(group, recipe).reshape(about.shape))
            assert matrix(merged[group.name]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", RANKED)
@pytest.mark.parametrize("share", [RANKS[-5], RANKS[-3]])
def test_strength_and_overlap_give_the_error_at_every_scale(
    suite: Suite, groups: TensorGroups, method: str, share: float
) -> None:
    frame = responses(groups, search_space(method, "vision", TASKS))
    for name in MATRICES:
        row = at(frame[frame["parameter"] == name], share)
        D, C = by_hand(suite, method, name, share)
        a, b = row["strength"], row["overlap"]
        for scale in (-0.5, 0.3, 2.0):
            assert 1 - 2 * scale * b + scale**2 * a == pytest.approx(error(scale, D, C), rel=1e-4)
        assert row["update_energy"] == pytest.approx(np.sum(D**2), rel=1e-5)
        assert row["task_energy"] == pytest.approx(np.mean([np.sum(c**2) for c in C]), rel=1e-5)


@pytest.mark.parametrize("method", RANKED)
def test_scales_do_what_they_are_named_after(
    suite: Suite, groups: TensorGroups, method: str
) -> None:
    table = whole_model(responses(groups, search_space(method, "vision", TASKS)))
    share = RANKS[-4]
    row = at(table, share)
    parts = [by_hand(suite, method, name, share) for name in MATRICES]

    def total(scale: float) -> float:
        return float(np.mean([error(scale, D, C) for D, C in parts]))

    assert row["least_squares"] == pytest.approx(minimize_scalar(total).x, rel=1e-3)
    strength = [
        np.mean([np.sum((row["matched"] * D @ c.T) ** 2) / np.sum((c @ c.T) ** 2) for c in C])
        for D, C in parts
    ]
    assert np.mean(strength) == pytest.approx(1, rel=1e-4)
    length = sum(np.sum((row["equal_norm"] * D) ** 2) for D, _ in parts)
    mean = sum(np.mean([np.sum(c**2) for c in C]) for _, C in parts)
    assert length == pytest.approx(mean, rel=1e-4)
    # The least error is what the directions leave: 1 − cos².
    assert total(row["least_squares"]) == pytest.approx(1 - row["alignment"] ** 2, abs=1e-4)


def test_about_the_average_full_rank_has_no_update_and_no_scale(
    groups: TensorGroups, space
) -> None:
    row = at(whole_model(responses(groups, space)), 1.0)
    assert row["strength"] == 0
    assert row[["alignment", "matched", "least_squares", "equal_norm"]].isna().all()


@SEEDS
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_equal_experts_ask_for_one_over_their_number(seed: int, count: int) -> None:
    """T τ is the sum of T equal task vectors: every rule gives back one of them."""
    table = sum_responses([moves(seed)] * count)
    assert table["alignment"] == pytest.approx(1, abs=1e-5)
    for column in ("matched", "least_squares", "equal_norm"):
        assert table[column] == pytest.approx(1 / count, rel=1e-4)


@SEEDS
@given(st.integers(0, 10**6))
def test_tasks_with_inputs_of_their_own_are_simply_added(seed: int) -> None:
    """Orthogonal row spaces: the sum acts on a task's inputs exactly as the task's own does."""
    first, second = moves(seed), moves(seed + 1)
    first[:, 4:], second[:, :4] = 0, 0
    table = sum_responses([first, second])
    assert table["strength"] == pytest.approx(1, abs=1e-5)
    assert table["matched"] == pytest.approx(1, abs=1e-5)
    assert table["least_squares"] == pytest.approx(1, abs=1e-5)


def moves(seed: int) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def sum_responses(vectors: list[torch.Tensor]) -> pd.Series:
    """Responses of Task Arithmetic on one matrix with these task vectors."""
    with tempfile.TemporaryDirectory() as folder:
        base = {FC: torch.zeros_like(vectors[0])}
        experts = {f"t{i}": {FC: vector.clone()} for i, vector in enumerate(vectors)}
        suite = write_suite(Path(folder) / "s", base, experts)
        groups = TensorGroups(suite, None, FactorStore(Path(folder) / "f"))
        found = whole_model(responses(groups, search_space("task_arithmetic", "vision")))
    return found.iloc[0]


def test_a_task_that_left_a_matrix_as_it_was_does_not_count_there(tmp_path: Path) -> None:
    vectors = [moves(1), moves(2), torch.zeros(6, 8)]
    with_idle, without = sum_responses(vectors), sum_responses(vectors[:2])
    assert with_idle["strength"] == pytest.approx(without["strength"], rel=1e-6)
    assert with_idle["overlap"] == pytest.approx(without["overlap"], rel=1e-6)


# Rules of rank


def spectrum(S: list[float], rows: int = 40, columns: int = 60, tasks: int = 3) -> Spectrum:
    return Spectrum(np.array(S), rows, columns, tasks)


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=12))
def test_thresholds_keep_the_fewest_directions_that_reach_the_share(values: list[float]) -> None:
    S = sorted(values, reverse=True)

    def fewest(power: int, share: float) -> int:
        total = sum(v**power for v in S)
        return next(
            k
            for k in range(1, len(S) + 1)
            if sum(v**power for v in S[:k]) >= share * total * (1 - 1e-12)
        )

    for name, power, share in (
        ("energy_80", 2, 0.8),
        ("energy_90", 2, 0.9),
        ("energy_95", 2, 0.95),
        ("nuclear_40", 1, 0.4),
    ):
        # A threshold met to the last bit may fall on either side.
        exact = fewest(power, share)
        assert RULES[name].count(spectrum(S)) in (exact, exact + 1)


def test_rules_on_a_spectrum_of_equal_directions_and_on_signal_in_noise() -> None:
    flat = spectrum([2.0] * 10)
    for name in ("stable_rank", "participation_ratio", "effective_rank"):
        assert RULES[name].count(flat) == pytest.approx(10)
    assert RULES["energy_80"].count(flat) == 8
    assert RULES["nuclear_40"].count(flat) == 4
    assert RULES["one_per_task"].count(flat) == 3
    for name, kept in (("energy_90", 90), ("energy_95", 95), ("share_8", 8), ("share_12", 12)):
        assert RULES[name].count(spectrum([1.0] * 100)) == pytest.approx(kept)
    rng = np.random.default_rng(0)
    noisy = 0.1 * rng.standard_normal((40, 60))
    noisy[:5, :5] += 20 * np.eye(5)
    S = np.linalg.svd(noisy, compute_uv=False)
    assert RULES["gavish_donoho"].count(spectrum(list(S))) == 5
    assert RULES["noise_edge"].count(spectrum(list(S))) == 5
    assert gavish_donoho_cut(S, 40, 60) > noise_edge(S, 40, 60)


def test_rules_are_averaged_over_the_tasks_that_changed_the_matrix(tmp_path: Path) -> None:
    one, three = torch.zeros(6, 8), torch.zeros(6, 8)
    one[0, 0] = 1.0
    three[0, 0], three[1, 1], three[2, 2] = 1.0, 1.0, 1.0
    experts = {"a": {FC: one}, "b": {FC: three}, "idle": {FC: torch.zeros(6, 8)}}
    suite = write_suite(tmp_path / "s", {FC: torch.zeros(6, 8)}, experts)
    frame = rule_ranks(TensorGroups(suite, None, FactorStore(tmp_path / "f")), "base")
    shares = frame.set_index("proxy")["share"]
    assert shares["stable_rank"] == pytest.approx((1 + 3) / 2 / 6)
    assert list(shares.index) == list(RULES)


# Curves and recommendations


def test_curves_are_those_of_the_interference_page(
    groups: TensorGroups, space: SearchSpace
) -> None:
    frame = proxy_curves(groups, space)
    assert set(frame["proxy"]) == set(CURVES)
    wide = frame.pivot(index="rank", columns="proxy", values="value")
    assert list(wide.index) == sorted(RANKS)
    row = mean_over_layers(interference_over_rank(groups, "average", RANKS)).set_index("share")
    column = mean_over_layers(interference_over_rank(groups, "average", RANKS, "column"))
    for ours, theirs in (
        ("reconstruction", row["reconstruction_share"]),
        ("interference_row", row["interference_normalised"]),
        ("interference_column", column.set_index("share")["interference_normalised"]),
        ("update_norm", row["update_norm"]),
    ):
        assert wide[ours].to_numpy() == pytest.approx(theirs.to_numpy(), abs=1e-5), ours
    assert (wide["energy"] + wide["reconstruction"]).to_numpy() == pytest.approx(1)


def test_kept_nuclear_norm_is_the_mean_over_matrices_and_tasks(
    suite: Suite, groups: TensorGroups, space: SearchSpace
) -> None:
    frame = proxy_curves(groups, space)
    wide = frame.pivot(index="rank", columns="proxy", values="value")
    share = RANKS[-4]
    expected = []
    for name in MATRICES:
        for C in task_vectors(suite, name, "average"):
            s = np.linalg.svd(matrix(C), compute_uv=False)
            expected.append(s[: max(1, int(share * s.size))].sum() / s.sum())
    assert wide["nuclear"][share] == pytest.approx(np.mean(expected), abs=1e-5)


def test_knee_and_balance_by_hand() -> None:
    table = pd.DataFrame(
        {"reconstruction": [1.0, 0.6, 0.5, 0.0], "interference_row": [0.0, 0.1, 0.5, 1.0]}
    )
    assert _knee(table) == 1  # 0.6² + 0.1² < 0.5² + 0.5²
    assert _balance(table) == 2
    # Only the shape counts, not the units.
    assert _knee(table * [7.0, 0.01] + [0.0, 3.0]) == 1


def test_each_proxy_takes_its_row_and_its_scale(groups: TensorGroups, space: SearchSpace) -> None:
    wide_open = search_space("cart", "vision", TASKS, scales=[-10.0, 10.0])
    found = recommend_from_weights(groups, wide_open).set_index("proxy")
    assert list(found.index) == [n for n in PROXIES if defined_for(n, "cart")]
    table = whole_model(responses(groups, space)).set_index("rank")
    peak = table["alignment"].idxmax()
    assert found.loc["alignment", ["rank", "scale"]].tolist() == [
        peak,
        pytest.approx(table["matched"][peak]),
    ]
    assert found["scale"]["least_squares"] == pytest.approx(table["least_squares"][peak])
    assert found["scale"]["equal_norm"] == pytest.approx(table["equal_norm"][peak])
    assert found["rank"]["update_norm"] == table["update_energy"].idxmax()
    means = rule_ranks(groups, "average").groupby("proxy")["share"].mean()
    for name in RULES:
        assert found["rank"][name] == pytest.approx(max(means[name], RANKS[0]))
    between = found.loc["energy_90"]
    near = table["matched"].dropna()
    assert (
        near[near.index <= between["rank"]].iloc[-1] * (1 - 1e-9)
        <= between["scale"]
        <= near[near.index >= between["rank"]].iloc[0] * (1 + 1e-9)
    )
    assert found["why"].str.len().min() > 20
    assert found["source"].notna().all()


def test_recommendations_stay_inside_the_space(groups: TensorGroups) -> None:
    space = search_space("cart", "vision", TASKS, ranks=[0.3, 0.4], scales=[1.0, 1.5])
    found = recommend_from_weights(groups, space)
    assert found["rank"].between(0.3, 0.4).all()
    assert found["scale"].between(1.0, 1.5).all()
    whole = search_space("cart", "vision", TASKS, ranks=[1, 2])
    assert recommend_from_weights(groups, whole)["rank"].between(0, 0.9).sum() > len(RULES) / 2


def test_what_lies_beyond_the_grid_is_said(groups: TensorGroups) -> None:
    wide = search_space("cart", "vision", TASKS, scales=[-10.0, 10.0])
    free = recommend_from_weights(groups, wide).set_index("proxy")
    assert free["at_edge"]["alignment"] == ""
    own = float(free["scale"]["alignment"])
    narrow = search_space("cart", "vision", TASKS, scales=[own / 4, own / 2])
    cut = recommend_from_weights(groups, narrow).set_index("proxy").loc["alignment"]
    assert cut["scale"] == pytest.approx(own / 2)
    assert cut["at_edge"] == (
        f"The scale {own / 2:.3g} is the highest of the grid, and the rule itself gives {own:.3g}."
    )
    few = search_space("cart", "vision", TASKS, ranks=[0.01, 0.02], scales=[-10.0, 10.0])
    said = recommend_from_weights(groups, few).set_index("proxy")["at_edge"]["energy_90"]
    assert "The rank 0.02 is the highest of the grid, and the rule itself gives" in said


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_m", "iso_c"])
def test_methods_without_a_rank_get_scales_only(groups: TensorGroups, method: str) -> None:
    space = search_space(method, "vision", TASKS)
    found = recommend_from_weights(groups, space)
    assert found["rank"].isna().all()
    assert found["scale"].notna().all()
    assert ("metagpt" in set(found["proxy"])) == (method == "task_arithmetic")
    assert proxy_curves(groups, space).empty
    assert layer_ranks(groups, space).empty
    if method == "task_arithmetic":
        assert found.set_index("proxy")["scale"]["metagpt"] == pytest.approx(1 / len(TASKS))


def test_nothing_is_recommended_where_nothing_is_known(
    suite: Suite, groups: TensorGroups, store: FactorStore
) -> None:
    ties = search_space("ties", "vision", TASKS)
    assert recommend_from_weights(groups, ties).empty
    pair = TensorGroups(suite, TASKS[:2], store)
    space = search_space("cart", "vision", TASKS[:2])
    # C_1 = −C_2, and so are their truncations, up to rounding.
    assert recommend_from_weights(pair, space).empty
    assert layer_ranks(pair, space).empty


def test_layers_get_the_setting_that_they_would_get_alone(
    suite: Suite, groups: TensorGroups, store: FactorStore, space: SearchSpace, tmp_path: Path
) -> None:
    frame = layer_ranks(groups, space)
    assert set(frame["parameter"]) == set(MATRICES)
    states = {t: {QKV: suite.expert(t).tensor(QKV)} for t in TASKS}
    assert suite.base is not None
    alone = write_suite(tmp_path / "alone", {QKV: suite.base.tensor(QKV)}, states)
    whole = recommend_from_weights(TensorGroups(alone, None, store), space).set_index("proxy")
    layer = frame[frame["parameter"] == QKV].set_index("proxy")
    assert layer["share"].to_numpy() == pytest.approx(whole["rank"].to_numpy())
    assert layer["scale"].to_numpy() == pytest.approx(whole["scale"].to_numpy(), rel=1e-5)
    assert (layer["rank"] == [max(1, int(s * 8 + 1e-9)) for s in layer["share"]]).all()


@pytest.mark.parametrize("method", PROPORTIONAL)
def test_one_rule_alone_picks_what_it_picks_among_all(groups: TensorGroups, method: str) -> None:
    narrow = search_space(method, "vision", TASKS, scales=[0.5, 1.5])
    spaces = [search_space(method, "vision", TASKS), narrow]
    if spaces[0].ranks:
        spaces.append(search_space(method, "vision", TASKS, ranks=[0.04, 0.9, 1.0]))
        spaces.append(search_space(method, "vision", TASKS, ranks=[1.0]))
    for space in spaces:
        whole = recommend_from_weights(groups, space).set_index("proxy")
        for name in PROXIES:
            alone = recommend_from_weights(groups, space, only=name).set_index("proxy")
            assert list(alone.index) == [name] * (name in whole.index)
            for row in alone.index:
                # A few float32 products in another order.
                assert alone["rank"][row] == pytest.approx(whole["rank"][row], nan_ok=True)
                assert alone["scale"][row] == pytest.approx(whole["scale"][row], rel=1e-5)
                assert alone["at_edge"][row] == whole["at_edge"][row]


def test_a_rule_of_the_rank_looks_at_the_two_ranks_around_it(
    groups: TensorGroups, space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[float] = []

    def counted(*given: object, ranks: list[float], **named: object) -> pd.DataFrame:
        looked.extend(ranks)
        return responses(*given, ranks=ranks, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("analysis.rank_selection.weight_proxies.responses", counted)
    (found,) = recommend_from_weights(groups, space, only="energy_90").to_dict("records")
    below, above = (
        max(r for r in RANKS if r <= found["rank"]),
        min(r for r in RANKS if r >= found["rank"]),
    )
    assert looked == [below, above]


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (8, 8)])
def test_either_way_of_multiplying_gives_the_same_responses(shape: tuple[int, int]) -> None:
    source = torch.Generator().manual_seed(8)
    vectors = [torch.randn(shape, generator=source) for _ in range(3)] + [torch.zeros(shape)]
    D = torch.randn(shape, generator=source)
    covariance, response = targets(vectors)
    strength, overlap = act(D, vectors)
    live = [C.double().numpy() for C in vectors[:3]]
    sizes = [np.sum((C @ C.T) ** 2) for C in live]
    exact = D.double().numpy()
    a = np.mean([np.sum((exact @ C.T) ** 2) / s for C, s in zip(live, sizes, strict=True)])
    b = np.mean([np.sum(exact @ C.T * (C @ C.T)) / s for C, s in zip(live, sizes, strict=True)])
    assert (strength, overlap) == (pytest.approx(a, rel=1e-5), pytest.approx(b, abs=1e-5 * a))
    assert float(((D @ covariance) * D).sum()) == pytest.approx(a, rel=1e-5)
    assert float((D * response).sum()) == pytest.approx(b, abs=1e-5 * a)


def test_passes_count_as_one_work_and_can_be_cancelled(groups: TensorGroups, space) -> None:
    seen: list[tuple[int, int]] = []
    recommend_from_weights(
        groups, space, Progress(lambda done, total, _: seen.append((done, total)))
    )
    # One pass over the matrices for all rules, ranks and scales.
    assert [done for done, _ in seen] == list(range(1, len(MATRICES) + 1))
    assert {total for _, total in seen} == {len(MATRICES)}
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        recommend_from_weights(groups, space, Progress(cancel=stop))
