"""Adapters over a base whose language head is its embedding.

PEFT changes each module by itself: where an adapter changes one of the two, the other keeps what
it was, and the head is no longer the embedding. With ``ensure_weight_tying`` its file holds both. A
tensor that an adapter's file holds without
``modules_to_save`` is written into the base itself, and so into both.

Source: ``ModulesToSaveWrapper``, ``get_peft_model_state_dict`` and ``set_peft_model_state_dict``
of PEFT (https://github.com/huggingface/peft), measured on version 0.21.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.parameter_roles import VOCABULARY, describe
from merge_core.checkpoints.shards import TensorInfo
from merge_core.checkpoints.side_files import read_description
from merge_core.checkpoints.tied import declares_tied, ties
from merge_core.errors import CheckpointError

# Tasks of PEFT in which a model is used with its language head, and classes that have one.
TASKS_WITH_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
CLASSES_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")
INSTEAD = "Merge it into its base with PEFT (merge_and_unload) and give the whole model instead."


def with_own_head(base: Checkpoint, layers: Mapping[str, TensorInfo]) -> Checkpoint:
    """A base that holds its tied head once, with a name for the head that an adapter changes.

    Args:
        base: of the adapter.
        layers: by the name of a weight that the adapter changes, a header of the width that it
            has there; prefixes as the adapter has them.

    Returns:
        The base itself where it has all these names, or its config.json declares nothing tied.
    """
    if not declares_tied(base):
        return base
    embeddings = [n for n in base if describe(n, base.info(n)).kind == "token embedding"]
    for name, info in layers.items():
        lacking = not any(n == name or n.endswith(f".{name}") for n in base)
        if lacking and describe(name, info).kind == "language head":
            alike = [n for n in embeddings if base.info(n).shape[1:] == info.shape[1:]]
            if len(alike) == 1:
                base = base.with_alias(name, alike[0])
    return base


def spread_whole(
    base: Checkpoint, whole: Mapping[str, str], wrapped: Collection[str]
) -> dict[str, str]:
    """Tensors that an adapter stores whole, under all names that loading them changes.

    Args:
        base: of the adapter.
        whole: key in the adapter's file by the base's name.
        wrapped: those of these names that PEFT keeps beside the base (``modules_to_save``).
    """
    found = dict(whole)
    for names in ties(base):
        for name in names:
            if name in whole and name not in wrapped:
                found |= {other: whole[name] for other in names if other not in whole}
    return found


def check_tied(path: Path, base: Checkpoint, changed: Iterable[str], task_type: str | None) -> None:
    """Refuse an adapter of whose effect on a tied head no weights can tell.

    Args:
        path: of the adapter, for messages.
        base: with a name for the head where there is one.
        changed: names of the base's tensors that the adapter changes by themselves.
        task_type: PEFT's name of what the adapter was trained for.

    Raises:
        CheckpointError: it changes a tied embedding alone, and the base's files do not name the
            head; or the base is an encoder-decoder, which scales by whether its head is tied.
    """
    document = read_description(base.files[0].parent / "config.json") if base.files else None
    if not declares_tied(base) or not _has_head(document, task_type):
        return
    tied = {name for names in ties(base) for name in names}
    scales = isinstance(document, dict) and document.get("is_encoder_decoder") is True
    for name in changed:
        kind = describe(name, base.info(name)).kind if name in base else ""
        if kind in VOCABULARY and (name not in tied or scales):
            raise CheckpointError(
                f"The adapter {path} changes {name!r}, and its base keeps its language head in "
                f"the same tensor (tie_word_embeddings), which PEFT leaves as it was. {INSTEAD}"
            )


def _has_head(document: Any, task_type: str | None) -> bool:
    """Whether the adapted model is used with its language head."""
    if task_type is not None:
        return task_type in TASKS_WITH_HEAD
    classes = document.get("architectures") if isinstance(document, dict) else None
    return isinstance(classes, list) and any(str(c).endswith(CLASSES_WITH_HEAD) for c in classes)
