"""The bus on Kafka: consumers hand records to the same handlers as ever; what a handler gives goes to the outbox.

Contract. An offset is committed after what its handler gave is durable. A record that waits keeps only its partition
waiting. Offsets have no gaps in our topics, so a gap, an offset that is gone, or one beyond the end says that records
were lost to the topic (retention, deletion, a broker that was restored): the handler then catches up from the table of
events, which has all of them, before it goes on with the topic. Nothing of that is silent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from clarion.adapters import outbox
from clarion.adapters.deadletters import Place, redrive
from clarion.adapters.handover import Handover
from clarion.adapters.kafka import HEARTBEAT_S, METADATA_S, SESSION_S, client_settings, record_at
from clarion.adapters.kafka_history import KafkaHistory
from clarion.adapters.outbox import RELAY
from clarion.adapters.topics import topics_of
from clarion.errors import BusUnavailableError
from clarion.patience import PATIENCE_S, TRIES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.adapters.database import Database
    from clarion.adapters.deadletters import DeadLetter
    from clarion.codec import Record
    from clarion.config import KafkaConfig
    from clarion.events import Event
    from clarion.plugins import StreamHandler
    from clarion.ports import Clock

log = structlog.get_logger()

_POLL_RECORDS = 200
_POLL_MS = 20
# The client gives up joining a group when a poll ends: one that joins is given the time that it takes.
_JOIN_MS = 3000
_CATCH_UP = "catchup:"
_KNOWN = "kafka:"


@dataclass(slots=True)
class _Subscription:
    hand: Handover
    topics: tuple[str, ...]
    client: Any = None
    joining: bool = True
    # The offset that comes next in each partition that was looked at since it was assigned.
    expected: dict[TopicPartition, int] = field(default_factory=dict)


class _Membership(ConsumerRebalanceListener):
    """Knows whether a consumer is joining its group."""

    def __init__(self, subscription: _Subscription) -> None:
        self._subscription = subscription

    def on_partitions_revoked(self, revoked: object) -> None:
        """The group is shared out anew."""
        del revoked
        self._subscription.joining = True
        self._subscription.expected.clear()

    def on_partitions_assigned(self, assigned: object) -> None:
        """The group has been shared out; there may be nothing for us."""
        del assigned
        self._subscription.joining = False


class KafkaBus:
    """The EventBus on Kafka: one consumer group per subscription. One thread; any number of processes.

    `runtime` is the client that keeps the membership and fetches: `kafka-python`, or `faust`.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        config: KafkaConfig,
        *,
        runtime: str = "kafka-python",
        tries: int = TRIES,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._database = database
        self._clock = clock
        self._config = config
        self._runtime = runtime
        self._tries = tries
        self._patience_s = patience_s
        self._subscriptions: list[_Subscription] = []
        self._history = KafkaHistory(config)
        database.create(outbox.SCHEMA)

    def publish(self, events: Iterable[Event]) -> None:
        """Make the events durable in the outbox; the relay takes them from there."""
        outbox.publish(self._database, events)

    def subscribe(self, consumer: str, kinds: Iterable[type[Event]], handler: StreamHandler) -> None:
        """Let the handler see every event of the kinds, from the first one."""
        wanted = tuple(kinds)
        hand = Handover(
            self._database,
            self._clock,
            consumer,
            frozenset(kind.kind for kind in wanted),
            handler,
            self._tries,
            self._patience_s,
        )
        self._subscriptions.append(_Subscription(hand, topics_of(wanted, self._config.prefix)))

    def step(self) -> bool:
        """Hand a batch of what is waiting to each handler."""
        moved, trouble = False, None
        for one in self._subscriptions:
            try:
                moved |= self._advance(one)
            except BusUnavailableError as error:
                trouble = error
        handlers = {one.hand.consumer: one.hand.handler for one in self._subscriptions}
        moved |= redrive(self._database, handlers, self._origin)
        if trouble is not None:
            raise trouble
        return moved

    def close(self) -> None:
        """Leave the consumer groups."""
        for one in self._subscriptions:
            if one.client is not None:
                one.client.close(autocommit=False)
        self._subscriptions.clear()
        self._history.close()

    def caught_up(self) -> bool:
        """Tell whether every subscription has seen all that its topics hold, paused partitions aside."""
        return all(self._caught_up(one) for one in self._subscriptions)

    def _caught_up(self, one: _Subscription) -> bool:
        client = self._client(one)
        mine = client.assignment()
        if {partition.topic for partition in mine} != set(one.topics) or self._caught_up_to(one):
            return False
        ends = client.end_offsets(list(mine))
        return all(
            client.position(place) >= end or one.hand.rests(place.topic, place.partition) for place, end in ends.items()
        )

    def _origin(self, letter: DeadLetter) -> Record | None:
        """Give the record that a letter is about: as it was published, else as it lies in its topic."""
        return outbox.find_record(self._database, letter.subject, letter.event_id) or self._history.at(
            letter.origin, letter.partition, letter.position
        )

    # Topics ----------------------------------------------------------------------------------------------------

    def _advance(self, one: _Subscription) -> bool:
        start = self._caught_up_to(one)
        if start:
            return self._catch_up(one, start)
        try:
            client = self._client(one)
            self._resume(one, client)
            timeout_ms = _JOIN_MS if one.joining else _POLL_MS
            found = client.poll(timeout_ms=timeout_ms, max_records=_POLL_RECORDS)
            lost = self._look_at_assignment(one, client) or (not found and self._look_behind(one, client))
            moved = False
            for place, records in found.items():
                moved |= self._take(one, client, place, records) if not lost else self._back(client, place, records)
        except KafkaError as error:
            raise BusUnavailableError(f"Kafka cannot be read now: {type(error).__name__}") from error
        return moved or lost

    @staticmethod
    def _back(client: KafkaConsumer, place: TopicPartition, records: list[Any]) -> bool:
        client.seek(place, records[0].offset)
        return False

    def _take(self, one: _Subscription, client: KafkaConsumer, place: TopicPartition, records: list[Any]) -> bool:
        """Handle a partition's records in order, up to one that has to wait; commit behind those that are done."""
        if one.hand.rests(place.topic, place.partition):
            # After a rebalance the client forgets what was paused.
            return self._back(client, place, records)
        first = records[0].offset
        if first != one.expected.get(place, first):
            self._lost(one, f"{place.topic} {place.partition}: what lay before offset {first} is gone")
            client.commit({place: OffsetAndMetadata(first, "", -1)})
            one.expected[place] = first
            return self._back(client, place, records)
        done: int | None = None
        for found in records:
            at = Place(origin=place.topic, partition=place.partition, position=found.offset)
            if not one.hand.hand(record_at(found), at):
                client.seek(place, found.offset)
                client.pause(place)
                break
            done = found.offset + 1
        if done is not None:
            client.commit({place: OffsetAndMetadata(done, "", -1)})
            one.expected[place] = done
        return done is not None

    def _resume(self, one: _Subscription, client: KafkaConsumer) -> None:
        due = [place for place in client.paused() if not one.hand.rests(place.topic, place.partition)]
        if due:
            client.resume(*due)

    # What a topic has lost -------------------------------------------------------------------------------------

    def _look_at_assignment(self, one: _Subscription, client: KafkaConsumer) -> bool:
        """Compare where the group was with what the topics have; tell whether something is missing."""
        fresh = [place for place in client.assignment() if place not in one.expected]
        if not fresh:
            return False
        begins, ends = client.beginning_offsets(fresh), client.end_offsets(fresh)
        known = outbox.position_of(self._database, f"{_KNOWN}{one.hand.consumer}") > 0
        lost, starts = [], {}
        for place in fresh:
            begin, end, committed = begins[place], ends[place], client.committed(place)
            if committed is None and (known or begin > 0):
                lost.append(f"{place.topic} {place.partition}: the group's offset is gone")
            elif committed is not None and not begin <= committed <= end:
                lost.append(f"{place.topic} {place.partition}: offset {committed} is not within {begin} to {end}")
                client.seek(place, begin)
            starts[place] = committed if committed is not None and begin <= committed <= end else begin
        for reason in lost:
            self._lost(one, reason)
        client.commit({place: OffsetAndMetadata(start, "", -1) for place, start in starts.items()})
        one.expected |= starts
        if not known:
            outbox.keep_position(self._database, f"{_KNOWN}{one.hand.consumer}", 1)
        return bool(lost)

    def _look_behind(self, one: _Subscription, client: Any) -> bool:  # noqa: ANN401  either runtime's
        """Tell whether a client has gone back by itself, as it does when a topic was deleted and made again."""
        back = {place: client.position(place) for place in client.assignment() & one.expected.keys()}
        back = {place: position for place, position in back.items() if position < one.expected[place]}
        for place, position in back.items():
            self._lost(one, f"{place.topic} {place.partition}: ends before offset {one.expected[place]}")
            client.commit({place: OffsetAndMetadata(position, "", -1)})
            one.expected[place] = position
        return bool(back)

    def _lost(self, one: _Subscription, reason: str) -> None:
        """Note that a topic has lost records, before anything says that they were handled."""
        log.error("topic.lost", consumer=one.hand.consumer, reason=reason, then="catches up from the table of events")
        outbox.keep_position(self._database, f"{_CATCH_UP}{one.hand.consumer}", -1)

    def _caught_up_to(self, one: _Subscription) -> int:
        """Give how far the table of events was handed over, -1 before the first; 0 when nothing was lost."""
        return outbox.position_of(self._database, f"{_CATCH_UP}{one.hand.consumer}")

    def _catch_up(self, one: _Subscription, start: int) -> bool:
        """Hand a batch of the table of events over, up to where the relay is; it has what the topic has lost."""
        reader = f"{_CATCH_UP}{one.hand.consumer}"
        if one.hand.rests(reader, 0):
            return False
        end = outbox.position_of(self._database, RELAY)
        with self._database.reading() as connection:
            rows = outbox.read_after(connection, start, _POLL_RECORDS, sorted(one.hand.kinds), until=end)
        handed = one.hand.hand_rows(rows, reader)
        done = int(str(rows[handed - 1].position)) if handed else start
        if not rows:
            log.info("topic.caughtup", consumer=one.hand.consumer)
        outbox.keep_position(self._database, reader, done if rows else 0)
        return True

    def _client(self, one: _Subscription) -> Any:  # noqa: ANN401
        if one.client is None:
            one.client = self._open(one, f"{self._config.prefix}.{one.hand.consumer}")
        return one.client

    def _open(self, one: _Subscription, group: str) -> Any:  # noqa: ANN401  either has what is used of it
        if self._runtime == "faust":
            from clarion.adapters.faust_consumer import FaustConsumer  # noqa: PLC0415  only for who asks for it

            return FaustConsumer(self._config, group, one.topics, _Membership(one))
        client = KafkaConsumer(
            **client_settings(self._config),
            client_id=group,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            allow_auto_create_topics=False,
            session_timeout_ms=SESSION_S * 1000,
            metadata_max_age_ms=METADATA_S * 1000,
            heartbeat_interval_ms=HEARTBEAT_S * 1000,
            max_poll_interval_ms=int(self._patience_s * 1000) + 600_000,
        )
        client.subscribe(list(one.topics), listener=_Membership(one))
        return client
