"""A LoRA adapter over its base, read as a checkpoint: θ = θ_0 + s·B·A where it adapts a layer.

PEFT keeps an adapter as a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
Each adapted weight (m x n) has A (r x n) and B (m x r); other tensors that were trained along
(biases, heads, norms) are stored whole.

Source: Hu et al., LoRA, arXiv:2106.09685; rank-stabilised scaling arXiv:2312.03732; the layout is
PEFT's (https://github.com/huggingface/peft).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.dtypes import DTYPES, Dtype
from merge_core.checkpoints.lora_config import (
    CONFIG_FILE,
    WEIGHT_FILES,
    AdapterConfig,
    read_adapter_config,
)
from merge_core.checkpoints.lora_ties import INSTEAD, check_tied, spread_whole, with_own_head
from merge_core.checkpoints.shards import TensorInfo
from merge_core.checkpoints.stored.entry import link_hops
from merge_core.checkpoints.tied import ties
from merge_core.errors import CheckpointError
from merge_core.files import digest_of
from merge_core.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PREFIX = "base_model.model."
# PEFT 0.21 applies this layer's update twice, whether it is merged or not: it has no one meaning.
ATTENTION_OF_TORCH = ".base_layer.out_proj.lora_"
WRAPPERS = re.compile(r"(^|\.)(base_layer|modules_to_save)(?=\.)")
LORA_KEY = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight|\.bias)?")


@dataclass(frozen=True)
class Update:
    """The update s·B·A of one parameter.

    Attributes:
        parameter: the base's name of it.
        a: key of A in the adapter's file (r x n; r x i x kh x kw for a kernel).
        b: key of B (m x r; o x r x 1 x 1 for a kernel).
        rank: r, the number of columns of B.
        scale: s, the factor of the product.
        stored_transposed: whether the parameter is stored transposed (in x out), as embeddings
            are and the layers of GPT-2.
        embedding: whether the layer is an embedding.
    """

    parameter: str
    a: str
    b: str
    rank: int
    scale: float
    stored_transposed: bool
    embedding: bool


@dataclass(frozen=True)
class Naming:
    """How an adapter's names of layers and the base's names differ.

    Attributes:
        dropped: prefix of the adapter's names that the base lacks.
        added: prefix of the base's names that the adapter lacks.
    """

    dropped: str = ""
    added: str = ""

    def to_base(self, name: str) -> str:
        """The base's name of what the adapter names."""
        return self.added + name.removeprefix(self.dropped)

    def to_adapter(self, name: str) -> str:
        """The adapter's name of what the base names."""
        return self.dropped + name.removeprefix(self.added)


def adapter_folder(path: Path) -> Path | None:
    """The folder of a PEFT adapter that a path names, by itself or by its weight file.

    A link may be the weight file's under another name.
    """
    try:
        for hop in link_hops(path):
            folder = hop.parent if hop.name in WEIGHT_FILES else hop
            if (folder / CONFIG_FILE).is_file():
                return folder
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, links in a circle
        return None
    return None


def is_adapter(path: Path) -> bool:
    """Whether a path is a PEFT adapter's folder, or its weight file."""
    return adapter_folder(path) is not None


def is_stored_transposed(model: Checkpoint, name: str) -> bool | None:
    """Whether a weight of two dimensions is stored in x out, told from biases; None if unknown.

    A layer's bias is as long as its output. A square weight is like the others beside it: GPT-2
    stores all of a block's layers transposed.

    Args:
        model: the model that holds it; only headers are looked at.
        name: the weight.
    """
    block = name.removesuffix(".weight").rpartition(".")[0]
    start, end = f"{block}.", ".weight"
    beside = [
        n
        for n in model
        if n.startswith(start) and n.endswith(end) and "." not in n[len(start) : -len(end)]
    ]
    for weight in [name, *beside]:
        bias = weight.removesuffix("weight") + "bias"
        if bias not in model:
            continue
        shape, length = model.info(weight).shape, model.info(bias).shape
        if len(shape) == 2 and shape[0] != shape[1] and len(length) == 1:
            return length[0] == shape[1]
    return None


class AdaptedCheckpoint(Checkpoint):
    """A base with a LoRA adapter applied: a checkpoint whose tensors are made when asked for.

    Floating tensors are float32 at least, also over a base in half precision, where the update
    would be lost in rounding.

    Args:
        path: the adapter's folder, or its weight file.
        base: what it was trained on.

    Attributes:
        base: what it was trained on.
        config: its configuration.
        updates: the low-rank updates, by the base's name of the parameter.
        naming: how its names differ from the base's.

    Raises:
        CheckpointError: unreadable, no plain LoRA, or it does not fit the base.
    """

    def __init__(self, path: Path, base: Checkpoint) -> None:
        self.path = adapter_folder(path) or path
        self.config: AdapterConfig = read_adapter_config(self.path / CONFIG_FILE)
        self._adapter = _open_weights(self.path)
        self.files = (*base.files, *self._adapter.files, self.path / CONFIG_FILE)
        self.metadata = {}
        self.unsafe_globals = self._adapter.unsafe_globals
        layers, whole = _sort_keys(self._adapter, self.path)
        self.base = base = with_own_head(base, _widths(self._adapter, layers, whole))
        known = [f"{layer}.weight" for layer, _ in layers] or list(whole)
        self.naming = _naming(known, base, self.path)
        self.updates: dict[str, Update] = {}
        self._biases: dict[str, tuple[str, float]] = {}
        for (layer, embedding), parts in layers.items():
            self._add(layer, embedding, parts)
        named = {self._base_name_of(name): key for name, key in whole.items()}
        wrapped = {n for n, key in named.items() if self._is_kept_beside(n, key)}
        check_tied(self.path, base, (*self.updates, *wrapped), self.config.task_type)
        self._whole = spread_whole(base, named, wrapped)
        extra = [name for name in self._whole if name not in base]
        self._stored = {name: name for name in [*base, *extra]}
        self.ties = tuple(names for names in ties(base) if not any(map(self.may_differ, names)))
        tied = {name for names in self.ties for name in names}
        self.aliases = base.aliases & tied

    def __repr__(self) -> str:
        return f"AdaptedCheckpoint({str(self.path)!r}, {self.summary})"

    @property
    def summary(self) -> str:
        """A sentence that describes the adapter: kind, ranks, α and what it changes."""
        ranks = sorted({update.rank for update in self.updates.values()}) or [0]
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        kind = "rank-stabilised LoRA" if self.config.use_rslora else "LoRA"
        rest = len(self._whole) + len(self._biases)
        also = f", {rest} other tensors" if rest else ""
        return (
            f"{kind} adapter of rank {span}, alpha {self.config.lora_alpha:g}, "
            f"on {len(self.updates)} matrices{also}"
        )

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor as :meth:`tensor` gives it, from headers alone.

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        if name not in self._stored:
            raise CheckpointError(f"{self.path} and its base hold no tensor named {name!r}.")
        key = self._whole.get(name)
        info = self.base.info(name) if key is None else self._adapter.info(key)
        return TensorInfo(info.shape, _working_dtype(info.dtype))

    def tensor(self, name: str) -> Tensor:
        """One tensor: the base's plus the update, in float32 or float64 (integers as they are).

        Raises:
            CheckpointError: no tensor of that name, an unreadable file, or NaN or infinite entries.
        """
        import torch

        info = self.info(name)
        dtype = info.dtype.torch
        key = self._whole.get(name)
        stored = self.base.tensor(name) if key is None else self._adapter.tensor(key)
        value = stored.to(dtype)
        if name in self._biases:
            key, scale = self._biases[name]
            value = value + scale * self._adapter.tensor(key).to(dtype)
        if name in self.updates:
            left, right = (factor.to(dtype) for factor in self._factors(self.updates[name]))
            value = torch.addmm(value.reshape(len(left), -1), left, right).reshape(info.shape)
            if not bool(torch.isfinite(value).all()):
                raise CheckpointError(
                    f"{self.path}: the update of {name!r} overflows. Such an adapter cannot be "
                    "merged; train or export it again."
                )
        return value

    def read_unchecked(self, name: str) -> Tensor:
        """As :meth:`tensor`, which checks the entries in any case."""
        return self.tensor(name)

    def rows(self, name: str, places: np.ndarray) -> np.ndarray:
        """See :meth:`Checkpoint.rows`; the update's rows alone are added to the base's."""
        update = self.low_rank(name)
        if update is None:
            return self._rows_of(name, places)
        left, right = update
        found = self.base.rows(name, places)
        return self._check_rows(name, found + (left[places] @ right).numpy())

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors are equal as stored: both in the base, or both in the adapter.

        Raises:
            CheckpointError: unreadable.
        """
        names = (first, second)
        if not any(map(self.may_differ, names)):
            return self.base.are_equal(*names)
        whole = all(n in self._whole and n not in self.updates for n in names)
        return whole and self._adapter.are_equal(*(self._whole[name] for name in names))

    def may_differ(self, name: str) -> bool:
        """Whether a tensor differs from the base's; False means that both are equal, bit by bit."""
        return name in self.updates or name in self._whole or name in self._biases

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The update about the base as a product, without making it; None if it is not of low rank.

        Args:
            name: a parameter of two dimensions or more.

        Returns:
            left, m x r, and right, r x n, float64, of the matrix m x (the rest); r = 0 for a
            parameter that the adapter does not touch.

        Raises:
            CheckpointError: unreadable, or NaN or infinite entries.
        """
        import torch

        info = self.info(name)
        if not info.is_floating or len(info.shape) < 2 or not info.numel:
            return None
        if not self.may_differ(name):
            rows = info.shape[0]
            wide = info.numel // rows
            return torch.zeros(rows, 0).double(), torch.zeros(0, wide).double()
        if name in self._whole:  # stored whole, perhaps with an update besides
            return None
        return self._factors(self.updates[name])

    @lazy
    def digest(self) -> str:
        """SHA-256 (hex) of the adapter's content and of the base's.

        Raises:
            CheckpointError: a file vanished, changed since it was opened, or cannot be read.
        """
        config = self.config.model_dump_json(exclude={"base_model_name_or_path", "task_type"})
        return digest_of("adapter-1", config, self._adapter.digest, self.base.digest)

    def check_unchanged(self) -> None:
        """Refuse files that were replaced since they were opened, the base's among them.

        Raises:
            CheckpointError: a file was removed or changed.
        """
        self._adapter.check_unchanged()
        self.base.check_unchanged()

    def _is_kept_beside(self, name: str, key: str) -> bool:
        """Whether PEFT keeps a tensor that is stored whole beside the base's, not in its place."""
        layer = name.rpartition(".")[0]
        saved = any(f".{layer}".endswith(f".{each}") for each in self.config.modules_to_save)
        return saved and ".base_layer." not in key

    def _factors(self, update: Update) -> tuple[Tensor, Tensor]:
        """left m x r and right r x n, float64, for the parameter as it is stored."""
        A = self._adapter.tensor(update.a).double().flatten(1)
        B = update.scale * self._adapter.tensor(update.b).double().flatten(1)
        return (A.T, B.T) if update.stored_transposed else (B, A)

    def _add(self, layer: str, embedding: bool, parts: dict[str, str]) -> None:
        """Add the update of one adapted layer after checking its shapes against the base's."""
        missing = {"A", "B"} - set(parts)
        if missing:
            raise CheckpointError(
                f"The adapter {self.path} holds no lora_{min(missing)} of layer {layer!r}, which "
                "it adapts. Copy or download it again."
            )
        name = self.naming.to_base(layer) + ".weight"
        shape = self.base.info(name).shape
        a, b = (self._adapter.info(parts[part]).shape for part in "AB")
        swapped = embedding or self._is_stored_transposed(name, a, b)
        expected = (a[1], b[0]) if swapped and len(a) == 2 else (b[0], *a[1:])
        if shape != expected or b[1:] != (a[0],) + (1,) * (len(a) - 2):
            raise CheckpointError(
                f"The adapter {self.path} does not fit the base {self.base.path}: lora_A {a} and "
                f"lora_B {b} of layer {layer!r} do not make an update of {name!r}, {shape}. Name "
                "the base that it was trained on."
            )
        declared, scale = self.config.rank_of(layer), self.config.scale_of(layer)
        if declared != a[0]:
            raise CheckpointError(
                f"The adapter {self.path} says rank {declared} for layer {layer!r}, but its "
                f"matrices have rank {a[0]}. Its configuration belongs to another adapter."
            )
        self.updates[name] = Update(name, parts["A"], parts["B"], a[0], scale, swapped, embedding)
        if "bias" in parts:
            bias = self.naming.to_base(layer) + ".bias"
            held = self.base.info(bias).shape if bias in self.base else None
            if held != self._adapter.info(parts["bias"]).shape:
                raise CheckpointError(
                    f"The adapter {self.path} has a bias for layer {layer!r} that the base "
                    f"{self.base.path} does not. Name the base that it was trained on."
                )
            self._biases[bias] = parts["bias"], scale

    def _is_stored_transposed(self, name: str, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        """Whether the base stores an adapted weight transposed; shapes tell unless it is square."""
        if len(a) != 2 or len(b) != 2:
            return False
        if a[1] != b[0]:
            return self.base.info(name).shape == (a[1], b[0])
        told = is_stored_transposed(self.base, name)
        return self.config.fan_in_fan_out if told is None else told

    def _base_name_of(self, name: str) -> str:
        """The base's name of a tensor that is stored whole; its own for a new head."""
        for candidate in (self.naming.to_base(name), name):
            if candidate in self.base:
                return candidate
        if not any(f"{layer}." in name for layer in self.config.modules_to_save):
            raise CheckpointError(
                f"The adapter {self.path} holds {name!r}, which matches no parameter of the base "
                f"{self.base.path}. Name the base that it was trained on."
            )
        return name


def _widths(
    adapter: Checkpoint, layers: Mapping[tuple[str, bool], dict[str, str]], whole: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """The weights that an adapter changes, by their names there, each with its number of inputs."""
    found = {name: adapter.info(key) for name, key in whole.items() if name.endswith("weight")}
    for (layer, embedding), parts in layers.items():
        if "A" in parts and not embedding:
            found[f"{layer}.weight"] = adapter.info(parts["A"])
    return found


def _working_dtype(dtype: Dtype) -> Dtype:
    return DTYPES["float32"] if dtype.is_floating_point and dtype.itemsize < 4 else dtype


class _AdapterFile(Checkpoint):
    """The tensors of an adapter, which are no model by themselves."""

    def _check_kind(self, *_: object) -> None:
        """Factors are what is expected here."""


def _open_weights(folder: Path) -> Checkpoint:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return _AdapterFile(folder / name)
    raise CheckpointError(
        f"The adapter {folder} holds no {WEIGHT_FILES[0]}. Copy or download it again."
    )


def _sort_keys(
    adapter: Checkpoint, path: Path
) -> tuple[dict[tuple[str, bool], dict[str, str]], dict[str, str]]:
    """The keys of A, B and B's bias by layer and whether it is an embedding; the others by name."""
    layers: dict[tuple[str, bool], dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in adapter:
        name = WRAPPERS.sub("", key.removeprefix(PREFIX)).removeprefix(".")
        if "lora_magnitude_vector" in name:
            raise CheckpointError(
                f"The adapter {path} is a DoRA, which rescales the base's own columns: no low-rank "
                f"update. {INSTEAD}"
            )
        if ATTENTION_OF_TORCH in key:
            raise CheckpointError(
                f"The adapter {path} adapts torch's MultiheadAttention ({key!r}), whose output "
                f"layer PEFT updates twice. {INSTEAD}"
            )
        match = LORA_KEY.fullmatch(name)
        if match is None:
            whole[name] = key
            continue
        layer, embedding, part, leaf = match.groups()
        parts = layers.setdefault((layer, embedding is not None), {})
        parts["bias" if leaf == ".bias" else part] = key
    return layers, whole


def _naming(names: Iterable[str], base: Checkpoint, path: Path) -> Naming:
    """The one prefix by which an adapter's names and the base's differ, if any.

    Args:
        names: parameters that are adapted, or, where there are none, tensors stored whole.
        base: the base.
        path: the adapter's, for messages.

    Raises:
        CheckpointError: no prefix makes all of them fit, or several do.
    """
    names = sorted(names)

    def fits(naming: Naming) -> bool:
        return all(naming.to_base(name) in base for name in names)

    if fits(Naming()):
        return Naming()
    first = next(name for name in names if name not in base)
    candidates = [Naming(dropped=first[: dot.end()]) for dot in re.finditer(r"\.", first)]
    candidates += [
        Naming(added=name[: len(name) - len(first)]) for name in base if name.endswith(f".{first}")
    ]
    fitting = [naming for naming in candidates if fits(naming)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise CheckpointError(
            f"The adapter {path} adapts {first!r}, which matches no parameter of the base "
            f"{base.path}. Name the base that it was trained on."
        )
    raise CheckpointError(
        f"The adapter {path} adapts {first!r}, which may be several parameters of the base "
        f"{base.path} ({fitting[0].to_base(first)!r}, {fitting[1].to_base(first)!r}). Give the "
        "part of the base that it was trained on."
    )
