"""A pickle read as data: the stack machine of Python's pickles, in which nothing runs.

Instructions as listed in Python's ``pickletools`` (protocols 0 to 5). Whatever a pickle asks to
import becomes a :class:`Global`, a pair of names; whatever it asks to call or to build becomes
what the given :class:`Maker` makes of it, usually an inert :class:`Record`. Foreign values are
never hashed, compared, printed or called, each of which a hostile file could make endless.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol

# A file within these bounds is read in about a second. A tensor of a state dict takes some 50
# steps, a module of a model with its tensors some 230.
MOST_STEPS = 1_000_000
STEPS_PER_CALL = 5
MOST_TEXT = 1 << 25
MOST_ESCAPED = 1 << 17
LONGEST_TEXT = 1 << 12
LONGEST_LINE = 1 << 16
LONGEST_INTEGER = 1 << 10
LONGEST_SHOWN = 120
LATEST_PROTOCOL = 5


class PickleFileError(Exception):
    """What is wrong with a pickled file, in sentences that call the file "it".

    :class:`merge_core.checkpoints.pickled.files.PickledTensors` makes a CheckpointError of it,
    which names the file.
    """

    @classmethod
    def damaged(cls, what: str) -> PickleFileError:
        """The error for a damaged file, of which another copy may be sound."""
        return cls(f"{what}. Copy or download it again.")


class Global(NamedTuple):
    """A name that the pickle would import; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def shown(self) -> str:
        """The full name as it may stand in a message: printable and not too long."""
        return "".join(c if c.isprintable() else "\ufffd" for c in str(self)[:LONGEST_SHOWN])


class Blob(NamedTuple):
    """Bytes, or a long text or number, left in the file: where they begin and how many they are."""

    start: int
    size: int


class Pairs(list[Any]):
    """A dictionary's keys and values in turn, not hashed."""

    __slots__ = ()


@dataclass(slots=True, eq=False)
class Record:
    """An object that was not made: its constructor, the arguments and the state it would get."""

    maker: Any
    args: Any
    state: Any = None
    pairs: Pairs | None = None


class Maker(Protocol):
    """Decides what the machine puts in place of a global, a call and an external object."""

    def find(self, module: str, name: str) -> Any:
        """The value in place of an import."""

    def make(self, maker: Any, args: Any) -> Any:
        """The value in place of a call, in constant time."""

    def persistent_load(self, key: Any) -> Any:
        """The value that lies outside the pickle under `key`, in constant time."""


@dataclass(slots=True)
class Budget:
    """The steps, and bytes of text and of what is none, that pickles of a file may still take."""

    steps: int = MOST_STEPS
    text: int = MOST_TEXT
    escaped: int = MOST_ESCAPED


def read_pickle(stream: BinaryIO, end: int, maker: Maker, budget: Budget) -> Any:
    """Read one pickle as data.

    Args:
        stream: a seekable stream, at the pickle's first byte; left after its last.
        end: where the pickle must end at the latest, in bytes of the stream.
        maker: what stands for globals, calls and external objects.
        budget: what may still be spent; it is charged.

    Returns:
        None, booleans, numbers, short texts, lists (sets too), tuples, :class:`Pairs`,
        :class:`Blob`, and what `maker` returned.

    Raises:
        PickleFileError: no pickle, a damaged one, or one beyond the budget.
    """
    return _Machine(stream, end, maker, budget).run()


class _Machine:
    def __init__(self, stream: BinaryIO, end: int, maker: Maker, budget: Budget) -> None:
        self.stream = stream
        self.end = end
        self.maker = maker
        self.budget = budget
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the open marks
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        read = self.stream.read
        budget = self.budget
        try:
            while (code := read(1)) != b".":
                step = STEPS.get(code)
                if step is None:
                    what = f"its byte {code[0]} is no instruction" if code else "it is truncated"
                    raise PickleFileError.damaged(what)
                budget.steps -= 1
                if budget.steps < 0:
                    raise PickleFileError(
                        f"it takes more than {MOST_STEPS:,} steps to read. Save the "
                        "weights alone, as safetensors."
                    )
                step(self)
            if self.stream.tell() > self.end:
                raise PickleFileError.damaged("its pickle is longer than its place")
            return self.stack.pop()
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise PickleFileError.damaged("its pickle is truncated or damaged") from error

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.stream.read(layout.size))[0]

    def room_for(self, size: int) -> int:
        """Where the next `size` bytes begin, if the pickle has as many left."""
        start = self.stream.tell()
        if not 0 <= size <= self.end - start:
            raise PickleFileError.damaged("its pickle claims more bytes than there are")
        return start

    def blob(self, size: int) -> Blob:
        start = self.room_for(size)
        self.budget.steps -= 1
        self.stream.seek(start + size)
        return Blob(start, size)

    def text(self, size: int) -> str | Blob:
        if size > LONGEST_TEXT:
            return self.blob(size)
        self.room_for(size)
        self.charge(size)
        return self.decode(self.stream.read(size), "utf-8")

    def charge(self, size: int) -> None:
        self.budget.text -= size
        if self.budget.text < 0:
            raise PickleFileError(
                f"it holds more than {MOST_TEXT >> 20} MiB of text. Save the weights alone, as "
                "safetensors."
            )

    def line(self, longest: int = LONGEST_LINE, encoding: str = "utf-8") -> str:
        raw = self.stream.readline(longest + 1)
        if not raw.endswith(b"\n"):
            raise PickleFileError.damaged("its pickle is truncated or damaged")
        self.charge(len(raw))
        return self.decode(raw[:-1], encoding)

    def decode(self, raw: bytes, encoding: str) -> str:
        """A text that can be written to a file; what is none stands in it as escapes.

        Escapes take a hundred times as long to make: they end with their own budget.
        """
        try:
            text = raw.decode(encoding)
            text.encode()  # halves of pairs are no text either
        except UnicodeError:
            self.budget.escaped -= len(raw)
            how = "backslashreplace" if self.budget.escaped >= 0 else "replace"
            return raw.decode(encoding, how).encode("utf-8", how).decode()
        return text

    def integer(self, size: int) -> int | Blob:
        if size > LONGEST_INTEGER:
            return self.blob(size)
        self.room_for(size)
        return int.from_bytes(self.stream.read(size), "little", signed=True)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def keep(self, place: int) -> None:
        if not 0 <= place < 1 << 32:
            raise ValueError
        self.memo[place] = self.stack[-1]

    def find(self, module: str, name: str) -> Any:
        self.budget.steps -= STEPS_PER_CALL
        return self.maker.find(module, name)

    def make(self, maker: Any, args: Any) -> None:
        self.budget.steps -= STEPS_PER_CALL
        self.stack.append(self.maker.make(maker, args))

    def persistent_load(self, key: Any) -> None:
        self.budget.steps -= STEPS_PER_CALL
        self.stack.append(self.maker.persistent_load(key))


Step = Callable[[_Machine], object]

U8, U16, I32, U32, U64, F64 = (struct.Struct(code) for code in ("<B", "<H", "<i", "<I", "<Q", ">d"))


def _constant(value: Any) -> Step:
    return lambda m: m.stack.append(value)


def _number(layout: struct.Struct) -> Step:
    return lambda m: m.stack.append(m.number(layout))


def _sized(read: Callable[[_Machine, int], Any], layout: struct.Struct) -> Step:
    return lambda m: m.stack.append(read(m, m.number(layout)))


def _global(m: _Machine) -> None:
    module, name = m.line(), m.line()
    m.stack.append(m.find(module, name))


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise TypeError
    m.stack.append(m.find(module, name))


def _extension(layout: struct.Struct) -> Step:
    def step(m: _Machine) -> None:
        m.stack.append(m.find("copyreg", f"extension {m.number(layout)}"))

    return step


def _reduce(m: _Machine) -> None:
    args, maker = m.stack.pop(), m.stack.pop()
    m.make(maker, args)


def _reduce_with_keywords(m: _Machine) -> None:
    m.stack.pop()
    _reduce(m)


def _instance(m: _Machine) -> None:
    maker = m.find(m.line(), m.line())
    args = tuple(m.pop_mark())
    m.make(maker, args)


def _object(m: _Machine) -> None:
    maker, *args = m.pop_mark()
    m.make(maker, tuple(args))


def _build(m: _Machine) -> None:
    state = m.stack.pop()
    if isinstance(m.stack[-1], Record):  # what is no record has nothing to set
        m.stack[-1].state = state


def _add(m: _Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if isinstance(target, Record) or not items:
        return  # an unknown kind of collection, or nothing
    if type(target) is not list:
        raise TypeError
    target.extend(items)


def _append(m: _Machine) -> None:
    item = m.stack.pop()
    _add(m, [item])


def _set_items(m: _Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if not items:
        return
    if isinstance(target, Record):
        if target.pairs is None:
            target.pairs = Pairs()
        target = target.pairs
    if type(target) is not Pairs or len(items) % 2:
        raise TypeError
    target.extend(items)


def _set_item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _set_items(m, [key, value])


def _mark(m: _Machine) -> None:
    m.below.append(m.stack)
    m.stack = []


def _pop(m: _Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


def _tuple(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(tuple(items))


def _tuple_of(size: int) -> Step:
    def step(m: _Machine) -> None:
        stack = m.stack
        if len(stack) < size:
            raise IndexError
        stack[-size:] = [tuple(stack[-size:])]

    return step


def _list(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(items)


def _dict(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(Pairs())
    _set_items(m, items)


def _integer_line(m: _Machine) -> None:
    text = m.line(LONGEST_INTEGER).removesuffix("L")
    m.stack.append(text == "01" if text in ("00", "01") else int(text))


def _protocol(m: _Machine) -> None:
    if m.number(U8) > LATEST_PROTOCOL:
        raise PickleFileError("it was written by a newer Python than this. Save it as safetensors.")


STEPS: dict[bytes, Step] = {
    b"\x80": _protocol,
    b"\x95": lambda m: m.number(U64),  # FRAME only says how far to read ahead
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b"I": _integer_line,
    b"L": _integer_line,
    b"F": lambda m: m.stack.append(float(m.line(LONGEST_INTEGER))),
    b"J": _number(I32),
    b"K": _number(U8),
    b"M": _number(U16),
    b"G": _number(F64),
    b"\x8a": _sized(_Machine.integer, U8),
    b"\x8b": _sized(_Machine.integer, I32),
    b"S": lambda m: m.stack.append(m.line()[1:-1]),
    b"V": lambda m: m.stack.append(m.line(encoding="raw-unicode-escape")),
    b"T": _sized(_Machine.text, I32),
    b"U": _sized(_Machine.text, U8),
    b"X": _sized(_Machine.text, U32),
    b"\x8c": _sized(_Machine.text, U8),
    b"\x8d": _sized(_Machine.text, U64),
    b"B": _sized(_Machine.blob, U32),
    b"C": _sized(_Machine.blob, U8),
    b"\x8e": _sized(_Machine.blob, U64),
    b"\x96": _sized(_Machine.blob, U64),
    b"]": lambda m: m.stack.append([]),
    b"\x8f": lambda m: m.stack.append([]),  # a set
    b"}": lambda m: m.stack.append(Pairs()),
    b")": _constant(()),
    b"(": _mark,
    b"l": _list,
    b"\x91": _list,  # a frozen set
    b"d": _dict,
    b"t": _tuple,
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"a": _append,
    b"e": lambda m: _add(m, m.pop_mark()),
    b"\x90": lambda m: _add(m, m.pop_mark()),
    b"s": _set_item,
    b"u": lambda m: _set_items(m, m.pop_mark()),
    b"0": _pop,
    b"1": _Machine.pop_mark,
    b"2": lambda m: m.stack.append(m.stack[-1]),
    b"p": lambda m: m.keep(int(m.line(LONGEST_INTEGER))),
    b"q": lambda m: m.keep(m.number(U8)),
    b"r": lambda m: m.keep(m.number(U32)),
    b"\x94": lambda m: m.keep(len(m.memo)),
    b"g": lambda m: m.stack.append(m.memo[int(m.line(LONGEST_INTEGER))]),
    b"h": lambda m: m.stack.append(m.memo[m.number(U8)]),
    b"j": lambda m: m.stack.append(m.memo[m.number(U32)]),
    b"c": _global,
    b"\x93": _stack_global,
    b"\x82": _extension(U8),
    b"\x83": _extension(U16),
    b"\x84": _extension(I32),
    b"R": _reduce,
    b"\x81": _reduce,
    b"\x92": _reduce_with_keywords,
    b"i": _instance,
    b"o": _object,
    b"b": _build,
    b"P": lambda m: m.persistent_load(m.line()),
    b"Q": lambda m: m.persistent_load(m.stack.pop()),
}
