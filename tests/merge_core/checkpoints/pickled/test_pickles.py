"""Pickled models and state dicts: the tensors that torch itself would give, in every format.

The oracle is ``torch.load`` (or the module's own ``state_dict``) on files made here.
"""

from __future__ import annotations

import enum
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.pickled.files import PickledTensors
from merge_core.errors import CheckpointError
from merge_core.suites.suite import load_suite
from tests.merge_core.checkpoints.pickled.pickled_files import (
    FORMATS,
    Save,
    assert_holds,
    draw,
    every_format,
    make_importable,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # torch on its own old formats

# ------------------------------------------------------------------------------------- tensors

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


@every_format
def test_every_dtype_comes_back(tmp_path: Path, save: Save) -> None:
    values = torch.tensor([[1.0, 0.0, -2.0], [0.5, 3.0, 100.0]])
    state = {str(dtype): values.to(dtype) for dtype in DTYPES}
    save(state, tmp_path / "m.pt")
    assert_holds(tmp_path / "m.pt", state)


@every_format
def test_views_shared_and_expanded_tensors_come_back(tmp_path: Path, save: Save) -> None:
    whole = draw(6, 8)
    state = {
        "whole": whole,
        "again": whole,
        "turned": whole.T,
        "rows": whole[2:4],
        "every second column": whole[:, 1::2],
        "one": whole[3, 5],
        "nothing": whole[:, :0],
        "empty": torch.zeros(0, 4),
        "repeated": torch.arange(5).expand(1000, -1),
        "parameter": nn.Parameter(whole[1]),
        "buffer": nn.Buffer(draw(2)),
        "channels last": draw(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    save(state, tmp_path / "m.pt")
    assert_holds(tmp_path / "m.pt", state)


@given(data=st.data())
def test_any_strided_view_reads_as_torch_reads_it(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    strides = data.draw(st.lists(st.integers(0, 6), min_size=len(shape), max_size=len(shape)))
    offset = data.draw(st.integers(0, 5))
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    base = torch.arange(offset + reach + 1).to(data.draw(st.sampled_from(DTYPES)))
    path = tmp_path_factory.mktemp("views") / "m.pt"
    save = data.draw(st.sampled_from([torch.save, FORMATS["legacy"], FORMATS["bare, protocol 4"]]))
    save({"view": base.as_strided(shape, strides, offset)}, path)
    assert_holds(path, {"view": base.as_strided(shape, strides, offset)})


def test_a_state_dict_is_read_without_its_other_entries(tmp_path: Path) -> None:
    class Settings:
        def __init__(self) -> None:
            self.rate, self.weights = 0.1, torch.ones(2)

    with make_importable("training", Settings=Settings):
        content = {"state_dict": {"w": draw(2)}, "args": Settings(), "path": Path("/data")}
        torch.save(content, tmp_path / "m.ckpt")
    checkpoint = assert_holds(tmp_path / "m.ckpt", {"w": draw(2)})
    assert checkpoint.unsafe_globals == ("pathlib.PosixPath", "training.Settings")


@every_format
def test_a_state_dict_may_be_of_a_foreign_class(tmp_path: Path, save: Save) -> None:
    class Weights(OrderedDict[str, Any]):
        pass

    with make_importable("elsewhere", Weights=Weights):
        save({"net": Weights(w=draw(2), b=draw(3))}, tmp_path / "m.pt")
    checkpoint = assert_holds(tmp_path / "m.pt", {"w": draw(2), "b": draw(3)})
    assert checkpoint.unsafe_globals == ("elsewhere.Weights",)


def test_a_state_dict_of_plain_tensors_meets_no_foreign_class(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for place, save in enumerate(FORMATS.values()):
        path = tmp_path / f"{place}.pt"
        save({"state_dict": model.state_dict(), "half": torch.ones(1).bfloat16()}, path)
        assert Checkpoint(path).unsafe_globals == ()


def test_a_view_that_torch_negates_when_it_reads_it_is_refused(tmp_path: Path) -> None:
    value = torch.complex(draw(3), draw(3)).conj().imag
    assert value.is_neg()
    torch.save({"w": value}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"'w'.*negated"):
        Checkpoint(tmp_path / "m.pt")


def test_a_bare_pickle_of_protocol_2_is_refused(tmp_path: Path) -> None:
    """It writes bytes as calls, which would have to be made."""
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"w": torch.ones(1)}, 2))
    with pytest.raises(CheckpointError, match=r"'w'.*torch\.save"):
        Checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "keys", [[0, 1], ["0", 1], [True, "x"]], ids=["numbers", "mixed", "booleans"]
)
def test_keys_that_are_no_texts_are_written_as_texts(tmp_path: Path, keys: list[Any]) -> None:
    state = {key: draw(2, seed=i) for i, key in enumerate(keys)}
    torch.save(state, tmp_path / "m.pt")
    assert_holds(tmp_path / "m.pt", {str(key): value for key, value in state.items()})


def test_a_tensor_named_by_a_tuple_is_refused_rather_than_dropped(tmp_path: Path) -> None:
    torch.save({("a", 1): torch.ones(1), "b": torch.ones(1)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="no text"):
        Checkpoint(tmp_path / "m.pt")


def test_names_are_safe_to_write(tmp_path: Path) -> None:
    torch.save({"lone \ud800 surrogate": torch.ones(1), "été 重": torch.ones(1)}, tmp_path / "m.pt")
    names = list(Checkpoint(tmp_path / "m.pt"))
    assert "été 重" in names
    assert all(name.encode() for name in names)


# ------------------------------------------------------------------------------------- modules


class Block(nn.Module):
    """Parameters, both kinds of buffers, absent entries, children, tied weights."""

    def __init__(self, width: int, children: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(draw(width, seed=width))
        self.register_parameter("absent", None)
        self.register_buffer("mean", draw(width, seed=width + 1))
        self.register_buffer("hidden", draw(3), persistent=False)
        self.register_buffer("missing", None)
        self.norm = nn.BatchNorm1d(width)
        self.nothing = None
        self.note = {"tensor": torch.ones(2)}  # an attribute is no part of the state
        self.inner = nn.ModuleList([Block(width, 0) for _ in range(children)])
        if children:
            self.tied = self.inner[0]
            self.scale_again = self.scale


MODELS: dict[str, Callable[[], nn.Module]] = {
    "blocks": lambda: Block(3, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "parallel": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.GRU(2, 2))),
    "parametrised": lambda: nn.utils.weight_norm(nn.Linear(2, 3)),
    "dictionaries": lambda: nn.ModuleDict(
        {"a": nn.ParameterList([nn.Parameter(draw(2))]), "b": nn.Embedding(3, 2)}
    ),
}


@every_format
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_pickled_module_has_the_names_of_its_state_dict(
    tmp_path: Path, save: Save, model: Callable[[], nn.Module]
) -> None:
    module = model().train(False)
    with make_importable("elsewhere.blocks", Block=Block):
        save(module, tmp_path / "m.pt")
    checkpoint = assert_holds(tmp_path / "m.pt", module.state_dict())
    assert list(PickledTensors(tmp_path / "m.pt").stored) == list(module.state_dict())
    kinds = {type(m) for m in module.modules()}
    classes = {f"{kind.__module__}.{kind.__qualname__}" for kind in kinds}
    assert {name for name in classes if "Parametrized" not in name} <= set(
        checkpoint.unsafe_globals
    )


@given(data=st.data())
def test_any_tree_of_modules_has_the_names_of_its_state_dict(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made: list[nn.Module] = [nn.Module()]

    def grown(depth: int) -> nn.Module:
        module = nn.Module()
        names = st.sampled_from(["a", "b", "weight", "0", "net", "model"])
        for name in data.draw(st.lists(names, unique=True, max_size=4)):
            kind = data.draw(st.sampled_from("pbhcs" if depth else "pbh"))
            if kind == "p":
                module.register_parameter(name, nn.Parameter(draw(2, seed=len(made))))
            elif kind in "bh":
                module.register_buffer(name, draw(1, 2), persistent=kind == "b")
            else:
                shared = data.draw(st.sampled_from(made)) if kind == "s" else grown(depth - 1)
                module.add_module(name, shared)
        made.append(module)
        return module

    top = grown(3)
    path = tmp_path_factory.mktemp("trees") / "m.pt"
    torch.save(data.draw(st.sampled_from([top, {"model": top}, {"epoch": 1, "net": top}])), path)
    state = top.state_dict()
    if not state:
        with pytest.raises(CheckpointError, match="no tensors"):
            Checkpoint(path)
        return
    assert_holds(path, state)


def test_the_encoders_of_the_vision_benchmark_open_without_their_code(tmp_path: Path) -> None:
    """Stand-ins with the layout of ``ImageEncoder``: a CLIP model and its preprocessing."""

    class Interpolation(enum.Enum):
        BICUBIC = "bicubic"

    class Resize:
        def __init__(self) -> None:
            self.size, self.interpolation = 224, Interpolation.BICUBIC

    class Compose:
        def __init__(self) -> None:
            self.transforms = [Resize(), torch.nn.functional.relu, partial(max, 0)]

    class VisualTransformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, 2, bias=False)
            self.class_embedding = nn.Parameter(draw(4))
            self.transformer = nn.Sequential(
                OrderedDict(attn=nn.MultiheadAttention(4, 2), act=nn.GELU())
            )
            self.proj = nn.Parameter(draw(4, 2))

    class CLIP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = VisualTransformer()
            self.logit_scale = nn.Parameter(torch.tensor(math.log(100)))
            self.register_buffer("attn_mask", torch.ones(3, 3).triu(), persistent=False)

    class ImageEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = CLIP()
            self.train_preprocess = self.val_preprocess = Compose()
            self.cache_dir = None

    encoder = ImageEncoder()
    for save in FORMATS.values():
        with (
            make_importable("src.modeling", ImageEncoder=ImageEncoder),
            make_importable("clip.model", CLIP=CLIP, VisualTransformer=VisualTransformer),
            make_importable("vision", Compose=Compose, Resize=Resize, Interpolation=Interpolation),
        ):
            save(encoder, tmp_path / "finetuned.pt")
        checkpoint = assert_holds(tmp_path / "finetuned.pt", encoder.state_dict())
        assert "model.visual.transformer.attn.in_proj_weight" in checkpoint
        assert {
            "src.modeling.ImageEncoder", "clip.model.CLIP", "clip.model.VisualTransformer",
            "vision.Compose", "vision.Resize", "vision.Interpolation", "functools.partial",
            "torch.nn.modules.conv.Conv2d",
        } <= set(checkpoint.unsafe_globals)  # fmt: skip


def test_a_scripted_model_gives_its_parameters_and_buffers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())).half()
    torch.jit.save(torch.jit.script(model), tmp_path / "ViT-B-32.pt")
    expected = torch.jit.load(tmp_path / "ViT-B-32.pt").state_dict()
    assert_holds(tmp_path / "ViT-B-32.pt", {k: v.contiguous() for k, v in expected.items()})


def test_a_suite_of_pickled_modules_is_one_of_safetensors(
    tmp_path: Path, suite_of: Callable[..., Any]
) -> None:
    models = {task: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for task in ("a", "b")}
    suite = suite_of({task: model.state_dict() for task, model in models.items()})
    for task, model in models.items():
        torch.save(model, tmp_path / f"{task}.pt")
    document = {"name": "pickled", "experts": {t: {"weights": f"{t}.pt"} for t in models}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(document))
    pickled = load_suite(tmp_path)
    for task in models:
        ours, theirs = pickled.expert(task), suite.expert(task)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours.tensor(n), theirs.tensor(n)) for n in ours)
        assert len(ours.digest) == 64
    assert pickled.expert("a").digest != pickled.expert("b").digest
