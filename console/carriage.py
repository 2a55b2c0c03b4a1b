"""How far the events have come: in the outbox, in the topics, at each handler."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from clarion.adapters.embedded import ConsumerLag
from clarion.adapters.embedded import read_lag as read_embedded_lag
from clarion.adapters.history import first_time_after, last_position
from clarion.adapters.outbox import position_of
from clarion.errors import BusUnavailableError
from console.stages import RELAY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clarion.adapters.database import Database
    from clarion.config import Config


def read_lag(config: Config, database: Database) -> list[ConsumerLag]:
    """Tell how far every reader of events is behind; on Kafka the relay by the outbox, the others by the topics.

    Raises BusUnavailableError when database or broker cannot be asked.
    """
    kafka = config.bus.kafka
    if config.bus.kind == "embedded" or kafka is None:
        return [one for one in read_embedded_lag(database) if one.consumer != RELAY]
    from clarion.adapters.kafka_topics import read_lag as read_kafka_lag  # noqa: PLC0415  an extra

    relay = ConsumerLag(consumer=RELAY, behind=last_position(database) - position_of(database, RELAY))
    groups = read_kafka_lag(kafka).items()
    return [
        relay,
        *(ConsumerLag(consumer=group.removeprefix(f"{kafka.prefix}."), behind=behind) for group, behind in groups),
    ]


def read_relay(config: Config, database: Database) -> dict[str, Any] | None:
    """Tell what waits for the relay, and since when; None on the embedded bus, where nothing has to be relayed."""
    if config.bus.kind == "embedded":
        return None
    position = position_of(database, RELAY)
    oldest = first_time_after(database, position)
    waited = (datetime.now(UTC) - datetime.fromisoformat(oldest)).total_seconds() if oldest else 0.0
    return {"backlog": max(0, last_position(database) - position), "oldest_seconds": round(max(0.0, waited), 3)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """How far the events have come; `topics` hold so many records; `broker` is `ok`, or why it cannot be asked."""

    consumers: Sequence[ConsumerLag]
    topics: Mapping[str, int]
    relay: dict[str, Any] | None
    broker: str


class Carriage:
    """Reads it for many who look at once: a broker is asked only every few seconds, by one of them."""

    _FRESH_S = 5.0

    def __init__(self, config: Config, database: Database) -> None:
        self._config = config
        self._database = database
        self._lock = threading.Lock()
        self._read: Carried | None = None
        self._until = 0.0

    def read(self) -> Carried:
        """Give what was read a moment ago, or read it."""
        with self._lock:
            if self._read is None or time.monotonic() > self._until:
                self._read = self._look()
                self._until = time.monotonic() + (self._FRESH_S if self._read.relay is not None else 0.0)
            return self._read

    def _look(self) -> Carried:
        relay = read_relay(self._config, self._database)
        try:
            lag, topics = read_lag(self._config, self._database), _count_records(self._config)
            return Carried(consumers=lag, topics=topics, relay=relay, broker="ok")
        except BusUnavailableError as error:
            return Carried(consumers=(), topics={}, relay=relay, broker=str(error))


def _count_records(config: Config) -> Mapping[str, int]:
    if config.bus.kind == "embedded" or config.bus.kafka is None:
        return {}
    from clarion.adapters.kafka_topics import count_records  # noqa: PLC0415  an extra

    return count_records(config.bus.kafka)
