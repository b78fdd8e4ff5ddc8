"""The controls that pages are made of, each kept by :mod:`ui.kept`.

Every function draws one of Streamlit's widgets under the name that it has in the address. Pages
draw no other: a test holds this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import streamlit as st
from streamlit.elements.lib.mutable_tab_container import TabContainer

from ui.kept import Control, stand
from ui.plain_text import plain

Value = TypeVar("Value")


def selectbox(
    label: str,
    options: Iterable[Value],
    name: str,
    *,
    rest: Value | None = None,
    words: Callable[[Value], str] = str,
    shown: Callable[[Value], str] | None = None,
    help: str | None = None,
    slot: str = "",
    linked: bool = True,
) -> Value:
    """One of several options; the first at rest, or the one that is named.

    Args:
        label: above it.
        options: at least one.
        name: in the address.
        rest: at rest.
        words: what is written on an option, and in the address.
        shown: what is written on an option instead.
        help: tooltip.
        slot: see :class:`ui.kept.Control`.
        linked: see :class:`ui.kept.Control`.
    """
    offered = list(options)
    control = replace(_one_of(label, offered, name, rest, words, slot), linked=linked)

    def draw(_: Value) -> Value:
        return st.selectbox(label, offered, format_func=shown or words, key=name, help=help)

    return stand(control, draw)


def optional_selectbox(
    label: str,
    options: Iterable[str],
    name: str,
    *,
    placeholder: str,
    words: Callable[[str], str] = str,
    help: str | None = None,
    typed: bool = False,
) -> str | None:
    """One of several texts, or none at rest.

    Args:
        label: above it.
        options: the texts, which are what the address says too.
        name: in the address.
        placeholder: shown where none is chosen.
        words: what is written on an option.
        help: tooltip.
        typed: whether another text can be typed.
    """
    offered = list(options)
    control: Control[str | None] = Control(
        name,
        label,
        None,
        _last,
        lambda text: [text or ""],
        lambda text: text is None or typed or text in offered,
        name,
    )

    def draw(_: str | None) -> str | None:
        return st.selectbox(
            label,
            offered,
            index=None,
            format_func=words,
            placeholder=placeholder,
            accept_new_options=typed,
            key=name,
            help=help,
        )

    return stand(control, draw)


def choice(
    label: str,
    options: Mapping[Value, str],
    name: str,
    help: str | None = None,
    slot: str = "",
    rest: Value | None = None,
) -> Value:
    """One of a few options side by side; the first at rest, or the one that is named.

    Args:
        label: above the control.
        options: value to what is written on it.
        name: in the address.
        help: tooltip.
        slot: see :class:`ui.kept.Control`.
        rest: at rest.
    """
    values, words = list(options), options.__getitem__

    def draw(_: Value) -> Value:
        chosen = st.segmented_control(
            label, values, format_func=words, required=True, key=name, help=help
        )
        return cast(Value, chosen)

    return stand(_one_of(label, values, name, rest, words, slot), draw)


def radio(
    label: str,
    options: Iterable[str],
    name: str,
    *,
    rest: str | None = None,
    help: str | None = None,
    slot: str = "",
) -> str:
    """One of a few texts below each other; the first at rest, or the one that is named."""
    offered = list(options)

    def draw(_: str) -> str:
        chosen: str = st.radio(label, offered, format_func=plain, key=name, help=help)
        return chosen

    return stand(
        _one_of(label, offered, name, offered[0] if rest is None else rest, str, slot), draw
    )


def pills(
    label: str,
    options: Iterable[Value],
    name: str,
    help: str | None = None,
    slot: str = "",
    rest: Iterable[Value] | None = None,
) -> list[Value]:
    """Any of a few options side by side, in the order of the options.

    Args:
        label: above the control.
        options: at least one.
        name: in the address.
        help: tooltip.
        slot: see :class:`ui.kept.Control`.
        rest: chosen at rest; all when None.
    """
    offered = list(options)
    at_rest = offered if rest is None else list(rest)
    control = _any_of(label, offered, name, at_rest, str, len(offered), slot)

    def draw(_: list[Value]) -> list[Value]:
        # Labels of pills are Markdown, and tasks have the names that strangers gave.
        chosen = st.pills(
            label, offered, selection_mode="multi", format_func=plain, key=name, help=help
        )
        return sorted(chosen, key=offered.index)

    return stand(control, draw)


def multiselect(
    label: str,
    options: Iterable[Value],
    name: str,
    *,
    rest: Iterable[Value] = (),
    words: Callable[[Value], str] = str,
    shown: Callable[[Value], str] | None = None,
    most: int | None = None,
    help: str | None = None,
    slot: str = "",
) -> list[Value]:
    """Any of several options, in the order in which they were chosen.

    Args:
        label: above it.
        options: may be none.
        name: in the address.
        rest: chosen at rest.
        words: what is written on an option, and in the address.
        shown: what is written on an option instead.
        most: so many can be chosen.
        help: tooltip.
        slot: see :class:`ui.kept.Control`.
    """
    offered = list(options)
    control = _any_of(label, offered, name, list(rest), words, most or len(offered), slot)

    def draw(_: list[Value]) -> list[Value]:
        return st.multiselect(
            label, offered, format_func=shown or words, max_selections=most, key=name, help=help
        )

    return stand(control, draw)


def steps(
    label: str,
    options: Iterable[Value],
    name: str,
    *,
    rest: Value,
    words: Callable[[Value], str] = str,
    help: str | None = None,
    slot: str = "",
) -> Value:
    """A slider over values that are all there are, such as the epochs that are stored."""
    offered = list(options)

    def draw(_: Value) -> Value:
        chosen: Value = st.select_slider(label, offered, format_func=words, key=name, help=help)
        return chosen

    return stand(_one_of(label, offered, name, rest, words, slot), draw)


def grid(
    label: str,
    options: Iterable[float],
    name: str,
    *,
    rest: float,
    high: float,
    words: Callable[[float], str],
    number: Callable[[str], float],
    help: str | None = None,
    slot: str = "",
) -> float:
    """A slider over a grid of numbers that may stand beside it too, at a number of a link's.

    Args:
        label: above it.
        options: the grid.
        name: in the address.
        rest: at rest, on the grid or not.
        high: the largest number that it can stand at; all are above 0.
        words: a number in words, with all its digits.
        number: a number from words; ValueError where they are none.
        help: tooltip.
        slot: see :class:`ui.kept.Control`.
    """
    offered = list(options)
    control = Control(
        name,
        label,
        rest,
        lambda found: number(_last(found)),
        lambda value: [words(value)],
        lambda value: 0 < value <= high or value in offered,
        slot or name,
    )

    def draw(value: float) -> float:
        shown = sorted({*offered, value})
        return float(st.select_slider(label, shown, format_func=words, key=name, help=help))

    return stand(control, draw)


def slider(
    label: str,
    low: float,
    high: float,
    name: str,
    *,
    rest: float,
    step: float,
    help: str | None = None,
    slot: str = "",
) -> float:
    """A slider over numbers, whole ones if all that it is given are whole."""
    whole = all(isinstance(value, int) for value in (low, high, rest, step))
    control = _number(label, low, high, name, rest, whole, slot)

    def draw(_: float) -> float:
        return st.slider(label, low, high, step=step, key=name, help=help)

    return stand(control, draw)


def count(
    label: str, low: int, name: str, *, rest: int, help: str | None = None, slot: str = ""
) -> int:
    """A whole number that is typed, of at least `low`."""
    control = _number(label, low, math.inf, name, rest, True, slot)

    def draw(_: float) -> float:
        return st.number_input(label, min_value=low, step=1, key=name, help=help)

    return int(stand(control, draw))


def toggle(label: str, name: str, help: str | None = None) -> bool:
    """A switch, off at rest."""
    control = _one_of(label, [False, True], name, False, lambda on: str(on).lower(), "")
    return stand(control, lambda _: st.toggle(label, key=name, help=help))


def text(
    label: str,
    name: str,
    *,
    rest: str = "",
    lines: bool = False,
    most: int | None = None,
    slot: str = "",
    **options: Any,
) -> str:
    """A text that is typed.

    Args:
        label: above it.
        name: in the address.
        rest: the text at rest.
        lines: whether it may have several lines.
        most: so many characters.
        slot: see :class:`ui.kept.Control`.
        options: of Streamlit's widget.
    """
    control: Control[str] = Control(
        name, label, rest, _last, lambda said: [said], lambda _: True, slot or name
    )
    widget = st.text_area if lines else st.text_input
    return stand(control, lambda _: widget(label, max_chars=most, key=name, **options) or "")


def tabs(labels: Iterable[str], name: str) -> Sequence[TabContainer]:
    """Tabs; the first one is open at rest. ``open`` of each says whether it is looked at."""
    offered = list(labels)
    places: list[TabContainer] = []

    def draw(_: str) -> str:
        places.extend(st.tabs(offered, key=name, on_change="rerun"))
        opened: str = st.session_state[name]
        return opened

    stand(_one_of("Tab", offered, name, None, str, ""), draw)
    return places


def _last(words: list[str]) -> str:
    """The last of an address's words for one name counts."""
    return words[-1]


def _one_of(
    label: str,
    offered: Sequence[Value],
    name: str,
    rest: Value | None,
    words: Callable[[Value], str],
    slot: str,
) -> Control[Value]:
    """A control that stands at one of the values on offer; at the first where no rest is named."""

    def read(found: list[str]) -> Value:
        for value in offered:
            if words(value) == _last(found):
                return value
        raise ValueError(name)

    return Control(
        name,
        label,
        offered[0] if rest is None else rest,
        read,
        lambda value: [words(value)],
        lambda value: value in offered,
        slot or name,
    )


def _any_of(
    label: str,
    offered: Sequence[Value],
    name: str,
    rest: Sequence[Value],
    words: Callable[[Value], str],
    most: int,
    slot: str,
) -> Control[list[Value]]:
    """A control that stands at several of the values on offer."""

    def read(found: list[str]) -> list[Value]:
        known = {words(value): value for value in offered}
        asked = list(dict.fromkeys(filter(None, found)))
        values = [known[word] for word in asked if word in known]
        if asked and not values:
            raise ValueError(name)
        return values

    return Control(
        name,
        label,
        list(rest),
        read,
        lambda values: list(map(words, values)),
        lambda values: len(values) <= most and all(value in offered for value in values),
        slot or name,
    )


def _number(
    label: str, low: float, high: float, name: str, rest: float, whole: bool, slot: str
) -> Control[float]:
    """A control that stands at a number between two others."""
    number: Callable[[str], float] = int if whole else float

    def read(found: list[str]) -> float:
        return number(_last(found))

    write = partial(_write_number, whole=whole)
    return Control(name, label, rest, read, write, lambda value: low <= value <= high, slot or name)


def _write_number(value: float, whole: bool) -> list[str]:
    """A number with all its digits."""
    return [str(value) if whole else f"{value:.12g}"]
