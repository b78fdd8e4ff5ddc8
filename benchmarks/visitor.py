"""A visitor of the dashboard: a connection like a browser's, without the browser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.Block_pb2 import Block
from streamlit.proto.Element_pb2 import Element
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_socket
from websockets.typing import Origin, Subprotocol

ANSWER_SECONDS = 300.0
NUMBERS = 12  # places of a slider over numbers that are tried
Field = Literal["string_value", "string_array_value", "double_array_value", "bool_value"]
Value = str | float | bool


@dataclass
class Widget:
    """A control that the server has drawn.

    Attributes:
        id: as Streamlit calls it; ends in the name that it has in the address.
        field: of Streamlit's message, that says where it stands.
        options: where it can stand.
        value: where it stands; None where it stands nowhere.
        fragment: the part of the page that is run when it moves; empty for all of it.
    """

    id: str
    field: Field
    options: list[Value]
    value: Value | None
    fragment: str

    @property
    def name(self) -> str:
        """Its name in the address."""
        return self.id.split("-", 2)[-1]

    def state(self) -> WidgetState:
        """Where it stands, as a browser says it."""
        state = WidgetState(id=self.id)
        if self.field.endswith("array_value"):
            getattr(state, self.field).data.append(self.value)
        else:
            setattr(state, self.field, self.value)
        return state


@dataclass
class Answer:
    """What one change took.

    Attributes:
        seconds: until everything was drawn.
        bytes: that the server sent.
        faults: exceptions on the page.
    """

    seconds: float
    bytes: int
    faults: list[str] = field(default_factory=list)


class Visitor:
    """One connection to a server; keeps what a browser keeps of the page in view.

    Args:
        port: of the server, on the loopback interface.
    """

    def __init__(self, port: int) -> None:
        self.widgets: dict[str, Widget] = {}
        self.page = ""
        self._query = ""
        self._hashes: dict[str, None] = {}
        self._drawn: set[str] = set()
        self._channel: ClientConnection = connect_socket(
            f"ws://127.0.0.1:{port}/_stcore/stream",
            subprotocols=[Subprotocol("streamlit")],
            max_size=None,
            origin=Origin(f"http://127.0.0.1:{port}"),
        )

    def close(self) -> None:
        """Leave."""
        self._channel.close()

    def open(self, page: str, query: str = "") -> Answer:
        """Go to a page.

        Args:
            page: its name.
            query: the parameters of the link.
        """
        self.page, self._query = page, query
        self.widgets.clear()
        return self._run("")

    def change(self, widget: Widget, value: Value) -> Answer:
        """Move a control of the page in view."""
        widget.value = value
        return self._run(widget.fragment)

    def _run(self, fragment: str) -> Answer:
        message = BackMsg()
        run = message.rerun_script
        run.query_string, run.page_name, run.fragment_id = self._query, self.page, fragment
        run.cached_message_hashes.extend(self._hashes)
        run.widget_states.widgets.extend(
            widget.state() for widget in self.widgets.values() if widget.value is not None
        )
        self._drawn = set()
        answer, start = Answer(0.0, 0), time.monotonic()
        self._channel.send(message.SerializeToString())
        while not self._receive(answer):
            pass
        answer.seconds = time.monotonic() - start
        if not fragment:
            self.widgets = {id: each for id, each in self.widgets.items() if id in self._drawn}
        return answer

    def _receive(self, answer: Answer) -> bool:
        """Take one message in; whether it is the last one of a run."""
        data = self._channel.recv(timeout=ANSWER_SECONDS)
        assert isinstance(data, bytes)
        answer.bytes += len(data)
        message = ForwardMsg.FromString(data)
        kind = message.WhichOneof("type")
        if message.metadata.cacheable:
            self._hashes[message.hash] = None
        if kind == "page_info_changed":
            self._query = message.page_info_changed.query_string
        elif kind == "delta":
            self._draw(message, answer)
        return kind == "script_finished" and message.script_finished in (
            ForwardMsg.FINISHED_SUCCESSFULLY,
            ForwardMsg.FINISHED_FRAGMENT_RUN_SUCCESSFULLY,
        )

    def _draw(self, message: ForwardMsg, answer: Answer) -> None:
        """Note the controls and the faults among what is drawn."""
        delta = message.delta
        if delta.new_element.WhichOneof("type") == "exception":
            answer.faults.append(f"{self.page}: {delta.new_element.exception.message}")
        if delta.WhichOneof("type") == "add_block":
            found = _widget_of_block(delta.add_block)
        else:
            found = _widget_of_element(delta.new_element)
        for widget, anew in found:
            known = self.widgets.get(widget.id)
            if known is not None and not anew:
                widget.value = known.value
            widget.fragment = delta.fragment_id
            self.widgets[widget.id] = widget
            self._drawn.add(widget.id)
        if delta.add_block.WhichOneof("type") == "tab" and self.widgets:
            self._add_tab(delta.add_block.tab.label)

    def _add_tab(self, label: str) -> None:
        """Tabs are drawn after what holds them."""
        last = next(reversed(self.widgets.values()))
        if label not in last.options:
            last.options.append(label)


def _widget_of_block(block: Block) -> Iterator[tuple[Widget, bool]]:
    """An expander or tabs, and whether the server moves it."""
    if block.expandable.id:
        expanded = block.expandable.expanded
        yield Widget(block.expandable.id, "bool_value", [False, True], expanded, ""), False
    if block.tab_container.id:
        tabs = block.tab_container
        yield Widget(tabs.id, "string_value", [], tabs.default_tab_label or None, ""), False


def _widget_of_element(element: Element) -> Iterator[tuple[Widget, bool]]:
    """A control, and whether the server moves it."""
    kind = element.WhichOneof("type")
    drawn: Any = getattr(element, kind) if kind else None
    options: list[Value]
    if kind in ("selectbox", "radio"):
        options = list(drawn.options)
        start = options[drawn.default] if drawn.HasField("default") or kind == "radio" else None
        value = drawn.raw_value if kind == "selectbox" and drawn.set_value else start
        yield Widget(drawn.id, "string_value", options, value, ""), drawn.set_value
    elif kind == "button_group" and drawn.click_mode == drawn.SINGLE_SELECT:
        options = [option.content for option in drawn.options]
        value = drawn.raw_values[0] if drawn.set_value and drawn.raw_values else None
        if not drawn.set_value and drawn.default:
            value = options[drawn.default[0]]
        yield Widget(drawn.id, "string_array_value", options, value, ""), drawn.set_value
    elif kind == "slider" and drawn.options:
        options = list(drawn.options)
        value = drawn.raw_value[0] if drawn.set_value else options[int(drawn.default[0])]
        yield Widget(drawn.id, "string_array_value", options, value, ""), drawn.set_value
    elif kind == "slider":
        steps = round((drawn.max - drawn.min) / drawn.step)
        stride = max(1, steps // NUMBERS) * drawn.step
        options = [drawn.min + stride * i for i in range(min(NUMBERS, steps) + 1)]
        value = drawn.value[0] if drawn.set_value else drawn.default[0]
        yield Widget(drawn.id, "double_array_value", options, value, ""), drawn.set_value
    elif kind == "checkbox":
        value = drawn.value if drawn.set_value else drawn.default
        yield Widget(drawn.id, "bool_value", [False, True], value, ""), drawn.set_value
