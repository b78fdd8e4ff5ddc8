"""The page Glossary, and words that lead to it."""

from __future__ import annotations

from tests.pages.test_pages import assert_healthy, open_page
from ui.words.glossary import TERMS


def test_every_word_has_a_place() -> None:
    at = assert_healthy(open_page("glossary"))
    assert {each.anchor for each in at.subheader} == {term.anchor for term in TERMS}
    text = " ".join(m.value for m in at.markdown)
    assert all(term.meaning in text for term in TERMS)


def test_how_to_read_explains_words_on_hover() -> None:
    at = open_page("overview")
    at.session_state["how_build_up"] = True
    at = assert_healthy(at.run())
    assert any('](glossary#direction "' in m.value for m in at.markdown)
