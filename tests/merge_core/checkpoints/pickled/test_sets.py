"""Which weights of a trainer's checkpoint are the model: as the libraries that wrote it choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError
from tests.merge_core.checkpoints.pickled.pickled_files import make_importable

State = dict[str, Tensor]


def state(seed: int = 0, prefix: str = "", further: int = 0) -> State:
    source = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (2, 3), "b.bias": (2,)}
    shapes |= {f"c{i}.weight": (2, 2) for i in range(further)}
    return {prefix + n: torch.randn(s, generator=source) for n, s in shapes.items()}


PLAIN, OTHER, LARGER = state(1), state(2), state(3, further=2)
TRAINER: dict[str, Any] = {
    "epoch": 3,
    "best_acc": torch.tensor(91.2),
    "arch": "vit",
    "optimizer": {"state": {0: {"exp_avg": torch.ones(3, 4)}}, "param_groups": [{"lr": 0.1}]},
    "lr_schedulers": [{"last_epoch": 3}],
    "rng_state": torch.zeros(5056, dtype=torch.uint8),
    "callbacks": {"EMA": {"weights": OTHER}},
    "hyper_parameters": {"lr": 0.1, "scale": torch.ones(3)},
    "metrics": {"confusion": torch.ones(7, 7)},
}


def assert_holds(path: Path, expected: State) -> Checkpoint:
    checkpoint = Checkpoint(path)
    assert sorted(checkpoint) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(checkpoint.tensor(name), value)
    return checkpoint


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


ONE_SET = [
    "state_dict", "state_dict_ema", "model_state_dict", "model", "model_ema", "module", "net",
    "network", "params", "params_ema", "weights", "ema", "student", "teacher", "generator",
    "g_ema", "netG", "backbone", "encoder_q", "optimal_weights", "lossy", "best_model",
]  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("key", ONE_SET)
def test_one_set_of_weights_is_the_model_under_whatever_key(
    tmp_path: Path, key: str, beside: bool
) -> None:
    content = {**(TRAINER if beside else {}), key: PLAIN}
    assert_holds(save(content, tmp_path / "m.pt"), PLAIN)
    nested = {"checkpoint": {**content, "latent_avg": torch.ones(4)}, "step": 7}
    assert_holds(save(nested, tmp_path / "m.pt"), PLAIN)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": PLAIN},
        {"model": PLAIN, **TRAINER},
        {"state_dict_ema": OTHER, "state_dict": PLAIN, "epoch": 1},
        {"model_ema": OTHER, "model": PLAIN},
        {"state_dict_ema": OTHER, "model_ema": PLAIN, "state_dict": PLAIN},
        {"state_dict": PLAIN, "model": OTHER},
        {"state_dict": state(1, "module."), "state_dict_ema": OTHER},
        {"state_dict": state(1, "module._orig_mod.")},
        {"state_dict": PLAIN, "state_dict_ema": None},
        PLAIN,
    ],
    ids=lambda content: " ".join(content)[:40],
)
def test_the_choice_is_timms(tmp_path: Path, content: dict[str, Any]) -> None:
    path = save(content, tmp_path / "m.pth")
    assert_holds(path, load_state_dict(str(path), weights_only=False))


@pytest.mark.parametrize(
    ("content", "expected", "told"),
    [
        ({"params": PLAIN, "params_ema": OTHER}, OTHER, ("'params_ema'", "'params'")),
        ({"g": PLAIN, "g_ema": OTHER, "d": LARGER, "latent": torch.ones(4)}, OTHER, ("'d'",)),
        ({"netG": PLAIN, "netG_ema": OTHER, "netD": LARGER}, OTHER, ("'netG_ema'", "'netD'")),
        ({"student": PLAIN, "teacher": OTHER, "epoch": 3}, OTHER, ("'teacher'", "'student'")),
        ({"student": state(1, "module."), "teacher": OTHER}, OTHER, ("'teacher'", "'student'")),
        # Another network than the trained one is no average of it.
        ({"student": PLAIN, "teacher": LARGER}, PLAIN, ("'student'", "'teacher'")),
        ({"state_dict": LARGER, "ema": {"module": OTHER}}, LARGER, ("'state_dict'", "'ema'")),
        ({"model": PLAIN, "ema": {"module": OTHER, "decay": 0.9}}, OTHER, ("'ema'", "'model'")),
        ({"model": PLAIN, "swa_model": OTHER}, OTHER, ("'swa_model'", "'model'")),
        ({"model": {"net": PLAIN, "ema_net": OTHER}}, OTHER, ("'ema_net'", "'net'")),
        ({"state_dict": PLAIN, "current_model_state": OTHER}, PLAIN, ("current_model_state",)),
        ({"model": {"backbone": PLAIN}}, PLAIN, ("model.backbone",)),
    ],
)
def test_a_choice_is_said(
    tmp_path: Path, content: dict[str, Any], expected: State, told: tuple[str, ...]
) -> None:
    checkpoint = assert_holds(save(content, tmp_path / "m.pt"), expected)
    (note,) = checkpoint.notes
    assert all(word in note for word in told)


def test_without_a_choice_nothing_is_said(tmp_path: Path) -> None:
    for content in (PLAIN, {"state_dict": PLAIN}, {**TRAINER, "model": PLAIN}):
        assert Checkpoint(save(content, tmp_path / "m.pt")).notes == ()


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"generator": PLAIN, "discriminator": OTHER, "step": 1}, ("generator", "discriminator")),
        ({"G": PLAIN, "D": LARGER}, ("G", "D")),
        ({"ema_0.9": PLAIN, "ema_0.99": OTHER}, ("ema_0.9", "ema_0.99")),
        ({"model": {"encoder": PLAIN, "decoder": OTHER}}, ("encoder", "decoder")),
    ],
)
def test_several_networks_are_refused_and_one_can_be_named(
    tmp_path: Path, content: dict[str, Any], keys: tuple[str, str]
) -> None:
    path = save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="does not say which is the model") as caught:
        Checkpoint(path)
    assert all(repr(key) in str(caught.value) for key in keys)
    inside = "model." if "model" in content else ""
    sets = content.get("model", content)
    digests = set()
    for key in keys:
        named = tmp_path / f"m.pt#{inside}{key}"
        digests.add(assert_holds(named, sets[key]).digest)
    assert len(digests) == 2  # what is kept of one set is not taken for the other's


def test_a_set_can_be_named_against_the_usual_choice(tmp_path: Path) -> None:
    path = save({"state_dict": PLAIN, "state_dict_ema": OTHER}, tmp_path / "m.pt")
    averaged = assert_holds(path, OTHER)
    trained = assert_holds(tmp_path / "m.pt#state_dict", PLAIN)
    assert averaged.digest != trained.digest
    assert averaged.digest == assert_holds(tmp_path / "m.pt#state_dict_ema", OTHER).digest
    with pytest.raises(CheckpointError, match=r"nothing under 'ema'; its keys are 'state_dict'"):
        Checkpoint(tmp_path / "m.pt#ema")
    save(PLAIN, tmp_path / "n#1.pt")  # a file of that name comes first
    assert_holds(tmp_path / "n#1.pt", PLAIN)
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "absent.pt#ema")


def test_safetensors_have_no_parts(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(PLAIN, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="one set of weights"):
        Checkpoint(tmp_path / "m.safetensors#ema")


def test_a_state_dict_with_more_in_it_is_the_model(tmp_path: Path) -> None:
    for extra in (TRAINER, {"statistics": {"mean": torch.ones(3)}}, {"ema": dict(OTHER)}):
        content = {**PLAIN, **extra}
        checkpoint = Checkpoint(save(content, tmp_path / "m.pt"))
        assert set(checkpoint) >= set(PLAIN)
        assert torch.equal(checkpoint.tensor("a.weight"), PLAIN["a.weight"])


def test_a_pickled_average_beside_a_pickled_model(tmp_path: Path) -> None:
    """As YOLO's trainers write them."""
    model, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save({"epoch": 1, "model": model, "ema": ema, "optimizer": None}, tmp_path / "m.pt")
    assert_holds(tmp_path / "m.pt", dict(ema.state_dict()))
    torch.save({"epoch": 1, "model": model, "ema": None}, tmp_path / "m.pt")
    assert_holds(tmp_path / "m.pt", dict(model.state_dict()))


def test_an_averaged_models_state_beside_the_trained_one(tmp_path: Path) -> None:
    from torch.optim.swa_utils import AveragedModel

    model = nn.Linear(3, 2)
    averaged = AveragedModel(model)
    content = {"model": model.state_dict(), "ema_model": averaged.state_dict()}
    assert_holds(save(content, tmp_path / "m.pt"), dict(averaged.module.state_dict()))


def test_numpy_values_under_a_key(tmp_path: Path) -> None:
    arrays = {name: value.numpy() for name, value in PLAIN.items()}
    assert_holds(save({"model_state": arrays, "epoch": 3}, tmp_path / "m.pt"), PLAIN)


def test_what_holds_no_tensors_by_name_says_what_it_holds(tmp_path: Path) -> None:
    content = {"shadow_params": list(PLAIN.values()), "decay": 0.9}
    with pytest.raises(CheckpointError, match=r"no tensors by name \(its keys: 'shadow_params', "):
        Checkpoint(save(content, tmp_path / "m.pt"))


def test_partitions_of_deepspeed_are_refused(tmp_path: Path) -> None:
    empty = {name: torch.empty(0) for name in PLAIN}
    content = {"module": empty, "ds_version": "0.15", "param_shapes": []}
    with pytest.raises(CheckpointError, match=r"zero_to_fp32\.py"):
        Checkpoint(save(content, tmp_path / "mp_rank_00_model_states.pt"))
    whole = {"module": PLAIN, "ds_version": "0.15"}  # stage 2
    assert_holds(save(whole, tmp_path / "mp_rank_00_model_states.pt"), PLAIN)


def test_other_keys_than_texts_beside_the_model(tmp_path: Path) -> None:
    class Settings:
        pass

    with make_importable("elsewhere.settings", Settings=Settings):
        content = {"model": PLAIN, "seen": {(1, 2): torch.ones(2)}, "cfg": Settings()}
        assert_holds(save(content, tmp_path / "m.pt"), PLAIN)
