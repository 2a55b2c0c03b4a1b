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
from clarion.adapters.outbox import RELAY, position_of
from clarion.errors import BusUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clarion.adapters.database import Database
    from clarion.config import Config, KafkaConfig


def read_lag(config: Config, database: Database) -> list[ConsumerLag]:
    """Tell how far every reader of events is behind; on Kafka the relay by the outbox, the others by the topics.

    Raises BusUnavailableError when database or broker cannot be asked.
    """
    kafka = config.bus.kafka
    if config.bus.kind == "embedded" or kafka is None:
        return _embedded_lag(database)
    from clarion.adapters.kafka_topics import read_lag as read_kafka_lag  # noqa: PLC0415  an extra

    return _kafka_lag(kafka, read_relay(config, database), read_kafka_lag(kafka))


def _embedded_lag(database: Database) -> list[ConsumerLag]:
    return [one for one in read_embedded_lag(database) if one.consumer != RELAY]


def _kafka_lag(kafka: KafkaConfig, relay: dict[str, Any] | None, groups: Mapping[str, int]) -> list[ConsumerLag]:
    ahead = [] if relay is None else [ConsumerLag(consumer=RELAY, behind=relay["backlog"])]
    return ahead + [
        ConsumerLag(consumer=group.removeprefix(f"{kafka.prefix}."), behind=behind) for group, behind in groups.items()
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


def look(config: Config, database: Database) -> Carried:
    """Read all of it, the broker by one connection; a broker that cannot be asked is said, not raised."""
    relay, kafka = read_relay(config, database), config.bus.kafka
    if relay is None or kafka is None:
        return Carried(consumers=_embedded_lag(database), topics={}, relay=None, broker="ok")
    from clarion.adapters.kafka_topics import read_lag_and_records  # noqa: PLC0415  an extra

    try:
        groups, topics = read_lag_and_records(kafka)
    except BusUnavailableError as error:
        return Carried(consumers=(), topics={}, relay=relay, broker=str(error))
    return Carried(consumers=_kafka_lag(kafka, relay, groups), topics=topics, relay=relay, broker="ok")


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
                self._read = look(self._config, self._database)
                self._until = time.monotonic() + (self._FRESH_S if self._read.relay is not None else 0.0)
            return self._read
