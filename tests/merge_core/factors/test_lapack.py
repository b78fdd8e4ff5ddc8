"""LAPACK's eigensolver, called directly, against numpy in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.factors.lapack import eigenpairs_above, leading_eigenpairs

# Backward error of LAPACK's symmetric eigensolvers: a moderate multiple of n unit roundoffs of the
# norm (LAPACK Users' Guide, section 4.7.1).
ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(0, 60),
    st.integers(0, 99),
    st.sampled_from(sorted(ROUNDOFF, key=str)),
    st.sampled_from(["any", "equal", "two values", "low rank"]),
)
def test_pairs_are_eigenpairs_of_the_largest_values(
    n: int, count: int, seed: int, dtype: torch.dtype, kind: str
) -> None:
    count, generator = min(count, n), torch.Generator().manual_seed(seed)
    B = torch.randn(n, n, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(B).Q
    values = {
        "any": torch.linspace(-1, 1, n).double(),
        "equal": torch.ones(n).double(),
        "two values": (torch.arange(n) < n // 2).double(),
        "low rank": (torch.arange(n) < 2).double(),
    }[kind]
    G = ((Q * values) @ Q.T).to(dtype)
    G = (G + G.T) / 2
    before = G.clone()
    found, rows = leading_eigenpairs(G, count)
    assert torch.equal(G, before)
    assert (found.dtype, rows.dtype, rows.shape) == (dtype, dtype, (count, n))
    slack = 100 * n * ROUNDOFF[dtype]
    exact = np.linalg.eigvalsh(G.double().numpy())[::-1]
    np.testing.assert_allclose(found.double().numpy(), exact[: count or n], atol=slack)
    X = rows.double().numpy()
    np.testing.assert_allclose(X @ X.T, np.eye(count), atol=slack)
    residual = X @ G.double().numpy() - exact[:count, None] * X
    np.testing.assert_allclose(residual, 0, atol=slack)


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.floats(0.001, 0.999),
    st.integers(0, 99),
    st.sampled_from(sorted(ROUNDOFF, key=str)),
    st.sampled_from(["falling", "equal", "low rank"]),
)
def test_pairs_above_a_share_are_all_of_those(
    n: int, share: float, seed: int, dtype: torch.dtype, kind: str
) -> None:
    B = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(B).Q
    values = {
        "falling": torch.logspace(0, -3, n).double(),
        "equal": torch.ones(n).double(),
        "low rank": (torch.arange(n) < 2).double(),
    }[kind]
    G = ((Q * values) @ Q.T).to(dtype)
    G = (G + G.T) / 2
    found, rows = eigenpairs_above(G, share)
    slack = 100 * n * ROUNDOFF[dtype]
    exact = np.linalg.eigvalsh(G.double().numpy())[::-1]
    surely, perhaps = (int((exact > share * exact[0] + e).sum()) for e in (slack, -slack))
    assert surely <= len(found) <= perhaps
    np.testing.assert_allclose(found.double().numpy(), exact[: len(found)], atol=slack)
    X = rows.double().numpy()
    np.testing.assert_allclose(X @ X.T, np.eye(len(found)), atol=slack)
    residual = X @ G.double().numpy() - exact[: len(found), None] * X
    np.testing.assert_allclose(residual, 0, atol=slack)


def test_a_matrix_of_zeros_has_no_pairs_above_any_share() -> None:
    values, rows = eigenpairs_above(torch.zeros(3, 3), 0.1)
    assert (values.shape, rows.shape) == ((0,), (0, 3))


def test_what_lapack_cannot_do_is_an_arithmetic_error() -> None:
    with pytest.raises(ArithmeticError, match="eigenvalues"):
        leading_eigenpairs(torch.full((4, 4), torch.nan), 2)


PROGRAM = """
import numpy, torch
from merge_core.factors.lapack import eigenpairs_above, leading_eigenpairs
from threadpoolctl import threadpool_info

leading_eigenpairs(torch.eye(64), 3)
print({lib["num_threads"] for lib in threadpool_info() if "scipy.libs" in lib["filepath"]})
print({lib["num_threads"] for lib in threadpool_info() if "numpy.libs" in lib["filepath"]})
"""


def test_only_scipys_blas_is_held_to_one_thread() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    ours, others = done.stdout.split("\n")[:2]
    if ours == "set()":
        pytest.skip("scipy has no library of its own here")
    assert ours == "{1}"
    assert others == "{2}"
