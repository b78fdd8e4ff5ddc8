"""The network that the files beside a model name, in the words of ``suite.yaml``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.compatibility.companions import Companions, companions_of
from merge_core.suites.suite_spec import ArchitectureSpec, Pooling

# A whole model of images and texts stands for its vision tower: the type, the part, and what of
# the whole belongs to it.
WHOLE = {
    "clip": ("clip_vision_model", "vision_config", "projection_dim"),
    "siglip": ("siglip_vision_model", "vision_config", ""),
    "siglip2": ("siglip2_vision_model", "vision_config", ""),
}
TOWERS = frozenset(
    ("clip_vision_model", "clip_text_model", "siglip_vision_model", "siglip2_vision_model")
)
# Fields of a configuration that build no other network: training, tokens, labels, what is returned.
NOT_SHAPE = re.compile(
    r"^_|dropout|_drop$|_pdrop$|drop_path|^initializer|_initializer|^(bos|sep|cls|mask|unk|"
    r"decoder_start|forced_eos|forced_bos)_token_id$|^output_|^return_dict|^use_cache$|"
    r"^(architectures|auto_map|dtype|torch_dtype|transformers_version|model_type|id2label|label2id|"
    r"num_labels|problem_type|tokenizer_class|task_specific_params|gradient_checkpointing|"
    r"stage_names|out_features|out_indices|is_encoder_decoder|tie_word_embeddings)$"
)
# Fields that change nothing about what a model says of a text: training, generation, the names of
# tokens, what is returned, how numbers are stored. Ties are told from the weights.
IRRELEVANT = re.compile(
    r"^_|dropout|_drop$|_pdrop$|^initializer|_initializer|_token_id$|^output_|^return_dict|"
    r"^use_cache$|attn_implementation|name_or_path|"
    r"^(architectures|auto_map|dtype|torch_dtype|transformers_version|model_type|id2label|label2id|"
    r"num_labels|problem_type|tokenizer_class|task_specific_params|gradient_checkpointing|"
    r"is_encoder_decoder|tie_word_embeddings|pretraining_tp|quantization_config|summary_.*|"
    r"max_length|min_length|do_sample|temperature|top_k|top_p|num_beams|repetition_penalty)$"
)
TIMM_NAME = re.compile(r"[a-z0-9_]{1,80}(\.[a-z0-9_]{1,80})?")
MODULES = "modules.json"  # of sentence-transformers: the steps from a text to its vector
# sentence-transformers' names of poolings, in the words of suite.yaml.
POOLINGS: Mapping[str, Pooling] = {"cls": "first", "mean": "mean", "lasttoken": "last"}
MODES = re.compile(r"pooling_mode_(cls|mean|max|mean_sqrt_len|weightedmean|lasttoken)(_tokens?)?")


def read_architecture(member: Checkpoint) -> ArchitectureSpec | None:
    """What the files beside a model name, where they are here and it can be run.

    ``config.json`` says which network it is, sentence-transformers' ``modules.json`` how a text's
    vector is made of the vectors of its tokens.
    """
    files = companions_of(member) if member.files else None
    config = None if files is None else files.document("config.json")
    if files is None or config is None:
        return None
    found = of_config(config)
    return found if found is None else add_pooling(found, files)


def add_pooling(architecture: ArchitectureSpec, files: Companions) -> ArchitectureSpec:
    """An architecture with pooling and normalisation as sentence-transformers' files say.

    What it says of them itself stays. Steps that are neither pooling nor normalisation make
    another vector than features are: then nothing is taken from the files.

    Args:
        architecture: of transformers; any other stays as it is.
        files: beside the model.
    """
    if architecture.library != "transformers":
        return architecture
    steps = _read_steps(files)
    known = {"Transformer", "Pooling", "Normalize"}
    if len(steps) < 2 or steps[0][0] != "Transformer" or {kind for kind, _ in steps} - known:
        return architecture
    pooled = next((path for kind, path in steps if kind == "Pooling"), None)
    pooling = None if pooled is None else _read_pooling(files, pooled)
    if pooling is None:
        return architecture
    update: dict[str, Any] = {}
    if architecture.pooling is None:
        update["pooling"] = pooling
    if architecture.normalize is None and any(kind == "Normalize" for kind, _ in steps):
        update["normalize"] = True
    return architecture.model_copy(update=update)


def _read_steps(files: Companions) -> list[tuple[str, str]]:
    """Kind and folder of each step of ``modules.json``; empty where there is none."""
    listed = files.array(MODULES)
    steps = [
        (step["type"].rpartition(".")[2], step["path"])
        for step in listed or ()
        if isinstance(step, dict)
        and isinstance(step.get("type"), str)
        and isinstance(step.get("path"), str)
    ]
    return steps if len(steps) == len(listed or ()) else []


def _read_pooling(files: Companions, folder: str) -> Pooling | None:
    """The one pooling that a step's configuration names; None for several, or others."""
    config = files.document(f"{folder}/config.json") or {}
    mode = config.get("pooling_mode")
    modes: Sequence[Any] = [mode] if isinstance(mode, str) else mode if mode else ()
    if not modes:  # as all versions before 6 write it
        modes = [
            found[1]
            for name, value in config.items()
            if value is True and (found := MODES.fullmatch(name)) is not None
        ]
    return POOLINGS.get(modes[0]) if len(modes) == 1 and isinstance(modes[0], str) else None


def of_config(config: Mapping[str, Any]) -> ArchitectureSpec | None:
    """The network of a configuration of timm or transformers; None where it cannot be run.

    Example:
        >>> of_config({"architecture": "resnet18", "num_classes": 10}).name
        'resnet18'
        >>> of_config({"model_type": "gpt2", "n_embd": 64, "n_head": 12}).args
        {'n_embd': 64}
    """
    name = config.get("architecture")
    if isinstance(name, str):
        args = config.get("model_args")
        args = args if isinstance(args, dict) else {}
        plain = {k: v for k, v in args.items() if _is_plain(v) and k != "num_classes"}
        fits = TIMM_NAME.fullmatch(name)
        return ArchitectureSpec(name=name.partition(".")[0], args=plain) if fits else None
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in WHOLE:
        kind, part, beside = WHOLE[kind]
        inner = config.get(part)
        inner = inner if isinstance(inner, dict) else {}
        config = {**inner, **({beside: config[beside]} if beside in config else {})}
    if not isinstance(kind, str) or kind not in runnable_types():
        return None
    defaults = type_defaults(kind)
    if defaults.get("is_encoder_decoder"):
        return None
    args = {
        name: value
        for name, value in config.items()
        if name in defaults and not NOT_SHAPE.search(name)
        if _is_plain(value) and value != defaults[name]
    }
    return ArchitectureSpec(name=kind, args=args, library="transformers") if defaults else None


def tell_language_model(members: Iterable[Checkpoint]) -> ArchitectureSpec | None:
    """The network of the first member with a ``config.json`` of a causal language model.

    Unlike an encoder's, its arguments are all that the file says, not what departs from the
    library's defaults: some defaults follow from other fields, and a file of transformers 4 names
    fields (``rope_theta``) that later configurations keep elsewhere.
    """
    for member in members:
        files = companions_of(member) if member.files else None
        config = None if files is None else files.document("config.json")
        if config is not None:
            return of_language_config(config)
    return None


def of_language_config(config: Mapping[str, Any]) -> ArchitectureSpec | None:
    """The network of a configuration of transformers; None where it is no causal language model.

    Example:
        >>> of_language_config({"model_type": "llama", "rope_theta": 5e5, "use_cache": True}).args
        {'rope_theta': 500000.0}
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in causal_types():
        return None
    args = {
        name: value
        for name, value in config.items()
        if not IRRELEVANT.search(name) and _is_plain(value, 3)
    }
    return ArchitectureSpec(name=kind, args=args, library="transformers")


@lru_cache(maxsize=1)
def causal_types() -> frozenset[str]:
    """Types of which transformers has a causal language model; empty where it is not installed."""
    try:
        from transformers.models.auto import modeling_auto as auto
    except ImportError:
        return frozenset()
    return frozenset(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def read_class_names(member: Checkpoint) -> tuple[str, ...] | None:
    """Names of the classes of a classifier, as ``config.json`` beside it says.

    Returns:
        In the order of its outputs (transformers' ``id2label``, timm's ``label_names``); None
        where there are none, or names that a library made up (``LABEL_0``).
    """
    files = companions_of(member) if member.files else None
    config = (None if files is None else files.document("config.json")) or {}
    listed = config.get("label_names")
    by_number = config.get("id2label")
    if isinstance(by_number, dict):
        listed = [by_number.get(str(number)) for number in range(len(by_number))]
    if not isinstance(listed, list) or not listed:
        return None
    names = tuple(name for name in listed if isinstance(name, str))
    made_up = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    return None if made_up or len(set(names)) < len(listed) else names


@lru_cache(maxsize=1)
def runnable_types() -> frozenset[str]:
    """Types of transformers whose encoders are run; empty where it is not installed.

    Those of which the library knows a classifier of texts or images or a masked language model,
    and the towers of CLIP and SigLIP; none that is a wrapper of another library's models.
    """
    try:
        from transformers.models.auto import modeling_auto as auto
    except ImportError:
        return frozenset()
    tables = (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
    classified = {kind for table in tables for kind in table} | TOWERS
    return frozenset(classified & set(auto.MODEL_MAPPING_NAMES)) - {"timm_wrapper", *WHOLE}


@lru_cache(maxsize=64)
def type_defaults(model_type: str) -> Mapping[str, Any]:
    """What transformers' configuration of a type says where a file does not, by field.

    The class is made without any value of the file, so that nothing of a stranger's is run.

    Returns:
        Empty for a type that it does not know, or where it is not installed.
    """
    try:
        from transformers import CONFIG_MAPPING

        defaults: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict()
    except Exception:  # another library's constructors raise what they like
        return {}
    return defaults


def _is_plain(value: object, depth: int = 2) -> bool:
    """Whether a value is a number or text, or a list or table of such."""
    if isinstance(value, list) and depth:
        return bool(value) and all(_is_plain(item, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return all(isinstance(k, str) and _is_plain(v, depth - 1) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)
