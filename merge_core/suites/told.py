"""What the files of a suite's members tell that ``suite.yaml`` leaves out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.parameter_roles import describe
from merge_core.checkpoints.shards import TensorInfo
from merge_core.compatibility.companions import companions_of
from merge_core.suites.architectures import add_pooling, read_architecture
from merge_core.suites.data_spec import OF_TEXTS, DataSpec
from merge_core.suites.preprocessors import read_transform
from merge_core.suites.suite_spec import ArchitectureSpec

# What is called a head and classifies no inputs.
OTHER_HEADS = re.compile(
    r"(^|\.)(cls|vocab_transform|qa_outputs|multiple_choice_head)\."
    r"|(^|\.)head\.(attention|mlp|probe|layernorm)[._]|text_model\.head\."  # SigLIP pools by it
)
# What features are, by the name of a pooling.
POOLED: Mapping[str | None, str] = {
    None: "what the library's own classifier takes",
    "first": "the vector of the first token",
    "last": "the vector of the last token",
    "mean": "the mean over a text's tokens",
    "patches": "the mean over an image's patches",
    "first_and_patches": "the class token and the mean over patches",
    "pooler": "what the model's pooler gives",
}
# CLIP's transform is known without a file.
CLIP = "clip_vision_model"


def tell_architecture(
    given: ArchitectureSpec | None, members: Iterable[Checkpoint], own_heads: bool
) -> ArchitectureSpec | None:
    """The network of a suite: as it is given, else as the files beside the first member say.

    Args:
        given: in suite.yaml.
        members: the base, where there is one, and the experts.
        own_heads: whether classifiers within the experts' checkpoints are the heads: they take
            what their library's class takes, whatever the base's files say of its vectors.
    """
    told = given
    for member in members:
        if told is None:
            told = read_architecture(member)
        elif (files := companions_of(member)) is not None:
            told = add_pooling(told, files)
        if told is not None:
            break
    if told is None or not own_heads:
        return told
    pooling, normalize = (None, None) if given is None else (given.pooling, given.normalize)
    return told.model_copy(update={"pooling": pooling, "normalize": normalize})


def describe_network(
    architecture: ArchitectureSpec, given: bool, own_heads: Collection[str]
) -> str:
    """A suite's network in words, for people: what it is, by whose word, and what its features are.

    Args:
        architecture: of the suite.
        given: whether suite.yaml names it.
        own_heads: tasks whose heads are the classifiers within their checkpoints.

    Example:
        >>> spec = ArchitectureSpec(name="bert", library="transformers", pooling="mean")
        >>> describe_network(spec, True, [])
        "bert of transformers; features: the mean over a text's tokens"
    """
    said = f"{architecture.name} of {architecture.library}"
    if not given:
        said += ", from config.json beside a member"
    if architecture.library == "transformers":
        said += f"; features: {POOLED[architecture.pooling]}"
        if architecture.normalize:
            said += ", divided by their norm"
    if own_heads:
        said += f"; heads within the checkpoints: {', '.join(own_heads)}"
    return said


def describe_language_model(architecture: ArchitectureSpec, given: bool) -> str:
    """A suite's language model in words, for people.

    Args:
        architecture: of the suite.
        given: whether suite.yaml names it.

    Example:
        >>> describe_language_model(ArchitectureSpec(name="gpt2", library="transformers"), True)
        'gpt2 of transformers, as a causal language model'
    """
    told = "" if given else ", from config.json beside a member"
    return f"{architecture.name} of {architecture.library}, as a causal language model{told}"


def holds_classifier(expert: Checkpoint) -> bool:
    """Whether a checkpoint holds, beside its encoder, a classifier of inputs.

    A head with one output is a regression's.
    """
    shapes = [expert.info(n).shape for n in expert if _is_classifier(n, expert.info(n))]
    return min((shape[0] for shape in shapes), default=0) > 1


def _is_classifier(name: str, info: TensorInfo) -> bool:
    if not info.is_floating or len(info.shape) != 2 or OTHER_HEADS.search(name):
        return False
    return describe(name, info).kind == "head"


def complete_data(
    data: DataSpec,
    architecture: ArchitectureSpec | None,
    base: str | None,
    members: Iterable[Checkpoint],
) -> DataSpec:
    """A task's data with the tokenizer, or the transform, that the files beside members tell.

    Args:
        data: as suite.yaml gives it.
        architecture: the suite's.
        base: the base as suite.yaml names it; its folder has the tokenizer.
        members: the base, where there is one, and the experts.
    """
    update: dict[str, Any] = {}
    if data.kind in OF_TEXTS and data.tokenizer is None:
        update["tokenizer"] = base
    by_transformers = architecture is not None and architecture.library == "transformers"
    pictures = data.kind not in OF_TEXTS and data.transform is None and not data.normalised_only
    if by_transformers and pictures and architecture is not None and architecture.name != CLIP:
        update["transform"] = next(filter(None, map(read_transform, members)), None)
    return data.model_copy(update=update) if any(update.values()) else data
