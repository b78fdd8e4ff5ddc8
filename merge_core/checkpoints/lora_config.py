"""The configuration of a LoRA adapter as PEFT writes it, and which adapters are refused.

Source: PEFT (https://github.com/huggingface/peft), ``LoraConfig`` and ``get_pattern_key``.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from merge_core.checkpoints.name_patterns import NamePatterns
from merge_core.errors import CheckpointError, explain_validation
from merge_core.input_files import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
MOST_BYTES = 4 << 20
MOST_VALUES = 50_000
LONGEST_PATTERN = 500
MOST_PATTERNS = 2000

# What is not the base's weights plus a product of two thin matrices.
REFUSED: tuple[tuple[str, str], ...] = (
    ("use_dora", "DoRA, which rescales the base's own columns"),
    ("use_qalora", "QALoRA, which pools its inputs"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("alora_invocation_tokens", "activated LoRA, which acts on some tokens only"),
    ("trainable_token_indices", "embeddings trained for single tokens"),
    ("target_parameters", "parameters that are adapted without a layer of their own"),
    ("layer_replication", "layers of the base repeated"),
    ("arrow_config", "routing between adapters"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
    ("velora_config", "VeLoRA"),
)
# Starts that move a part of the base into the adapter: the base as published no longer fits.
STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Rank = Annotated[int, Field(ge=1, le=1 << 20)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]


class AdapterConfig(BaseModel):
    """The fields of ``adapter_config.json`` that determine the update.

    Attributes:
        r: rank of the update of a layer that `rank_pattern` does not match.
        lora_alpha: α of a layer that `alpha_pattern` does not match.
        use_rslora: whether the update is scaled by α/√r instead of α/r.
        fan_in_fan_out: whether layers keep their weights in x out, as GPT-2's do.
        rank_pattern: rank by pattern of the layer's name.
        alpha_pattern: α by pattern of the layer's name.
        modules_to_save: ends of the names of layers whose tensors are stored whole.
        task_type: what it was trained for, as PEFT names it; None if unknown.
        base_model_name_or_path: what it was trained on, for people; never opened.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: Literal["LORA"]
    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Alpha] = {}
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    base_model_name_or_path: str = ""

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, data: Any) -> Any:
        """Refuse kinds of adapters that are no low-rank update; null means the default."""
        if not isinstance(data, dict):
            return data
        kind = data.get("peft_type")
        if kind != "LORA":
            raise ValueError(f"it is an adapter of the kind {kind!r}; only LORA is read")
        for field, what in REFUSED:
            if data.get(field):
                raise ValueError(f"it uses {what} ({field}), which is no low-rank update")
        start = data.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(STARTS_THAT_CHANGE_THE_BASE):
            raise ValueError(
                f"it started from {start!r}, which changes the base's weights as well "
                "(PEFT can convert it: path_initial_model_for_weight_conversion)"
            )
        return {name: value for name, value in data.items() if value is not None}

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_patterns(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        """Refuse regular expressions that are wrong, or could run for hours."""
        if len(patterns) > MOST_PATTERNS:
            raise ValueError(f"there are {len(patterns):,} patterns; {MOST_PATTERNS:,} at most")
        for pattern in patterns:
            heavy = (
                len(pattern) > LONGEST_PATTERN
                or len(re.findall(r"[*+?{]", pattern)) > 2
                or len(re.findall(r"\(", pattern)) > 2
                or re.search(r"\)[*+?{]|\\[1-9]", pattern)
            )
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError):
                heavy = True
            if heavy:
                raise ValueError(f"the pattern {pattern[:60]!r} cannot be used; name the layers")
        return patterns

    @cached_property
    def _ranks(self) -> NamePatterns:
        return NamePatterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> NamePatterns:
        return NamePatterns(self.alpha_pattern)

    def rank_of(self, layer: str) -> int:
        """The rank that is declared for a layer.

        Raises:
            CheckpointError: the patterns would take too long.
        """
        declared = self._ranks.find(layer)
        return self.r if declared is None else int(declared)

    def scale_of(self, layer: str) -> float:
        """The factor s of a layer's update s·B·A: α/r, or α/√r.

        Raises:
            CheckpointError: the patterns would take too long.
        """
        rank, declared = self.rank_of(layer), self._alphas.find(layer)
        alpha = self.lora_alpha if declared is None else declared
        return alpha / (rank**0.5 if self.use_rslora else rank)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read an ``adapter_config.json``.

    Raises:
        CheckpointError: not readable, not JSON, or an adapter that is no low-rank update.
    """
    try:
        document = read_json(path, MOST_BYTES, MOST_VALUES)
        if not isinstance(document, dict):
            raise TypeError
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not an adapter's configuration (a JSON object). Copy it again."
        ) from error
    try:
        return AdapterConfig.model_validate(document)
    except ValidationError as error:
        reason = explain_validation(error).removeprefix("the whole document: ")
        raise CheckpointError(
            f"The adapter {path.parent} cannot be read: {reason}. Merge it into its base with "
            "PEFT (merge_and_unload) and give the whole model instead."
        ) from error
