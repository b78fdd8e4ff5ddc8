"""The network of a suite, of timm, open_clip or transformers, without classifier.

Nothing is fetched and no code of a checkpoint is run: the libraries build a network with random
weights from a name and arguments, and the suite's weights are put into it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from analysis.networks.build import build_error, build_network
from analysis.networks.classifiers import Classifier, find_classifier
from analysis.networks.encoders import (
    as_encoder,
    build_model,
    configuration_class,
    import_library,
)
from analysis.networks.limits import Size, build_within, find_fetching
from analysis.networks.saved_names import leave_unused, names_in, rename
from analysis.networks.stateless import StatelessNetwork
from merge_core.errors import SuiteError
from merge_core.executors.base import one_thread
from merge_core.suites.architectures import TOWERS
from merge_core.suites.suite import Suite
from merge_core.suites.suite_spec import ArchitectureSpec, Pooling

PROJECTION = "visual_projection.weight"

NUMBER = re.compile(r"\.\d+\.")

Shapes = Mapping[str, tuple[int, ...]]


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
        >>> module = suite_network(load_suite("vision")).module
        >>> type(module).__name__, module.training
        ('VisionTransformer', False)
    """
    architecture = suite.architecture
    if architecture is None:
        raise SuiteError(
            f"The suite {suite.name!r} names no architecture, so its models cannot be run. "
            "Add 'architecture: {name: ..., args: {...}}' to suite.yaml."
        )
    expert = suite.expert(suite.tasks[0])
    shapes, size = {name: expert.info(name).shape for name in expert}, Size.of(expert)
    if architecture.library == "timm":
        network = build_network(architecture, suite.path, SuiteError, num_classes=0, size=size)
    else:
        _check_arguments(architecture, suite.path)
        if architecture.library == "open_clip":
            network = _build_open_clip(architecture, suite.path, size)
        elif is_projected(suite, architecture):
            network = _build_projected(architecture, suite.path, shapes, size)
        else:
            network = _build_encoder(suite, architecture, shapes, size)
    prefix = common_prefix(shapes_of(network), shapes)
    if prefix:
        network = _Nested(prefix[:-1].split("."), network)
    network = network.eval().requires_grad_(False)
    fixed = _copy_from_base(network, suite, shapes)
    return StatelessNetwork(network, architecture, suite.path, SuiteError, fixed=fixed)


def is_projected(suite: Suite, architecture: ArchitectureSpec) -> bool:
    """Whether features are the image embeddings of a CLIP, which the library's classifier and
    another pooling leave out."""
    clip = architecture.library == "transformers" and architecture.name == "clip_vision_model"
    own = any(suite.has_own_head(task) for task in suite.tasks)
    return clip and architecture.pooling is None and not own


def _build_encoder(
    suite: Suite, architecture: ArchitectureSpec, shapes: Shapes, size: Size
) -> nn.Module:
    """An encoder of transformers whose parameters are called as in the suite's checkpoints."""
    own = any(suite.has_own_head(task) for task in suite.tasks)
    classifier = None
    if architecture.pooling is None and (own or architecture.name not in TOWERS):
        classifier = find_classifier(architecture, suite.path, size)
    model = build_model(architecture, suite.path, size, classifier is not None).eval()
    names = names_in(model, shapes)
    prefix = common_prefix({names[name]: shape for name, shape in shapes_of(model).items()}, shapes)
    refuse_deeper(architecture, {prefix + name for name in names.values()}, shapes, suite.path)
    missing = {own for own, saved in names.items() if prefix + saved not in shapes}
    pooling = architecture.pooling or _usual_pooling(architecture, classifier, own, missing)
    try:
        encoder = as_encoder(model, pooling, bool(architecture.normalize))
        leave_unused(encoder, missing)
        return rename(encoder, names)
    except Exception as fault:  # a library's forward passes raise what they like
        raise SuiteError(
            f"{suite.path}: {architecture.name!r} of transformers gives no vector for an input "
            f"({type(fault).__name__}: {' '.join(str(fault).split()):.200}). Correct its "
            "args or 'pooling', or leave it out to study weights only."
        ) from fault


def _usual_pooling(
    architecture: ArchitectureSpec,
    classifier: Classifier | None,
    own_heads: bool,
    missing: Collection[str],
) -> Pooling:
    """What the library's own classifier of a type takes, and of towers their own pooler.

    Weights that lack the pooler give the mean, unless their classifiers take it.
    """
    if classifier is None:
        usual: Pooling = "pooler" if architecture.name in TOWERS else "mean"
    else:
        usual = classifier.pooling
    lacks = usual == "pooler" and any(name.startswith("pooler.") for name in missing)
    return "mean" if lacks and not own_heads else usual


def refuse_deeper(
    architecture: ArchitectureSpec, known: Collection[str], shapes: Shapes, path: Path
) -> None:
    """Refuse an encoder that would leave out layers of the weights.

    Raises:
        SuiteError: the weights have a layer of the same kind with a number that it lacks.
    """
    kinds = {NUMBER.sub(".#.", name) for name in known if NUMBER.search(name)}
    more = [n for n in shapes if n not in known and NUMBER.sub(".#.", n) in kinds]
    if more and any(name in shapes for name in known):
        raise SuiteError(
            f"The weights hold {more[0]!r}, and the architecture {architecture.name!r} has fewer "
            f"layers ({len(more)} parameters would be left out). Correct its args in {path}."
        )


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and buffer that a checkpoint holds, by name."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def common_prefix(expected: Shapes, weights: Shapes) -> str:
    """The prefix under which most of a network's parameters are found in a checkpoint.

    Args:
        expected: shapes of the network's parameters by name.
        weights: of the checkpoint's.

    Returns:
        Such as ``model.visual.``, or empty; the shortest of several that find as many by name and
        shape, and by name alone where no shape fits.
    """
    for compared in (True, False):
        found: Counter[str] = Counter()
        for name, shape in weights.items():
            words = name.split(".")
            for start in range(len(words)):
                end = ".".join(words[start:])
                if end in expected and (not compared or expected[end] == shape):
                    found[name.removesuffix(end)] += 1
        if found:
            return min(found, key=lambda prefix: (-found[prefix], len(prefix)))
    return ""


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
    open_clip = import_library("open_clip", path)
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


def _build_projected(
    architecture: ArchitectureSpec, path: Path, shapes: Shapes, size: Size
) -> nn.Module:
    """The vision half of a CLIP of transformers with its projection, in the layout of the names."""
    configure, args = configuration_class(architecture, path), architecture.args
    transformers = import_library("transformers", path)
    make = transformers.CLIPVisionModelWithProjection
    try:
        whole: Any = build_within(size, args, lambda: make(configure(**args)))
    except Exception as fault:  # wrong arguments raise almost anything, from deep inside
        raise build_error(architecture, path, fault, SuiteError) from fault
    vision, projection = whole.vision_model, whole.visual_projection
    if any(name.startswith("vision_model.") for name in shapes):
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
