"""Which file opens a model: as transformers chooses, and at links as they are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.stored.entry import usual_file
from merge_core.checkpoints.tied import declares_tied
from merge_core.errors import CheckpointError
from merge_core.opening.search import find_models
from merge_core.suites.suite import load_suite

State = dict[str, Tensor]


def gpt(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=4, n_embd=8, n_layer=2, n_head=2))


def theirs(folder: Path) -> Tensor:
    return GPT2LMHeadModel.from_pretrained(folder).state_dict()["transformer.wte.weight"]


def ours(path: Path) -> Tensor:
    return Checkpoint(path).tensor("transformer.wte.weight")


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    return str(caught.value)


def save_sharded(model: GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="2KB")
    assert (folder / "model.safetensors.index.json").is_file()


def save_pickled(model: GPT2LMHeadModel, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def whole_after_shards(folder: Path) -> None:
    save_sharded(gpt(0), folder)
    gpt(1).save_pretrained(folder)


def whole_beside_shards(folder: Path) -> None:
    save_sharded(gpt(0), folder)
    old = {path.name: path.read_bytes() for path in folder.glob("model-*")}
    gpt(1).save_pretrained(folder)
    for name, content in old.items():
        (folder / name).write_bytes(content)


def shards_beside_pickle(folder: Path) -> None:
    save_pickled(gpt(0), folder)
    save_sharded(gpt(1), folder)


def whole_beside_pickle(folder: Path) -> None:
    save_pickled(gpt(0), folder)
    gpt(1).save_pretrained(folder)


def pickle_beside_index_of_pickles(folder: Path) -> None:
    save_pickled(gpt(0), folder)
    index = {"weight_map": {"transformer.wte.weight": "pytorch_model-00001-of-00002.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def pickle_beside_other_libraries(folder: Path) -> None:
    save_pickled(gpt(0), folder)
    for name in ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx"):
        (folder / name).write_bytes(b"x")
    for name in ("tf_model.h5.index.json", "flax_model.msgpack.index.json"):
        (folder / name).write_text("{}")


def whole_beside_variants(folder: Path) -> None:
    gpt(0).half().save_pretrained(folder, variant="fp16")
    gpt(1).save_pretrained(folder)
    torch.save(gpt(2).state_dict(), folder / "pytorch_model.fp16.bin")


def shards_beside_consolidated(folder: Path) -> None:
    save_sharded(gpt(0), folder)
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors")


def index_that_lists_too_little(folder: Path) -> None:
    save_sharded(gpt(0), folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = min(index["weight_map"].values())
    names = [name for name, file in index["weight_map"].items() if file == first]
    assert "transformer.wte.weight" in names or len(names) > 1
    for name in names[1:]:
        del index["weight_map"][name]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "lay_out",
    [
        whole_after_shards,
        whole_beside_shards,
        shards_beside_pickle,
        whole_beside_pickle,
        pickle_beside_index_of_pickles,
        pickle_beside_other_libraries,
        whole_beside_variants,
        shards_beside_consolidated,
        index_that_lists_too_little,
    ],
)
def test_the_choice_among_files_is_transformers(
    tmp_path: Path, lay_out: Callable[[Path], None]
) -> None:
    folder = tmp_path / "m"
    lay_out(folder)
    assert torch.equal(ours(folder), theirs(folder))
    expected = GPT2LMHeadModel.from_pretrained(folder).state_dict()
    checkpoint = Checkpoint(folder)
    assert set(expected) - set(checkpoint) <= {"lm_head.weight"}  # tied
    assert all(torch.equal(checkpoint.tensor(n), expected[n]) for n in checkpoint)
    (found,) = find_models([str(tmp_path)])  # one model, however many files
    assert (found.shown, found.role) == ("m", "expert")


def test_tensors_that_an_index_does_not_list_are_said(tmp_path: Path) -> None:
    index_that_lists_too_little(tmp_path / "m")
    assert "does not list" in " ".join(Checkpoint(tmp_path / "m").notes)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.safetensors", "a.bin"], "a.safetensors"),
        (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"],
         "open_clip_model.safetensors"),
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
         "diffusion_pytorch_model.safetensors"),
        (["diffusion_pytorch_model.safetensors.index.json",
          "diffusion_pytorch_model-00001-of-00002.safetensors",
          "diffusion_pytorch_model-00002-of-00002.safetensors"],
         "diffusion_pytorch_model.safetensors.index.json"),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"],
         "model.safetensors.index.fp16.json"),
        # As for model.safetensors beside its old index.
        (["x.safetensors", "x.safetensors.index.json", "x-00001-of-00002.safetensors"],
         "x.safetensors"),
        (["model-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors"),
        (["model-00001-of-00002.safetensors"], None),
        (["consolidated.safetensors", "model-00001-of-00002.safetensors"], None),
        (["a.pt", "training_args.bin", "optimizer.pt", "scheduler.pt"], "a.pt"),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
         "mp_rank_00_model_states.pt"),
        (["a.pt", "b.pt"], None),
        (["tf_model.h5"], None),
        ([], None),
    ],
)  # fmt: skip
def test_the_usual_file_of_a_folder(names: list[str], expected: str | None) -> None:
    assert usual_file(names) == expected
    assert usual_file(names[::-1]) == expected


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_without_their_index_are_refused(tmp_path: Path, suffix: str) -> None:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    for number in (1, 2):
        path = tmp_path / "m" / f"{stem}-{number:05}-of-00002{suffix}"
        path.parent.mkdir(exist_ok=True)
        state = {f"w{number}": torch.ones(2)}
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        assert f"shard {number} of 2" in refusal(path)
    assert f"{stem}{suffix}.index.json" in refusal(tmp_path / "m")
    (found,) = find_models([str(tmp_path)])
    assert found.role == "left out"
    assert "without their index" in found.note
    (tmp_path / "m" / f"{stem}-00002-of-00002{suffix}").unlink()  # one of them alone
    assert "without their index" in refusal(tmp_path / "m")


def test_one_shard_of_one_is_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00001.safetensors"
    save_file({"w": torch.ones(2)}, path)
    assert list(Checkpoint(path)) == list(Checkpoint(tmp_path)) == ["w"]
    assert [each.shown for each in find_models([str(tmp_path)])] == [path.name]


def test_pieces_of_matrices_are_refused(tmp_path: Path) -> None:
    for number in (0, 1):
        torch.save({"w": torch.ones(2)}, tmp_path / f"consolidated.{number:02}.pth")
    assert "piece of each matrix" in refusal(tmp_path / "consolidated.00.pth")
    (tmp_path / "consolidated.01.pth").unlink()
    assert list(Checkpoint(tmp_path / "consolidated.00.pth")) == ["w"]  # of a model in one piece


def test_folders_without_weights_say_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    assert "tf_model.h5" in refusal(tmp_path)
    (tmp_path / "tf_model.h5").rename(tmp_path / "model.safetensors.dvc")
    assert "dvc pull" in refusal(tmp_path)
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    assert "dcp_to_torch_save" in refusal(tmp_path)


# ------------------------------------------------------------------------------------- links

TIED = {"model_type": "gpt2", "tie_word_embeddings": True}
NAMES = ("model.safetensors", "config.json")


def write_model(folder: Path, value: float = 1.0) -> None:
    folder.mkdir(parents=True)
    save_file({"wte.weight": torch.full((3, 2), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TIED))


def hub_cache(root: Path) -> Path:
    """As huggingface_hub keeps a repository."""
    repo = root / "models--org--net"
    write_model(repo / "snapshots" / ("4d" * 20))
    (repo / "blobs").mkdir()
    for number, name in enumerate(NAMES):
        path = repo / "snapshots" / ("4d" * 20) / name
        path.rename(repo / "blobs" / f"{number:064x}")
        path.symlink_to(Path("..") / ".." / "blobs" / f"{number:064x}")
    return repo / "snapshots" / ("4d" * 20)


def annex(root: Path) -> Path:
    """As git-annex keeps files: under keys that may end as the names do."""
    write_model(root / "m")
    for name in NAMES:
        key = f"SHA256E-s1--4d{Path(name).suffix}"
        store = root / ".git" / "annex" / "objects" / "x1" / "2y" / key
        store.mkdir(parents=True)
        (root / "m" / name).rename(store / key)
        (root / "m" / name).symlink_to(Path("..") / (store / key).relative_to(root))
    return root / "m"


def dvc(root: Path) -> Path:
    write_model(root / "m")
    store = root / ".dvc" / "cache" / "files" / "md5" / "4d"
    store.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (root / "m" / name).rename(store / f"{number:030x}")
        (root / "m" / name).symlink_to(store / f"{number:030x}")
    return root / "m"


def linked_folder(root: Path) -> Path:
    write_model(root / "elsewhere" / "4d4d4d")
    (root / "m").symlink_to(root / "elsewhere" / "4d4d4d")
    return root / "m"


STORES = [hub_cache, annex, dvc, linked_folder]


@pytest.mark.parametrize("store", STORES)
def test_a_linked_file_has_the_name_and_the_neighbours_of_the_link(
    tmp_path: Path, store: Callable[[Path], Path]
) -> None:
    folder = store(tmp_path)
    for place in (folder, folder / "model.safetensors"):
        checkpoint = Checkpoint(place)
        assert list(checkpoint) == ["wte.weight"]
        assert declares_tied(checkpoint)  # by config.json beside
        suite = tmp_path / "suite.yaml"
        suite.write_text(json.dumps({"name": "s", "experts": {"a": {"weights": str(place)}}}))
        expert = load_suite(suite).expert("a")
        assert torch.equal(expert.tensor("wte.weight"), torch.ones(3, 2))
        assert declares_tied(expert)
        (found,) = find_models([str(place)])
        assert found.role == "expert"
        assert not found.note


@pytest.mark.parametrize("store", STORES)
def test_an_index_that_is_a_link_has_its_shards_beside_it(
    tmp_path: Path, store: Callable[[Path], Path]
) -> None:
    folder = store(tmp_path)
    shard = folder / "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").rename(shard)
    index = folder / "model.safetensors.index.json"
    (tmp_path / "content").write_text(json.dumps({"weight_map": {"wte.weight": shard.name}}))
    index.symlink_to(tmp_path / "content")
    for place in (folder, index):
        assert list(Checkpoint(place)) == ["wte.weight"]


def test_the_content_of_a_cache_is_found_by_its_links(tmp_path: Path) -> None:
    blob = (hub_cache(tmp_path) / "model.safetensors").resolve()
    assert "snapshots" in refusal(blob)


def test_links_collected_in_one_folder_keep_the_neighbours_of_their_models(tmp_path: Path) -> None:
    experts = tmp_path / "experts"
    experts.mkdir()
    for task in ("cars", "dtd"):
        write_model(tmp_path / "models" / task)
        (experts / f"{task}.safetensors").symlink_to(tmp_path / "models" / task / NAMES[0])
        (experts / task).symlink_to(experts / f"{task}.safetensors")  # without an ending
        for link in (experts / f"{task}.safetensors", experts / task):
            assert declares_tied(Checkpoint(link))
    found = find_models([str(experts)])
    assert [(each.task, each.role) for each in found] == [("cars", "expert"), ("dtd", "expert")]
    # An index far from its shards.
    shards = tmp_path / "sharded"
    save_sharded(gpt(0), shards)
    (experts / "gpt.index.json").symlink_to(shards / "model.safetensors.index.json")
    assert torch.equal(ours(experts / "gpt.index.json"), theirs(shards))


def test_a_link_whose_file_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").symlink_to(tmp_path / "blobs" / "4d")
    assert "git annex get" in refusal(tmp_path / "m.safetensors")
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    assert "loop.safetensors" in refusal(loop)


def test_a_merged_folder_gets_the_files_beside_the_links(tmp_path: Path) -> None:
    from merge_core.factors.store import FactorStore
    from merge_core.merging.recipe import make_recipe
    from merge_core.output.model_folder import merge_to_folder

    base = hub_cache(tmp_path / "hub")
    write_model(tmp_path / "a", 3.0)
    suite = tmp_path / "suite.yaml"
    spec = {"name": "s", "base": str(base / NAMES[0]), "experts": {"a": {"weights": "a"}}}
    suite.write_text(json.dumps(spec))
    loaded = load_suite(suite)
    recipe = make_recipe({"suite": str(suite), "method": "average"})
    merge_to_folder(recipe, loaded, tmp_path / "out", FactorStore())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["wte.weight"], torch.full((3, 2), 3.0))
    shutil.rmtree(tmp_path / "out")
