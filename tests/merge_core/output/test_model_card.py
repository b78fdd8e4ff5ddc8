"""Model cards: what the hub reads of them (its own parser), and texts of strangers as texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from merge_core.merging.recipe import make_recipe
from merge_core.output.card_facts import read_card
from merge_core.output.model_card import Result, escape_markdown, model_card
from merge_core.output.provenance import provenance
from merge_core.suites.suite import Suite, load_suite

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "transformers": {"config.json": {"model_type": "bert"}},
    "timm": {"config.json": {"architecture": "vit_tiny_patch16_224"}},
    "open_clip": {"open_clip_config.json": {"model_cfg": {}}},
    "sentence-transformers": {"config.json": {"model_type": "bert"}, "modules.json": {}},
}


def member(folder: Path, card: str = "", seed: int = 0, **files: Any) -> None:
    """A model in a folder of its own, with a card and other files."""
    folder.mkdir(parents=True)
    source = torch.Generator().manual_seed(seed)
    state = {"w.weight": torch.randn(3, 3, generator=source), **files.pop("state", {})}
    save_file(state, folder / "model.safetensors")
    for name, document in files.pop("configs", {}).items():
        (folder / name).write_text(json.dumps(document))
    if card:
        (folder / "README.md").write_text(card)


def suite_at(folder: Path, tasks: str = "ab", **fields: Any) -> Suite:
    document = {"name": "s", "base": "base", "experts": {t: {"weights": t} for t in tasks}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(document | fields))
    return load_suite(folder)


def card_of(suite: Suite, results: Any = (), adapter: str | None = None) -> ModelCard:
    recipe = make_recipe({"suite": str(suite.path), "method": "task_arithmetic"})
    return ModelCard(model_card(recipe, suite, provenance(recipe, suite), results, adapter))


def front(**fields: Any) -> str:
    return f"---\n{yaml.safe_dump(fields)}---\n\n# A model\n"


@pytest.mark.parametrize("library", list(CONFIGS))
def test_library_licence_and_task_are_the_base_s(tmp_path: Path, library: str) -> None:
    told = front(license="apache-2.0", pipeline_tag="feature-extraction", library_name="other")
    member(tmp_path / "base", told, configs=CONFIGS[library])
    for seed, name in enumerate("ab"):
        member(tmp_path / name, seed=seed + 1, configs=CONFIGS["timm"])
    data = card_of(suite_at(tmp_path)).data
    assert data.library_name == library
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "feature-extraction"
    assert data.tags == ["merge", "mergescope", "task_arithmetic"]
    assert data.base_model is None  # folders have no name on the hub
    assert "base_model_relation" not in data.to_dict()


def test_without_description_the_suites_network_says_the_library(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        member(tmp_path / name)
    assert card_of(suite_at(tmp_path)).data.library_name is None
    network = {"name": "ViT-B-32", "library": "open_clip"}
    assert card_of(suite_at(tmp_path, architecture=network)).data.library_name == "open_clip"


def test_the_base_s_card_says_the_library_where_nothing_else_does(tmp_path: Path) -> None:
    member(tmp_path / "base", front(library_name="timm"))
    member(tmp_path / "a", front(library_name="transformers", pipeline_tag="fill-mask"))
    member(tmp_path / "b", front(library_name="<b>", pipeline_tag="fill-mask"))
    data = card_of(suite_at(tmp_path)).data
    assert (data.library_name, data.pipeline_tag) == ("timm", "fill-mask")


def test_an_adapter_is_one_of_peft(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        member(tmp_path / name, configs=CONFIGS["transformers"])
    card = card_of(suite_at(tmp_path), adapter="2 matrices of model.layers_0.<b>.")
    assert card.data.library_name == "peft"
    assert card.data.tags == ["merge", "mergescope", "task_arithmetic", "lora"]
    assert r"2 matrices of model.layers_0.\<b\>." in card.text


@pytest.mark.parametrize(
    ("cards", "license"),
    [
        ({"base": "mit", "a": "mit", "b": "mit"}, "mit"),
        ({"base": "mit"}, "mit"),
        ({"a": "mit", "b": "mit"}, "mit"),
        ({"base": "mit", "b": "cc-by-nc-4.0"}, None),
        ({}, None),
    ],
)
def test_a_licence_is_claimed_only_where_all_that_state_one_agree(
    tmp_path: Path, cards: dict[str, str], license: str | None
) -> None:
    for name in ("base", "a", "b"):
        member(tmp_path / name, front(license=cards[name]) if name in cards else "")
    card = card_of(suite_at(tmp_path))
    assert card.data.license == license
    told = "The members state different licences ((base): mit, b: cc-by-nc-4.0)"
    assert (told in card.text) == (len(set(cards.values())) > 1)


def test_an_own_licence_keeps_its_name_and_link(tmp_path: Path) -> None:
    own = {"license": "other", "license_name": "my-1.0", "license_link": "LICENSE.md"}
    for name in ("base", "a", "b"):
        member(tmp_path / name, front(**own))
    data = card_of(suite_at(tmp_path)).data.to_dict()
    assert {name: data[name] for name in own} == own


@pytest.mark.parametrize(
    "card",
    [
        "",
        "no front matter\n---\nlicense: mit\n---\n",
        "---\nlicense: [mit, apache-2.0]\n---\n",
        "---\nlicense: {a: b}\npipeline_tag: 3\n---\n",
        "---\nlicense: 'mit\"><script>'\npipeline_tag: '../x'\nlicense_link: javascript:x\n---\n",
        "---\nlicense: &a mit\n---\n",
        "---\nlicense: mit\nlicense: gpl\n---\n",
        "---\nlicense: !!python/object/apply:os.system [x]\n---\n",
        f"---\nlicense: {'a' * 100}\n---\n",
        "---\nlicense: 'mit\n\n  x: y'\n---\n",
    ],
)
def test_fields_of_strangers_that_have_not_the_hub_s_form_are_left_out(
    tmp_path: Path, card: str
) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_card(tmp_path) == {}


def test_cards_that_cannot_be_read(tmp_path: Path) -> None:
    assert read_card(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert read_card(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense:\r\n- mit\r\n---\r\n")
    assert read_card(tmp_path) == {"license": "mit"}


EVIL = "a_b *c* <img src=x onerror=alert(1)> [d](javascript:e) `f` | ``` $g$ ![h](//i) &lt; # j"


def test_texts_of_strangers_stand_as_texts(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        member(tmp_path / name)
    experts = {"a": {"weights": "a", "title": EVIL}, "b": {"weights": "b"}}
    suite = suite_at(tmp_path, name=EVIL, experts=experts)
    card = card_of(suite, [Result("a", "test", 0.5, 0.4, 0.6, 10)])
    assert card.data.model_name == f"Task Arithmetic of 2 experts of {EVIL}"
    assert card.data.eval_results is not None
    assert card.data.eval_results[0].dataset_name == EVIL
    # Outside the fence of the recipe, which its own text does not close, no mark is left bare.
    fence, recipe = re.findall(r"^(`{3,})yaml\n(.*?)^\1$", card.text, re.DOTALL | re.MULTILINE)[0]
    assert len(fence) == 4
    assert yaml.safe_load(recipe)["suite"] == EVIL
    outside = card.text.replace(f"{fence}yaml\n{recipe}{fence}", "")
    assert outside.count(escape_markdown(EVIL)) == 2
    rest = outside.replace(escape_markdown(EVIL), "")
    assert not any(mark in rest for mark in ("<img", "javascript", "![h]", "&lt;"))
    for mark in ("<", ">", "[", "]", "|", "!", "&", "*", "`", "$"):
        bare = re.search(rf"(?<!\\){re.escape(mark)}", escape_markdown(EVIL))
        assert bare is None, mark
    assert escape_markdown("two\nlines\t of_one") == "two lines of_one"


def test_heads_are_spoken_of_only_where_each_task_keeps_one(tmp_path: Path) -> None:
    def head(classes: int) -> dict[str, torch.Tensor]:
        return {"head.weight": torch.ones(classes, 3)}

    words = "not part of this merge"
    for place, sizes in {"none": (), "same": (2, 2, 2), "own": (2, 3, 4)}.items():
        folder = tmp_path / place
        for i, name in enumerate(("base", "a", "b")):
            member(folder / name, seed=i, state=head(sizes[i]) if sizes else {})
        text = card_of(suite_at(folder)).text
        assert (words in text) == (place == "own")
        assert ("`head.weight`" in text) == (place == "own")


def test_modules_with_weights_of_their_own_are_told(tmp_path: Path) -> None:
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense", "../x")]
    for name in ("base", "a", "b"):
        member(tmp_path / name, configs={**CONFIGS["transformers"], "modules.json": modules})
        for below in ("1_Pooling", "2_Dense"):
            (tmp_path / name / below).mkdir()
    suite = suite_at(tmp_path)
    assert "Modules with weights" not in card_of(suite).text
    save_file({"w": torch.ones(1)}, tmp_path / "base" / "2_Dense" / "model.safetensors")
    assert "Modules with weights of their own (2_Dense) are not part" in card_of(suite).text


def test_the_hub_names_of_members_are_the_base_models(
    synthetic_suite: Callable[..., Suite],
) -> None:
    suite = synthetic_suite()
    recipe = make_recipe({"suite": str(suite.path), "method": "average"})
    about = provenance(recipe, suite).model_copy(
        update={"sources": {"task0": f"hf://org/one@{'0' * 40}"}, "base_source": "hf://org/base"}
    )
    whole = ModelCard(model_card(recipe, suite, about)).data.to_dict()
    assert (whole["base_model"], whole["base_model_relation"]) == (["org/one", "org/base"], "merge")
    thin = ModelCard(model_card(recipe, suite, about, adapter="x")).data.to_dict()
    assert (thin["base_model"], thin["base_model_relation"]) == (["org/base"], "adapter")
