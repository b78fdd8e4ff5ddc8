"""pool.yaml: what is read, what is refused and in which words."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from merge_core.errors import CheckpointError, PoolError
from merge_core.suites.bundled import bundled_suites
from merge_core.suites.pool import describes_pool, load_pool
from merge_core.yaml_text import dump_yaml
from tests.pools import write_pool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pool(tmp_path / "tiny", members=4).root


def rewrite(folder: Path, **changes: object) -> Path:
    path = folder / "pool.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document.update(changes)
    path.write_text(dump_yaml(document), encoding="utf-8")
    return path


def test_a_pool_by_file_or_folder(folder: Path) -> None:
    for reference in (folder, folder / "pool.yaml", str(folder)):
        pool = load_pool(reference)
        assert pool.name == "tiny"
        assert len(pool) == 4
        assert pool.title == "noise, mlp, independent starts"
    stored = load_file(folder / "2.safetensors")
    assert torch.equal(pool.member(2).tensor("head.weight"), stored["head.weight"])
    assert pool.member(2) is pool.member(2)
    assert pool.start is None
    assert set(pool.files) == {
        folder / "inputs.npz",
        *(folder / f"{i}.safetensors" for i in range(4)),
    }


def test_members_are_chosen_in_the_pools_order(folder: Path) -> None:
    pool = load_pool(folder)
    assert pool.select(None) == (0, 1, 2, 3)
    assert pool.select([3, 1, 3]) == (1, 3)
    with pytest.raises(PoolError, match=r"has no member 4\. Its members: 0 to 3"):
        pool.select([1, 4])
    with pytest.raises(PoolError, match="has no member -1"):
        pool.select([-1])
    with pytest.raises(PoolError, match="at least one"):
        pool.select([])


def test_snapshots_and_start(folder: Path) -> None:
    members = [
        {
            "weights": "0.safetensors",
            "trajectory": [
                {"epoch": 0, "weights": "1.safetensors"},
                {"epoch": 2.5, "weights": "2.safetensors"},
            ],
        }
    ]
    rewrite(folder, members=members, start="3.safetensors", regime="shared", title="Mine")
    pool = load_pool(folder)
    assert pool.title == "Mine"
    assert pool.spec.members[0].trajectory[1].epoch == 2.5
    stored = [load_file(folder / f"{i}.safetensors") for i in range(4)]
    assert torch.equal(pool.snapshot(0, 1).tensor("head.weight"), stored[2]["head.weight"])
    assert pool.start is not None
    assert torch.equal(pool.start.tensor("head.weight"), stored[3]["head.weight"])
    assert len(pool.files) == 5


def test_the_data_digest_follows_content_and_constants(folder: Path) -> None:
    first = load_pool(folder).data_digest
    assert load_pool(folder).data_digest == first
    rewrite(folder, data={"file": "inputs.npz", "mean": [0.4], "std": [0.25]})
    second = load_pool(folder).data_digest
    path = folder / "inputs.npz"
    path.write_bytes(path.read_bytes() + b"\0")
    assert len({first, second, load_pool(folder).data_digest}) == 3
    path.unlink()
    with pytest.raises(PoolError, match=r"inputs\.npz .* does not exist"):
        _ = load_pool(folder).data_digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": []}, "members"),
        ({"regime": "alone"}, "regime"),
        ({"surprise": 1}, "surprise: this field is not known"),
        ({"name": "a b"}, "name"),
        ({"data": {"file": "inputs.npz", "mean": [0.5], "std": [0]}}, r"data\.std"),
        ({"members": [{"weights": "a", "trajectory": [{"epoch": -1, "weights": "b"}]}]}, "epoch"),
    ],
)
def test_wrong_fields_are_named(folder: Path, changes: dict[str, object], message: str) -> None:
    path = rewrite(folder, **changes)
    with pytest.raises(PoolError, match=message) as caught:
        load_pool(folder)
    assert str(path) in str(caught.value)


def test_unreadable_files_are_explained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=r"cannot be read .*Give a pool\.yaml, its folder, or"):
        load_pool(tmp_path / "nothing")
    path = folder / "pool.yaml"
    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(PoolError, match="not valid YAML"):
        load_pool(folder)
    path.write_text("- a\n- b\n", encoding="utf-8")
    with pytest.raises(PoolError, match="is not a pool"):
        load_pool(folder)


def test_a_missing_member_says_whose_it_is(folder: Path) -> None:
    (folder / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"Pool 'tiny', member 1: .*does not exist"):
        load_pool(folder).member(1)


def test_a_pool_is_told_from_a_suite(folder: Path, tmp_path: Path) -> None:
    assert describes_pool(folder)
    assert describes_pool(folder / "pool.yaml")
    renamed = shutil.copy(folder / "pool.yaml", tmp_path / "mine.yaml")
    assert describes_pool(renamed)
    assert not describes_pool(bundled_suites()["vision"])
    assert not describes_pool(bundled_suites()["vision"].parent)
    assert not describes_pool("vision")
    assert not describes_pool(tmp_path / "nothing")
