"""What all tests share: a cache of their own, few threads, and suites made to measure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits
from torch import Tensor

from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml

State = Mapping[str, Tensor]

settings.register_profile(
    "mergescope",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mergescope")

TESTS = Path(__file__).parent
# What takes longest, first of all; browsers one at a time.
LONG = ("browser/test_dashboard", "data/", "pages/", "browser/")

# A small transformer in names and kinds of tensors: matrices of both orientations, a kernel,
# what is only averaged, and an integer buffer.
SHAPES: dict[str, tuple[int, ...]] = {
    "blocks.0.attn.qkv.weight": (18, 6),
    "blocks.0.attn.qkv.bias": (18,),
    "blocks.0.mlp.fc2.weight": (6, 10),
    "conv.weight": (5, 3, 3, 3),
    "norm.weight": (6,),
    "pos_embed": (1, 4, 6),
    "logit_scale": (),
}
COUNTER = "bn.num_batches_tracked"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker waits for another's in the end."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(TESTS).as_posix()
        return next((i for i, start in enumerate(LONG) if name.startswith(start)), len(LONG))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the user's cache out of the tests, and the tests out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGESCOPE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are fastest on one thread, and results do not depend on the machine's.

    NumPy's further threads would wait in loops that take the other workers' time.
    """
    torch.set_num_threads(1)
    with threadpool_limits(1), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of processes that tests start
        yield


def write_suite(
    folder: Path, experts: Mapping[str, State], base: State | None = None, **fields: Any
) -> Path:
    """Write checkpoints and their ``suite.yaml``; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(state: State, name: str) -> None:
        # One tensor may stand under several names; safetensors wants each to own its memory.
        save_file(
            {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()},
            folder / name,
        )

    for task, state in experts.items():
        write(state, f"{task}.safetensors")
    document: dict[str, Any] = {
        "name": "synthetic",
        "experts": {task: {"weights": f"{task}.safetensors"} for task in experts},
        **fields,
    }
    if base is not None:
        write(base, "base.safetensors")
        document["base"] = "base.safetensors"
    path = folder / "suite.yaml"
    path.write_text(dump_yaml(document), encoding="utf-8")
    return path


def random_states(
    tasks: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.3,
    counter: bool = True,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Seeded experts around a seeded base: (experts by task, base)."""
    source = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    base = {name: draw(shape) for name, shape in shapes.items()}
    experts = {
        task: {name: value + spread * draw(shapes[name]) for name, value in base.items()}
        for task in tasks
    }
    members = [base, *experts.values()]
    for place, member in enumerate(members):
        for name in member:
            member[name] = member[name].to(dtype)
        if counter:
            member[COUNTER] = torch.tensor(100 + place)
    return experts, base


@pytest.fixture(scope="session")
def synthetic_states() -> Callable[..., tuple[dict[str, State], State]]:
    """:func:`random_states`, for tests that change tensors before they are written."""
    return random_states


@pytest.fixture(scope="session")
def suite_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Suite]:
    """A factory: ``suite_of(experts, base=None, **fields of suite.yaml)`` gives a loaded suite."""
    places = (tmp_path_factory.mktemp("suites") / str(i) for i in itertools.count())

    def make(experts: Mapping[str, State], base: State | None = None, **fields: Any) -> Suite:
        return load_suite(write_suite(next(places), experts, base, **fields))

    return make


@pytest.fixture(scope="session")
def synthetic_suite(suite_of: Callable[..., Suite]) -> Callable[..., Suite]:
    """A factory of seeded random suites.

    ``synthetic_suite(tasks=3, shapes=SHAPES, seed=0, dtype=torch.float32, with_base=True,
    spread=0.3, counter=True, **fields of suite.yaml)``; `tasks` is a number or a list of names.
    """

    def make(
        tasks: int | Sequence[str] = 3,
        shapes: Mapping[str, tuple[int, ...]] = SHAPES,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        with_base: bool = True,
        spread: float = 0.3,
        counter: bool = True,
        **fields: Any,
    ) -> Suite:
        names = [f"task{i}" for i in range(tasks)] if isinstance(tasks, int) else list(tasks)
        experts, base = random_states(names, shapes, seed, dtype, spread, counter)
        return suite_of(experts, base if with_base else None, **fields)

    return make
