"""Tiny language models and texts for tests: a word tokenizer, three tasks, a base and experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ANIMALS = ["cat", "dog", "fox", "owl", "hen", "cow"]
PLACES = ["barn", "field", "house", "river", "road", "tree"]
NOTES = ["do", "re", "mi", "fa", "sol", "la", "si"]
LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def texts(task: str, count: int, seed: int) -> list[str]:
    """Sentences of one of the tasks sums, animals and tunes, of 6 to 12 words."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        if task == "sums":
            a, b = random.integers(0, 5, size=2)
            more = f" and {NUMBERS[b]} plus {NUMBERS[a]} is too" if random.random() < 0.5 else ""
            made.append(f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}{more}")
        elif task == "animals":
            who, where = random.choice(ANIMALS), PLACES[int(random.integers(6))]
            other = ANIMALS[(ANIMALS.index(str(who)) + 1) % 6]
            more = f" and fears the {other}" if random.random() < 0.5 else ""
            made.append(f"the {who} sleeps near the {where}{more}")
        else:
            start, length = int(random.integers(7)), int(random.integers(6, 12))
            made.append(" ".join(NOTES[(start + i) % 7] for i in range(length)))
    return made


TASKS = ("sums", "animals", "tunes")


def save_tokenizer(folder: Path, extra: Sequence[str] = ()) -> Any:
    """A fast tokenizer of words, which begins a text with its first token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted(
        {word for task in TASKS for text in texts(task, 200, 0) for word in text.split()}
    )
    names = ["<s>", "</s>", "<unk>", *words, *extra]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


def build(kind: str, **changes: Any) -> Any:
    """A model of transformers of a type, random and in evaluation mode."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[kind](**changes)
    return AutoModelForCausalLM.from_config(config).eval()


def train(model: Any, tokenizer: Any, lines: Sequence[str], steps: int, rate: float) -> None:
    """Some steps of AdamW on texts."""
    rows = [tokenizer(line)["input_ids"] for line in lines]
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    random = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(rows), (16,), generator=random)
        optimiser.zero_grad()
        model(input_ids=tokens[batch], labels=labels[batch]).loss.backward()
        optimiser.step()
    model.eval()


def write_suite(folder: Path, experts: Mapping[str, Any], **fields: Any) -> Path:
    """A suite.yaml in a folder with base and experts."""
    document = {"name": "spoken", "base": "base", "experts": dict(experts), **fields}
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def trained_suite(folder: Path, examples: int = 32) -> Path:
    """A Llama taught all tasks a little, and fine-tuned on each: a suite with `examples` texts a
    task to choose on and as many to report on."""
    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "base")
    model = build("llama", **LLAMA)
    every = [line for task in TASKS for line in texts(task, 60, 1)]
    train(model, tokenizer, every, 40, 4e-3)
    model.save_pretrained(folder / "base")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    experts = {}
    for task in TASKS:
        model.load_state_dict(start)
        train(model, tokenizer, texts(task, 120, 2), 25, 3e-3)
        model.save_pretrained(folder / task)
        data = folder / f"{task}-data"
        data.mkdir()
        for split, seed in (("val", 3), ("test", 4)):
            (data / f"{split}.txt").write_text("\n".join(texts(task, examples, seed)))
        experts[task] = {"weights": task, "data": {"kind": "language", "path": data.name}}
    return write_suite(folder, experts)
