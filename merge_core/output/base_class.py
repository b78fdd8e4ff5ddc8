"""The class of transformers that opens the base of an adapter: its task, its ties, its names.

It is looked up by the name in ``config.json`` and built without memory; nothing that lies beside
the weights is run.

Source: ``TaskType`` and ``AutoPeftModel`` of PEFT (https://github.com/huggingface/peft); the names
that transformers gives what it reads: ``transformers.conversion_mapping``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.side_files import read_description
from merge_core.output.layout import folder_of

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
_COUNTS = re.compile(r"layer|depth|block|stage|expert|level", re.IGNORECASE)
# So many are built in seconds, whatever else a number of layers may mean.
FEW = 200
# With these a class may fetch parts of itself, weights included, from elsewhere.
_FETCHES = re.compile(r"^backbone$|^architecture$|pretrained|timm|model_id|repo", re.IGNORECASE)


@dataclass(frozen=True)
class BaseClass:
    """What is known of the class that opens a base.

    Attributes:
        task: PEFT's name of its task; None for what PEFT has no task for, or unknown classes.
        heads: ends of the names of modules that PEFT keeps whole for that task.
        auto_mapping: the class and its module, by which PEFT opens a base without a task.
        names: the class's own name of each of the base's tensors; None where it is not known.
        twins: of a tensor of several names, by the class's name of what the base stores, the
            others; None where they are not known.
    """

    task: str | None = None
    heads: tuple[str, ...] = ()
    auto_mapping: Mapping[str, str] | None = None
    names: Mapping[str, str] | None = None
    twins: Mapping[str, tuple[str, ...]] | None = field(default=None)


UNKNOWN = BaseClass()


def base_class(base: Checkpoint) -> BaseClass:
    """The class that opens a model, from the ``config.json`` in its folder."""
    document = read_description(folder_of(base) / "config.json")
    if not isinstance(document, dict) or not isinstance(document.get("model_type"), str):
        return UNKNOWN
    named = document.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return UNKNOWN
    model = _build(name, document, len(base))
    end, task, heads = next((row for row in TASKS if name.endswith(row[0])), ("", None, ()))
    config = document if model is None else model.config.to_dict()
    if end == "ForConditionalGeneration" and not config.get("is_encoder_decoder"):
        task = None  # such as a language model that sees, which no auto class of a task opens
    if model is None:
        return BaseClass(task, heads)
    mapping = None
    if task is None:
        mapping = {"base_model_class": name, "parent_library": type(model).__module__}
    names = _names(model, base)
    return BaseClass(task, heads, mapping, names, _twins(model, set(names.values())))


def _build(name: str, document: dict[str, Any], tensors: int) -> Any:
    """A model of transformers without memory for its weights; None if there is no such class.

    A configuration that counts more layers than the base has tensors describes another model, and
    might take hours to build; one that names a backbone may have it fetched.
    """
    values = list(_values(document))
    counts = (value for key, value in values if isinstance(value, int) and _COUNTS.search(key))
    fetched = any(isinstance(v, str) and v and _FETCHES.search(key) for key, v in values)
    asked = any(v is True and _FETCHES.search(key) for key, v in values)
    if fetched or asked or any(count > max(tensors, FEW) for count in counts):
        return None
    try:
        import torch

        library = importlib.import_module("transformers")
        cls = getattr(library, name)
        if not issubclass(cls, library.PreTrainedModel):
            return None
        with torch.device("meta"):
            return cls(cls.config_class.from_dict(document))
    except Exception:  # not installed, another version's, or a configuration that it refuses
        return None


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration, each with the name under which it stands."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _values(each, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _values(each, key)
    else:
        yield key, value


def _names(model: Any, base: Checkpoint) -> dict[str, str]:
    """What the class calls each tensor of the base; its own name where that is not one tensor."""
    stored = [name for name in base if name not in base.aliases]
    found = {name: name for name in stored}
    try:
        conversion = importlib.import_module("transformers.conversion_mapping")
        loading = importlib.import_module("transformers.core_model_loading")
        steps = conversion.get_model_conversion_mapping(model)
        simple = [step for step in steps if isinstance(step, loading.WeightRenaming)]
        known, prefix = model.state_dict(), model.base_model_prefix
        for name in stored:
            found[name] = loading.rename_source_key(name, simple, [], prefix, known)[0]
    except Exception:  # a version of transformers that names things in another way
        return {name: name for name in stored}
    alone = set(found.values()) <= set(known) and len(set(found.values())) == len(found)
    return found if alone else {name: name for name in stored}


def _twins(model: Any, stored: set[str]) -> dict[str, tuple[str, ...]]:
    """Tensors that the class has under several names, by the name that is stored."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    found = {}
    for names in groups.values():
        first = next((name for name in names if name in stored), None)
        if first is not None and len(names) > 1:
            found[first] = tuple(name for name in names if name != first)
    return found
