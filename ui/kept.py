"""Where every control stands: kept over pages, and written in the page's address.

One mechanism for all of them. The address of a page says everything in which its controls differ
from rest, so that going back, reloading and opening a link show the same. Besides, each page's
values are kept for the session: the navigation leads back to a page as it was left. Values are
kept as they are, whether or not a control offers them: a rank of 11.3 % beside a slider's 10 and
12 %. :mod:`ui.controls` draws the controls; nothing else draws any.

Streamlit's own ``bind="query-params"`` is not used: it forgets what a control does not offer,
shares values between controls of one name on different pages, and sends other parameters as they
were some runs ago.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qs, urlencode

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from ui import history

STATE = "_kept"
# Chosen beside every page, and so the same on all of them.
SHARED = (*("suite", "preset", "tasks", "layer", "pool", "start", "members", "device", "present"),)
STAYING = ("suite", "pool", "start", "device", "present")  # when a page is reset
Value = TypeVar("Value")
Query = dict[str, list[str]]


@dataclass(frozen=True)
class Control(Generic[Value]):
    """What the mechanism has to know of a control.

    Attributes:
        name: in the address, and key in Streamlit's session state.
        label: above it.
        rest: its value until somebody changes it; not written in the address.
        read: a value from the words of an address; ValueError where they say none.
        write: the words of a value.
        fits: whether it can stand at a value.
        slot: what the value is kept for, where a control of one name means different things, such
            as the scale of different methods; the name where it always means the same.
        linked: whether the address says it. What depends on the machine is kept for the session
            alone.
    """

    name: str
    label: str
    rest: Value
    read: Callable[[list[str]], Value]
    write: Callable[[Value], list[str]]
    fits: Callable[[Value], bool]
    slot: str
    linked: bool = True


@dataclass
class Kept:
    """What one session keeps.

    Attributes:
        page: the one in view.
        addresses: page to its parameters, as it is or was left.
        asked: what of the address no control has read yet.
        linked: names in the address of a link.
        complete: scopes of which the address said everything when the page was entered.
        drawn: names of all controls that have been drawn.
        seeded: name to slot of the controls that stand somewhere in this visit of the page.
        rests: name to value at rest of these.
        unread: labels of controls for which the address said nothing that fits.
        values: scope (a page, or empty for what all pages share) to slot to what differs from
            rest.
    """

    page: str = ""
    addresses: dict[str, Query] = field(default_factory=dict)
    asked: Query = field(default_factory=dict)
    linked: set[str] = field(default_factory=set)
    complete: set[str] = field(default_factory=set)
    drawn: set[str] = field(default_factory=set)
    seeded: dict[str, str] = field(default_factory=dict)
    rests: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def address(self) -> Query:
        """The parameters of the page in view."""
        return self.addresses.setdefault(self.page, {})

    def scope(self, name: str) -> str:
        """Where the values of a control of that name are kept."""
        return "" if name in SHARED else self.page


def kept() -> Kept:
    """What the current session keeps."""
    known: Kept | None = st.session_state.get(STATE)
    if known is None:
        known = st.session_state[STATE] = Kept()
    return known


def enter(page: str) -> None:
    """Begin a run of a page; on arrival its controls take their values anew.

    An address that says something of the page itself is a link, and says everything; so does one
    that the browser goes back to. One that says nothing comes from the navigation.

    Args:
        page: its name.
    """
    known, context = kept(), get_script_run_ctx()
    gone_back = context is not None and context.is_history_navigation
    if known.page == page and not gone_back:
        return
    link = _current_query()
    is_link = gone_back or any(name not in SHARED for name in link)
    left = {} if is_link else known.addresses.get(page, {})
    known.page, known.linked = page, set(link)
    known.asked = {name: words for name, words in left.items() if name not in SHARED} | link
    known.addresses[page] = dict(known.asked)
    known.seeded, known.rests, known.unread = {}, {}, []
    known.complete = ({page} if is_link else set()) | ({""} if gone_back else set())


def stand(control: Control[Value], draw: Callable[[Value], Value]) -> Value:
    """Draw a control where it stands.

    Args:
        control: what is drawn.
        draw: draws Streamlit's widget, whose key is the control's name, from its present value,
            and returns what it says then.
    """
    known, name = kept(), control.name
    value = _present(control, known)
    # On arrival always: what stands there may be another page's widget of that name, and the new
    # widget would begin at its first option.
    arrived = name not in known.seeded
    if arrived or name not in st.session_state or st.session_state[name] != value:
        st.session_state[name] = value
    known.drawn.add(name)
    known.seeded[name], known.rests[name] = control.slot, control.rest
    value = draw(value)
    _keep(control, value, known)
    return value


def address() -> str:
    """The parameters of the page in view, as a link's query."""
    return urlencode(kept().address, doseq=True)


def asked(name: str) -> str:
    """What the address says for a control that is not drawn yet in this visit; else nothing."""
    return next(iter(kept().asked.get(name, [])[-1:]), "")


def answer(name: str, words: str) -> None:
    """Put what a control understands in the place of what the address says for it."""
    kept().asked[name] = [words]


def move(name: str, words: str) -> None:
    """Let a control stand elsewhere from the next run on (called between two runs of a page).

    Args:
        name: of the control.
        words: as its value would stand in an address.
    """
    known = kept()
    known.seeded.pop(name, None)
    known.asked[name] = [words]


def reset() -> None:
    """Put every control of the page in view to rest, and tasks and layer with them.

    The suite or pool stays, and what is about the room and the machine. Called between two runs.
    """
    known = kept()
    known.values[""] = {slot: v for slot, v in known.values.get("", {}).items() if slot in STAYING}
    known.values.pop(known.page, None)
    known.addresses[known.page] = {k: v for k, v in known.address.items() if k in STAYING}
    known.asked, known.linked, known.complete = {}, set(), set()
    for name in [name for name in known.drawn if name not in STAYING]:
        known.seeded.pop(name, None)
        st.session_state.pop(name, None)


def take_unread() -> list[str]:
    """Labels of controls whose words in the address did not fit, once."""
    known = kept()
    found, known.unread = known.unread, []
    return found


def shared_value(slot: str) -> Any:
    """What a control beside every page stands at, where that is not at rest; else None."""
    return kept().values.get("", {}).get(slot)


def _present(control: Control[Value], known: Kept) -> Value:
    """Where a control stands before it is drawn."""
    name = control.name
    # What is there before a control is drawn for the first time was put there by a program.
    standing = known.seeded.get(name) if name in known.drawn else control.slot
    if name in st.session_state and standing == control.slot:
        value: Value = st.session_state[name]
        at_rest = name in known.rests and value == known.rests[name]
        return control.rest if at_rest or not control.fits(value) else value
    words = known.asked.pop(name, None)
    if words is not None and control.linked:
        try:
            value = control.read(words)
            if control.fits(value):
                return value
        except ValueError:
            pass
        if name in known.linked:
            known.unread.append(control.label)
    scope = known.scope(name)
    if name not in known.seeded and scope in known.complete and control.linked:
        return control.rest
    value = known.values.get(scope, {}).get(control.slot, control.rest)
    return value if control.fits(value) else control.rest


def _keep(control: Control[Value], value: Value, known: Kept) -> None:
    """Keep a value, and write it in the address."""
    values = known.values.setdefault(known.scope(control.name), {})
    known.address.pop(control.name, None)
    if value == control.rest:
        values.pop(control.slot, None)
    else:
        values[control.slot] = value
        if control.linked:
            known.address[control.name] = control.write(value) or [""]
    if known.address != _current_query():
        st.query_params.from_dict({**known.address, history.PAGE: [known.page]})


def _current_query() -> Query:
    """The parameters in the browser's address line, as far as the server knows."""
    context = get_script_run_ctx()
    query = "" if context is None else context.query_string
    found = parse_qs(query, keep_blank_values=True)
    own = (history.PAGE, "embed", "embed_options")
    return {name: words for name, words in found.items() if name not in own}
