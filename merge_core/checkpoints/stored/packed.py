"""Tensors that are no weights by themselves: packed, scaled, flattened, or factors of an adapter.

A merge of their entries would be neither model. They are told by the names and dtypes that the
libraries which write them use: bitsandbytes, GPTQ and AWQ, compressed-tensors, fp8 with scales,
HQQ, torchao, Quanto, AQLM, MXFP4 and others; PEFT, kohya's sd-scripts, diffusers and LyCORIS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from merge_core.checkpoints.dtypes import Dtype
from merge_core.errors import CheckpointError
from merge_core.input_files import read_bounded

CONFIG_BYTES = 10_000_000
UNPACK = (
    "Give the weights that it was made from, or save it dequantised first (in transformers: "
    "model.dequantize(), then save_pretrained)."
)
# A format, the end of a name that tells it, and ends of which one must stand beside it.
FORMATS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("bitsandbytes int8", ".SCB", (".weight",)),
    ("bitsandbytes int8", ".weight_format", (".weight",)),
    ("bitsandbytes NF4 or FP4", ".weight.absmax", (".weight",)),
    ("bitsandbytes NF4 or FP4", ".weight.quant_map", (".weight",)),
    ("GPTQ or AWQ", "qweight", ("qzeros", "scales")),
    ("compressed-tensors", ".weight_packed", (".weight_scale", ".weight_shape")),
    ("HQQ", ".W_q", (".scale", ".zero", ".meta", ".nbits", ".group_size", ".shape")),
    ("torchao", "_weight_qdata", ("_weight_scale", "_weight_scale_and_zero")),
    ("VPTQ", ".indices", (".centroids.weight",)),
    ("SpQR", ".dense_weights", (".row_offsets", ".col_vals")),
    ("Quanto", ".weight._data", (".weight._scale",)),
    ("AQLM", ".codes", (".codebooks",)),
    ("QuIP#", ".Qidxs", (".SU", ".SV")),
    ("MXFP4", "_blocks", ("_scales",)),
    ("EXL2", ".q_weight", (".q_scale", ".q_invperm")),
)
ENDS = tuple(end for _, end, _ in FORMATS)
FOUR_BIT = re.compile(r"\.quant_state\.bitsandbytes__(\w+)$")
FLAT = re.compile(r"(^|[._])flat_param(_\d+)?$")
# How adapters' libraries end the names of factors, scales and masks.
FACTORS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("LoRA", re.compile(r"(^|[._])lora_(embedding_)?[AB](\.|$)")),
    ("LoRA", re.compile(r"(^|[._])lora_(up|down|mid)(\.|$)")),
    ("LoRA", re.compile(r"(^|[._])lora(_linear_layer)?\.(up|down)\.")),
    ("DoRA", re.compile(r"(^|[._])(lora_magnitude_vector|dora_scale)(\.|$)")),
    ("LoHa", re.compile(r"(^|[._])hada_[wt][12](_[ab])?(\.|$)")),
    ("LoKr", re.compile(r"(^|[._])lokr_([wt][12])(_[ab])?(\.|$)")),
    ("IA3", re.compile(r"(^|[._])ia3_l(\.|$)")),
    ("OFT", re.compile(r"(^|[._])b?oft_(blocks|diag|R|r|s)(\.|$)")),
    ("VeRA", re.compile(r"(^|[._])vera_(lambda_[bd]|A|B)(\.|$)")),
    ("prompt-tuning", re.compile(r"^prompt_embeddings$")),
)
IN_FACTORS = re.compile(r"lora|dora_scale|hada_|lokr_|ia3_l|oft_|vera_|prompt_embeddings")


class Info(Protocol):
    """Shape and dtype of a stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    @property
    def dtype(self) -> Dtype:
        """The stored dtype."""


def check_plain(infos: Mapping[str, Info], where: str, folder: Path | None = None) -> None:
    """Refuse tensors that are packed, scaled or flattened, or factors of an adapter.

    Args:
        infos: shape and dtype by name.
        where: the file, for messages.
        folder: where a ``config.json`` may name how weights are quantised; None for none.

    Raises:
        CheckpointError: there is such a tensor.
    """
    _check_no_factors(infos, where)
    found = _packed(infos)
    declared = _quantisation(folder) if found or _has_bytes(infos) else ""
    if found is None and declared and (name := next(_one_byte_matrices(infos), None)):
        found = ("a quantised format", name)
    if found is not None:
        kind, name = found
        named = f" ({declared} by config.json)" if declared else ""
        raise CheckpointError(
            f"{where} holds weights packed or scaled as {kind}{named}, such as {name!r}, whose "
            f"numbers cannot be merged. {UNPACK}"
        )


def _check_no_factors(names: Collection[str], where: str) -> None:
    """Refuse factors of an adapter, which change a model only with its base.

    Raises:
        CheckpointError: there are some.
    """
    for name in names:
        if not IN_FACTORS.search(name):
            continue
        kind = next((kind for kind, pattern in FACTORS if pattern.search(name)), None)
        if kind is None:
            continue
        if any(".base_layer." in other for other in names):
            raise CheckpointError(
                f"{where} is a model with a {kind} adapter inside that is not merged into it (such "
                f"as {name!r}). Merge it with PEFT (merge_and_unload) and save it again."
            )
        raise CheckpointError(
            f"{where} holds parts of a {kind} adapter (such as {name!r}), which are no model: put "
            "PEFT's adapter_config.json beside adapter_model.safetensors, give their folder and "
            "name the base in the suite, or fuse the adapter into its base with the library that "
            "made it and give the whole model."
        )


def _packed(infos: Mapping[str, Info]) -> tuple[str, str] | None:
    """The format of packed weights and a tensor that shows it, or None; the surest sign first."""
    for sign in (_own_names, _beside, _scaled):
        found = next(sign(infos), None)
        if found is not None:
            return found
    return None


def _own_names(infos: Mapping[str, Info]) -> Iterator[tuple[str, str]]:
    for name in infos:
        if four := FOUR_BIT.search(name):
            yield f"bitsandbytes {four[1].upper()}", name
        if FLAT.search(name):
            yield "flattened parameters of FSDP", name


def _beside(infos: Mapping[str, Info]) -> Iterator[tuple[str, str]]:
    for name in infos:
        for kind, end, beside in FORMATS if name.endswith(ENDS) else ():
            layer = name.removesuffix(end)
            if layer != name and any(f"{layer}{other}" in infos for other in beside):
                yield kind, name


def _scaled(infos: Mapping[str, Info]) -> Iterator[tuple[str, str]]:
    for name, info in infos.items():
        if info.dtype.itemsize == 1 and info.dtype.name != "bool" and len(info.shape) > 1:
            family = "fp8" if info.dtype.is_floating_point else info.dtype.name
            yield from ((f"{family} with scales", n) for n in _scales(name) if n in infos)


def _scales(name: str) -> Iterator[str]:
    """The names under which the scales of a weight may lie."""
    layer, dot, own = name.rpartition(".")
    for end in ("_scale", "_scale_inv", "_scales", "_scale_2", ".scale", ".scale_inv", "._scale"):
        yield name + end
    yield f"{layer}{dot}scale_{own}"
    if own == "weight":
        yield from (f"{layer}{dot}{end}" for end in ("scale", "scales", "weights_scaling_factor"))


def _one_byte_matrices(infos: Mapping[str, Info]) -> Iterator[str]:
    for name, info in infos.items():
        if info.dtype.itemsize == 1 and info.dtype.is_floating_point and len(info.shape) > 1:
            yield name


def _has_bytes(infos: Mapping[str, Info]) -> bool:
    return next(_one_byte_matrices(infos), None) is not None


def _quantisation(folder: Path | None) -> str:
    """The method of quantisation that ``config.json`` names, in words fit for a message."""
    if folder is None:
        return ""
    try:
        document = json.loads(read_bounded(folder / "config.json", CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return ""
    settings = document.get("quantization_config") if isinstance(document, dict) else None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if settings is None:
        return ""
    return method if isinstance(method, str) and re.fullmatch(r"[\w.-]{1,40}", method) else "named"
