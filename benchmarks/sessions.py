"""Memory of the dashboard under several visitors: ``python -m benchmarks.sessions``.

Each visitor is a connection like a browser's, without the browser: it opens one page after
another, some with another layer or other tasks, and reads whatever the server draws. Prints the
server's memory before the first visitor, at each quarter of the time, and after the last one left.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlencode

import psutil
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from tests.browser.conftest import Server
from ui.shell import PAGES

PAUSE_SECONDS = (0.5, 3.0)
LAYERS = tuple(f"blocks.{i}.{part}.weight" for i in range(2) for part in ("attn.qkv", "mlp.fc1"))
TASKS = (None, ("digits", "clothes", "shapes"), ("digits", "letters", "shapes", "numerals"))


def visit(server: Server, number: int, end: float, opened: list[float], faults: list[str]) -> None:
    """One visitor, until `end`; appends the seconds that each page took."""
    source = random.Random(number)
    address = f"ws://127.0.0.1:{server.port}/_stcore/stream"
    protocol, origin = Subprotocol("streamlit"), Origin(server.url)
    with connect(address, subprotocols=[protocol], max_size=None, origin=origin) as channel:
        while time.monotonic() < end:
            page = source.choice(PAGES)
            query: list[tuple[str, str]] = []
            if page.subject == "suite":
                query.append(("layer", source.choice(LAYERS)))
                query += [("tasks", task) for task in source.choice(TASKS) or ()]
            message = BackMsg()
            message.rerun_script.query_string = urlencode(query)
            message.rerun_script.page_name = page.name
            start = time.monotonic()
            channel.send(message.SerializeToString())
            finished = False
            while not finished:
                answer = ForwardMsg()
                answer.ParseFromString(channel.recv(timeout=300))
                finished = answer.WhichOneof("type") == "script_finished"
                if answer.delta.new_element.WhichOneof("type") == "exception":
                    faults.append(f"{page.name}: {answer.delta.new_element.exception.message}")
            opened.append(time.monotonic() - start)
            time.sleep(source.uniform(*PAUSE_SECONDS))


def megabytes(server: Server) -> float:
    """Resident memory of the server and what it has started."""
    process = psutil.Process(server.process.pid)
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]) / 1e6


def main() -> None:
    """Run the visitors and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        print(f"before the first visitor: {megabytes(server):.0f} MB", flush=True)
        opened: list[float] = []
        faults: list[str] = []
        end = time.monotonic() + chosen.seconds
        visitors = [
            threading.Thread(target=visit, args=(server, i, end, opened, faults))
            for i in range(chosen.sessions)
        ]
        for visitor in visitors:
            visitor.start()
        for quarter in range(1, 5):
            time.sleep(chosen.seconds / 4)
            print(
                f"after {quarter * chosen.seconds / 4:.0f} s, {len(opened)} pages: "
                f"{megabytes(server):.0f} MB",
                flush=True,
            )
        for visitor in visitors:
            visitor.join()
        time.sleep(5)
        print(f"after the last visitor: {megabytes(server):.0f} MB")
        print(f"pages: {len(opened)}, slowest {max(opened):.1f} s, exceptions: {faults or 'none'}")
        log = server.stop()
        print("tracebacks in the log:", log.count("Traceback"))


if __name__ == "__main__":
    main()
