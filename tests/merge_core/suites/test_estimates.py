"""What a merge is said to take: bytes by hand, costs that grow with the work, times in words."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from merge_core.executors import local
from merge_core.factors.store import FactorStore
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.suites import estimates
from merge_core.suites.estimates import (
    IMPORTS_BYTES,
    Job,
    Part,
    Rates,
    seconds,
    time_in_words,
    usual_workers,
)
from merge_core.suites.preflight import preflight
from merge_core.suites.suite import Suite
from tests.merge_core.adapted_models import two_adapters

Make = Callable[..., Suite]
SPEED = Rates(eigen=1.0, product=1e9, digest=1e12, copy=1e9)
PLAIN = Part(1000, 4)
MATRIX = Part(1000, 4, (10, 100))


def averaged_part(entries: int) -> Part:
    return Part(entries, 4)


def square(side: int) -> Part:
    return Part(side * side, 4, (side, side))


class TestMemory:
    def test_nothing_to_merge_takes_nothing(self) -> None:
        empty = Job()
        assert empty.entrywise_bytes == empty.spectral_bytes == empty.factor_bytes == 0

    def test_one_parameter(self) -> None:
        job = Job((PLAIN,), tasks=3)
        sample, result, temporaries = 4 * 4 * 3 * 1000, 4000, 8000
        assert job.entrywise_bytes == IMPORTS_BYTES + sample + result + temporaries
        assert job.spectral_bytes == IMPORTS_BYTES + result

    def test_copies_of_what_is_read(self) -> None:
        plain, copied = (Job((replace(PLAIN, copied=each),), tasks=3) for each in (False, True))
        assert copied.entrywise_bytes - plain.entrywise_bytes == 4 * 4000  # with the base
        assert copied.spectral_bytes - plain.spectral_bytes == 3 * 4000

    def test_results_that_wait(self) -> None:
        sizes = [1000, 10, 2000, 10, 10, 10, 3000, 10]
        job = Job(tuple(map(averaged_part, sizes)), tasks=1, workers=2)
        # The largest five in a row, of which two are being worked on.
        assert job.spectral_bytes == IMPORTS_BYTES + 4 * (2000 + 10 + 10 + 10 + 3000)
        alone = replace(job, workers=1)
        assert alone.spectral_bytes == IMPORTS_BYTES + 4 * (3000 + 10)

    def test_a_matrix(self) -> None:
        tall, side, long = 4000, 4 * 10 * 10, 4 * (10 + 100) * 1
        held = tall + 3 * (side + long)
        making = 2 * tall + 7 * side
        expected = IMPORTS_BYTES + 4000 + 2.5 * (held + making)
        assert Job((MATRIX,), tasks=3).spectral_bytes == expected

    def test_large_blocks_are_given_back(self) -> None:
        # 256 MB each: far more than what the allocator keeps.
        job = Job((Part(1 << 26, 4, (1, 1 << 26)),), tasks=1)
        large = 4 << 26
        assert job.spectral_bytes == pytest.approx(IMPORTS_BYTES + 5 * large, rel=0.01)


class TestDisk:
    def test_factors_by_hand(self) -> None:
        small, large = Part(1000, 4, (100, 10)), Part(600 * 800, 4, (600, 800))
        # Vectors, values and bounds: of 600 directions an eighth.
        each = 4 * (10 * 10 + 2 * 10) + 4 * (75 * 600 + 2 * 75)
        assert Job((small, PLAIN, large), tasks=3).factor_bytes == 3 * each

    def test_no_more_than_the_store_may_hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        job = Job((square(8192),), tasks=20)
        assert job.factor_bytes > 1 << 29
        monkeypatch.setenv("MERGESCOPE_FACTORS_GB", "0.25")
        assert job.factor_bytes == 1 << 28
        monkeypatch.setenv("MERGESCOPE_FACTORS_GB", "-1")
        assert job.factor_bytes == 0
        monkeypatch.setenv("MERGESCOPE_FACTORS_GB", "much")
        assert job.factor_bytes > 1 << 29

    def test_what_cart_stores(self, synthetic_suite: Make, tmp_path: Path) -> None:
        shapes = {"l0.attn.qkv.weight": (512, 520), "l1.attn.qkv.weight": (30, 20), "b": (512,)}
        made = synthetic_suite(tasks=3, shapes=shapes)
        store = FactorStore(tmp_path / "factors")
        merge_to_folder(make_recipe({"method": "cart"}), made, tmp_path / "out", store)
        stored = [load_file(path) for path in (tmp_path / "factors").rglob("*.safetensors")]
        found = sum(value.nbytes for file in stored for value in file.values())
        assert len(stored) == 6
        assert preflight(made).factor_bytes == pytest.approx(found, rel=0.01)


class TestTime:
    def test_averaging_by_hand(self) -> None:
        job = Job((averaged_part(1_000_000_000),), 2, read_bytes=3 * 10**9, written_bytes=4 * 10**9)
        files, reading, writing = 2.002, 2 * 1.3 * 4, 2 * 4
        assert seconds(job, SPEED).entrywise == pytest.approx(files + reading + writing)
        # One thread writes, however many merge.
        assert seconds(replace(job, workers=4), SPEED).entrywise == pytest.approx(files + writing)
        # Each of two digests runs at half of the disk's speed: together at it.
        slow = replace(SPEED, digest=0.75e9)
        assert seconds(replace(job, workers=2), slow).entrywise == pytest.approx(
            files + (reading + writing) / 2
        )

    def test_decomposing_by_hand(self) -> None:
        job = Job((square(2048),), tasks=2)
        eigen = 0.85 * (0.64 * 4**3 + 0.36 * 4**2)
        gram, passes, products = 2048**3 / 0.6e9, 8 * 4 * 2048**2 / 1e9, 4 * 2048**2 * 163 / 1e9
        each = 0.002 + eigen + gram + passes + products
        taken = seconds(job, SPEED)
        assert taken.spectral - taken.entrywise == pytest.approx(2 * each)

    def test_small_matrices_are_decomposed_in_float64(self) -> None:
        taken = [seconds(Job((square(side),), tasks=1), SPEED).spectral for side in (511, 2048)]
        whole = seconds(Job((replace(square(2048), computed=8),), tasks=1), SPEED).spectral
        assert taken[0] > 2 * (0.64 * (511 / 512) ** 3 + 0.36 * (511 / 512) ** 2)
        assert whole > 2 * taken[1]

    def test_adapters_are_quick(self) -> None:
        whole, thin = (Job((replace(square(2048), thin=q),), tasks=4) for q in (None, 32))
        assert seconds(thin, SPEED).spectral < seconds(whole, SPEED).spectral / 10
        assert thin.factor_bytes == 0 < whole.factor_bytes

    def test_the_machine_is_measured_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        estimates.rates.cache_clear()
        first = estimates.rates()
        assert min(first.product, first.digest, first.copy) > 1e6
        assert 0 < first.eigen < 10
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(torch.linalg, "eigh", None)
        assert estimates.rates() is first
        assert seconds(Job((square(600),), tasks=2)) == seconds(Job((square(600),), 2), first)

    @pytest.mark.parametrize(
        ("taken", "words"),
        [
            (0, "under 1 s"),
            (0.99, "under 1 s"),
            (1, "about 1 s"),
            (9.6, "about 10 s"),
            (17.2, "about 20 s"),
            (89, "about 90 s"),
            (91, "about 2 min"),
            (207, "about 3 min"),
            (55 * 60, "about 60 min"),
            (3 * 3600, "about 3 h"),
            (1e6, "about 300 h"),
        ],
    )
    def test_in_words(self, taken: float, words: str) -> None:
        assert time_in_words(taken) == words


parts = st.builds(
    lambda m, n, matrix, copied, computed: Part(
        m * n, computed, (m, n) if matrix else None, copied
    ),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.booleans(),
    st.booleans(),
    st.sampled_from([4, 8]),
)
jobs = st.builds(
    Job,
    st.lists(parts, min_size=1, max_size=7).map(tuple),
    st.integers(1, 9),
    st.integers(0, 10**11),
    st.integers(0, 10**10),
    st.integers(1, 5),
)


def costs(job: Job) -> list[float]:
    taken = seconds(job, SPEED)
    held = [job.entrywise_bytes, job.spectral_bytes]
    return [*held, taken.entrywise, taken.spectral]


def never_less(job: Job, larger: Job) -> bool:
    # Sums of the same times in another order differ in their last bits.
    return all(b >= a * (1 - 1e-12) for a, b in zip(costs(job), costs(larger), strict=True))


@given(jobs, st.integers(0, 6), st.integers(0, 2000), st.integers(0, 2000))
def test_more_work_never_costs_less(job: Job, place: int, rows: int, columns: int) -> None:
    further = replace(job, tasks=job.tasks + 1)
    assert never_less(job, further)
    assert further.factor_bytes >= job.factor_bytes
    assert never_less(job, replace(job, written_bytes=2 * job.written_bytes))
    grown = list(job.parts)
    part = grown[place % len(grown)]
    m, n = part.sides or (1, part.entries)
    sides = (m + rows, n + columns)
    grown[place % len(grown)] = replace(
        part, entries=sides[0] * sides[1], sides=sides if part.sides else None
    )
    assert never_less(job, replace(job, parts=tuple(grown)))


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_larger_matrices_store_more(r: int, other: int) -> None:
    small, large = sorted((r, other))
    if (small < 512) == (large < 512):  # of large ones the reduction is stored
        found = [Job((square(side),), tasks=1).factor_bytes for side in (small, large)]
        assert found[0] <= found[1]


@given(jobs)
def test_more_threads_take_more_memory_and_no_more_time(job: Job) -> None:
    more = replace(job, workers=job.workers + 1)
    assert more.entrywise_bytes >= job.entrywise_bytes
    assert more.spectral_bytes >= job.spectral_bytes
    assert seconds(more, SPEED).spectral <= seconds(job, SPEED).spectral * (1 + 1e-12)


def test_as_many_threads_are_supposed_as_the_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usual_workers() == local.Threads().workers == 1
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert usual_workers() == 3
    for other in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", other)
        assert usual_workers() >= 1


class TestOfASuite:
    def test_what_is_read_and_written(self, synthetic_suite: Make) -> None:
        shapes = {"l0.attn.qkv.weight": (6, 10), "b": (6,), "conv.weight": (4, 3, 2, 2)}
        job = preflight(synthetic_suite(tasks=3, shapes=shapes, counter=False)).job
        assert job.parts == (Part(6, 4), Part(48, 4, (4, 12)), Part(60, 4, (6, 10)))
        assert (job.tasks, job.read_bytes, job.written_bytes) == (3, 4 * 4 * 114, 4 * 114)

    @pytest.mark.parametrize(
        ("dtype", "computed", "copied"),
        [
            (torch.float32, 4, False),
            (torch.bfloat16, 4, True),
            (torch.float64, 8, False),
        ],
    )
    def test_dtypes(
        self, dtype: torch.dtype, computed: int, copied: bool, synthetic_suite: Make
    ) -> None:
        made = synthetic_suite(shapes={"b": (9,)}, dtype=dtype)
        weights, counter = preflight(made).job.parts
        assert counter == Part(1, 8)
        assert weights == Part(9, computed, None, copied)

    def test_vocabularies_of_several_lengths(self, suite_of: Make) -> None:
        states = {t: {"wte.weight": torch.ones(n, 4)} for t, n in (("a", 5), ("b", 7))}
        (part,) = preflight(suite_of(states, vocabulary="common")).job.parts
        assert part == Part(28, 4, None, copied=True)

    def test_adapters(self, tmp_path: Path) -> None:
        job = preflight(two_adapters(tmp_path)).job
        assert all(part.copied for part in job.parts)
        matrices = [part for part in job.parts if part.sides]
        assert {part.thin for part in matrices if min(part.sides or ()) > 4} <= {0, 4}
        assert any(part.thin == 4 for part in matrices)
        base = two_adapters(tmp_path).base
        assert base is not None
        assert job.read_bytes == base.nbytes
