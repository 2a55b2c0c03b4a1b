"""The relay: copies the outbox to Kafka, in order per key; and copies a topic anew when a person asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
from kafka import KafkaProducer
from kafka.errors import KafkaError

from clarion.adapters import outbox
from clarion.adapters.kafka import client_settings
from clarion.adapters.outbox import RELAY
from clarion.adapters.topics import TOPICS, family_of, topic_of
from clarion.errors import BusUnavailableError
from clarion.events import ALL

if TYPE_CHECKING:
    from clarion.adapters.database import Database
    from clarion.config import KafkaConfig

log = structlog.get_logger()

REBUILD = "rebuild:"
_RELAY_BATCH = 500
_ACKNOWLEDGE_S = 10.0
# An outage shorter than this costs no record its place: the producer keeps them all, in order.
_DELIVERY_MS = 24 * 3600 * 1000


class _Producer(KafkaProducer):
    """Ends at once when it is closed, with what it has not sent: that is read again, and sent by another.

    Else closing waits for what is under way, raises when that does not come, and leaves a thread that goes on sending.
    """

    def flush(self, timeout: float | None = None) -> None:
        """Wait for nothing: each record is waited for by its own future."""


class Relay:
    """Copies the outbox to Kafka, in order per key; one process, one thread.

    Contract. The position moves behind records that the broker has acknowledged, all of them up to there: a crash
    repeats, never skips. The producer is idempotent and never gives a record up during an outage, so that what is
    behind it never overtakes it.
    """

    def __init__(self, database: Database, config: KafkaConfig) -> None:
        self._database = database
        self._config = config
        self._producer: _Producer | None = None
        # What the broker has been given and has not acknowledged: (position, future), in order.
        self._sent: list[tuple[int, Any]] = []
        self._relayed = 0
        # Whose position what was sent moves on: the relay's, or that of a topic's rebuilding.
        self._reader = RELAY
        database.create(outbox.SCHEMA)

    def step(self) -> bool:
        """Send a batch, or wait for what was sent; tell whether there may be more."""
        if not self._sent:
            rows = self._to_rebuild() or self._waiting()
            if not rows:
                return False
            self._send(rows)
        self._settle()
        return True

    def facts(self) -> dict[str, object]:
        """Say how many events this process has relayed, and how many it waits for."""
        return {"events_relayed": self._relayed, "events_in_flight": len(self._sent)}

    def drain(self) -> None:
        """Let the broker acknowledge what it was given; what it does not is sent again by the next relay."""
        try:
            while self._sent:
                self._settle()
        except BusUnavailableError as error:
            log.warning("relay.undrained", reason=str(error), events=len(self._sent))
        self._close()

    def _waiting(self) -> list[Any]:
        self._reader = RELAY
        start = outbox.position_of(self._database, RELAY)
        with self._database.reading() as connection:
            return list(outbox.read_after(connection, start, _RELAY_BATCH))

    def _to_rebuild(self) -> list[Any]:
        """Give what a topic that is being rebuilt wants next; it is copied anew up to where the relay is."""
        families = {f"{REBUILD}{family}": family for family in TOPICS}
        with self._database.reading() as connection:
            positions = outbox.positions_of(connection, [RELAY, *families])
        for reader, family in families.items():
            # Positions begin at 1: a rebuild that was asked for stands at -1, one that is over at 0.
            start = positions.get(reader, 0)
            if start == 0:
                continue
            kinds = [kind.kind for kind in ALL if family_of(kind.kind) == family]
            with self._database.reading() as connection:
                rows = list(outbox.read_after(connection, start, _RELAY_BATCH, kinds, until=positions.get(RELAY, 0)))
            if rows:
                self._reader = reader
                return rows
            outbox.keep_position(self._database, reader, 0)
            log.info("relay.rebuilt", topic=family)
        return []

    def _send(self, rows: list[Any]) -> None:
        try:
            producer = self._open()
            for row in rows:
                record = outbox.record_of(row)
                future = producer.send(
                    topic_of(str(row.kind), self._config.prefix),
                    key=record.key.encode(),
                    value=record.body,
                    headers=[(name, value.encode()) for name, value in record.headers.items()],
                )
                self._sent.append((int(row.position), future))
        except KafkaError as error:
            # Nothing is lost: what was not given to the producer is read again.
            if not self._sent:
                self._close()
            raise BusUnavailableError(f"Kafka does not take events now: {type(error).__name__}") from error

    def _settle(self) -> None:
        """Wait for acknowledgements and keep the position of what has them."""
        done, failed = 0, None
        for position, future in self._sent:
            try:
                future.get(timeout=_ACKNOWLEDGE_S)
            except KafkaError as error:
                failed = error
                break
            done = position
        if done:
            count = sum(position <= done for position, _ in self._sent)
            self._sent = self._sent[count:]
            self._relayed += count
            outbox.keep_position(self._database, self._reader, done)
        if failed is not None:
            if self._sent[0][1].is_done:
                # The broker refused it; begin again from there with a new producer.
                self._close()
            raise BusUnavailableError(f"Kafka does not acknowledge: {type(failed).__name__}") from failed

    def _open(self) -> KafkaProducer:
        if self._producer is None:
            self._producer = _Producer(
                **client_settings(self._config),
                client_id=f"{self._config.prefix}-relay",
                acks="all",
                enable_idempotence=True,
                linger_ms=5,
                delivery_timeout_ms=_DELIVERY_MS,
                max_block_ms=int(_ACKNOWLEDGE_S * 1000),
            )
        return self._producer

    def _close(self) -> None:
        self._sent = []
        if self._producer is not None:
            self._producer.close(timeout=0)
            self._producer = None


def ask_for_rebuild(database: Database, families: list[str]) -> None:
    """Let the relay copy topics anew from the table of events; it does so before it goes on."""
    for family in families:
        outbox.keep_position(database, f"{REBUILD}{family}", -1)
