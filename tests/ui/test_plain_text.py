"""What strangers wrote is shown as it is: no link, no image, no letters of another kind."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.browser.foreign_texts import HOST, TEXTS
from ui.plain_text import JOINER, UNUSABLE, code, plain, plain_figure

ROOT = Path(__file__).resolve().parents[2]
MARKDOWN = MarkdownIt("commonmark").enable("strikethrough").enable("table")
MADE_OF = "![](){}<>`*_~$:/&#;.-+=|\\ \n@wht"


def rendered(markdown: str) -> tuple[set[str], str]:
    """Kinds of tokens that an independent parser of Markdown finds, and the text that it shows."""
    tokens = [each for token in MARKDOWN.parse(markdown) for each in (token.children or [token])]
    kinds = {token.type for token in tokens if not token.type.startswith("paragraph")}
    return kinds, "".join(token.content for token in tokens)


@pytest.mark.parametrize("text", TEXTS)
def test_a_foreign_text_is_shown_as_it_is(text: str) -> None:
    kinds, shown = rendered(plain(text))
    assert kinds <= {"text"}
    assert shown.replace(JOINER, "") == UNUSABLE.sub("\ufffd", " ".join(text.split()))


@given(st.lists(st.sampled_from([*MADE_OF, f"http://{HOST}", "www.", ":red", "1"])).map("".join))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    kinds, shown = rendered(plain(text))
    assert kinds <= {"text"}
    assert shown.replace(JOINER, "") == " ".join(text.split())


@given(st.text())
def test_no_text_stops_a_page(text: str) -> None:
    plain(text).encode()
    code(text).encode()


def test_what_needs_no_escape_keeps_its_letters() -> None:
    for text in ("vit_base/blocks.0.attn.qkv.weight", "a: b, c (d) - 5 %", "expert 'x' 1.5"):
        assert plain(text) == text


def test_figures_hold_no_links() -> None:
    hostile = f"<a href='http://{HOST}'>x</a> <span style='x'>y</span> <b>b</b><br>"
    figure = go.Figure(go.Bar(x=[hostile], y=[1], customdata=[[hostile]], hovertemplate=hostile))
    figure.update_layout(title_text=hostile, xaxis_title_text=hostile)
    figure.add_annotation(text=hostile)
    shown = str(plain_figure(figure).to_dict())
    assert "<a" not in shown
    assert "<span" not in shown
    assert shown.count("<b>b</b><br>") == 6
    same = go.Figure(go.Bar(x=["a"], hovertemplate="%{x}<br>b<extra></extra>"))
    assert plain_figure(same) is same


# What errors, warnings and notes say is made of others' words more often than not.
MESSAGES = {"error", "warning", "info", "success", "toast", "exception"}
OURS = {"plain", "code", "len", "nunique", "factor_label", "join"}
NUMBER = re.compile(r"[-+ ,.\d]*[defgn%]|,")
NO_PLACES = {"log", "first", "expert", "checkpoint"}  # whose ``info`` is of a tensor


def is_ours(node: ast.AST) -> bool:
    """Whether an expression holds no text but literal, escaped, or a number by its format."""
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.FormattedValue) and isinstance(node.format_spec, ast.JoinedStr):
        parts = node.format_spec.values
        return NUMBER.fullmatch("".join(str(getattr(p, "value", "")) for p in parts)) is not None
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        return name in OURS and (name != "join" or all(map(is_ours, node.args)))
    parts = {
        ast.JoinedStr: lambda: node.values,
        ast.FormattedValue: lambda: [node.value],
        ast.BinOp: lambda: [node.left, node.right],
        ast.IfExp: lambda: [node.body, node.orelse],
        ast.GeneratorExp: lambda: [node.elt],
        ast.ListComp: lambda: [node.elt],
    }.get(type(node))
    if parts is not None:
        return all(map(is_ours, parts()))
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name.isupper()


def foreign_messages(source: str) -> Iterator[str]:
    """Calls that show a message with a text that may be anybody's."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr not in MESSAGES or ast.unparse(node.func.value) in NO_PLACES:
                continue
            shown = [*node.args, *(k.value for k in node.keywords if k.arg == "body")]
            yield from (ast.unparse(each) for each in shown if not is_ours(each))


@pytest.mark.parametrize("place", ["pages", "ui"])
def test_messages_are_escaped(place: str) -> None:
    """Others' words are shown by ui/plain_text.py, or stand in ``plain(...)`` or ``code(...)``."""
    files = [file for file in (ROOT / place).rglob("*.py") if file.name != "plain_text.py"]
    assert files
    found = {str(f.relative_to(ROOT)): [*foreign_messages(f.read_text())] for f in files}
    assert not {file: texts for file, texts in found.items() if texts}


def test_the_search_for_messages_finds_them() -> None:
    bad = ["st.error(str(error))", "left.warning(f'a {name}')", "st.info(x if y else 'b')"]
    assert all([*foreign_messages(each)] for each in bad)
    good = ["st.error(plain(error))", "st.info(f'{n:,.1f} {len(x)} {code(y)} {MOST}')"]
    assert not any([*foreign_messages(each)] for each in good)
