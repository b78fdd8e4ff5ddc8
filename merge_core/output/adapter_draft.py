"""What an adapter holds of a merge: taken from merged tensors, and written as PEFT reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from merge_core.checkpoints.lora import PREFIX, AdaptedCheckpoint, is_stored_transposed
from merge_core.checkpoints.parameter_roles import describe, treatment
from merge_core.checkpoints.shards import TensorInfo
from merge_core.checkpoints.side_files import describes_model
from merge_core.errors import OutputError, RecipeError
from merge_core.factors.decomposition import decompose
from merge_core.factors.low_rank import as_matrix, count_directions, resolution
from merge_core.hub.files import HubId, is_hub_id
from merge_core.merging.engine import written_dtype
from merge_core.merging.recipe import Recipe
from merge_core.methods.declaration import Rank
from merge_core.methods.spectral import energy_rank
from merge_core.output.base_class import UNKNOWN, base_class
from merge_core.output.layout import folder_of
from merge_core.places import is_place
from merge_core.suites.suite import Suite

ENERGY = "energy:"
# A weighted mean of equal numbers may differ from them in the last bits: by this many ε.
SAME = 8.0


@dataclass(frozen=True)
class AdapterRank:
    """How many directions of each matrix's update an adapter keeps.

    Attributes:
        rank: a share of min(m, n) when a float in (0, 1], the number itself when an integer.
        energy: instead: as few as carry this share of Σσ².
    """

    rank: float | int = 1.0
    energy: float | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterRank:
        """Read ``16`` (directions), ``0.08`` (a share) or ``energy:0.95``.

        Raises:
            RecipeError: anything else.
        """
        try:
            if text.startswith(ENERGY):
                energy = float(text.removeprefix(ENERGY))
                if not 0 < energy <= 1:
                    raise ValueError
                return cls(energy=energy)
            return cls(rank=TypeAdapter(Rank).validate_python(text))
        except (ValueError, ValidationError) as error:
            raise RecipeError(
                f"An adapter's rank is a whole number of directions (16), a share of the full rank "
                f"(0.08), or a share of the update's energy ({ENERGY}0.95); got {text!r:.60}."
            ) from error

    def of(self, S: Tensor, r: int) -> int:
        """The number of directions kept of a matrix.

        Args:
            S: its singular values that are more than rounding, descending.
            r: directions of such a matrix.
        """
        if self.energy is not None:
            return energy_rank(S, self.energy)
        return min(len(S), count_directions(self.rank, r))


@dataclass
class AdapterReport:
    """What an adapter holds of a merge.

    Attributes:
        ranks: directions kept of each adapted matrix.
        kept: Σσ² of the kept directions over all adapted matrices.
        total: Σσ² of all their directions.
        whole: tensors stored whole, and by how much each differs from the base: ‖Δ‖/‖θ_0‖.
        in_base: those of them that PEFT writes into the base itself, where they stay when the
            adapter is removed.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    kept: float = 0.0
    total: float = 0.0
    whole: dict[str, float] = field(default_factory=dict)
    in_base: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """Share of the matrices' update that is kept, as squared norm."""
        return self.kept / self.total if self.total else 1.0

    def sentences(self) -> str:
        """The report in words."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        span = f"{low}" if low == high else f"{low} to {high}"
        text = (
            f"{len(self.ranks)} matrices with rank {span}, which keep {self.energy:.4%} of their "
            "update's energy."
        )
        if self.whole:
            most = max(self.whole, key=lambda name: self.whole[name])
            text += (
                f" {len(self.whole)} tensors that no low-rank update can hold are stored whole; "
                f"the most changed, {most}, differs from the base by {self.whole[most]:.2%}."
            )
        if self.in_base:
            text += (
                f" {len(self.in_base)} of them ({', '.join(self.in_base[:3])}"
                f"{', ...' if len(self.in_base) > 3 else ''}) belong to no layer of their own: "
                "PEFT writes them into the base when it loads the adapter, and removing the "
                "adapter does not take them back."
            )
        return text


@dataclass(frozen=True)
class _Layer:
    """How PEFT keeps the update of one kind of layer."""

    stored_transposed: bool = False
    embedding: bool = False


@dataclass(frozen=True)
class _Pair:
    layer: _Layer
    A: Tensor
    B: Tensor


class AdapterDraft:
    """Takes merged tensors one after another and keeps what an adapter needs of them."""

    def __init__(
        self, suite: Suite, tasks: Sequence[str], rank: AdapterRank, recipe: Recipe
    ) -> None:
        assert suite.base is not None
        self.report = AdapterReport()
        self._base, self._base_reference = suite.base, suite.spec.base or ""
        self._base_source = suite.source(None)
        # Of a tensor that the base holds once, the names that other members have besides are none
        # of its files.
        self._names = [name for name in self._base if name not in self._base.aliases]
        self._rank, self._recipe = rank, recipe
        members = [suite.expert(task) for task in tasks]
        self._adapters = [m for m in members if isinstance(m, AdaptedCheckpoint)]
        self._class = base_class(self._base)
        self._adapter_names = self._find_names()
        self._pairs: dict[str, _Pair] = {}
        self._whole: dict[str, Tensor] = {}

    def take(self, name: str, merged: Tensor) -> None:
        """Keep the difference between a merged tensor and the base's, if there is one.

        Raises:
            OutputError: a shape that is not the base's.
        """
        base = self._base.tensor(name).to(merged.dtype)
        if base.shape != merged.shape:
            raise OutputError(
                f"Parameter {name!r} of the merged model has shape {tuple(merged.shape)}, the base "
                f"{tuple(base.shape)}: no adapter can change that. Write the whole model."
            )
        if not merged.dtype.is_floating_point:
            if not torch.equal(merged, base):
                self._keep_whole(name, merged, base)
            return
        eps = torch.finfo(merged.dtype).eps
        if not bool(((merged - base).abs() > SAME * eps * base.abs()).any()):
            return
        layer = self._layer(name, TensorInfo.of(merged))
        own = self._own(name)
        # An update of a tied tensor would reach one of its names; a task's head is kept whole.
        if layer is None or self._is_tied(name) or self._head_of(own):
            self._keep_whole(name, merged, base)
        else:
            self._keep_directions(name, merged, base, layer)

    def _layer(self, name: str, info: TensorInfo) -> _Layer | None:
        """The layer that a low-rank update of a parameter belongs to; None if that is unclear."""
        for adapter in self._adapters:
            if update := adapter.updates.get(name):
                return _Layer(update.stored_transposed, update.embedding)
        block = name.rpartition(".")[0].rpartition(".")[0]
        # A kernel may be one of several groups, which its shape does not tell; torch's own
        # attention reads its output layer's weight past any wrapper.
        unsure = len(info.shape) != 2 or f"{block}.in_proj_weight" in self._base
        if unsure or not name.endswith(".weight") or not treatment(name, info).decomposed:
            return None
        told = is_stored_transposed(self._base, name)
        known = any(adapter.config.fan_in_fan_out for adapter in self._adapters)
        return _Layer(stored_transposed=known if told is None else told)

    def _keep_whole(self, name: str, merged: Tensor, base: Tensor) -> None:
        change = float((merged.double() - base.double()).norm())
        self.report.whole[name] = change / max(float(base.double().norm()), 1e-300)
        self._whole[name] = merged.clone()

    def _keep_directions(self, name: str, merged: Tensor, base: Tensor, layer: _Layer) -> None:
        update = as_matrix(merged.double() - base.double())
        noise = max(resolution(as_matrix(merged)), resolution(as_matrix(base)))
        factors = decompose(update, noise)
        k = self._rank.of(factors.S, min(update.shape))
        if k == 0:
            return
        root = factors.S[:k].sqrt()
        left, right = factors.U[:, :k] * root, (factors.V[:, :k] * root).T
        A, B = (left.T, right.T) if layer.stored_transposed else (right, left)
        if merged.ndim > 2:
            ones = (1,) * (merged.ndim - 2)
            A, B = A.reshape(k, *merged.shape[1:]), B.reshape(len(B), k, *ones)
        self._pairs[name] = _Pair(layer, A, B)
        self.report.ranks[name] = k
        self.report.kept += float(factors.S[:k].square().sum())
        self.report.total += float(factors.S.square().sum())

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by PEFT's keys, and the configuration.

        Raises:
            OutputError: no matrix differs from the base's, or a value does not fit the dtype.
        """
        if not self._pairs:
            raise OutputError(
                "The merged model's weight matrices are the base's own: there is no update for an "
                "adapter to hold. Write the whole model instead."
            )
        state: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for name, pair in self._pairs.items():
            layer = self._own(name).removesuffix(".weight")
            ranks[layer] = self.report.ranks[name]
            kind, end = ("lora_embedding", "") if pair.layer.embedding else ("lora", ".weight")
            for part, value in (("A", pair.A), ("B", pair.B)):
                key = f"{PREFIX}{layer}.{kind}_{part}{end}"
                state[key] = self._to_output_dtype(key, value, torch.float32)
        saved = self._saved_layers(ranks)
        placed = self._place_whole(state, saved, ranks)
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {f"^{re.escape(layer)}": k for layer, k in ranks.items() if k != usual}
        name, revision = self._base_name()
        config = {
            "peft_type": "LORA",
            "task_type": self._class.task,
            "auto_mapping": self._class.auto_mapping,
            "base_model_name_or_path": name,
            "revision": revision,
            "inference_mode": True,
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": list(ranks),
            "modules_to_save": saved or None,
            "bias": "lora_only" if placed else "none",
            "fan_in_fan_out": any(
                pair.layer.stored_transposed and not pair.layer.embedding
                for pair in self._pairs.values()
            ),
            "lora_dropout": 0.0,
        }
        return state, config

    def _place_whole(
        self, state: dict[str, Tensor], saved: Sequence[str], adapted: Iterable[str]
    ) -> bool:
        """Add the tensors that are stored whole; True if any is the bias of an adapted layer."""
        biases = {f"{layer}.bias": f"{layer}.base_layer.bias" for layer in adapted}
        in_base = []
        for name in dict.fromkeys([*self._names, *self._whole]):
            own = self._own(name)
            changed = self._whole.get(name)
            inside = any(own.startswith(f"{layer}.") for layer in saved)
            if changed is not None or inside:
                self._place(state, PREFIX + biases.get(own, own), name)
            if changed is not None and not inside:
                in_base.append(name)
        stored = {own: name for name, own in self._adapter_names.items()}
        for first, twins in (self._class.twins or {}).items():
            for twin in twins:
                if PREFIX + twin not in state and twin.rpartition(".")[0] in saved:
                    self._place(state, PREFIX + twin, stored[first])
        self.report.in_base = tuple(in_base)
        return any(self._own(name) in biases for name in in_base)

    def _place(self, state: dict[str, Tensor], key: str, name: str) -> None:
        """Add a tensor under a key: as it was merged, or else the base's."""
        value = self._whole[name] if name in self._whole else self._base.tensor(name)
        state[key] = self._to_output_dtype(key, value, self._base.info(name).dtype.torch)

    def _saved_layers(self, adapted: Iterable[str]) -> list[str]:
        """Layers that PEFT can keep as whole copies: those with changed tensors, and heads.

        A layer qualifies if it holds tensors only, is not adapted, and its name is the end of no
        other's (PEFT matches ends). Of a tensor with several names each gets a copy: PEFT's own
        way of tying them (``ensure_weight_tying``) makes a head of every name, embeddings included.
        """
        names = [self._own(name) for name in self._names]
        layers = {name[: dot.start()] for name in names for dot in re.finditer(r"\.", name)}
        parents = {layer.rpartition(".")[0] for layer in layers}
        adapted = set(adapted)

        def qualifies(layer: str) -> bool:
            alike = any(other != layer and other.endswith(layer) for other in layers)
            return bool(layer) and layer not in parents and layer not in adapted and not alike

        own = {self._own(name): name for name in self._whole}
        known = self._class.twins
        alone = {n for n, name in own.items() if known is None and self._is_tied(name)}
        twins = {twin.rpartition(".")[0] for name in own for twin in (known or {}).get(name, ())}
        heads = {head for name in names if (head := self._head_of(name))}
        owners = {name.rpartition(".")[0] for name in own.keys() - alone}
        inside = {layer for layer in owners if self._head_of(f"{layer}.")}
        return sorted({*filter(qualifies, owners - inside), *twins, *heads})

    def _head_of(self, own: str) -> str:
        """The module that PEFT keeps whole for the base's task and a tensor lies in, or none."""
        modules = (own[: dot.start()] for dot in re.finditer(r"\.", own))
        ends = self._class.heads
        return next((module for module in modules if ends and module.endswith(ends)), "")

    def _is_tied(self, name: str) -> bool:
        """Whether the class that opens the base has, or may have, further names for a tensor.

        Where the class is not known, an embedding may be the head besides, if the base has none.
        PEFT then writes it into the base, where it is changed under all its names.
        """
        if self._class.twins is not None:
            return self._own(name) in self._class.twins
        kinds = {describe(each, self._base.info(each)).kind for each in self._names}
        own = describe(name, self._base.info(name)).kind
        return own == "token embedding" and not kinds & {"language head", "head"}

    def _own(self, name: str) -> str:
        """The adapter's name of what the base names."""
        return self._adapter_names.get(name, name)

    def _find_names(self) -> dict[str, str]:
        """The adapter's name of each tensor of the base: as in the merged adapters, or the class's.

        Where adapters were trained on another class than the base's configuration names, nothing
        is taken from that class.
        """
        named = {name: name for name in self._base} | dict(self._class.names or {})
        if not self._adapters:
            return named
        first = self._adapters[0]
        if any(first.naming.to_adapter(name) != named[name] for name in first.updates):
            self._class = UNKNOWN
            return {name: first.naming.to_adapter(name) for name in self._base}
        return named

    def _to_output_dtype(self, key: str, value: Tensor, stored: torch.dtype) -> Tensor:
        """A tensor in the dtype that the recipe asks for.

        Raises:
            OutputError: it overflows there.
        """
        stored = torch.promote_types(stored, torch.float32) if stored.is_floating_point else stored
        dtype = written_dtype(self._recipe, stored)
        written = value.to(dtype).clone(memory_format=torch.contiguous_format)
        if dtype.is_floating_point and not bool(torch.isfinite(written).all()):
            raise OutputError(f"{key} does not fit into {dtype}. Choose dtype float32.")
        return written

    def _base_name(self) -> tuple[str, str | None]:
        """The base's name, and its revision where it is on the hub: never a path of this machine.

        That is its name on the hub, or what the merged adapters agree to call it there; else the
        name of its folder, which opens from where that folder lies.
        """
        if is_hub_id(self._base_reference):
            named = HubId.parse(self._base_source or self._base_reference)
            return named.repo, named.revision
        names = {adapter.config.base_model_name_or_path for adapter in self._adapters}
        agreed = names.pop() if len(names) == 1 else ""
        if agreed and not is_place(agreed) and not agreed.startswith("."):
            return agreed, None
        folder = folder_of(self._base)
        return folder.name if describes_model(folder) else self._base.path.stem, None
