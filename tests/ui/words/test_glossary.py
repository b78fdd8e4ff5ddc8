"""Words say their meaning where they stand in texts."""

from __future__ import annotations

import re

import pytest

from ui.words.glossary import TERMS, link_terms


def test_the_first_of_each_word_is_linked() -> None:
    text = link_terms("Experts have a **rank**; other experts, other ranks, and ranking.")
    assert text.count("](glossary#expert ") == 1
    assert text.startswith("[Experts](glossary#expert ")
    assert "**[rank](glossary#rank " in text
    assert text.endswith("other experts, other ranks, and ranking.")


def test_the_longest_word_counts() -> None:
    assert link_terms("centred task vectors").startswith("[centred task vectors](glossary#task-v")


@pytest.mark.parametrize("text", ["`rank`", "$rank$", "[rank](https://host)", "rank-and-file"])
def test_code_formulas_and_links_stay(text: str) -> None:
    assert link_terms(text) == text


def test_every_word_is_explained_once_in_plain_words() -> None:
    forms = [form.lower() for term in TERMS for form in (term.name, *term.forms)]
    assert len(forms) == len(set(forms))
    assert len({term.anchor for term in TERMS}) == len(TERMS)
    for term in TERMS:
        assert not re.search(r'["`$<\[\]*_]', term.meaning), term.name  # stands in a link's title
        assert term.meaning.endswith(".")
        if term.source is not None:
            assert term.source[1].startswith("https://arxiv.org/abs/")
