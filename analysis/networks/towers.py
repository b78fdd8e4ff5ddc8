"""Networks of open_clip and transformers from their configuration alone, without classifiers.

Nothing is fetched and no code of a checkpoint is run: the libraries build a network with random
weights from a name and arguments, and the suite's weights are put into it.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from analysis.networks.build import build_error, build_network
from analysis.networks.limits import Size, build_within, find_fetching
from analysis.networks.stateless import StatelessNetwork
from merge_core.errors import SuiteError
from merge_core.executors.base import one_thread
from merge_core.suites.suite import Suite
from merge_core.suites.suite_spec import ArchitectureSpec

PROJECTION = "visual_projection.weight"
_EXTRAS = {"open_clip": ("open_clip_torch", "clip"), "transformers": ("transformers", "text")}


@dataclass(frozen=True)
class Kind:
    """How transformers builds a type of model, and what its classifiers take of it.

    Attributes:
        config: class of its configuration.
        model: its class.
        within: how a classifier calls the model, in the names of parameters.
        token: of text models, the token whose features are classified.
        more: arguments beside the configuration.
    """

    config: str
    model: str
    within: str = ""
    token: Literal["first", "last"] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


# By the type in config.json.
MODELS = {
    "clip_vision_model": Kind("CLIPVisionConfig", "CLIPVisionModelWithProjection"),
    "gpt2": Kind("GPT2Config", "GPT2Model", "transformer", "last"),
    "roberta": Kind(
        "RobertaConfig", "RobertaModel", "roberta", "first", {"add_pooling_layer": False}
    ),
}


class _Nested(nn.Module):
    """A network under another name, so that its parameters are called as in a checkpoint."""

    def __init__(self, path: list[str], network: nn.Module) -> None:
        super().__init__()
        first, *rest = path
        self.add_module(first, _Nested(rest, network) if rest else network)

    def forward(self, images: Tensor) -> Any:
        return next(self.children())(images)


class _ProjectedVision(nn.Module):
    """The vision half of a CLIP of transformers, named as in a whole CLIP."""

    def __init__(self, vision_model: nn.Module, visual_projection: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.visual_projection = visual_projection

    def forward(self, images: Tensor) -> Any:
        return self.visual_projection(self.vision_model(pixel_values=images).pooler_output)


class _TextFeatures(nn.Module):
    """A text model, giving the features of one token of each text."""

    def __init__(self, name: str, model: nn.Module, token: Literal["first", "last"]) -> None:
        super().__init__()
        self.add_module(name, model)
        self._token = token
        config: Any = model.config
        self._filler = config.pad_token_id or 0

    def forward(self, tokens: Tensor) -> Any:
        """Features, N x width, of tokens, N x L, which are negative after the end of a text."""
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError("it takes texts, and these are images")
        there = tokens >= 0
        longest = max(int(there.sum(dim=1).max()), 1)
        tokens, there = tokens[:, :longest], there[:, :longest]
        model = next(self.children())
        hidden = model(
            input_ids=torch.where(there, tokens, self._filler), attention_mask=there.long()
        ).last_hidden_state
        if self._token == "first":
            return hidden[:, 0]
        return hidden[torch.arange(len(hidden)), (there.sum(dim=1) - 1).clamp(min=0)]


@one_thread()
def suite_network(suite: Suite) -> StatelessNetwork:
    """The network that a suite names, without classifier.

    Its parameters are called as in the suite's checkpoints. A CLIP of transformers that was
    fine-tuned as ``CLIPVisionModel`` leaves the projection out, which all experts share: the
    base's own counts then.

    Raises:
        SuiteError: no architecture, one that its library does not know or cannot build, or a
            library that is not installed.
        CheckpointError: an expert or base that cannot be opened.

    Example:
        >>> module = suite_network(load_suite("demo")).module
        >>> type(module).__name__, module.training
        ('VisionTransformer', False)
    """
    architecture = suite.spec.architecture
    if architecture is None:
        raise SuiteError(
            f"The suite {suite.name!r} names no architecture, so its models cannot be run. "
            "Add 'architecture: {name: ..., args: {...}}' to suite.yaml."
        )
    expert = suite.expert(suite.tasks[0])
    names, size = frozenset(expert), Size.of(expert)
    if architecture.library == "timm":
        network = build_network(architecture, suite.path, SuiteError, num_classes=0, size=size)
    else:
        _check_arguments(architecture, suite.path)
        if architecture.library == "open_clip":
            network = _build_open_clip(architecture, suite.path, size)
        else:
            network = _build_transformers(architecture, suite.path, names, size)
    prefix = common_prefix(network.state_dict(), names)
    if prefix:
        network = _Nested(prefix[:-1].split("."), network)
    network = network.eval().requires_grad_(False)
    fixed = _copy_from_base(network, suite, names)
    return StatelessNetwork(network, architecture, suite.path, SuiteError, fixed=fixed)


def common_prefix(expected: Collection[str], names: Collection[str]) -> str:
    """The prefix under which most of a network's parameters are found in a checkpoint.

    Args:
        expected: names of the network's parameters.
        names: of the checkpoint's.

    Returns:
        Such as ``model.visual.``, or empty; the shortest of several that find as many.
    """
    known = set(names)
    anchor = max(expected, key=lambda name: (name.count("."), len(name)))
    candidates = {""} | {n.removesuffix(anchor) for n in known if n.endswith(f".{anchor}")}
    return min(candidates, key=lambda p: (-sum(p + name in known for name in expected), len(p)))


def _copy_from_base(network: nn.Module, suite: Suite, names: Collection[str]) -> frozenset[str]:
    """Give the projection the base's values where experts lack it; the names of what was given."""
    own = network.state_dict()
    if PROJECTION not in own or PROJECTION in names:
        return frozenset()
    if suite.base is None or PROJECTION not in suite.base:
        raise SuiteError(
            f"The experts of {suite.name!r} are vision models without {PROJECTION!r}, which "
            "features need. Give the CLIP they were fine-tuned from as the suite's base."
        )
    value = suite.base.tensor(PROJECTION)
    if value.shape != own[PROJECTION].shape:
        raise SuiteError(
            f"{PROJECTION!r} of the base has shape {tuple(value.shape)}, but the architecture "
            f"needs {tuple(own[PROJECTION].shape)}. Correct its args in {suite.path}."
        )
    own[PROJECTION].copy_(value)  # own shares the network's memory
    return frozenset({PROJECTION})


def _check_arguments(architecture: ArchitectureSpec, path: Path) -> None:
    """Refuse a name or arguments by which the library would fetch or open something.

    Raises:
        SuiteError: there is one.
    """
    name = architecture.name
    if architecture.library == "open_clip":
        name = name.replace("/", "-")  # the old way of writing, as in ViT-B/32
    if (fetching := find_fetching(name, architecture.args)) is not None:
        raise SuiteError(
            f"{path}: architecture: {fetching} would have {architecture.library} fetch or open "
            "files. Give its plain name there and arguments of its shape; the weights come from "
            "the suite."
        )


def _build_open_clip(architecture: ArchitectureSpec, path: Path, size: Size) -> nn.Module:
    """A visual tower of open_clip; arguments replace those of the named configuration."""
    open_clip = _import_library("open_clip", path)
    known = open_clip_config(open_clip, architecture.name)
    if known is None:
        near = [name for name in open_clip.list_models() if name[:6] == architecture.name[:6]]
        raise SuiteError(
            f"{path}: open_clip knows no architecture {architecture.name!r:.80}."
            + (f" Similar: {', '.join(near[:4])}." if near else "")
        )
    args = dict(architecture.args)
    try:
        vision = {**known.pop("vision_cfg"), **args.pop("vision_cfg", {})}
        vision.pop("timm_model_pretrained", None)  # weights are not fetched
        _check_trunk(vision.get("timm_model_name"))
        whole = {key: known[key] for key in ("embed_dim", "quick_gelu") if key in known} | args

        def build() -> nn.Module:
            clip = open_clip.CLIP(
                vision_cfg=open_clip.CLIPVisionCfg(**vision),
                # The text half is not used: as small as it can be.
                text_cfg=open_clip.CLIPTextCfg(
                    context_length=1, vocab_size=1, width=8, heads=1, layers=1
                ),
                **whole,
            )
            visual: nn.Module = clip.visual
            return visual

        return build_within(size, [vision, whole], build)
    except Exception as fault:  # wrong arguments raise almost anything, from deep inside
        raise build_error(architecture, path, fault, SuiteError) from fault


def open_clip_config(open_clip: Any, name: str) -> dict[str, Any] | None:
    """A configuration that comes with open_clip; None for any other name, which it would fetch."""
    plain = name.replace("/", "-")
    if plain not in open_clip.list_models():
        return None
    config: dict[str, Any] | None = open_clip.get_model_config(plain)
    return config


def _check_trunk(name: Any) -> None:
    """Refuse a trunk of timm that is none of its own: it would be fetched.

    Raises:
        ValueError: it is not.
    """
    import timm

    if name is not None and not timm.is_model(name):
        raise ValueError(f"timm knows no model {name!r:.80}")


def _build_transformers(
    architecture: ArchitectureSpec, path: Path, names: Collection[str], size: Size
) -> nn.Module:
    """A model of transformers, in the layout of the names."""
    transformers = _import_library("transformers", path)
    name = architecture.name
    if name not in MODELS:
        raise SuiteError(
            f"{path}: of transformers, {', '.join(MODELS)} can be run, not {name!r:.80}. Leave the "
            "architecture out: merging and analysis of the weights need none."
        )
    kind = MODELS[name]
    configure, args = getattr(transformers, kind.config), architecture.args
    fields = configure().to_dict()
    if unknown := [argument for argument in args if argument not in fields]:
        raise SuiteError(
            f"{path}: a {kind.config} of transformers has no {unknown[0]!r:.80}. Correct the args."
        )
    make = getattr(transformers, kind.model)
    try:
        whole: Any = build_within(size, args, lambda: make(configure(**args), **kind.more))
    except Exception as fault:  # wrong arguments raise almost anything, from deep inside
        raise build_error(architecture, path, fault, SuiteError) from fault
    if kind.token is not None:
        return _TextFeatures(kind.within, whole, kind.token)
    vision, projection = whole.vision_model, whole.visual_projection
    if any(name.startswith("vision_model.") for name in names):
        return _ProjectedVision(vision, projection)
    return _build_bare(vision, projection)


def _build_bare(vision_model: nn.Module, projection: nn.Module) -> nn.Module:
    """A vision model that projects its own output: how transformers 5 names what it saves."""

    class Bare(type(vision_model)):  # type: ignore[misc]
        def forward(self, images: Tensor) -> Any:
            return self.visual_projection(super().forward(pixel_values=images).pooler_output)

    vision_model.add_module("visual_projection", projection)
    vision_model.__class__ = Bare
    return vision_model


def _import_library(name: str, path: Path) -> Any:
    """An optional library.

    Raises:
        SuiteError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as fault:
        package, extra = _EXTRAS[name]
        raise SuiteError(
            f"{path} names an architecture of {name}, but {package} is not installed. Run "
            f"pip install 'mergescope[{extra}]'."
        ) from fault
