"""Factors and merges come out alike on the CPU and on accelerators.

The fake accelerator's tensors refuse to meet the CPU's, so that what would fail on a real one for
a tensor left behind fails here too. Where there is a real one, it is asked as well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_core import devices
from merge_core.devices import CPU, Device, use_device
from merge_core.factors.decomposition import decompose, singular_values
from merge_core.factors.low_rank import multiply, orthogonalize
from merge_core.factors.store import TOLERANCE, FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite, load_suite
from merge_core.task_vectors import TensorGroup, TensorGroups
from tests.conftest import random_states, write_suite
from tests.fake_accelerator import Fake, fake, only

REAL = [device for device in devices.find_devices() if device.accelerates]
RANK = 40


def accelerators() -> list[Callable[[], Device]]:
    return [fake, *(lambda device=device: device for device in REAL)]


@pytest.fixture(params=accelerators(), ids=lambda make: make().name + "-" + type(make()).__name__)
def device(request: pytest.FixtureRequest) -> Device:
    made: Device = request.param()
    return made


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Three experts with a matrix of each orientation that is large enough to be sent."""
    shapes = {"tall.weight": (600, 520), "wide.weight": (520, 560), "bias": (520,)}
    experts, base = random_states(["a", "b", "c"], shapes, counter=False)
    return load_suite(write_suite(tmp_path_factory.mktemp("large"), experts, base))


def exact_vectors(suite: Suite, name: str, origin: str) -> list[Tensor]:
    members = [suite.expert(task).tensor(name).double() for task in suite.tasks]
    assert suite.base is not None
    about = suite.base.tensor(name).double()
    if origin == "average":
        about = torch.stack(members).mean(dim=0)
    return [member - about for member in members]


def truncated(A: Tensor, k: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k]


@pytest.mark.parametrize("origin", ["base", "average"])
def test_factors_made_there_are_those_of_numpy(
    suite: Suite, device: Device, origin: str, tmp_path: Path
) -> None:
    with only(device):
        groups = TensorGroups(suite, None, FactorStore(tmp_path))
        for group in filter(lambda group: group.decomposed, groups.members):
            expected = exact_vectors(suite, group.name, origin)
            found = group.truncations(origin, RANK)
            directions = group.directions(origin, 5)
            spectra = group.singular_values(origin)
            for A, part, some, S in zip(expected, found, directions, spectra, strict=True):
                whole = truncated(A, RANK)
                off = (part.truncate(RANK).double() - whole).norm() / whole.norm()
                assert off <= part.error(RANK) <= TOLERANCE
                values = torch.linalg.svdvals(A)
                torch.testing.assert_close(S.double(), values, rtol=1e-6, atol=1e-6)
                again = (some.U * some.S) @ some.V.T
                one = truncated(A, 5)
                assert (again.double() - one).norm() / one.norm() < 1e-4
                torch.testing.assert_close(some.S.double(), values[:5], rtol=1e-6, atol=1e-6)
    if isinstance(device, Fake):
        assert sum(device.sent) > 0


@pytest.mark.parametrize("method", ["cart", "low_rank_task_arithmetic", "tsv_m", "iso_c"])
def test_merges_agree_with_the_cpu(
    suite: Suite, device: Device, method: str, tmp_path: Path
) -> None:
    recipe = make_recipe({"method": method, "tasks": suite.tasks})

    def merge(place: Device) -> dict[str, Tensor]:
        with only(place) if place.accelerates else use_device(place):
            store = FactorStore(tmp_path / place.name.replace(":", ""))
            return MergeSession(suite, None, store).merge(recipe)

    here, there = merge(CPU), merge(device)
    assert suite.base is not None
    for name, value in here.items():
        update = value - suite.base.tensor(name)
        assert (there[name] - value).norm() <= 1e-4 * update.norm() + 1e-6, name


def test_what_an_accelerator_has_no_room_for_is_decomposed_here(
    suite: Suite, tmp_path: Path
) -> None:
    def full(tensor: Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with only(fake(room=full)):
        group = TensorGroup(suite, suite.tasks, "tall.weight", FactorStore(tmp_path))
        with use_device(CPU):
            expected = group.truncations("average", RANK)[0].truncate(RANK)
        group.release()
        got = group.truncations("average", RANK)[0].truncate(RANK)
    torch.testing.assert_close(got, expected)


def test_single_matrices(device: Device) -> None:
    A = torch.randn(700, 530, generator=torch.Generator().manual_seed(3))
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    with only(device):
        found = decompose(A)
        torch.testing.assert_close(found.S, S, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close((found.U * found.S) @ found.V.T, A.double())
        torch.testing.assert_close(orthogonalize(A).double(), U @ Vh, rtol=1e-4, atol=1e-4)
        right = torch.randn(530, 600, generator=torch.Generator().manual_seed(4))
        expected = A.double() @ right.double()
        torch.testing.assert_close(multiply(A, right).double(), expected, rtol=1e-4, atol=1e-3)
        values = device.exact.fetch(singular_values(device.exact.send(A)))
        torch.testing.assert_close(values, S, rtol=1e-9, atol=1e-9)
