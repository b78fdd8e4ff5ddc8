"""Whatever JSON stands beside weights: findings or none, the same in every order, never a fault."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from merge_core.compatibility.companions import Companions
from merge_core.compatibility.config_fields import DEFAULTS, RULES, SILENT
from merge_core.compatibility.config_values import ROTARY
from merge_core.compatibility.configs import compare_documents
from merge_core.compatibility.findings import sort_findings
from merge_core.compatibility.tokens import compare_settings, compare_templates
from merge_core.compatibility.vocabularies import compare_vocabularies

NAMES = sorted(
    {*RULES, *DEFAULTS, *SILENT, *ROTARY, "model_type", "architecture", "vision_config", "type"}
)
TOKENIZER = ("model", "vocab", "merges", "added_tokens", "id", "content", "chat_template", "name")
WORDS = ("llama", "clip", "default", "linear", "gelu", "swish", "vit_base_patch16_224", "default")
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)


def documents(names: tuple[str, ...] | list[str]) -> st.SearchStrategy[dict[str, object]]:
    keys = st.one_of(st.sampled_from(names), st.text(max_size=5))
    values = st.recursive(
        plain,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)
        ),
        max_leaves=8,
    )
    return st.dictionaries(keys, values, max_size=8)


@given(st.lists(documents(NAMES), min_size=2, max_size=4))
def test_any_configurations(configs: list[dict[str, object]]) -> None:
    members = {f"m{i}": config for i, config in enumerate(configs)}
    found = sort_findings(compare_documents("config.json", members))
    turned = dict(reversed(members.items()))
    assert sort_findings(compare_documents("config.json", turned)) == found
    assert all(finding.sentence.isprintable() for finding in found)
    alike = {"a": configs[0], "b": json.loads(json.dumps(configs[0]))}
    whole = json.dumps(configs[0])
    assert "NaN" in whole or compare_documents("config.json", alike) == []


@given(st.lists(documents([*TOKENIZER, *NAMES[:20]]), min_size=2, max_size=3))
def test_any_tokenizers(contents: list[dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        members = {}
        for i, content in enumerate(contents):
            folder = Path(place) / str(i)
            folder.mkdir()
            for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
                (folder / name).write_text(json.dumps(content))
            members[f"m{i}"] = Companions(folder)
        turned = dict(reversed(members.items()))
        for compare in (
            lambda m: compare_vocabularies(m, False),
            compare_settings,
            compare_templates,
        ):
            found = sort_findings(compare(members))
            assert sort_findings(compare(turned)) == found
            assert all(finding.sentence.isprintable() for finding in found)
