"""Patterns of layers' names: PEFT's own answer, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from merge_core.checkpoints.lora_config import MOST_PATTERNS, AdapterConfig
from merge_core.checkpoints.name_patterns import NamePatterns
from merge_core.errors import CheckpointError
from tests.reliability.limits import SECONDS

NAMES = [
    f"model.layers.{i}.{part}"
    for i in (0, 1, 10, 11, 21)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "q_proj")
] + ["q_proj", "xq_proj", "layers.1", "a.b.c", "aXb.c", "model", "1"]
PIECES = [
    "q_proj",
    "self_attn",
    "layers",
    "mlp",
    r"\d+",
    "1",
    "10",
    ".*",
    "[01]",
    "(q|k)_proj",
    "up",
]
PATTERNS = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map(".".join),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map(r"\.".join),
    st.sampled_from(
        ["^q_proj", "^model", "q_proj$", "layers|q_proj", "a.b", "a.b.c", ".proj", "."]
    ),
    st.text("abq_.1", min_size=1, max_size=4),
)


@given(st.lists(PATTERNS, min_size=1, max_size=6, unique=True))
def test_patterns_match_as_pefts_do(patterns: list[str]) -> None:
    found = NamePatterns({pattern: float(i) for i, pattern in enumerate(patterns)})
    for name in NAMES:
        key = get_pattern_key(patterns, name)
        # PEFT gives the name itself where nothing matches, which may also be a pattern.
        matched = any(re.match(rf"(.*\.)?({pattern})$", name) for pattern in patterns)
        assert found.find(name) == (float(patterns.index(key)) if matched else None)


def test_a_pattern_for_each_of_many_layers_is_no_work() -> None:
    """Every layer has a rank of its own, as AdaLoRA's may."""
    names = [f"model.layers.{i // 10}.block.{i % 10}.q_proj" for i in range(MOST_PATTERNS)]
    config = AdapterConfig(
        peft_type="LORA",
        rank_pattern={name: i + 1 for i, name in enumerate(names)},
        alpha_pattern={name.removeprefix("model."): 2.0 * i for i, name in enumerate(names)},
    )
    began = time.process_time()
    ranks = [config.rank_of(f"base.{name}") for name in names]
    scales = [config.scale_of(f"base.{name}") for name in names]
    assert time.process_time() - began < SECONDS
    assert ranks == list(range(1, MOST_PATTERNS + 1))
    assert scales == [2.0 * i / (i + 1) for i in range(MOST_PATTERNS)]


@pytest.mark.parametrize(
    "patterns",
    [
        [f".*{i}.*x" for i in range(MOST_PATTERNS)],
        [f"[a-z]*[a-z]*{i}" for i in range(MOST_PATTERNS)],
        [f"({i}|x)y" for i in range(MOST_PATTERNS)],
        ["".join(".a"[(i >> k) & 1] for k in range(11)) for i in range(MOST_PATTERNS)],
    ],
)
def test_patterns_made_to_take_long_end_within_a_second(patterns: list[str]) -> None:
    config = AdapterConfig(peft_type="LORA", rank_pattern=dict.fromkeys(patterns, 4))
    names = [f"{'a' * 30}.{'b' * 400}.{i:011d}" for i in range(5000)]
    began = time.process_time()
    with pytest.raises(CheckpointError, match="too many and too intricate"):
        [config.rank_of(name) for name in names]
    assert time.process_time() - began < 2 * SECONDS
