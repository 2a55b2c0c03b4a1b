"""The bus on Kafka: a relay copies the outbox to topics, consumers hand records to the same handlers as ever.

What a handler gives goes to the outbox, never straight to a topic: only the relay produces, so that events leave in
the order in which the database committed them. An offset is committed after what its handler gave is durable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from kafka import ConsumerRebalanceListener, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from clarion.adapters import outbox
from clarion.adapters.deadletters import Place, bury, redrive
from clarion.adapters.topics import topic_of, topics_of
from clarion.codec import Record, decode, is_known
from clarion.errors import BusUnavailableError, describe
from clarion.patience import PATIENCE_S, TRIES, Patience

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.adapters.database import Database
    from clarion.config import KafkaConfig
    from clarion.events import Event
    from clarion.plugins import StreamHandler
    from clarion.ports import Clock

log = structlog.get_logger()

RELAY = "relay"
_RELAY_BATCH = 500
_POLL_RECORDS = 200
_POLL_MS = 20
# The client gives up joining a group when a poll ends: one that joins is given the time that it takes.
_JOIN_MS = 3000
_ACKNOWLEDGE_S = 10.0
# An outage shorter than this costs no record its place: the producer keeps them all, in order.
_DELIVERY_MS = 24 * 3600 * 1000
_RECONNECT_MS = 1000
_BOOTSTRAP_MS = 5000


def client_settings(config: KafkaConfig) -> dict[str, Any]:
    """Give what every client of the broker needs: where it is, and how to be let in."""
    security = config.security
    settings: dict[str, Any] = {
        "bootstrap_servers": list(config.bootstrap),
        "security_protocol": security.protocol,
        "reconnect_backoff_max_ms": _RECONNECT_MS,
        "bootstrap_timeout_ms": _BOOTSTRAP_MS,
    }
    if security.ca_file is not None:
        settings["ssl_cafile"] = str(security.ca_file)
    if security.mechanism is not None:
        settings["sasl_mechanism"] = security.mechanism
        settings["sasl_plain_username"] = security.username
        settings["sasl_plain_password"] = security.password.get_secret_value() if security.password else None
    return settings


class Relay:
    """Copies the outbox to Kafka, in order per key; one process, one thread.

    Contract. The position moves behind records that the broker has acknowledged, all of them up to there: a crash
    repeats, never skips. The producer is idempotent and never gives a record up during an outage, so that what is
    behind it never overtakes it.
    """

    def __init__(self, database: Database, config: KafkaConfig) -> None:
        self._database = database
        self._config = config
        self._producer: KafkaProducer | None = None
        # What the broker has been given and has not acknowledged: (position, future), in order.
        self._sent: list[tuple[int, Any]] = []
        self._relayed = 0
        database.create(outbox.SCHEMA)

    def step(self) -> bool:
        """Send a batch, or wait for what was sent; tell whether there may be more."""
        if not self._sent:
            rows = self._waiting()
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
        start = outbox.position_of(self._database, RELAY)
        with self._database.reading() as connection:
            return list(outbox.read_after(connection, start, _RELAY_BATCH))

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
            outbox.keep_position(self._database, RELAY, done)
        if failed is not None:
            if self._sent[0][1].is_done:
                # The broker refused it; begin again from there with a new producer.
                self._close()
            raise BusUnavailableError(f"Kafka does not acknowledge: {type(failed).__name__}") from failed

    def _open(self) -> KafkaProducer:
        if self._producer is None:
            self._producer = KafkaProducer(
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


@dataclass(slots=True)
class _Subscription:
    consumer: str
    kinds: frozenset[str]
    topics: tuple[str, ...]
    handler: StreamHandler
    client: KafkaConsumer | None = None
    joining: bool = True
    patience: dict[TopicPartition, Patience] = field(default_factory=dict)


class _Membership(ConsumerRebalanceListener):
    """Knows whether a consumer is joining its group."""

    def __init__(self, subscription: _Subscription) -> None:
        self._subscription = subscription

    def on_partitions_revoked(self, revoked: object) -> None:
        """The group is shared out anew."""
        del revoked
        self._subscription.joining = True

    def on_partitions_assigned(self, assigned: object) -> None:
        """The group has been shared out; there may be nothing for us."""
        del assigned
        self._subscription.joining = False


class KafkaBus:
    """The EventBus on Kafka: one consumer group per subscription. One thread; any number of processes."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        config: KafkaConfig,
        *,
        tries: int = TRIES,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._database = database
        self._clock = clock
        self._config = config
        self._tries = tries
        self._patience_s = patience_s
        self._subscriptions: list[_Subscription] = []
        database.create(outbox.SCHEMA)

    def publish(self, events: Iterable[Event]) -> None:
        """Make the events durable in the outbox; the relay takes them from there."""
        outbox.publish(self._database, events)

    def subscribe(self, consumer: str, kinds: Iterable[type[Event]], handler: StreamHandler) -> None:
        """Let the handler see every event of the kinds, from the first one that the topics still have."""
        wanted = tuple(kinds)
        names = frozenset(kind.kind for kind in wanted)
        topics = topics_of(wanted, self._config.prefix)
        self._subscriptions.append(_Subscription(consumer, names, topics, handler))

    def step(self) -> bool:
        """Hand a batch of what is waiting to each handler."""
        moved, trouble = False, None
        for one in self._subscriptions:
            try:
                moved |= self._advance(one)
            except BusUnavailableError as error:
                trouble = error
        moved |= redrive(self._database, {one.consumer: one.handler for one in self._subscriptions})
        if trouble is not None:
            raise trouble
        return moved

    def close(self) -> None:
        """Leave the consumer groups."""
        for one in self._subscriptions:
            if one.client is not None:
                one.client.close(autocommit=False)
                one.client = None

    def caught_up(self) -> bool:
        """Tell whether every subscription has seen all that its topics hold, paused partitions aside."""
        return all(self._caught_up(one) for one in self._subscriptions)

    def _caught_up(self, one: _Subscription) -> bool:
        client = self._client(one)
        mine = client.assignment()
        if {partition.topic for partition in mine} != set(one.topics):
            return False
        ends = client.end_offsets(list(mine))
        now = self._clock.monotonic()
        return all(
            client.position(partition) >= end or self._patience(one, partition).paused_until > now
            for partition, end in ends.items()
        )

    def _advance(self, one: _Subscription) -> bool:
        try:
            client = self._client(one)
            self._resume(one, client)
            timeout_ms = _JOIN_MS if one.joining else _POLL_MS
            found = client.poll(timeout_ms=timeout_ms, max_records=_POLL_RECORDS)
            moved = False
            for partition, records in found.items():
                moved |= self._take(one, client, partition, records)
        except KafkaError as error:
            raise BusUnavailableError(f"Kafka cannot be read now: {type(error).__name__}") from error
        return moved

    def _take(self, one: _Subscription, client: KafkaConsumer, partition: TopicPartition, records: list[Any]) -> bool:
        """Handle a partition's records in order, up to one that has to wait; commit behind those that are done."""
        if self._patience(one, partition).paused_until > self._clock.monotonic():
            # After a rebalance the client forgets what was paused.
            client.seek(partition, records[0].offset)
            return False
        done: int | None = None
        for record in records:
            if not self._handle(one, partition, record):
                client.seek(partition, record.offset)
                client.pause(partition)
                break
            done = record.offset + 1
        if done is not None:
            client.commit({partition: OffsetAndMetadata(done, "", -1)})
        return done is not None

    def _handle(self, one: _Subscription, partition: TopicPartition, found: Any) -> bool:  # noqa: ANN401  the client's record
        """Handle one record; tell whether the offset may pass it."""
        patience = self._patience(one, partition)
        record = record_at(found)
        kind = record.headers.get("ce_type", "")
        if kind not in one.kinds and is_known(kind):
            return True
        try:
            outbox.publish(self._database, one.handler.handle(decode(record)), cause=record.key)
        except Exception as error:  # noqa: BLE001  the contract of EventBus; `Patience` tells the kinds apart
            pause_s = patience.pause_after(error, self._clock.monotonic())
            if pause_s is not None:
                log.warning("handler.paused", consumer=one.consumer, error=describe(error), pause_s=pause_s)
                return False
            place = Place(origin=partition.topic, partition=partition.partition, position=found.offset)
            tries = patience.failed
            bury(self._database, one.consumer, place, record, error=error, tries=tries, now=self._clock.now())
        patience.reset()
        return True

    def _resume(self, one: _Subscription, client: KafkaConsumer) -> None:
        now = self._clock.monotonic()
        due = [partition for partition in client.paused() if self._patience(one, partition).paused_until <= now]
        if due:
            client.resume(*due)

    def _patience(self, one: _Subscription, partition: TopicPartition) -> Patience:
        if partition not in one.patience:
            one.patience[partition] = Patience(self._tries, self._patience_s)
        return one.patience[partition]

    def _client(self, one: _Subscription) -> KafkaConsumer:
        if one.client is None:
            one.client = KafkaConsumer(
                **client_settings(self._config),
                client_id=f"{self._config.prefix}-{one.consumer}",
                group_id=f"{self._config.prefix}.{one.consumer}",
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                allow_auto_create_topics=False,
                max_poll_interval_ms=int(self._patience_s * 1000) + 600_000,
            )
            one.client.subscribe(list(one.topics), listener=_Membership(one))
        return one.client


def record_at(found: Any) -> Record:  # noqa: ANN401  the client's record
    """Read a record as it lies in a topic, whoever wrote it: what is no text becomes something that is refused."""
    headers = {str(name): (value or b"").decode(errors="replace") for name, value in found.headers or ()}
    key = (found.key or b"").decode(errors="replace")
    return Record(key=key, headers=headers, body=found.value or b"")
