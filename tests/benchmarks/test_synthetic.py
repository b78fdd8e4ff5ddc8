"""The synthetic checkpoints are what the benchmarks say they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from benchmarks import synthetic
from benchmarks.members import Members
from benchmarks.synthetic import Model, write_suite
from merge_core.suites.suite import load_suite

SMALL = synthetic.vit(24, 2, 32, 10)
DECODER = synthetic.decoder(16, 40, 2, 50, 8, shard_bytes=4096)


def _state(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


@pytest.mark.parametrize(
    ("model", "name", "classes"),
    [
        (synthetic.vit_b_32(), "vit_base_patch32_clip_224", 512),
        (synthetic.vit_l_14(), "vit_large_patch14_clip_224", 768),
    ],
)
def test_names_and_shapes_are_those_of_timm(model: Model, name: str, classes: int) -> None:
    with torch.device("meta"):
        known = timm.create_model(name, num_classes=classes).state_dict()
    assert model.shapes == {key: tuple(value.shape) for key, value in known.items()}


def test_sizes_are_those_asked_for() -> None:
    assert synthetic.vit_b_32().nbytes / 2**20 == pytest.approx(335, abs=1)
    assert synthetic.decoder_1b().nbytes / 2 == pytest.approx(1.1e9, rel=0.01)


@pytest.mark.parametrize("spectrum", ["decaying", "flat"])
def test_task_vectors_have_the_spectrum(tmp_path: Path, spectrum: synthetic.Spectrum) -> None:
    suite = write_suite(tmp_path / "suite", SMALL, spectrum, 2)
    base = _state(tmp_path / f"{SMALL.name}-base-0.safetensors")
    index = torch.arange(1, 25).double()
    expected = index**-0.7 if spectrum == "decaying" else 1 - 0.5 * (index - 1) / 23
    found = []
    for task in ("task1", "task2"):
        expert = _state(suite.parent / "experts" / f"{task}.safetensors")
        for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"):
            tau = expert[name].double() - base[name].double()
            S = torch.linalg.svdvals(tau)
            torch.testing.assert_close(S / S[0], expected, rtol=1e-3, atol=0)
            size = 0.02 * 0.02 * tau.numel() ** 0.5
            assert float(tau.norm()) == pytest.approx(size, rel=1e-3)
            found.append(torch.linalg.svd(tau, full_matrices=False))
    # Leading directions of different tasks and layers are as foreign as random ones.
    first, other = found[0], found[2]
    assert float((first.U[:, 0] @ other.U[:, 0]).abs()) < 0.6
    assert float((first.Vh[0] @ other.Vh[0]).abs()) < 0.6


def test_a_complete_suite_is_kept_and_another_one_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    suite = write_suite(folder, SMALL, "flat", 2)
    expert = folder / "experts" / "task1.safetensors"
    first, made = _state(expert), expert.stat().st_mtime_ns
    write_suite(folder, SMALL, "flat", 2)
    assert expert.stat().st_mtime_ns == made
    suite.unlink()  # as a run that was stopped leaves it
    write_suite(folder, SMALL, "flat", 2)
    assert expert.stat().st_mtime_ns != made
    again = _state(expert)
    assert all(torch.equal(first[name], again[name]) for name in first)
    write_suite(folder, SMALL, "decaying", 2)
    assert not torch.equal(
        _state(expert)["blocks.0.mlp.fc1.weight"], first["blocks.0.mlp.fc1.weight"]
    )


def test_a_decoder_is_sharded_and_opens_as_a_suite(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path / "suite", DECODER, "decaying", 2))
    index = json.loads(
        (suite.file(suite.spec.base or "") / "model.safetensors.index.json").read_text()
    )
    assert len(set(index["weight_map"].values())) > 2
    assert set(suite.parameters) == set(DECODER.shapes)
    expert = suite.expert("task2")
    assert all(expert.info(name).dtype.torch == torch.bfloat16 for name in expert)
    # What MergeScope decomposes is what the benchmark's own routes decompose.
    shapes = DECODER.shapes
    assert set(suite.matrices) == {n for n in shapes if synthetic.is_matrix(n, shapes[n])}


def test_the_block_in_the_middle(tmp_path: Path) -> None:
    assert Members(tmp_path / "suite.yaml", synthetic.vit_b_32()).block() == "blocks.6."
    members = Members(tmp_path / "suite.yaml", synthetic.decoder_1b())
    assert members.block() == "model.layers.11."
    assert members.matrices[0].endswith(("k_proj.weight", "v_proj.weight"))
