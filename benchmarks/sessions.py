"""The dashboard under many visitors: ``python -m benchmarks.sessions --sessions 30``.

Each visitor is a connection like a browser's, without the browser: every few seconds it changes a
control of its page, and now and then the page. What visitors look at is stored: it is shipped, or
one visitor has looked at it before the others come; that one's times are given as "alone". Prints
how long changes take until everything is drawn, and the server's memory before, at its highest and
after the last visitor has left.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from benchmarks.visitor import Answer, Visitor, Widget
from tests.browser.conftest import Server

# Controls, by their names in the address, of which every place is stored for the bundled suites,
# or is computed at once. Expanders have names that begin so.
STORED = {
    "overview": ("layer",),
    "spectra": ("layer", "origin", "share", "map_origin", "fused", "quantity", "part"),
    "interference": ("layer", "scope", "share", "side"),
    "rank_and_scale": ("layer", "show", "at_rank", "at_scale", "measured", "regret_on"),
    "merge_lab": ("layer", "split"),
    "compare": ("layer", "show", "cost", "source"),
    "how_does_it_scale": ("layer", "shown"),
    "patterns": ("classifiers", "levels", "against", "measure", "over", "lam", "view"),
    "weights_or_features": ("split",),
    "magnitude_and_stability": ("m", "law", "size", "parameter"),
}
EXPANDERS = ("how_", "numbers_", "preflight")
STAY = 6  # changes on a page, in the mean
PLACES = 4  # of each control that the first visitor looks at
WATCH_SECONDS = 1.0


@dataclass
class Seen:
    """What visitors saw.

    Attributes:
        opened: seconds of each page that was opened.
        changed: seconds of each control that was changed.
        bytes: that the server sent.
        slowest: seconds, and what was opened or changed.
        faults: exceptions on pages.
    """

    opened: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=list)
    bytes: int = 0
    faults: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def note(self, answer: Answer, into: list[float], what: str) -> None:
        """Note one answer, to what was opened or changed."""
        into.append(answer.seconds)
        self.slowest = max(self.slowest, (answer.seconds, what))
        self.bytes += answer.bytes
        self.faults += answer.faults

    def describe(self, cpu: float) -> str:
        """The figures in a line.

        Args:
            cpu: processor seconds of the server meanwhile.
        """
        both = self.opened + self.changed
        median, high = np.quantile(self.changed, [0.5, 0.95])
        return (
            f"{len(self.changed)} changes: median {median:.2f} s, 95 % {high:.2f} s, worst "
            f"{max(self.changed):.2f} s; {len(self.opened)} pages opened: median "
            f"{np.median(self.opened):.2f} s, worst {max(self.opened):.2f} s "
            f"(slowest: {self.slowest[1]}); "
            f"{1000 * cpu / len(both):.0f} ms of processor and "
            f"{self.bytes / 1000 / len(both):.0f} kB each"
        )


def offered(visitor: Visitor) -> list[Widget]:
    """The controls of the page in view of which every place is stored."""
    names = STORED[visitor.page]
    return [
        widget
        for widget in visitor.widgets.values()
        if len(widget.options) > 1 and (widget.name in names or widget.name.startswith(EXPANDERS))
    ]


def look_around(server: Server, seen: Seen) -> None:
    """One visitor looks at every place of every control, one after the other."""
    visitor = Visitor(server.port)
    for page in STORED:
        seen.note(visitor.open(page), seen.opened, page)
        for name in [widget.name for widget in offered(visitor)]:
            for place in range(PLACES):
                found = next((each for each in offered(visitor) if each.name == name), None)
                if found is None or place >= len(found.options):
                    break
                if found.options[place] != found.value:
                    answer = visitor.change(found, found.options[place])
                    seen.note(answer, seen.changed, f"{page}, {name}")
    visitor.close()


def visit(server: Server, number: int, pause: float, end: float, seen: Seen) -> None:
    """One visitor, until `end`: a change every `pause` seconds, of a control or of the page."""
    source = random.Random(number)
    time.sleep(source.uniform(0, pause))
    visitor = Visitor(server.port)
    due = time.monotonic()
    while time.monotonic() < end:
        widgets = offered(visitor) if visitor.page else []
        if not widgets or source.random() < 1 / STAY:
            page = source.choice([name for name in STORED if name != visitor.page])
            seen.note(visitor.open(page), seen.opened, page)
        else:
            widget = source.choice(widgets)
            others = [option for option in widget.options if option != widget.value]
            answer = visitor.change(widget, source.choice(others))
            seen.note(answer, seen.changed, f"{visitor.page}, {widget.name}")
        due = max(due + pause, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
    visitor.close()


class Watch:
    """The highest memory of a server while it is watched."""

    def __init__(self, server: Server) -> None:
        self._process = psutil.Process(server.process.pid)
        self.highest = self.megabytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def megabytes(self) -> float:
        """Resident memory of the server and what it has started."""
        every = [self._process, *self._process.children(recursive=True)]
        return sum(each.memory_info().rss for each in every) / 1e6

    def cpu(self) -> float:
        """Processor seconds of the server so far."""
        times = self._process.cpu_times()
        return times.user + times.system

    def _look(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            self.highest = max(self.highest, self.megabytes())

    def end(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()


def measure(server: Server, sessions: int, seconds: float, pause: float, after: float) -> None:
    """Run the visitors and print what was measured."""
    watch, alone, seen = Watch(server), Seen(), Seen()
    print(f"memory before the first visitor: {watch.megabytes():.0f} MB", flush=True)
    cpu = watch.cpu()
    look_around(server, alone)
    print("alone, and for the first time:", alone.describe(watch.cpu() - cpu))
    print(f"memory after that one: {watch.megabytes():.0f} MB", flush=True)
    cpu, end = watch.cpu(), time.monotonic() + seconds
    visitors = [
        threading.Thread(target=visit, args=(server, i, pause, end, seen)) for i in range(sessions)
    ]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    print(f"{sessions} visitors:", seen.describe(watch.cpu() - cpu))
    print(f"memory at its highest: {watch.highest:.0f} MB", flush=True)
    time.sleep(after)
    watch.end()
    print(f"memory {after:.0f} s after the last visitor: {watch.megabytes():.0f} MB")
    print("exceptions:", sorted(set(alone.faults + seen.faults)) or "none")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--pause", type=float, default=3.0, help="between two changes of a visitor")
    parser.add_argument("--after", type=float, default=240.0, help="seconds waited at the end")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            measure(server, chosen.sessions, chosen.seconds, chosen.pause, chosen.after)
        finally:
            log = server.stop()
        print("tracebacks in the log:", log.count("Traceback"))


if __name__ == "__main__":
    main()
