"""The published merging benchmarks as suites that are ready to run: ``suite init --preset NAME``.

Vision, two protocols that never share a column: FusionBench's, with vision models of transformers
and zero-shot heads made by CLIP's text tower, and that of Task Arithmetic, TALL-masks and CART,
with encoders of open_clip and heads stored as pickles. Text: GPT-2 and RoBERTa on GLUE.

Sources: github.com/tanganke/fusion_bench (``config/modelpool``, ``docs/modelpool``);
huggingface.co/nik-dim/tall_masks; huggingface.co/vanillaOVO/roberta_base_glue_ckpts (of
MergeLM, arXiv:2311.03099).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from merge_core.errors import SuiteError
from merge_core.opening.benchmark_tasks import (
    GLUE,
    GLUE_TASKS,
    VISION_TASKS,
    TextTask,
    VisionTask,
)
from merge_core.suites.suite_spec import SuiteSpec

Protocol = Literal["FusionBench", "TALL-masks", "GLUE"]
COUNTS = (8, 14, 20)


@dataclass(frozen=True)
class ClipModel:
    """One size of CLIP's vision transformer, as each library calls it.

    Attributes:
        short: as in the names of presets.
        title: as in the papers.
        hub: name of the whole CLIP in transformers, without the organisation.
        open_clip: name of the configuration in open_clip; OpenAI's weights need its QuickGELU.
        folder: where huggingface.co/nik-dim/tall_masks keeps its checkpoints.
        args: of transformers' ``CLIPVisionConfig``, as far as they are not its defaults.
    """

    short: str
    title: str
    hub: str
    open_clip: str
    folder: str
    args: dict[str, Any]


CLIP_MODELS = (
    ClipModel(
        "b-32",
        "CLIP ViT-B/32",
        "clip-vit-base-patch32",
        "ViT-B-32-quickgelu",
        "ViT-B-32",
        {"patch_size": 32},
    ),
    ClipModel(
        "b-16",
        "CLIP ViT-B/16",
        "clip-vit-base-patch16",
        "ViT-B-16-quickgelu",
        "VIT-B-16",  # spelt so there
        {"patch_size": 16},
    ),
    ClipModel(
        "l-14",
        "CLIP ViT-L/14",
        "clip-vit-large-patch14",
        "ViT-L-14-quickgelu",
        "ViT-L-14",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "projection_dim": 768,
        },
    ),
)


@dataclass(frozen=True)
class PresetTask:
    """A task of a benchmark: its names and sizes.

    Attributes:
        name: as in the suite.
        title: as in the papers' tables.
        classes: number of classes; 1 is a regression.
        train: images or examples of the training split.
        test: those of the split that is reported.
    """

    name: str
    title: str
    classes: int
    train: int
    test: int


@dataclass(frozen=True)
class Preset:
    """One published setting.

    Attributes:
        name: what ``--preset`` takes.
        title: model and number of tasks.
        protocol: whose data and heads; figures of two protocols are never compared.
        tasks: in the order of the suite.
        spec: the suite; paths are relative to where it is written.
    """

    name: str
    title: str
    protocol: Protocol
    tasks: tuple[PresetTask, ...]
    spec: SuiteSpec


def presets() -> dict[str, Preset]:
    """All presets by name, vision first.

    Example:
        >>> [task.title for task in presets()["clip-vit-b-32-8"].tasks][:2]
        ['SUN397', 'Cars']
    """
    return dict(_presets())


def preset_spec(name: str) -> SuiteSpec:
    """The suite of a preset.

    Raises:
        SuiteError: there is none of that name.

    Example:
        >>> preset_spec("clip-vit-b-32-8").base
        'hf://openai/clip-vit-base-patch32'
    """
    known = _presets()
    if name not in known:
        raise SuiteError(f"There is no preset {name!r}. The presets are {', '.join(known)}.")
    return known[name].spec


@cache
def _presets() -> dict[str, Preset]:
    vision = [
        build(model, VISION_TASKS[:count])
        for build in (_fusion_bench, _tall_masks)
        for model in CLIP_MODELS
        for count in COUNTS
    ]
    text = [_gpt2(GLUE_TASKS[:7]), _roberta(GLUE_TASKS[:7]), _roberta(GLUE_TASKS)]
    return {preset.name: preset for preset in [*vision, *text]}


def _fusion_bench(model: ClipModel, tasks: Sequence[VisionTask]) -> Preset:
    title = f"{model.title}, {len(tasks)} tasks"
    tower = f"hf://openai/{model.hub}"
    return Preset(
        f"clip-vit-{model.short}-{len(tasks)}",
        title,
        "FusionBench",
        tuple(PresetTask(t.name, t.title, t.classes, t.train, t.test) for t in tasks),
        SuiteSpec.model_validate(
            {
                "name": title,
                "description": (
                    "FusionBench (arXiv:2406.03280): vision models of transformers, zero-shot "
                    "heads, data sets of the Hugging Face Hub. Validation images are taken from "
                    "the training splits, on which the experts were trained. Results of the "
                    "TALL-masks protocol are not comparable."
                ),
                "architecture": {
                    "name": "clip_vision_model",
                    "library": "transformers",
                    "args": model.args,
                },
                "base": tower,
                "experts": {
                    task.name: {
                        "title": task.title,
                        "weights": f"hf://tanganke/{model.hub}_{task.name}",
                        "head": {"zero_shot": {"text_tower": tower, **_prompts(task)}},
                        "data": {**_hub_data(task), "transform": "open_clip"},
                    }
                    for task in tasks
                },
            }
        ),
    )


def _prompts(task: VisionTask) -> dict[str, Any]:
    names = {"classes": list(task.class_names)} if task.class_names else {}
    return {**names, "templates": list(task.templates)}


def _hub_data(task: VisionTask) -> dict[str, Any]:
    hub = task.hub
    data = {
        "kind": "huggingface",
        "dataset": hub.name,
        "config": hub.config,
        "image_column": hub.image_column,
        "label_column": hub.label_column,
        "val": hub.train,
        "test": hub.test,
    }
    return {key: value for key, value in data.items() if value is not None}


def _tall_masks(model: ClipModel, tasks: Sequence[VisionTask]) -> Preset:
    title = f"{model.title}, {len(tasks)} tasks, pickled encoders"
    folder = f"hf://nik-dim/tall_masks:single_task/{model.folder}"
    return Preset(
        f"tall-masks-vit-{model.short}-{len(tasks)}",
        title,
        "TALL-masks",
        tuple(
            PresetTask(t.title, t.title, t.local.classes, t.local.train, t.local.test)
            for t in tasks
        ),
        SuiteSpec.model_validate(
            {
                "name": title,
                "description": (
                    "The protocol of Task Arithmetic, TALL-masks (arXiv:2405.07813) and CART "
                    "(arXiv:2412.12153): encoders of open_clip and heads as pickles, read as "
                    "data; EMNIST is its digits; images below the folder data, arranged as in "
                    "github.com/mlfoundations/task_vectors. Validation images are drawn anew "
                    "from the training splits. Results of FusionBench are not comparable."
                ),
                "architecture": {"name": model.open_clip, "library": "open_clip"},
                "base": f"{folder}/MNISTVal/nonlinear_zeroshot.pt",
                "experts": {
                    task.title: {
                        "weights": f"{folder}/{task.title}Val/nonlinear_finetuned.pt",
                        "head": {
                            "file": f"{folder}/head_{task.title}Val.pt",
                            "normalize": True,
                        },
                        "data": {**task.local.fields, "transform": "open_clip"},
                    }
                    for task in tasks
                },
            }
        ),
    )


def _glue(
    name: str,
    title: str,
    tasks: Sequence[TextTask],
    weights: dict[str, str],
    base: str,
    head: str,
    **fields: Any,
) -> Preset:
    def evaluation(task: TextTask) -> dict[str, Any]:
        if task.classes == 1:  # a correlation is reported, not an accuracy
            return {}
        return {
            "head": {"file": weights[task.name], "layers": head},
            "data": {
                "kind": "text",
                "dataset": GLUE,
                "config": task.name,
                "text_columns": list(task.columns),
                "tokenizer": base,
                "val": "train",
                "test": task.split,
            },
        }

    return Preset(
        name,
        title,
        "GLUE",
        tuple(PresetTask(t.name, t.title, t.classes, t.train, t.test) for t in tasks),
        SuiteSpec.model_validate(
            {
                "name": title,
                "description": (
                    f"{len(tasks)} tasks of GLUE (arXiv:1804.07461), whose validation splits are "
                    "reported, as accuracy. Heads are not merged. STS-B, a regression, can be "
                    "merged but not evaluated here."
                ),
                "base": base,
                **fields,
                "experts": {
                    task.name: {
                        "title": task.title,
                        "weights": weights[task.name],
                        **evaluation(task),
                    }
                    for task in tasks
                },
            }
        ),
    )


def _gpt2(tasks: Sequence[TextTask]) -> Preset:
    weights = {task.name: f"hf://tanganke/gpt2_{task.name}" for task in tasks}
    title = f"GPT-2, {len(tasks)} tasks of GLUE"
    return _glue(
        f"gpt-2-glue-{len(tasks)}",
        title,
        tasks,
        weights,
        "hf://openai-community/gpt2",
        head="score",
        base_prefix="transformer.",
        architecture={"name": "gpt2", "library": "transformers"},
    )


def _roberta(tasks: Sequence[TextTask]) -> Preset:
    repo = "hf://vanillaOVO/roberta_base_glue_ckpts"
    weights = {
        task.name: f"{repo}:{task.name}/roberta-base_lr1e-05/pytorch_model.bin" for task in tasks
    }
    title = f"RoBERTa-base, {len(tasks)} tasks of GLUE"
    args = {
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }
    return _glue(
        f"roberta-base-glue-{len(tasks)}",
        title,
        tasks,
        weights,
        "hf://FacebookAI/roberta-base",
        head="classifier",
        architecture={"name": "roberta", "library": "transformers", "args": args},
    )
