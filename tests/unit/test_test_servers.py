"""Which server serves the tests: the order is environment, one of our own, a container, nobody."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support import containers, kafka, postgres
from support.world import free_port


class Engine(BaseHTTPRequestHandler):
    """Answers a ping as an engine does."""

    def do_GET(self) -> None:
        said = b"OK" if self.path.endswith("/_ping") else json.dumps({"ApiVersion": "1.45"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_port}")
    containers.engine.cache_clear()
    yield
    containers.engine.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{free_port()}")
    containers.engine.cache_clear()
    yield
    containers.engine.cache_clear()


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CLARION_TEST_KAFKA", raising=False)
    monkeypatch.delenv("CLARION_TEST_DATABASE", raising=False)
    monkeypatch.setattr(kafka, "JAVA", tmp_path / "java")
    monkeypatch.setattr(postgres, "_installed", list)


@pytest.mark.usefixtures("engine", "nothing_installed")
def test_a_container_where_an_engine_answers() -> None:
    assert kafka.source() == "container apache/kafka:4.1.1"
    assert postgres.source() == "container postgres:15"


@pytest.mark.usefixtures("no_engine", "nothing_installed")
def test_a_command_without_an_engine_is_no_engine() -> None:
    assert kafka.source().startswith("none: install")
    assert postgres.source().startswith("none: install")


@pytest.mark.usefixtures("engine")
def test_what_the_environment_names_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLARION_TEST_KAFKA", "broker:9092")
    monkeypatch.setenv("CLARION_TEST_DATABASE", "postgresql://user:secret@host/db")
    assert kafka.source() == "broker:9092 (CLARION_TEST_KAFKA)"
    assert postgres.source() == "that of CLARION_TEST_DATABASE", "no password in a report"
