"""Tridiagonal reductions against numpy in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_core.factors.tridiagonal import reduced


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """A float32 matrix with these eigenvalues."""
    n, generator = len(values), torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    G = ((Q * values) @ Q.T).float()
    return (G + G.T) / 2


SPECTRA = {
    "spread": torch.linspace(1, 0, 70, dtype=torch.float64),
    "decaying": torch.arange(1, 71, dtype=torch.float64) ** -1.4,
    "equal": torch.ones(70, dtype=torch.float64),
    "two values": torch.cat([torch.ones(30), torch.zeros(40)]).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_and_eigenvectors(name: str) -> None:
    G = symmetric(SPECTRA[name])
    found = reduced(G)
    values, size = np.linalg.eigvalsh(G.double().numpy()), max(1.0, float(SPECTRA[name][0]))
    np.testing.assert_allclose(found.eigenvalues.numpy(), values, atol=1e-6 * size)
    for first, stop in ((0, 1), (0, 20), (20, 70), (69, 70), (0, 70)):
        rows = found.eigenvectors(first, stop)
        X = rows.double().numpy()
        np.testing.assert_allclose(X @ X.T, np.eye(stop - first), atol=2e-6)
        chosen = values[::-1][first:stop, None]
        np.testing.assert_allclose(X @ G.double().numpy(), chosen * X, atol=2e-6 * size)


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 99))
def test_a_reduction_is_the_matrix(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(n, n, generator=generator)
    G = B + B.T
    found = reduced(G)
    X = torch.randn(3, n, generator=generator)
    np.testing.assert_allclose(found.times(X).numpy(), (X @ G).numpy(), atol=1e-4 * n)
    assert found.diagonal.sum().item() == pytest.approx(float(G.trace()), abs=1e-4 * n)
    assert len(found.reflectors) == n * (n + 1) // 2


PROGRAM = """
import numpy, torch
from merge_core.factors.tridiagonal import reduced
from threadpoolctl import threadpool_info

reduced(torch.eye(64))
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
