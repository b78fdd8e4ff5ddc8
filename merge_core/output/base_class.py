"""The class of transformers that opens the base of an adapter: its task, its ties, its names.

It is looked up by the name in ``config.json``; nothing that lies beside the weights is run.

Source: ``TaskType`` and ``AutoPeftModel`` of PEFT (https://github.com/huggingface/peft);
``_tied_weights_keys`` of transformers.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_core.checkpoints.side_files import read_json

# Ends of classes' names, what PEFT calls their task, and the modules that it keeps whole for it.
TASKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("ForCausalLM", "CAUSAL_LM", ()),
    ("LMHeadModel", "CAUSAL_LM", ()),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM", ()),
    ("ForSequenceClassification", "SEQ_CLS", ("classifier", "score")),
    ("ForTokenClassification", "TOKEN_CLS", ("classifier", "score")),
    ("ForQuestionAnswering", "QUESTION_ANS", ("qa_outputs",)),
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,100}")


@dataclass(frozen=True)
class BaseClass:
    """What is known of the class that opens a base.

    Attributes:
        task: PEFT's name of its task; None for what PEFT has no task for, or unknown classes.
        heads: ends of the names of modules that PEFT keeps whole for that task.
        auto_mapping: the class and its module, by which PEFT opens a base without a task.
        ties: names of tensors that are others under further names, in the class's own names;
            None where that is not known.
        prefix: what the class puts before the names of its backbone.
    """

    task: str | None = None
    heads: tuple[str, ...] = ()
    auto_mapping: Mapping[str, str] | None = None
    ties: Mapping[str, str] | None = None
    prefix: str = ""

    def twins(self, name: str) -> tuple[str, ...]:
        """Further names of a tensor, in the class's own names."""
        return tuple(twin for twin, first in (self.ties or {}).items() if first == name)


UNKNOWN = BaseClass()


@dataclass(frozen=True)
class _Found:
    cls: Any
    config: Any
    backbone: Any = field(default=None)


def base_class(folder: Path) -> BaseClass:
    """The class that opens a model, from the ``config.json`` in its folder."""
    document = read_json(folder / "config.json")
    if not isinstance(document, dict) or not isinstance(document.get("model_type"), str):
        return UNKNOWN
    named = document.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return UNKNOWN
    found = _find(name, document)
    end, task, heads = next((row for row in TASKS if name.endswith(row[0])), ("", None, ()))
    config = document if found is None else found.config.to_dict()
    if end == "ForConditionalGeneration" and not config.get("is_encoder_decoder"):
        task = None  # such as a language model that sees, which no auto class of a task opens
    if found is None:
        return BaseClass(task=task, heads=heads)
    mapping = None
    if task is None:
        mapping = {"base_model_class": name, "parent_library": found.cls.__module__}
    prefix = str(getattr(found.cls, "base_model_prefix", "") or "")
    return BaseClass(task, heads, mapping, _ties(found, prefix), prefix)


def _find(name: str, document: dict[str, Any]) -> _Found | None:
    """A class of transformers by its name, with its configuration; None if there is none."""
    try:
        library = importlib.import_module("transformers")
        cls = getattr(library, name)
        if not issubclass(cls, library.PreTrainedModel):
            return None
        config = cls.config_class.from_dict(document)
        backbone = library.MODEL_MAPPING.get(type(config), None)
    except Exception:  # not installed, another version's, or a configuration that it refuses
        return None
    return _Found(cls, config, backbone)


def _ties(found: _Found, prefix: str) -> dict[str, str] | None:
    """The class's ties where its configuration asks for them; None if they cannot be told."""
    if not getattr(found.config.get_text_config(decoder=True), "tie_word_embeddings", False):
        return {}
    own = getattr(found.cls, "_tied_weights_keys", None) or {}
    inner = getattr(found.backbone, "_tied_weights_keys", None) or {}
    if not isinstance(own, dict) or not isinstance(inner, dict):  # before transformers 5
        return None
    if isinstance(found.backbone, type) and not issubclass(found.cls, found.backbone):
        own = {f"{prefix}.{twin}": f"{prefix}.{first}" for twin, first in inner.items()} | own
    return {twin: first for twin, first in own.items() if not set(twin + first) & set("*\\()[]^$")}
