"""Norms, variances and histograms against numpy, and the identity against its proof."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.averaging.soups import mean_norms, restore_norms, uniform_soup
from analysis.magnitude.norms import TOTAL, histogram_frame, identity_frame, norms_frame
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.errors import MergeScopeError, PoolError
from tests.pools import SIZE, write_pool

WIDE = {"name": "mlp", "args": {"img_size": SIZE, "widths": [96], "bias": False}}


@pytest.fixture(scope="module")
def pools(tmp_path_factory) -> dict[str, PoolEvaluator]:
    folder = tmp_path_factory.mktemp("pools")
    return {
        kind: PoolEvaluator(write_pool(folder / kind, kind, members=4))
        for kind in ("vgg", "resnet")
    }


def arrays(evaluator: PoolEvaluator, members, name: str) -> list[np.ndarray]:
    return [evaluator.weights(i)[name].numpy().astype(np.float64) for i in members]


@pytest.mark.parametrize("members", [(0,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("kind", ["vgg", "resnet"])
def test_what_the_norm_loses_is_the_spread(pools, kind: str, members) -> None:
    evaluator = pools[kind]
    frame = identity_frame(evaluator, members).set_index("parameter")
    parameters = [name for name, _ in evaluator.network.module.named_parameters()]
    assert frame.index.tolist() == [*parameters, TOTAL]
    assert frame["deviation"].max() < 1e-13
    for name in parameters[:4]:
        values = arrays(evaluator, members, name)
        mean = sum(values) / len(values)
        row = frame.loc[name]
        square = sum(float(np.sum(v**2)) for v in values) / len(values)
        assert row["mean_square"] == pytest.approx(square)
        assert row["soup_square"] == pytest.approx(np.sum(mean**2))
        assert row["lost"] == pytest.approx(square - np.sum(mean**2), abs=1e-12 * square)
        spread = sum(float(np.sum((v - mean) ** 2)) for v in values) / len(values)
        assert row["spread"] == pytest.approx(spread, abs=1e-12 * square)
    for column in ("mean_square", "soup_square", "lost", "spread"):
        assert frame.loc[TOTAL, column] == pytest.approx(frame.loc[parameters, column].sum())


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(1e-4, 10))
def test_the_identity_holds_for_any_members(tmp_path_factory, seed, members, spread) -> None:
    folder = tmp_path_factory.mktemp("any") / "pool"
    pool = write_pool(folder, "mlp", members, seed=seed, spread=spread)
    frame = identity_frame(PoolEvaluator(pool), tuple(range(members)))
    assert frame["deviation"].max() < 1e-13
    assert frame["spread"].to_numpy() == pytest.approx(
        frame["lost"].to_numpy(), rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize("members", [(0,), (0, 2, 3)])
def test_norms_are_numpys(pools, members) -> None:
    evaluator = pools["resnet"]
    frame = norms_frame(evaluator, members)
    assert "bn1.running_mean" not in set(frame["parameter"])
    for row in frame.itertuples():
        values = arrays(evaluator, members, row.parameter)
        mean = sum(values) / len(values)
        norms = [np.sqrt(np.sum(v**2)) for v in values]
        assert row.entries == mean.size
        assert row.weight == (mean.ndim >= 2)
        assert row.norm_mean == pytest.approx(np.mean(norms))
        assert (row.norm_min, row.norm_max) == pytest.approx((min(norms), max(norms)))
        assert row.norm_soup == pytest.approx(np.sqrt(np.sum(mean**2)))
        variances = [np.var(v) for v in values]
        assert row.variance_mean == pytest.approx(np.mean(variances))
        assert (row.variance_min, row.variance_max) == pytest.approx(
            (min(variances), max(variances))
        )
        assert row.variance_soup == pytest.approx(np.var(mean))
        root = np.sqrt(np.mean(np.square(norms)))
        assert row.ratio == pytest.approx(np.sqrt(np.sum(mean**2)) / root)
        assert row.independent == pytest.approx(len(members) ** -0.5)


def test_independent_members_follow_the_line(tmp_path: Path) -> None:
    evaluator = PoolEvaluator(write_pool(tmp_path / "p", WIDE, members=9))
    row = norms_frame(evaluator, tuple(range(9))).iloc[0]
    # 13 824 independent entries of mean zero.
    assert row["independent"] == pytest.approx(1 / 3)
    assert row["ratio"] == pytest.approx(1 / 3, rel=0.02)


def test_a_tensor_of_zeros_has_no_ratio(tmp_path: Path) -> None:
    def zeroed(number: int, state):
        return {n: torch.zeros_like(v) if n == "head.bias" else v for n, v in state.items()}

    evaluator = PoolEvaluator(write_pool(tmp_path / "p", "vgg", change=zeroed))
    frame = norms_frame(evaluator, (0, 1)).set_index("parameter")
    assert np.isnan(frame.loc["head.bias", "ratio"])
    identity = identity_frame(evaluator, (0, 1)).set_index("parameter")
    assert identity.loc["head.bias", "deviation"] == 0
    flat = histogram_frame(evaluator, (0, 1), "head.bias", bins=3)
    assert np.isfinite(flat["density"]).all()


def test_histograms_share_edges_and_integrate_to_one(pools) -> None:
    evaluator = pools["vgg"]
    members, name = (0, 1, 3), "stages.1.0.weight"
    frame = histogram_frame(evaluator, members, name, bins=20)
    soup = uniform_soup(evaluator, members)
    restored = restore_norms(soup, mean_norms(evaluator, members))
    values = arrays(evaluator, members, name)
    subjects = {
        "individuals": values,
        "uniform_soup": [soup[name].numpy()],
        "norm_restored": [restored[name].numpy()],
    }
    assert list(frame) == ["subject", "left", "right", "density"]
    edges = frame["left"].to_numpy()[:20]
    assert list(dict.fromkeys(frame["subject"])) == list(subjects)
    for subject, tensors in subjects.items():
        part = frame[frame["subject"] == subject]
        assert part["left"].to_numpy() == pytest.approx(edges)
        width = part["right"] - part["left"]
        assert (part["density"] * width).sum() == pytest.approx(1)
        # The mean over members of each member's own density, within an entry at an edge.
        whole = np.append(edges, part["right"].iloc[-1])
        # float32 soups may put an extreme entry an ulp outside.
        clipped = [np.clip(t.ravel(), whole[0], whole[-1]) for t in tensors]
        own = [np.histogram(t, whole, density=True)[0] for t in clipped]
        gap = np.abs(part["density"].to_numpy() - np.mean(own, axis=0)) * width.to_numpy()
        assert gap.max() < 2.5 / values[0].size


def test_wrong_names_and_members(pools, tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="no parameter 'nothing'"):
        histogram_frame(pools["vgg"], (0,), "nothing")
    with pytest.raises(PoolError, match="no member 9"):
        norms_frame(pools["vgg"], (9,))

    def other(number: int, state):
        return {n: v[:-1] if number and n == "head.bias" else v for n, v in state.items()}

    with pytest.raises(PoolError, match="another shape"):
        norms_frame(PoolEvaluator(write_pool(tmp_path / "a", "vgg", change=other)), (0, 1))

    def lacking(number: int, state):
        return {n: v for n, v in state.items() if n != "head.bias"}

    with pytest.raises(MergeScopeError, match=r"head\.bias"):
        norms_frame(PoolEvaluator(write_pool(tmp_path / "b", "vgg", change=lacking)), (0, 1))
