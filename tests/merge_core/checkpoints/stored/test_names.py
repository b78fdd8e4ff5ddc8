"""Names without wrappers: real wrappers' state dicts read as those of the model within."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.stored.names import public_names
from merge_core.errors import CheckpointError

State = dict[str, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return nn.Sequential(nn.Linear(3, 3), block, nn.Linear(2, 2))


def compiled_inside() -> nn.Module:
    model = net()
    model[1] = torch.compile(model[1])  # type: ignore[operator,index]
    return model


def checkpointed_inside() -> nn.Module:
    model = net()
    model[1] = checkpoint_wrapper(model[1])  # type: ignore[operator,index]
    return model


class Trainer(nn.Module):
    """As a LightningModule holds its network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "parallel": lambda: nn.DataParallel(net()),
    "averaged": lambda: AveragedModel(net()),
    "exponential average": lambda: AveragedModel(net(), multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "average of parallel": lambda: AveragedModel(nn.DataParallel(net())),
    "parallel average": lambda: nn.DataParallel(AveragedModel(net())),
    "compiled": lambda: torch.compile(net()),  # type: ignore[dict-item,return-value]
    "compiled parallel": lambda: torch.compile(nn.DataParallel(net())),  # type: ignore[dict-item,return-value]
    "parallel compiled": lambda: nn.DataParallel(torch.compile(net())),  # type: ignore[arg-type]
    "average of compiled": lambda: AveragedModel(torch.compile(net())),  # type: ignore[arg-type]
    "compiled inside": compiled_inside,
    "checkpointed inside": checkpointed_inside,
    "all at once": lambda: nn.DataParallel(torch.compile(AveragedModel(checkpointed_inside()))),  # type: ignore[arg-type]
}


def assert_reads_as(path: Path, state: State) -> None:
    checkpoint = Checkpoint(path)
    assert sorted(checkpoint) == sorted(state)
    for name, value in state.items():
        assert torch.equal(checkpoint.tensor(name), value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED.keys())
def test_a_wrapped_model_reads_as_the_model(
    tmp_path: Path, wrapped: Callable[[], nn.Module], suffix: str
) -> None:
    model = wrapped()  # activation checkpointing hides its names in state_dict() alone
    state = {n: v.detach().clone() for n, v in [*model.named_parameters(), *model.named_buffers()]}
    assert sorted(state) != sorted(net().state_dict())
    path = tmp_path / f"m{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert_reads_as(path, net().state_dict())
    checkpoint = Checkpoint(path)
    assert {checkpoint.stored_name(name) for name in checkpoint} <= set(state)


INSERTED = ("_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module")


@pytest.mark.parametrize("order", list(permutations(INSERTED, 2)))
@pytest.mark.parametrize(
    "prefix", ["", "module.", "base_model.model.", "module.module.", "_module."]
)
def test_wrappers_in_any_nesting(order: tuple[str, str], prefix: str) -> None:
    outer, inner = order
    plain = {name: tuple(value.shape) for name, value in net().state_dict().items()}

    def wrap(name: str) -> str:
        return f"{outer}.{prefix}" + name.replace("1.", f"1.{inner}.", 1)

    assert public_names({wrap(n): shape for n, shape in plain.items()}, "m") == {
        name: wrap(name) for name in plain
    }


def test_names_that_become_one_are_refused(tmp_path: Path) -> None:
    save_file({"a.w": torch.ones(1), "a._orig_mod.w": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: .*'a\._orig_mod\.w'.* one tensor"):
        Checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "names",
    [
        # A model's own names, which look like a wrapper's.
        {"model.layers.0.mlp.up_proj.weight": (4, 2), "lm_head.weight": (4, 2)},
        {"model.layers.0.mlp.up_proj.weight": (4, 2), "model.embed_tokens.weight": (4, 2)},
        {"net.0.weight": (2, 2), "net.2.weight": (2, 2)},
        {"module.a.weight": (2, 2), "n_averaged_tokens": ()},
        {"module.a.weight": (2, 2), "logit_scale": ()},
        {"module.a.weight": (2, 2), "step": (3, 3)},
        {"module": (2, 2)},
        {"a.step": (), "a.weight": (2, 2)},
        {"n_averaged": ()},
        {"base_model.weight": (2, 2), "base_model.model": (2, 2)},
        {"base_layer.0.weight": (2, 2), "level0.0.weight": (2, 2)},  # timm's DLA
        # Layer scale, and norms of other libraries, are called gamma and stay so.
        {"stages.0.blocks.0.gamma": (4,), "stages.0.blocks.0.norm.weight": (4,)},
        {"layernorm.gamma": (4,), "layernorm.beta": (4,), "ls_1.gamma": (4,)},
        {"LayerNorm.gamma": (4,), "LayerNorm.weight": (4,)},
        # Another parametrization with two parts.
        {
            "a.parametrizations.weight.original0": (3, 2),
            "a.parametrizations.weight.original1": (4, 4),
        },
        {"a.parametrizations.weight.original0": (4, 1)},
    ],
    ids=lambda names: next(iter(names)),
)
def test_names_that_are_no_wrappers_stay(names: dict[str, tuple[int, ...]]) -> None:
    assert public_names(names, "m") == {name: name for name in names}


def test_a_tied_language_model_of_transformers_keeps_its_names(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert all(name.startswith("model.") for name in names)  # the head is the embedding
    assert set(Checkpoint(tmp_path)) == names


def test_lightning_puts_one_attribute_before_all_names(tmp_path: Path) -> None:
    marks: dict[str, Any] = {"pytorch-lightning_version": "2.5.0", "epoch": 1, "callbacks": {}}
    for model in (net(), torch.compile(net()), nn.DataParallel(net()), AveragedModel(net())):
        state = Trainer(model).state_dict()  # type: ignore[arg-type]
        torch.save({**marks, "state_dict": state}, tmp_path / "m.ckpt")
        assert_reads_as(tmp_path / "m.ckpt", net().state_dict())
    # What several attributes hold has no prefix.
    several = {**Trainer(net()).state_dict(), "head.weight": torch.ones(2, 2)}
    torch.save({**marks, "state_dict": several}, tmp_path / "m.ckpt")
    assert_reads_as(tmp_path / "m.ckpt", several)


def test_a_base_within_an_adapters_wrapper(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(net(), LoraConfig(target_modules=["0"]))  # type: ignore[arg-type]
    state = {name: value for name, value in wrapped.state_dict().items() if "lora" not in name}
    assert any("base_layer" in name for name in state)
    torch.save(state, tmp_path / "m.pt")
    assert_reads_as(tmp_path / "m.pt", net().state_dict())


def old_bert(seed: int) -> tuple[State, State]:
    """A small BERT's weights, and the same under the names of its first release."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=6, max_position_embeddings=5,
    )  # fmt: skip
    new = BertModel(config).state_dict()
    for name, value in new.items():
        if value.is_floating_point():
            new[name] = value + 0.1 * torch.randn(value.shape)  # no norm is all ones
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, value in new.items():
        end = next((end for end in ends if name.endswith(end)), "")
        old[name.removesuffix(end) + ends[end] if end else name] = value
    return new, old


def test_old_names_of_norms_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    new, old = old_bert(0)
    assert set(old) != set(new)
    for name, state in (("new", new), ("old", old)):
        (tmp_path / name).mkdir()
        BertConfig(
            vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=6, max_position_embeddings=5,
        ).save_pretrained(tmp_path / name)  # fmt: skip
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    theirs = BertModel.from_pretrained(tmp_path / "old").state_dict()
    ours = Checkpoint(tmp_path / "old")
    assert set(ours) == set(Checkpoint(tmp_path / "new"))
    for name, value in theirs.items():
        assert torch.equal(ours.tensor(name), value)


def test_a_merge_onto_old_names_opens_in_transformers(tmp_path: Path) -> None:
    import yaml
    from transformers import BertConfig, BertModel

    from merge_core.factors.store import FactorStore
    from merge_core.merging.recipe import load_recipe
    from merge_core.output.model_folder import merge_to_folder

    states = {"base": old_bert(0)[1], "a": old_bert(1)[0], "b": old_bert(2)[1]}
    for name, state in states.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    BertConfig(
        vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=6, max_position_embeddings=5,
    ).save_pretrained(tmp_path / "base")  # fmt: skip
    suite = {"name": "s", "base": "base", "experts": {t: {"weights": t} for t in "ab"}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    recipe = {"suite": "suite.yaml", "method": "average"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge_to_folder(*load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out", FactorStore())
    merged = BertModel.from_pretrained(tmp_path / "out").state_dict()
    for name, first in old_bert(1)[0].items():
        if first.is_floating_point():
            mean = (first.double() + old_bert(2)[0][name].double()) / 2
            assert torch.allclose(merged[name].double(), mean, rtol=0, atol=1e-6)


def test_both_spellings_of_weight_norm_are_one(tmp_path: Path) -> None:
    def layer() -> nn.Conv1d:
        torch.manual_seed(0)
        return nn.Conv1d(4, 6, 3)

    for dim in (0, 2):
        old = nn.ModuleDict({"conv": nn.utils.weight_norm(layer(), dim=dim)})
        new = nn.ModuleDict({"conv": nn.utils.parametrizations.weight_norm(layer(), dim=dim)})
        torch.save(old.state_dict(), tmp_path / "old.pt")
        torch.save(new.state_dict(), tmp_path / "new.pt")
        assert_reads_as(tmp_path / "new.pt", old.state_dict())
        assert_reads_as(tmp_path / "old.pt", old.state_dict())
        stored = {Checkpoint(tmp_path / "new.pt").stored_name(name) for name in old.state_dict()}
        assert stored == set(new.state_dict())
