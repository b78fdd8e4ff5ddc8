"""Presets against the published papers: tasks, counts, names, and layouts that can be built."""

from __future__ import annotations

import re

import pytest
import torch

from merge_core.errors import SuiteError
from merge_core.hub.files import HubId
from merge_core.opening.benchmark_tasks import VISION_TASKS
from merge_core.opening.presets import CLIP_MODELS, Preset, preset_spec, presets
from merge_core.suites.data_spec import DataSpec, HeadSpec
from merge_core.suites.suite_spec import SuiteSpec

# Classes, training and test images: the papers and cards of the data sets.
PUBLISHED = {
    "SUN397": (397, 19850, 19850),
    "Cars": (196, 8144, 8041),
    "RESISC45": (45, 18900, 6300),
    "EuroSAT": (10, 21600, 2700),
    "SVHN": (10, 73257, 26032),
    "GTSRB": (43, 26640, 12630),
    "MNIST": (10, 60000, 10000),
    "DTD": (47, 3760, 1880),
    "Flowers102": (102, 1020, 6149),
    "PCAM": (2, 262144, 32768),
    "FER2013": (7, 28709, 7178),
    "OxfordIIITPet": (37, 3680, 3669),
    "STL10": (10, 5000, 8000),
    "CIFAR100": (100, 50000, 10000),
    "CIFAR10": (10, 50000, 10000),
    "Food101": (101, 75750, 25250),
    "FashionMNIST": (10, 60000, 10000),
    "EMNIST": (26, 124800, 20800),
    "KMNIST": (10, 60000, 10000),
    "RenderedSST2": (2, 6920, 1821),
}
DIGITS = {"EMNIST": (10, 240000, 40000)}
# arXiv:2212.04089 table 1; arXiv:2405.07813 section 5.1.
EIGHT = {"SUN397", "Cars", "RESISC45", "EuroSAT", "SVHN", "GTSRB", "MNIST", "DTD"}
FOURTEEN = EIGHT | {"CIFAR100", "STL10", "Flowers102", "OxfordIIITPet", "PCAM", "FER2013"}
TWENTY = FOURTEEN | {"EMNIST", "CIFAR10", "Food101", "FashionMNIST", "RenderedSST2", "KMNIST"}
# Columns of nyu-mll/glue, and the split that its labels are known for.
GLUE_COLUMNS = {
    "cola": "sentence validation",
    "sst2": "sentence validation",
    "mrpc": "sentence1 sentence2 validation",
    "qqp": "question1 question2 validation",
    "mnli": "premise hypothesis validation_matched",
    "qnli": "question sentence validation",
    "rte": "sentence1 sentence2 validation",
}
# Where the hub's data sets differ from a column image, a column label and a split test.
UNUSUAL = {
    "fer2013": ("jpg", "cls", "test"),
    "cifar10": ("img", "label", "test"),
    "cifar100": ("img", "fine_label", "test"),
    "food101": ("image", "label", "validation"),
}
GLUE = {"CoLA", "SST-2", "MRPC", "QQP", "MNLI", "QNLI", "RTE"}
SETTINGS = {8: EIGHT, 14: FOURTEEN, 20: TWENTY}
# Parameters of the vision tower with its projection, in millions (arXiv:2103.00020, table 19 and
# the released models).
MILLIONS = {"b-32": 87.85, "b-16": 86.19, "l-14": 303.97}

every_preset = pytest.mark.parametrize("preset", presets().values(), ids=presets().keys())


def test_the_published_settings_are_there() -> None:
    vision = {
        f"{protocol}-vit-{size}-{count}"
        for protocol in ("clip", "tall-masks")
        for size in MILLIONS
        for count in SETTINGS
    }
    text = {"gpt-2-glue-7", "roberta-base-glue-7", "roberta-base-glue-8"}
    assert set(presets()) == vision | text


@every_preset
def test_tasks_and_their_sizes_are_the_published_ones(preset: Preset) -> None:
    titles = {task.title for task in preset.tasks}
    if preset.protocol == "GLUE":
        assert titles == GLUE | ({"STS-B"} if preset.name.endswith("8") else set())
        assert {t.title: t.classes for t in preset.tasks if t.classes != 2}.items() <= {
            ("MNLI", 3),
            ("STS-B", 1),
        }
        return
    assert titles == SETTINGS[int(preset.name.rpartition("-")[2])]
    published = PUBLISHED | (DIGITS if preset.protocol == "TALL-masks" else {})
    for task in preset.tasks:
        assert (task.classes, task.train, task.test) == published[task.title], task.title


@every_preset
def test_names_are_unique_well_formed_and_in_one_order(preset: Preset) -> None:
    spec = preset.spec
    assert preset_spec(preset.name) is spec
    assert [task.name for task in preset.tasks] == list(spec.experts)
    assert [task.title for task in preset.tasks] == [e.title or n for n, e in spec.experts.items()]
    weights = [expert.weights for expert in spec.experts.values()]
    assert spec.base is not None
    assert len({*weights, spec.base}) == len(weights) + 1
    for name in [*weights, spec.base]:
        assert str(HubId.parse(name)) == name
    for task, expert in spec.experts.items():
        # Each expert's name says its task, and nothing of another model.
        assert re.search(rf"[_/:]{re.escape(task)}(Val)?(/|$)", expert.weights)
    # A suite is written and read again without loss.
    again = SuiteSpec.model_validate(spec.model_dump(mode="json", exclude_unset=True))
    assert again == spec


@every_preset
def test_every_task_can_be_evaluated_in_its_protocol(preset: Preset) -> None:
    sources = set()
    for task, expert in preset.spec.experts.items():
        data, head = expert.data, expert.head
        if expert.title == "STS-B":
            assert data is None
            assert head is None
            continue
        assert isinstance(data, DataSpec)
        assert isinstance(head, HeadSpec)
        if preset.protocol == "GLUE":
            assert (data.kind, data.dataset) == ("text", "nyu-mll/glue")
            assert data.tokenizer == preset.spec.base
            assert head.file == expert.weights
            texts = " ".join([*(data.text_columns or ()), data.test or ""])
            assert texts == GLUE_COLUMNS[task]
            sources.add((data.kind, data.dataset, data.config))
            continue
        assert head.normalizes
        assert data.transform == "open_clip"
        assert data.val != data.test
        sources.add((data.kind, data.dataset, data.path))
        if preset.protocol == "FusionBench":
            assert data.kind == "huggingface"
            columns = (data.image_column, data.label_column, data.test)
            assert columns == UNUSUAL.get(task, ("image", "label", "test"))
            assert head.zero_shot is not None
            assert head.zero_shot.text_tower == preset.spec.base
        else:
            assert head.file is not None
            assert str(HubId.parse(head.file)) == head.file
    assert len(sources) == sum(task.classes > 1 for task in preset.tasks)


@pytest.mark.parametrize("task", VISION_TASKS, ids=lambda task: task.name)
def test_prompts_name_each_class_once(task: object) -> None:
    assert isinstance(task, type(VISION_TASKS[0]))
    assert all(template.count("{}") == 1 for template in task.templates)
    assert len(set(task.templates)) == len(task.templates)
    assert not re.search(r"  | \.", " ".join(task.templates))
    assert len(set(task.class_names)) in (0, task.classes)


def test_cifar_has_the_eighteen_published_prompts() -> None:
    templates = {t.name: t.templates for t in VISION_TASKS}
    assert len(templates["cifar10"]) == 18
    assert "a low contrast photo of a {}." in templates["cifar10"]
    assert "a photo of the big {}." in templates["cifar10"]
    assert len(templates["resisc45"]) == 18
    assert "aerial view of the {}." in templates["resisc45"]


@pytest.mark.parametrize("model", CLIP_MODELS, ids=lambda model: model.short)
def test_both_protocols_name_the_same_architecture(model: object) -> None:
    import open_clip
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    assert isinstance(model, type(CLIP_MODELS[0]))
    known = open_clip.get_model_config(model.open_clip)
    assert known["quick_gelu"]
    with torch.device("meta"):
        config = CLIPVisionConfig(**model.args)
        vision = CLIPVisionModelWithProjection(config)
        small_text = open_clip.CLIPTextCfg(
            context_length=1, vocab_size=1, width=8, heads=1, layers=1
        )
        visual = open_clip.CLIP(
            known["embed_dim"], open_clip.CLIPVisionCfg(**known["vision_cfg"]), small_text, True
        ).visual
    count = sum(value.numel() for value in vision.parameters())
    assert count == sum(value.numel() for value in visual.parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[model.short], abs=0.005)
    assert config.hidden_act == "quick_gelu"
    assert config.num_attention_heads * 64 == config.hidden_size
    assert visual.transformer.resblocks[0].attn.num_heads == config.num_attention_heads


@pytest.mark.parametrize(
    ("name", "parameters"), [("gpt-2-glue-7", 124_439_808), ("roberta-base-glue-7", 124_645_632)]
)
def test_text_models_are_of_the_published_size(name: str, parameters: int) -> None:
    import transformers

    architecture = preset_spec(name).architecture
    assert architecture is not None
    config, model = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2Model),
        "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
    }[architecture.name]
    with torch.device("meta"):
        built = model(config(**architecture.args))
    assert sum(value.numel() for value in built.parameters()) == parameters


def test_an_unknown_preset_is_named_with_the_known_ones() -> None:
    with pytest.raises(SuiteError, match=r"no preset 'clip-vit-b-32'.*clip-vit-b-32-8"):
        preset_spec("clip-vit-b-32")
