"""The running server: who reaches it, and that no request gets at a file or a secret."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_aSecretThatNobodyMaySee"
MARK = "only on this disk: 5f2c"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Server:
    """``mergescope app`` on a free port, with a token in its environment."""

    def __init__(self, folder: Path) -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.log = folder / "log"
        (folder / "notes.txt").write_text(MARK)
        environment = {
            **os.environ,
            "HF_TOKEN": SECRET,
            "MERGESCOPE_CACHE": str(folder / "cache"),
            "STREAMLIT_SERVER_HEADLESS": "true",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mergescope", "app", "--port", str(self.port)],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if self.ask("/_stcore/health").status == 200:
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(self.log.read_text())

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> Answer:
        """One request, its path exactly as given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with closing(connection):
            connection.putrequest(method, path, skip_host="Host" in headers)
            if body is not None:
                headers["Content-Length"] = str(len(body))
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders(body)
            answer = connection.getresponse()
            if answer.status == 101:
                return Answer(101, {}, b"")
            return Answer(answer.status, dict(answer.getheaders()), answer.read())

    def websocket(self, **headers: str) -> int:
        """Status of an attempt to open the page's channel."""
        return self.ask(
            "/_stcore/stream",
            Connection="Upgrade",
            Upgrade="websocket",
            Sec_WebSocket_Version="13",
            Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ==",
            **headers,
        ).status


def test_a_signal_ends_the_server_and_frees_its_port(tmp_path: Path) -> None:
    for number, sent in enumerate((signal.SIGTERM, signal.SIGINT)):
        (tmp_path / str(number)).mkdir()
        running = Server(tmp_path / str(number))
        running.process.send_signal(sent)  # to the one process that the user started
        running.process.wait(timeout=20)
        assert listening(running.port) == set()
        with pytest.raises(OSError, match="refused"):
            running.ask("/_stcore/health")
        assert "Traceback" not in running.log.read_text()


@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    "arguments", [["app", "--port", "8599"], ["inspect", "vision", "--spectra"]]
)
def test_an_interrupt_at_the_start_shows_no_traceback(
    arguments: list[str], seconds: float, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mergescope", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "STREAMLIT_SERVER_HEADLESS": "true"},
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert "Traceback" not in said
    assert process.returncode != 0 or arguments[0] == "app"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("served"))
    yield running
    os.killpg(running.process.pid, 15)
    running.process.wait(timeout=20)


def listening(port: int) -> set[str]:
    """Addresses that a port is bound to, as the kernel lists them."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, number = local.split(":")
            if int(number, 16) == port and state == "0A":
                found.add(address)
    return found


def test_only_this_machine_reaches_it(server: Server) -> None:
    assert listening(server.port) == {"0100007F"}  # 127.0.0.1, and nothing else


def test_other_sites_cannot_drive_it(server: Server) -> None:
    own = f"http://127.0.0.1:{server.port}"
    assert server.websocket(Origin=own) == 101
    for foreign in ("http://evil.example", "http://127.0.0.1.evil.example", "null", "https://x"):
        assert server.websocket(Origin=foreign) == 403, foreign
    # A name that an attacker points at 127.0.0.1 is neither this host nor its origin.
    evil = f"evil.example:{server.port}"
    assert server.websocket(Host=evil, Origin=f"http://{evil}") == 403


def test_other_sites_cannot_upload_or_delete(server: Server) -> None:
    for method in ("PUT", "DELETE", "POST"):
        answer = server.ask(
            "/_stcore/upload_file/session/file", method, b"x" * 10, Origin="http://evil.example"
        )
        assert answer.status in (400, 401, 403, 404, 405), method
        allowed = {name.lower(): v for name, v in answer.headers.items()}
        assert allowed.get("access-control-allow-origin") not in ("*", "http://evil.example")


TRAVERSALS = (
    "/../../../../../../etc/passwd",
    "/..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/static/../../../../../../etc/passwd",
    "/static/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/app/static/../../../pyproject.toml",
    "/app/static/..%5c..%5cpyproject.toml",
    "/media/../../../../etc/passwd",
    "/media/%2fetc%2fpasswd",
    "/component/x/../../../../etc/passwd",
    "/_stcore/bidi-components/../../../../etc/passwd",
    "/_stcore/upload_file/../../../../etc/passwd",
    "//etc/passwd",
    "/file:///etc/passwd",
    "/notes.txt",
    "/app.py",
    "/.streamlit/config.toml",
    "/.streamlit/secrets.toml",
    "/proc/self/environ",
    "/overview?suite=../../../../etc/passwd",
    "/?suite=/etc/passwd&pool=../../notes.txt",
)


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_request_gets_at_a_file(server: Server, path: str) -> None:
    body = server.ask(path).body
    for inside in (
        b"root:",
        MARK.encode(),
        b"shell.run",
        b"[server]",
        SECRET.encode(),
        b"[project]",
    ):
        assert inside not in body


def test_what_drives_it_from_programs_is_off(server: Server) -> None:
    for path in ("/_stcore/agent/interact", "/_stcore/agent/mcp"):
        assert server.ask(path, "POST", b"{}", Content_Type="application/json").status >= 400


def test_secrets_are_neither_served_nor_logged(server: Server) -> None:
    for path in ("/", "/_stcore/health", "/_stcore/host-config", "/_stcore/metrics"):
        assert SECRET.encode() not in server.ask(path).body
    log = server.log.read_text()
    assert SECRET not in log
    assert "Traceback" not in log
    host = json.loads(server.ask("/_stcore/host-config").body)
    assert host["allowedOrigins"] is not None
