"""Texts of strangers on a page: shown as they are, whatever marks of Markdown or HTML they hold.

Names of suites, tasks and tensors, paths, what a link says and every error that names them come
from files and links that anybody may have made. As Markdown they could have the browser ask
another host for an image, or show a link under any words.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import streamlit as st

from merge_core.errors import MergeScopeError
from merge_core.files import cache_dir
from ui.server import roots
from ui.server.catalog import POOLS, SUITES

# Of no width: it parts what Streamlit would join to a link or an icon after escapes are gone.
JOINER = "\u2060"
# Halves of pairs, which no message to the browser takes; control characters; those that turn the
# direction of writing, so that a name reads as another.
UNUSABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MARKS = re.compile(
    r"(?P<mark>[\\`*\[\]<$~|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|&(?=#?\w+;))"
    r"|(?P<icon>:(?=[\w+/-]+:))"  # :smile:, :material/home:
    r"|(?P<directive>:(?=[^\W\d]))"  # :red[…]
    r"|(?P<address>https?:(?=//)|www(?=\.)|(?<=[\w.+-])@(?=[\w-]+\.))",
    re.IGNORECASE,
)
BLOCK = re.compile(r"[#>=]|[-+](?=[\s+-]|$)|\d+(?=[.)](?:\s|$))")  # where a line begins
# The tags of Plotly's texts that change no more than how letters look. All others are shown.
TAG = re.compile(r"<(?!/?(?:b|i|em|strong|sub|sup|br|extra)\s*/?>)", re.IGNORECASE)


def plain(text: object) -> str:
    """A stranger's text as Markdown that shows exactly this text, in one line.

    Example:
        >>> plain("![x](p.png) *a*")
        '!\\\\[x\\\\](p.png) \\\\*a\\\\*'
        >>> plain("vit_base/blocks.0.attn.qkv.weight")
        'vit_base/blocks.0.attn.qkv.weight'
    """
    shown = MARKS.sub(_escape, _clean(text))
    if (block := BLOCK.match(shown)) is None:
        return shown
    if block[0].isdigit():
        return f"{block[0]}\\{shown[block.end() :]}"
    return f"\\{shown}"


def code(text: object) -> str:
    """A stranger's text in the letters of code, as Markdown.

    Example:
        >>> code("head.weight")
        '`head.weight`'
    """
    shown = _clean(text)
    return f"`{shown}`" if shown and "`" not in shown else plain(text)


def _clean(text: object) -> str:
    return " ".join(UNUSABLE.sub("\ufffd", " ".join(str(text).split())).split())


def _escape(found: re.Match[str]) -> str:
    mark = found[0]
    if found["mark"] or found["directive"]:
        return f"\\{mark}"
    return f"\\{mark}{JOINER}" if found["icon"] else f"{mark}{JOINER}"


def show_error(message: object) -> None:
    """What went wrong, in the words of an error; nothing in them is Markdown."""
    st.error(plain(shorten_paths(str(message))), icon=":material/error:")


def show_warning(message: object) -> None:
    """A warning made of others' words; nothing in them is Markdown."""
    st.warning(plain(shorten_paths(str(message))))


def show_info(message: object) -> None:
    """A note made of others' words; nothing in them is Markdown."""
    st.info(plain(shorten_paths(str(message))))


def shorten_paths(text: str) -> str:
    """A message in which the server's folders are called by their last name.

    Where they lie on the server is no business of whoever opened a link.

    Example:
        >>> shorten_paths(f"{Path.home()}/models/base is missing.")
        '~/models/base is missing.'
    """
    offered = (*SUITES.list_offered().values(), *POOLS.list_offered().values())
    places = {path.parent for path in offered}
    with suppress(MergeScopeError):  # one is no path
        places |= {*roots.roots(), cache_dir()}
    for place in sorted(places, key=lambda place: len(str(place)), reverse=True):
        if place.name:
            text = text.replace(f"{place}/", f"{place.name}/")
    with suppress(RuntimeError):  # no home folder
        text = text.replace(f"{Path.home()}/", "~/")
    return text


def plain_figure(figure: go.Figure) -> go.Figure:
    """A figure whose texts hold no links or styles, whatever names are drawn in it.

    Plotly reads a few HTML tags in every text. Line breaks, bold and the like stay.

    Returns:
        The figure itself where there is nothing to take away.

    Example:
        >>> figure = go.Figure(layout_title_text="<a href='http://host'>a</a> <b>b</b>")
        >>> plain_figure(figure).layout.title.text
        "&lt;a href='http://host'>a&lt;/a> <b>b</b>"
    """
    drawn = figure.to_dict()
    return go.Figure(_without_tags(drawn)) if _has_tags(drawn) else figure


def _has_tags(value: Any) -> bool:
    if isinstance(value, str):
        return "<" in value and TAG.search(value) is not None
    if isinstance(value, dict):
        return any(map(_has_tags, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_tags, value))
    return _holds_objects(value) and any(map(_has_tags, value.ravel()))


def _without_tags(value: Any) -> Any:
    if isinstance(value, str):
        return TAG.sub("&lt;", value)
    if isinstance(value, dict):
        return {key: _without_tags(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tags(item) for item in value]
    if _holds_objects(value):
        return _without_tags(value.tolist())
    return value


def _holds_objects(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "OU"
