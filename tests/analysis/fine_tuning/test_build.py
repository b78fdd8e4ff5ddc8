"""Whole builds of tiny suites: what is written, resumed, repeated and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import timm
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file

from analysis.evaluation.evaluator import Evaluator
from analysis.fine_tuning.build import build_suite
from analysis.fine_tuning.plan import load_plan
from merge_core.errors import MergeScopeError, OutputError, SuiteError
from merge_core.progress import Progress
from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml, load_yaml
from tests.analysis.fine_tuning.tiny_plans import (
    COUNTS,
    IMAGE_TASKS,
    STEPS,
    SYMBOLS,
    TEXT_TASKS,
    VIT,
    write_image_plan,
    write_text_plan,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(cache))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_plan(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_plan(tmp_path_factory.mktemp("images"))


def changed(plan: Path, name: str, **fields: Any) -> Path:
    """A plan beside another one, with other fields; None removes one."""
    document = load_yaml(plan.read_text()) | fields
    path = plan.with_name(f"{name}.yaml")
    path.write_text(dump_yaml({key: v for key, v in document.items() if v is not None}))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def accuracies(suite: Suite, split: str = "val") -> dict[str, float]:
    frame = Evaluator(suite).experts(suite.tasks, split)  # type: ignore[arg-type]
    return dict(zip(frame["task"], frame["accuracy"], strict=True))


def text_rows(plan: Path, task: str, split: str) -> pd.DataFrame:
    return pd.read_parquet(plan.parent / task / f"{split}-00000-of-00001.parquet")


def test_texts_are_classified_as_transformers_would(texts: Path, tmp_path: Path) -> None:
    said: list[str] = []
    suite = build_suite(load_plan(texts), tmp_path / "suite", report=said.append)
    assert suite.tasks == tuple(TEXT_TASKS)
    assert suite.why_not_evaluated is None
    found = accuracies(suite)
    tokenizer = tf.AutoTokenizer.from_pretrained(suite.root / "base")
    told = [sentence for sentence in said if not sentence.startswith("note:")]
    for task, sentence in zip(suite.tasks, told, strict=True):
        model = tf.RobertaForMaskedLM.from_pretrained(suite.root / "base").roberta.eval()
        state = load_file(suite.root / f"experts/{task}.safetensors")
        own = {name.removeprefix("roberta."): value for name, value in state.items()}
        assert not model.load_state_dict(own, strict=False).missing_keys
        rows = text_rows(texts, task, "validation")
        tokens = tokenizer(rows["text"].tolist(), return_tensors="pt", padding=True)
        with torch.no_grad():
            features = model(**tokens).last_hidden_state[:, 0]
        head = load_file(suite.root / f"heads/{task}.safetensors")
        logits = features @ head["weight"].T + head["bias"]
        share = float((logits.argmax(1).numpy() == rows["label"].to_numpy()).mean())
        assert found[task] == pytest.approx(share)
        assert sentence.endswith(f"{share:.1%} of the expert")


def test_images_are_classified_as_timm_would(images: Path, tmp_path: Path) -> None:
    suite = build_suite(load_plan(images), tmp_path / "suite")
    found = accuracies(suite, "test")
    for task, kinds in IMAGE_TASKS.items():
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT).eval()
        model.load_state_dict(load_file(suite.root / f"experts/{task}.safetensors"))
        head = load_file(suite.root / f"heads/{task}.safetensors")
        hits = []
        for label, kind in enumerate(kinds):
            for path in (images.parent / "images" / task / "test" / f"class{kind}").iterdir():
                pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
                with torch.no_grad():
                    logits = model((pixels / 255 - 0.5) / 0.5) @ head["weight"].T + head["bias"]
                hits.append(int(logits.argmax()) == label)
        assert len(hits) == COUNTS["test"]
        assert found[task] == pytest.approx(np.mean(hits))


def test_experts_learn_and_start_from_the_written_base(images: Path, tmp_path: Path) -> None:
    slow = {"steps": 80, "batch": 24, "rate": 3e-3, "warmup": 5}
    plan = changed(images, "longer", fine_tuning=slow, dtype="bfloat16")
    suite = build_suite(load_plan(plan), tmp_path / "suite")
    steps = json.loads((suite.root / "build.json").read_text())["steps"]
    facts = {task: steps[f"expert {task}"]["facts"] for task in suite.tasks}
    assert accuracies(suite) == {task: fact["expert"] for task, fact in facts.items()}
    # Chance is one half; which half of a picture is bright is not told by random weights.
    assert facts["colour"]["expert"] == 1
    assert facts["place"]["expert"] - facts["place"]["base"] >= 0.2
    base = load_file(suite.root / "base/model.safetensors")
    assert {value.dtype for value in base.values()} == {torch.bfloat16}
    # What has no gradient is the base's own bits: nothing was rounded on the way.
    still = build_suite(
        load_plan(changed(plan, "still", fine_tuning=slow | {"rest": 0.0})), tmp_path / "still"
    )
    for task in still.tasks:
        expert = load_file(still.root / f"experts/{task}.safetensors")
        moved = {name for name in base if not torch.equal(expert[name], base[name])}
        inner = {name for name in base if name.startswith("blocks.0.") and base[name].ndim == 2}
        assert moved == inner


class Killed(BaseException):
    """Ends a build as a signal would: nothing in it expects this."""


def kill_after(calls: int) -> Progress:
    left = [calls]

    def listen(*_: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed

    return Progress(listen)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_killed_build_goes_on_to_the_same_bits(
    texts: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = STEPS | {"method": method}
    plan = load_plan(changed(texts, f"killed-{method}", fine_tuning=how))
    build_suite(plan, tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    output = tmp_path / "killed"
    # While features are read, then in the first training, in the second, and there again.
    for calls in (1, 4, 9, 5) if method == "full" else (9,):
        with pytest.raises(Killed):
            build_suite(plan, output, progress=kill_after(calls))
        assert not (output / "suite.yaml").exists()
    # What a killed process leaves half-written: files without record, and temporary ones.
    (output / "heads" / ".ends.safetensors.abc").write_bytes(b"half")
    for path in output.glob("experts/*"):
        if path.is_file() and path.stem == "thirds":
            path.write_bytes(b"half")
    trained: list[str] = []
    from analysis.fine_tuning import expert

    fine_tune = expert.fine_tune

    def count(*args: Any) -> float:
        trained.append(args[6])
        return fine_tune(*args)

    monkeypatch.setattr(expert, "fine_tune", count)
    build_suite(plan, output)
    assert contents(output) == wanted
    assert trained == ["thirds"]  # the other one was finished
    build_suite(plan, output)
    assert trained == ["thirds"]


def test_a_damaged_file_is_made_again(texts: Path, tmp_path: Path) -> None:
    plan, output = load_plan(texts), tmp_path / "suite"
    build_suite(plan, output)
    wanted = contents(output)
    (output / "experts/ends.safetensors").write_bytes(b"damaged")
    (output / "heads/thirds.safetensors").unlink()
    build_suite(plan, output)
    assert contents(output) == wanted


def test_a_changed_plan_does_again_what_it_changes(texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "suite"
    build_suite(load_plan(texts), output)
    first = contents(output)
    more = load_plan(changed(texts, "seed", seed=1))
    with pytest.raises(OutputError, match="holds a suite that this plan did not build"):
        build_suite(more, output)
    assert contents(output) == first
    build_suite(more, output, overwrite=True)
    second = contents(output)
    same = {name for name in first if second[name] == first[name]}
    assert {"heads/ends.safetensors", "base/model.safetensors"} <= same
    assert {"experts/ends.safetensors", "experts/thirds.safetensors"}.isdisjoint(same)
    # Another order or number of tasks changes no other task's expert.
    alone = changed(texts, "alone", tasks=["thirds"])
    build_suite(load_plan(alone), tmp_path / "alone")
    known = "experts/thirds.safetensors"
    assert (tmp_path / "alone" / known).read_bytes() == first[known]


def test_an_adapter_is_what_peft_reads_and_trains(texts: Path, tmp_path: Path) -> None:
    how = {**STEPS, "method": "lora", "rank": 3, "alpha": 5.0, "steps": 1, "warmup": 0}
    plan = changed(texts, "peft", fine_tuning=how | {"examples": 30, "batch": 30})
    suite = build_suite(load_plan(plan), tmp_path / "suite")
    tokenizer = tf.AutoTokenizer.from_pretrained(suite.root / "base")
    for task in suite.tasks:
        base = tf.RobertaForMaskedLM.from_pretrained(suite.root / "base")
        folder = suite.root / f"experts/{task}"
        model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
        merged = suite.expert(task)
        ours = {name: merged.tensor(name) for name in merged}
        theirs = peft.PeftModel.from_pretrained(
            tf.RobertaForMaskedLM.from_pretrained(suite.root / "base"), folder
        ).merge_and_unload().state_dict()  # fmt: skip
        changed_names = set(merged.updates)  # type: ignore[attr-defined]
        assert len(changed_names) == 12
        for name in changed_names:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)

        # The first step of Adam moves each entry by the rate against the sign of its slope, and
        # B starts from zero: so the written B tells the signs of PEFT's own gradients.
        written = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data.zero_()
        data = text_rows(texts, task, "train")
        rows = np.random.default_rng(0).permutation(len(data))[:30]  # the data's seed
        tokens = tokenizer(data["text"].iloc[rows].tolist(), return_tensors="pt", padding=True)
        head = load_file(suite.root / f"heads/{task}.safetensors")
        model.eval()
        features = model.base_model.model.roberta(**tokens).last_hidden_state[:, 0]
        labels = torch.from_numpy(data["label"].to_numpy()[rows])
        logits = features @ head["weight"].T + head["bias"]
        torch.nn.functional.cross_entropy(logits, labels).backward()
        for name, value in model.named_parameters():
            if "lora_B" in name:
                assert value.grad is not None
                sure = value.grad.abs() > 1e-6
                assert sure.any()
                torch.testing.assert_close(
                    written[name][sure], -1e-3 * value.grad.sign()[sure], rtol=0.05, atol=0
                )


def test_an_adapter_of_transposed_weights_is_what_peft_reads(tmp_path: Path) -> None:
    plan = write_text_plan(tmp_path / "plan", fine_tuning=STEPS | {"method": "lora", "rank": 2})
    folder = tmp_path / "plan/roberta"
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=len(SYMBOLS), n_embd=16, n_layer=2, n_head=2, n_positions=24)
    shutil.rmtree(folder)
    tf.GPT2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    suite = build_suite(load_plan(plan), tmp_path / "suite")
    for task in suite.tasks:
        base = tf.GPT2Model.from_pretrained(suite.root / "base")
        adapted = peft.PeftModel.from_pretrained(base, suite.root / f"experts/{task}")
        theirs = adapted.merge_and_unload().state_dict()
        expert = suite.expert(task)
        updates = expert.updates  # type: ignore[attr-defined]
        assert {name.split(".")[-2] for name in updates} == {"c_attn", "c_fc", "c_proj"}
        assert all(update.stored_transposed for update in updates.values())
        for name in updates:
            torch.testing.assert_close(expert.tensor(name), theirs[name], rtol=1e-6, atol=1e-7)
            assert not torch.equal(theirs[name], suite.base.tensor(name))  # type: ignore[union-attr]


def test_given_heads_are_used_and_checked(texts: Path, tmp_path: Path) -> None:
    first = build_suite(load_plan(texts), tmp_path / "first")
    shutil.copytree(first.root / "heads", texts.parent / "given", dirs_exist_ok=True)
    plan = changed(texts, "heads", head="given/{task}.safetensors")
    second = build_suite(load_plan(plan), tmp_path / "second")
    assert not (second.root / "heads").exists()
    for task in second.tasks:
        name = f"experts/{task}.safetensors"
        assert (second.root / name).read_bytes() == (first.root / name).read_bytes()
    swapped = changed(texts, "swapped", head="given/ends.safetensors")
    with pytest.raises(SuiteError, match="has 2 classes, and its data have class 2"):
        build_suite(load_plan(swapped), tmp_path / "third")


def test_ridge_and_normalised_heads(images: Path, tmp_path: Path) -> None:
    plan = changed(images, "ridge", probe={"kind": "ridge", "normalize": True})
    suite = build_suite(load_plan(plan), tmp_path / "suite")
    steps = json.loads((suite.root / "build.json").read_text())["steps"]
    assert accuracies(suite) == {t: steps[f"expert {t}"]["facts"]["expert"] for t in suite.tasks}


def test_few_shots_are_the_first_of_each_class(texts: Path, tmp_path: Path) -> None:
    # More shots than there are examples are all of them; one shot of each class is another head.
    heads = []
    for shots in (None, 1000, 1):
        probe = {"penalty": 2.0} | ({} if shots is None else {"shots": shots})
        plan = changed(texts, f"shots-{shots}", probe=probe, tasks=["thirds"])
        suite = build_suite(load_plan(plan), tmp_path / str(shots))
        heads.append((suite.root / "heads/thirds.safetensors").read_bytes())
    assert heads[0] == heads[1] != heads[2]


def drop_split(plan: Path) -> None:
    for path in (plan.parent / "ends").glob("train*"):
        path.unlink()


def add_class(plan: Path) -> None:
    path = plan.parent / "ends" / "test-00000-of-00001.parquet"
    frame = pd.read_parquet(path)
    frame.loc[3, "label"] = 4
    frame.to_parquet(path)


def spoil_base(plan: Path) -> None:
    from safetensors.torch import save_file

    path = plan.parent / "roberta/model.safetensors"
    state = load_file(path)
    save_file({name: value * 1e30 for name, value in state.items()}, path, {"format": "pt"})


REFUSALS: list[tuple[dict[str, Any], Callable[[Path], None] | None, str]] = [
    ({"base": "package:no-such-package-here"}, None, r"package.*not installed\. Run pip install"),
    ({"base": "nowhere"}, None, "nowhere"),
    ({"tasks": []}, None, "tasks"),
    ({"tasks": ["ends", "ends"]}, None, "named twice"),
    ({"tasks": {"ends": {"data": {"kind": "text"}}}, "data": None}, None, "needs"),
    ({"tasks": ["absent"]}, None, r"absent.*is not a folder"),
    ({"fine_tuning": {"steps": 0}}, None, "fine_tuning.steps"),
    ({"fine_tuning": {"rank": 4}}, None, "add 'method: lora'"),
    ({"fine_tuning": {"stepz": 4}}, None, "stepz: this field is not known"),
    ({"fine_tuning": STEPS | {"method": "lora", "rank": 40}}, None, "rank 40 is more than"),
    ({"fine_tuning": STEPS | {"rate": 9.0, "clip": 1e9, "steps": 40}}, None, None),  # type: ignore[list-item]
    ({"fine_tuning": STEPS | {"examples": 1}}, None, "examples of every class"),
    ({"device": "tpu"}, None, "device"),
    ({}, drop_split, "which split is for fine-tuning"),
    ({}, add_class, "class 4 stands in the test part"),
    ({}, spoil_base, "not finite"),
]


@pytest.mark.parametrize(("fields", "spoil", "message"), REFUSALS)
def test_bad_plans_are_refused_in_a_sentence(
    tmp_path: Path, fields: dict[str, Any], spoil: Callable[[Path], None] | None, message: str
) -> None:
    path = write_text_plan(tmp_path / "it", **fields)
    if spoil is not None:
        spoil(path)
    build = partial(build_suite, output=tmp_path / "out")
    if message is None:  # a rate that is far too high: finite or refused, never silently NaN
        try:
            suite = build(load_plan(path))
        except SuiteError as error:
            assert "not finite" in str(error) or "does not fit" in str(error)  # noqa: PT017
            return
        assert all(torch.isfinite(suite.expert(t).tensor(n)).all()
                   for t in suite.tasks for n in suite.expert(t))  # fmt: skip
        return
    with pytest.raises(MergeScopeError, match=message) as caught:
        build(load_plan(path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "suite.yaml").exists()


def test_examples_in_two_parts_are_told(texts: Path, tmp_path: Path) -> None:
    plan = write_text_plan(tmp_path / "plan", tasks=["thirds"])
    train, test = (tmp_path / f"plan/thirds/{s}-00000-of-00001.parquet" for s in ("train", "test"))
    known = set(pd.read_parquet(train)["text"])
    said: list[str] = []
    frame = pd.read_parquet(test)
    frame.loc[:4, "text"] = pd.read_parquet(train)["text"][:5]
    frame.to_parquet(test)
    build_suite(load_plan(plan), tmp_path / "suite", report=said.append)
    count = int(frame["text"].isin(known).sum())
    assert count >= 5
    assert f"{count} of 12 test examples stand in the training part" in said[0]


def test_what_else_lies_in_the_folder_stays(texts: Path, tmp_path: Path) -> None:
    build_suite(load_plan(texts), tmp_path / "suite")
    for name in ("notes.txt", ".hidden"):
        (tmp_path / "suite" / name).write_text("mine")
        (tmp_path / "suite" / name).chmod(0o600)
    build_suite(load_plan(texts), tmp_path / "suite")
    for name in ("notes.txt", ".hidden"):
        assert (tmp_path / "suite" / name).stat().st_mode & 0o777 == 0o600


def test_other_folders_are_left_alone(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        build_suite(load_plan(texts), tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_base_that_would_be_overwritten_is_refused(texts: Path, tmp_path: Path) -> None:
    build_suite(load_plan(texts), tmp_path / "suite")
    before = contents(tmp_path / "suite")
    plan = changed(texts, "own", base=str(tmp_path / "suite/base"))
    with pytest.raises(OutputError, match="The base lies in"):
        build_suite(load_plan(plan), tmp_path / "suite", overwrite=True)
    assert contents(tmp_path / "suite") == before


def test_the_suite_may_be_moved(texts: Path, tmp_path: Path) -> None:
    suite = build_suite(load_plan(texts), tmp_path / "suite")
    found = accuracies(suite)
    shutil.move(tmp_path / "suite", tmp_path / "moved")
    assert accuracies(load_suite(tmp_path / "moved")) == found
