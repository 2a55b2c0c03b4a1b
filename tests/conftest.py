"""Servers that several test modules share; each is started when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.kafka import Broker, start_broker


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    broker = start_broker(tmp_path_factory.mktemp("kafka") / "broker")
    yield broker
    broker.stop()
