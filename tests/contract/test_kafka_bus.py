"""The suite of every bus over a real Kafka, and what only a broker can do wrong."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kafka import TopicPartition
from support.kafka import Broker, topics_on
from support.world import pause

from clarion.adapters.database import Database
from clarion.adapters.kafka_bus import KafkaBus
from clarion.adapters.kafka_topics import apply_topics, check_topics, read_lag
from clarion.adapters.memory import ManualClock
from clarion.adapters.relay import Relay
from clarion.adapters.topics import topic_of
from clarion.config import KafkaConfig
from clarion.errors import BusUnavailableError, TransientError
from clarion.events import ALL, JobStarted
from clarion.ports import Clock
from clarion.testing.suites import MOMENT, EventBusSuite, MakeBus, Recorder, started

DEADLINE_ROUNDS = 3000


class RelayedBus(KafkaBus):
    """A KafkaBus together with its relay, which comes to rest only when the topics hold nothing unseen."""

    def __init__(self, database: Database, clock: Clock, config: KafkaConfig, relay: Relay, runtime: str) -> None:
        super().__init__(database, clock, config, runtime=runtime)
        self.relay = relay

    def step(self) -> bool:
        """Step until something moved, or nothing is left."""
        for _ in range(DEADLINE_ROUNDS):
            relayed, moved = self.relay.step(), super().step()
            if relayed or moved:
                return True
            if self.caught_up():
                return False
            pause(0.005)
        raise AssertionError("the bus never came to rest")


@pytest.fixture
def config(kafka: Broker) -> KafkaConfig:
    """Topics of their own for every test."""
    return topics_on(kafka.address)


@pytest.fixture
def make_bus(config: KafkaConfig, tmp_path: Path, runtime: str) -> Iterator[MakeBus]:
    made: list[RelayedBus] = []

    def make(clock: Clock) -> RelayedBus:
        for one in made:
            one.close()
        database = Database(f"sqlite:///{tmp_path / 'bus.db'}")
        made.append(RelayedBus(database, clock, config, Relay(database, config), runtime))
        return made[-1]

    yield make
    for one in made:
        one.close()
        one.relay.drain()


class TestKafkaBus(EventBusSuite):
    """Handlers cannot tell which bus they run on."""

    def test_offsets_survive_a_restart(self, make_bus: Callable[[Clock], RelayedBus]) -> None:
        first, second = Recorder(), Recorder()
        bus = make_bus(ManualClock(MOMENT))
        bus.subscribe("suite", [JobStarted], first)
        bus.publish([started("a", 1)])
        settle(bus)
        again = make_bus(ManualClock(MOMENT))
        again.subscribe("suite", [JobStarted], second)
        again.publish([started("a", 2)])
        settle(again)
        assert [event.sequence for event in first.seen] == [1]
        assert [event.sequence for event in second.seen] == [2]

    def test_what_a_consumer_had_not_committed_comes_again(self, make_bus: Callable[[Clock], RelayedBus]) -> None:
        """At least once. Bites: commit before the handler's answer is durable and the second sees nothing."""
        clock = ManualClock(MOMENT)
        dying = Recorder(trouble=lambda event: KeyboardInterrupt() if event.sequence == 2 else None)  # type: ignore[arg-type,return-value]
        bus = make_bus(clock)
        bus.subscribe("suite", [JobStarted], dying)
        bus.publish([started("a", number) for number in range(1, 5)])
        with pytest.raises(KeyboardInterrupt):
            settle(bus)
        again, recorder = make_bus(clock), Recorder()
        again.subscribe("suite", [JobStarted], recorder)
        settle(again)
        assert [event.sequence for event in recorder.seen][-3:] == [2, 3, 4]

    def test_one_key_that_waits_keeps_no_other_partition_waiting(self, make_bus: Callable[[Clock], RelayedBus]) -> None:
        """Bites: stop at the first trouble of any partition."""
        clock = ManualClock(MOMENT)
        bus = make_bus(clock)
        recorder = Recorder(trouble=lambda event: TransientError("later", 60) if event.subject == "a" else None)
        bus.subscribe("suite", [JobStarted], recorder)
        bus.publish([started(subject, 1) for subject in "abcdefghij"])
        settle(bus)
        assert {event.subject for event in recorder.seen} >= set("bcdefghij") - same_partition("a", "bcdefghij")
        assert "a" not in {event.subject for event in recorder.seen}


def same_partition(key: str, others: str) -> set[str]:
    """Which keys share a partition of three with the key, by Kafka's own hash."""
    from kafka.partitioner.default import murmur2

    def place(text: str) -> int:
        return int((murmur2(text.encode()) & 0x7FFFFFFF) % 3)

    return {one for one in others if place(one) == place(key)}


def settle(bus: RelayedBus) -> None:
    while bus.step():
        pass


def test_order_per_key_through_the_relay(config: KafkaConfig, make_bus: Callable[[Clock], RelayedBus]) -> None:
    """2,000 events of 20 keys: each key's in the order in which the database has them."""
    bus, recorder = make_bus(ManualClock(MOMENT)), Recorder()
    bus.subscribe("suite", [JobStarted], recorder)
    bus.publish([started(f"k{key}", number) for number in range(1, 101) for key in range(20)])
    settle(bus)
    by_key: dict[str, list[int]] = {}
    for event in recorder.seen:
        by_key.setdefault(event.subject, []).append(event.sequence)
    assert by_key == {f"k{key}": list(range(1, 101)) for key in range(20)}
    end = time.monotonic() + 20
    while sum(read_lag(config).values()) != 0:
        assert time.monotonic() < end, "not committed"
        pause(0.1)


def test_relay_killed_between_acknowledgement_and_position_repeats_and_skips_nothing(
    config: KafkaConfig, tmp_path: Path
) -> None:
    """Bites: keep the position before the broker has acknowledged, and a crash skips what it had not."""
    database = Database(f"sqlite:///{tmp_path / 'bus.db'}")
    bus = KafkaBus(database, ManualClock(MOMENT), config)
    bus.publish([started("a", number) for number in range(1, 6)])
    first = Relay(database, config)
    first._send(first._waiting())
    for _, future in first._sent:
        future.get(timeout=10)
    first._close()
    second = Relay(database, config)
    while second.step():
        pass
    second.drain()
    assert read_topic(config) == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]


def read_topic(config: KafkaConfig) -> list[int]:
    """Read the sequences of key `a` as another client would: no group, from the start."""
    import json

    from kafka import KafkaConsumer

    topic = topic_of("job.started.v1", config.prefix)
    consumer = KafkaConsumer(bootstrap_servers=list(config.bootstrap), auto_offset_reset="earliest")
    places = [TopicPartition(topic, one) for one in range(config.partitions)]
    consumer.assign(places)
    consumer.seek_to_beginning(*places)
    ends = consumer.end_offsets(places)
    found: list[int] = []
    while any(consumer.position(place) < ends[place] for place in places):
        for records in consumer.poll(timeout_ms=200).values():
            found += [json.loads(one.value)["sequence"] for one in records]
    consumer.close()
    return found


def test_broker_killed_and_back_loses_and_reorders_nothing(tmp_path: Path, runtime: str) -> None:
    """F23, small: publishing goes on while the broker is down; afterwards everything comes, in order."""
    from support.kafka import start_broker

    broker = start_broker(tmp_path / "broker")
    if broker.process is None:
        pytest.skip("CLARION_TEST_KAFKA names a broker that is not ours to kill")
    try:
        config = KafkaConfig(bootstrap=(broker.address,), partitions=3, replication=1, min_insync_replicas=1)
        apply_topics(config)
        database = Database(f"sqlite:///{tmp_path / 'bus.db'}")
        bus = RelayedBus(database, ManualClock(MOMENT), config, Relay(database, config), runtime)
        recorder = Recorder()
        bus.subscribe("suite", [JobStarted], recorder)
        bus.publish([started(f"k{key}", 1) for key in range(9)])
        settle(bus)
        broker.kill()
        for number in range(2, 301):
            bus.publish([started(f"k{key}", number) for key in range(9)])
        with pytest.raises(BusUnavailableError):
            bus.relay.step()
        broker.start()
        wait_for(bus, recorder, 9 * 300)
        by_key: dict[str, list[int]] = {}
        for event in recorder.seen:
            by_key.setdefault(event.subject, []).append(event.sequence)
        for key, sequences in by_key.items():
            once = list(dict.fromkeys(sequences))
            assert once == list(range(1, 301)), key
        bus.close()
        bus.relay.drain()
    finally:
        broker.stop()


def wait_for(bus: RelayedBus, recorder: Recorder, count: int) -> None:
    for _ in range(3000):
        try:
            bus.step()
        except BusUnavailableError:
            pause(0.05)
        if len({(event.subject, event.sequence) for event in recorder.seen}) == count:
            return
    raise AssertionError(f"{len(recorder.seen)} of {count} came")


def test_topics_are_made_checked_and_mended(kafka: Broker) -> None:
    config = KafkaConfig(
        bootstrap=(kafka.address,), prefix=f"t{uuid.uuid4().hex[:12]}", partitions=2, replication=1,
        min_insync_replicas=1,
    )  # fmt: skip
    assert len(check_topics(config)) == 5
    assert len(apply_topics(config)) == 5
    assert check_topics(config) == apply_topics(config) == []
    wider = config.model_copy(update={"partitions": 3, "retention_hours": 5})
    assert len(check_topics(wider)) == 10
    assert len(apply_topics(wider)) == 10
    assert check_topics(wider) == []


def test_every_event_type_has_a_topic_and_a_subject_only_one() -> None:
    assert {topic_of(kind.kind, "p") for kind in ALL} == {
        "p.studies",
        "p.groups",
        "p.jobs",
        "p.deliveries",
        "p.replays",
    }


def test_no_broker_is_a_transient_error(tmp_path: Path) -> None:
    from support.world import free_port

    config = KafkaConfig(bootstrap=(f"127.0.0.1:{free_port()}",))
    with pytest.raises(BusUnavailableError, match="Kafka at"):
        check_topics(config)
    database = Database(f"sqlite:///{tmp_path / 'bus.db'}")
    bus = KafkaBus(database, ManualClock(MOMENT), config)
    bus.publish([started("a", 1)])
    with pytest.raises(BusUnavailableError):
        Relay(database, config).step()
