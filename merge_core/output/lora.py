"""A merge written as a LoRA adapter over the suite's base, in PEFT's layout.

Each matrix's update (merged − base) is cut to its leading directions, SVD_k = B·A; what no such
product can hold and has changed (norms, biases, embeddings) is stored whole.

Source: the best rank-k approximation, Eckart and Young 1936; the layout is PEFT's
(https://github.com/huggingface/peft).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save
from torch import Tensor

from merge_core.checkpoints.lora import PREFIX, AdaptedCheckpoint, Naming, is_stored_transposed
from merge_core.checkpoints.lora_config import CONFIG_FILE, WEIGHT_FILES
from merge_core.checkpoints.parameter_roles import treatment
from merge_core.checkpoints.shards import TensorInfo
from merge_core.errors import OutputError, RecipeError, SuiteError
from merge_core.executors.base import Executor, one_thread
from merge_core.executors.local import Threads
from merge_core.factors.decomposition import decompose
from merge_core.factors.low_rank import as_matrix, count_directions, resolution
from merge_core.factors.store import FactorStore
from merge_core.files import check_output, write_folder_atomically
from merge_core.hub.files import HubId, is_hub_id
from merge_core.merging.engine import check_fits, check_recipe, merge_parameters, written_dtype
from merge_core.merging.recipe import Recipe
from merge_core.methods.declaration import Rank
from merge_core.methods.spectral import energy_rank
from merge_core.output.model_card import model_card
from merge_core.output.provenance import HEADER_KEY, provenance
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroups

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


def merge_to_adapter(
    recipe: Recipe,
    suite: Suite,
    output: Path,
    rank: AdapterRank,
    store: FactorStore | None = None,
    progress: Progress | None = None,
    learned: Any = None,
    executor: Executor | None = None,
) -> AdapterReport:
    """Merge, and write the result as an adapter of the suite's base.

    Memory holds one parameter at a time as a merge does, and the adapter itself.

    Args:
        recipe: what to do.
        suite: the suite that it names, with a base.
        output: folder to make (absent or empty).
        rank: how many directions are kept.
        store: where factors are kept.
        progress: reports each parameter; cancels between two.
        learned: what a method that needs data has learnt from it.
        executor: where parameters are merged.

    Raises:
        SuiteError: no base, or members that do not fit.
        RecipeError: a method that gives one model per task.
        OutputError: nothing for an adapter to hold, or the folder cannot be written.
        CheckpointError, ExecutorError, Cancelled: as for a merge.

    Example:
        >>> recipe = make_recipe({"method": "average", "tasks": ("digits", "dots")})
        >>> suite, rank = load_suite("demo"), AdapterRank(rank=4)
        >>> report = merge_to_adapter(recipe, suite, Path("adapter"), rank)
        >>> set(report.ranks.values()), report.energy < 1
        ({4}, True)
    """
    check_output(output)
    tasks = suite.select(recipe.tasks)
    if suite.base is None:
        raise SuiteError(
            f"The suite {suite.name!r} names no base, which an adapter is relative to. Add "
            "'base:' to suite.yaml, or write the whole model."
        )
    if recipe.declaration.indexed:
        raise RecipeError(
            f"{recipe.declaration.title} gives one model per task. Write whole models instead."
        )
    check_fits(suite, tasks)
    check_recipe(suite, recipe)
    store = store or FactorStore()
    groups = TensorGroups(suite, tasks, store)
    with write_folder_atomically(output) as staging, torch.no_grad(), one_thread():
        about = provenance(recipe, suite, store.route)
        draft = _Draft(suite, tasks, rank, recipe)
        tensors = merge_parameters(recipe, groups, progress, None, learned, executor or Threads())
        for name, value in tensors:
            draft.take(name, value)
        state, config = draft.finish()
        notes = {"format": "pt", HEADER_KEY: about.to_header()}
        (staging / WEIGHT_FILES[0]).write_bytes(save(state, notes))
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (staging / "recipe.yaml").write_text(recipe.publish(suite).to_yaml(), encoding="utf-8")
        card = (
            f"{model_card(recipe, suite, about)}\n## Adapter\n\nA LoRA adapter of the base: "
            f"{draft.report.sentences()}\n\n"
            "Load it with `peft.PeftModel.from_pretrained(base_model, FOLDER)`.\n"
        )
        (staging / "README.md").write_text(card, encoding="utf-8")
        for member in suite.members(tasks):
            member.check_unchanged()
    return draft.report


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


class _Draft:
    """Takes merged tensors one after another and keeps what an adapter needs of them."""

    def __init__(
        self, suite: Suite, tasks: Sequence[str], rank: AdapterRank, recipe: Recipe
    ) -> None:
        assert suite.base is not None
        self.report = AdapterReport()
        self._base, self._base_reference = suite.base, suite.spec.base or ""
        self._rank, self._recipe = rank, recipe
        members = [suite.expert(task) for task in tasks]
        self._adapters = [m for m in members if isinstance(m, AdaptedCheckpoint)]
        self._naming = self._adapters[0].naming if self._adapters else Naming()
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
        if layer is None:
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
            layer = self._naming.to_adapter(name).removesuffix(".weight")
            ranks[layer] = self.report.ranks[name]
            kind, end = ("lora_embedding", "") if pair.layer.embedding else ("lora", ".weight")
            for part, value in (("A", pair.A), ("B", pair.B)):
                key = f"{PREFIX}{layer}.{kind}_{part}{end}"
                state[key] = self._to_output_dtype(key, value, torch.float32)
        saved = self._saved_layers(ranks)
        placed = self._place_whole(state, saved, ranks)
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {f"^{re.escape(layer)}": k for layer, k in ranks.items() if k != usual}
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": self._base_name(),
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
        self, state: dict[str, Tensor], saved: list[str], adapted: Iterable[str]
    ) -> bool:
        """Add the tensors that are stored whole; True if any is the bias of an adapted layer."""
        biases = {f"{layer}.bias": f"{layer}.base_layer.bias" for layer in adapted}
        in_base = []
        for name in self._base:
            own = self._naming.to_adapter(name)
            changed = self._whole.get(name)
            inside = own.rpartition(".")[0] in saved
            if changed is None and not inside:
                continue
            value = self._base.tensor(name) if changed is None else changed
            key = PREFIX + biases.get(own, own)
            state[key] = self._to_output_dtype(key, value, self._base.info(name).dtype.torch)
            if not inside:
                in_base.append(name)
        self.report.in_base = tuple(in_base)
        return any(self._naming.to_adapter(name) in biases for name in in_base)

    def _saved_layers(self, adapted: Iterable[str]) -> list[str]:
        """Layers with changed tensors that PEFT can keep as whole copies.

        A layer qualifies if it holds tensors only, is not adapted, and its name is the end of no
        other's (PEFT matches ends).
        """
        names = [self._naming.to_adapter(name) for name in self._base]
        layers = {name[: dot.start()] for name in names for dot in re.finditer(r"\.", name)}
        parents = {layer.rpartition(".")[0] for layer in layers}
        adapted = set(adapted)

        def qualifies(layer: str) -> bool:
            alike = any(other != layer and other.endswith(layer) for other in layers)
            return bool(layer) and layer not in parents and layer not in adapted and not alike

        owners = {self._naming.to_adapter(name).rpartition(".")[0] for name in self._whole}
        return sorted(filter(qualifies, owners))

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

    def _base_name(self) -> str:
        """The base's name on the hub, or what the merged adapters agree to call it."""
        if is_hub_id(self._base_reference):
            return HubId.parse(self._base_reference).repo
        names = {adapter.config.base_model_name_or_path for adapter in self._adapters}
        return names.pop() if len(names) == 1 else ""
