"""Servers that several test modules share; each is started when it is first asked for."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator

import pytest
from support import kafka as kafka_server
from support import postgres
from support.kafka import Broker, start_broker

_LONGEST_END_S = 60


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which server served what; in the summary, for a quiet run has no header."""
    terminalreporter.write_line(f"served by: Kafka: {kafka_server.source()}; PostgreSQL: {postgres.source()}")


def pytest_configure() -> None:
    """A shell that starts us in the background has us ignore SIGINT, and so do the programs that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """A thread that a test has left must not hold the whole run for ever: it is shown, and the run has failed."""
    faulthandler.dump_traceback_later(_LONGEST_END_S, exit=True)


def pytest_report_header() -> str:
    """Say which server is going to serve what."""
    return f"servers: Kafka: {kafka_server.source()}; PostgreSQL: {postgres.source()}"


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    broker = start_broker(tmp_path_factory.mktemp("kafka") / "broker")
    yield broker
    broker.stop()


@pytest.fixture(params=["kafka-python", "faust"])
def runtime(request: pytest.FixtureRequest) -> str:
    """Run a test on either runtime of the bus on Kafka."""
    return str(request.param)


@pytest.fixture(params=[postgres.SQLITE, postgres.POSTGRESQL])
def each_database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on SQLite and on PostgreSQL: whatever it opens by `url_in` is of that kind."""
    if request.param == postgres.POSTGRESQL:
        postgres.shared()
    monkeypatch.setattr(postgres, "current", request.param)
    return str(request.param)
