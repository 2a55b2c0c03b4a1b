"""F23 to F26 and F33: what a broker, its network and whoever writes to it can do wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient
from support.kafka import Broker, start_broker, topics_on
from support.proxy import Proxy
from support.world import pause

from clarion.adapters import deadletters, outbox, relay
from clarion.adapters.clock import SystemClock
from clarion.adapters.database import Database
from clarion.adapters.deadletters import State, mark, read_dead_letters
from clarion.adapters.kafka_bus import KafkaBus
from clarion.adapters.kafka_topics import apply_topics, check_topics
from clarion.adapters.relay import Relay, ask_for_rebuild
from clarion.adapters.topics import TOPICS, family_of, topic_of
from clarion.codec import Record
from clarion.config import KafkaConfig
from clarion.errors import BusUnavailableError, MissingObjectError
from clarion.events import ALL, Event, JobRequested, JobStarted
from clarion.model import ObjectRef
from clarion.testing.suites import MOMENT, Recorder, started
from console.schema import create_tables
from orchestrator.ledger import jobs
from orchestrator.requests import JobRequests

BACKLOG, KEYS, DOWN_S = 100_000, 200, 60
DEADLINE_S = 150.0


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    broker = start_broker(tmp_path / "broker")
    if broker.process is None:
        pytest.skip("CLARION_TEST_KAFKA names a broker that is not ours to kill")
    yield broker
    broker.stop()


def read_all(config: KafkaConfig, family: str = "jobs") -> list[Any]:
    """Read a topic as a stranger would: no group, from its start to its end; in order per partition."""
    topic = f"{config.prefix}.{family}"
    consumer = KafkaConsumer(bootstrap_servers=list(config.bootstrap), auto_offset_reset="earliest")
    places = [TopicPartition(topic, one) for one in sorted(consumer.partitions_for_topic(topic) or ())]
    consumer.assign(places)
    consumer.seek_to_beginning(*places)
    ends, found = consumer.end_offsets(places), []
    while any(consumer.position(place) < ends[place] for place in places):
        for records in consumer.poll(timeout_ms=500, max_records=5000).values():
            found += records
    consumer.close()
    return found


def run_until(step: Any, done: Any, what: str, deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not done():
        try:
            moved = step()
        except BusUnavailableError:
            moved = False
        assert time.monotonic() < end, f"{what}: not within {deadline_s} s"
        if not moved:
            pause(0.01)


def drained(database: Database, copying: Relay) -> Any:
    def ready() -> bool:
        with database.reading() as connection:
            last = connection.execute(sa.select(sa.func.max(outbox.events_table.c.position))).scalar() or 0
        return outbox.position_of(database, relay.RELAY) == last and not copying.facts()["events_in_flight"]

    return ready


# F23 -------------------------------------------------------------------------------------------------------------


def test_a_minute_without_the_broker_and_a_large_backlog(own_broker: Broker, tmp_path: Path) -> None:
    """F23. 100,000 events while it is down: none refused, none lost, each key in order when it is back.

    Bites: let the producer give records up within the outage, and what is behind them overtakes them.
    """
    config, database = topics_on(own_broker.address), Database(f"sqlite:///{tmp_path / 'bus.db'}")
    copying = Relay(database, config)
    outbox.publish(database, [started(f"k{key}", 1) for key in range(KEYS)])
    run_until(copying.step, drained(database, copying), "the first events")
    own_broker.kill()
    back = time.monotonic() + DOWN_S
    each = BACKLOG // KEYS
    for first in range(2, each + 2, 10):
        outbox.publish(
            database, [started(f"k{key}", number) for number in range(first, first + 10) for key in range(KEYS)]
        )
    with pytest.raises(BusUnavailableError):
        copying.step()
    pause(max(0.0, back - time.monotonic()))
    own_broker.start()
    run_until(copying.step, drained(database, copying), "the backlog")
    copying.drain()
    by_key: dict[bytes, list[int]] = {}
    for record in read_all(config):
        by_key.setdefault(record.key, []).append(json.loads(record.value)["sequence"])
    assert len(by_key) == KEYS
    for key, sequences in by_key.items():
        assert sequences == list(range(1, each + 2)), key


# F24 -------------------------------------------------------------------------------------------------------------


def job_requested(number: int) -> JobRequested:
    ref = ObjectRef(location="l", digest="d", size_bytes=1)
    return JobRequested(
        subject=f"job-{number}", sequence=1, time=MOMENT, source="t", name="n", pipeline_id="p", definition=ref,
        group_id=f"g{number}", revision=1, manifest=ref, priority="normal", destinations=(), studies=("1",),
    )  # fmt: skip


def test_answers_lost_after_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F24. The answer to every first write is lost: 1,000 ambiguous writes make 1,000 records and 1,000 jobs.

    Bites: without the idempotent producer each of them lies in the topic twice.
    """
    proxies: list[Proxy] = []

    def through(port: int) -> int:
        proxies.append(Proxy(port))
        return proxies[0].port

    broker = start_broker(tmp_path / "broker", through)
    if broker.process is None:
        pytest.skip("CLARION_TEST_KAFKA names a broker that answers by itself")
    try:
        monkeypatch.setattr(relay, "_RELAY_BATCH", 10)
        config, database = topics_on(broker.address), Database(f"sqlite:///{tmp_path / 'bus.db'}")
        create_tables(database)
        outbox.publish(database, [job_requested(number) for number in range(1000)])
        copying = Relay(database, config)
        proxies[0].losing = True
        run_until(copying.step, drained(database, copying), "1,000 events through a line that loses answers", 250)
        proxies[0].losing = False
        copying.drain()
        assert proxies[0].swallowed >= 100, "every batch was ambiguous once"
        keys = [record.key.decode() for record in read_all(config)]
        assert sorted(keys) == sorted(f"job-{number}" for number in range(1000))
        bus = KafkaBus(database, SystemClock(), config)
        bus.subscribe("ledger", [JobRequested], JobRequests(database))
        run_until(bus.step, lambda: count_jobs(database) == 1000, "the jobs")
        bus.close()
    finally:
        broker.stop()
        proxies[0].close()


def test_a_relay_that_gives_up_takes_back_what_it_gave(own_broker: Broker, tmp_path: Path) -> None:
    """Drained while the broker is down: it ends, nothing of it goes on sending, and the next relay sends each once.

    Bites: let closing wait for what is under way: it raises, and its thread sends everything a second time later.
    """
    config, database = topics_on(own_broker.address), Database(f"sqlite:///{tmp_path / 'bus.db'}")
    copying = Relay(database, config)
    outbox.publish(database, [started("k", 1)])
    run_until(copying.step, drained(database, copying), "the first event")
    own_broker.kill()
    outbox.publish(database, [started("k", number) for number in range(2, 50)])
    with pytest.raises(BusUnavailableError):
        copying.step()
    assert copying.facts()["events_in_flight"] == 48
    copying.drain()
    end = time.monotonic() + DEADLINE_S
    while any(one.name == f"{config.prefix}-relay-network-thread" for one in threading.enumerate()):
        assert time.monotonic() < end, "what sends goes on"
        pause(0.1)
    own_broker.start()
    following = Relay(database, config)
    run_until(following.step, drained(database, following), "the rest")
    following.drain()
    assert [json.loads(record.value)["sequence"] for record in read_all(config)] == list(range(1, 50))


def count_jobs(database: Database) -> int:
    with database.reading() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(jobs)).scalar_one())


# F25 -------------------------------------------------------------------------------------------------------------


class Consumer:
    """A handler on a topic, with its relay: what it has seen, and what the log said of the topic."""

    def __init__(self, kafka: Broker, root: Path, runtime: str) -> None:
        self.runtime = runtime
        self.config, self.database = topics_on(kafka.address), Database(f"sqlite:///{root / 'bus.db'}")
        self.copying, self.recorder = Relay(self.database, self.config), Recorder()
        self.open()

    def open(self) -> None:
        self.bus = KafkaBus(self.database, SystemClock(), self.config, runtime=self.runtime)
        self.bus.subscribe("suite", [JobStarted], self.recorder)

    def publish(self, first: int, last: int) -> None:
        outbox.publish(self.database, [started(f"k{number % 7}", number) for number in range(first, last + 1)])
        run_until(self.copying.step, drained(self.database, self.copying), "relayed")

    def sees(self, last: int, what: str) -> None:
        run_until(self.bus.step, lambda: self.seen() >= set(range(1, last + 1)), what)

    def seen(self) -> set[int]:
        return {event.sequence for event in self.recorder.seen}

    def admin(self) -> KafkaAdminClient:
        return KafkaAdminClient(bootstrap_servers=list(self.config.bootstrap))

    def close(self) -> None:
        self.bus.close()
        self.copying.drain()


@pytest.fixture
def consumer(kafka: Broker, tmp_path: Path, runtime: str) -> Iterator[Consumer]:
    one = Consumer(kafka, tmp_path, runtime)
    one.publish(1, 40)
    one.sees(40, "the first events")
    yield one
    one.close()


def digest_of(pairs: Any) -> str:
    return hashlib.sha256("\n".join(sorted(pairs)).encode()).hexdigest()


def test_a_topic_is_deleted(consumer: Consumer, capsys: pytest.CaptureFixture[str]) -> None:
    """F25. Found, made again, rebuilt from the table of events: the same set of events by hash; nothing unseen.

    Bites: trust `auto_offset_reset` and the 40 that were relayed and not yet read are never seen.
    """
    consumer.bus.close()
    consumer.publish(41, 80)
    admin = consumer.admin()
    admin.delete_topics([f"{consumer.config.prefix}.jobs"])
    admin.close()
    run_until(lambda: False, lambda: f"topic {consumer.config.prefix}.jobs is missing" in check_topics(consumer.config),
              "the topic is gone")  # fmt: skip
    assert f"made topic {consumer.config.prefix}.jobs" in apply_topics(consumer.config)[0]
    consumer.open()
    consumer.publish(81, 90)
    consumer.sees(90, "everything, also what the topic never had a chance to say")
    assert "topic.lost" in capsys.readouterr().out
    ask_for_rebuild(consumer.database, ["jobs"])
    run_until(consumer.copying.step, lambda: len(read_all(consumer.config)) >= 100, "rebuilt")
    with consumer.database.reading() as connection:
        rows = connection.execute(sa.select(outbox.events_table.c.event_id, outbox.events_table.c.body)).all()
    wanted = digest_of(f"{row.event_id} {hashlib.sha256(row.body).hexdigest()}" for row in rows)
    there = {
        f"{dict(one.headers)['ce_id'].decode()} {hashlib.sha256(one.value).hexdigest()}"
        for one in read_all(consumer.config)
    }
    assert digest_of(there) == wanted


def test_a_topic_is_made_again_under_a_member(consumer: Consumer, capsys: pytest.CaptureFixture[str]) -> None:
    """Its offsets begin anew while the member remembers the old ones.

    Bites: compare offsets only when something comes; kafka-python goes to the end of the new topic, silently.
    """
    admin, topic = consumer.admin(), f"{consumer.config.prefix}.jobs"
    admin.delete_topics([topic])
    run_until(lambda: False, lambda: f"topic {topic} is missing" in check_topics(consumer.config), "the topic is gone")
    admin.close()
    apply_topics(consumer.config)
    consumer.publish(41, 60)
    consumer.sees(60, "what the new topic has")
    consumer.publish(61, 140)
    consumer.sees(140, "and goes on to have")
    assert "topic.lost" in capsys.readouterr().out


def test_a_broker_comes_back_as_it_was_yesterday(own_broker: Broker, tmp_path: Path, runtime: str) -> None:
    """Restored from a copy under a member: what was relayed since is gone from the topic, its offsets come again.

    Bites: let Faust remember how far it has read, and it drops what comes with offsets that it has seen.
    """
    one = Consumer(own_broker, tmp_path, runtime)
    folder = own_broker.folder
    assert folder is not None
    try:
        one.publish(1, 40)
        one.sees(40, "the first events")
        own_broker.kill()
        shutil.copytree(folder / "log", tmp_path / "yesterday")
        own_broker.start()
        one.publish(41, 140)
        one.sees(140, "what comes after the copy")
        own_broker.kill()
        shutil.rmtree(folder / "log")
        shutil.copytree(tmp_path / "yesterday", folder / "log")
        own_broker.start()
        one.publish(141, 200)
        one.sees(200, "what comes after the restoring")
    finally:
        one.close()


def test_retention_passes_what_was_not_read_yet(consumer: Consumer, capsys: pytest.CaptureFixture[str]) -> None:
    consumer.bus.close()
    consumer.publish(41, 80)
    admin, topic = consumer.admin(), f"{consumer.config.prefix}.jobs"
    reader = KafkaConsumer(bootstrap_servers=list(consumer.config.bootstrap))
    places = [TopicPartition(topic, one) for one in range(3)]
    admin.delete_records(dict(reader.end_offsets(places)))
    reader.close()
    admin.close()
    consumer.open()
    consumer.publish(81, 85)
    consumer.sees(85, "what had expired as well")
    assert "topic.lost" in capsys.readouterr().out


def test_records_expire_under_a_consumer_that_is_slow(consumer: Consumer, capsys: pytest.CaptureFixture[str]) -> None:
    """The same while it is a member: a gap in the offsets says so."""
    consumer.publish(41, 80)
    admin, topic = consumer.admin(), f"{consumer.config.prefix}.jobs"
    reader = KafkaConsumer(bootstrap_servers=list(consumer.config.bootstrap))
    admin.delete_records(dict(reader.end_offsets([TopicPartition(topic, one) for one in range(3)])))
    reader.close()
    admin.close()
    consumer.publish(81, 95)
    consumer.sees(95, "what had expired as well")
    del capsys


def test_a_group_s_offsets_are_lost(consumer: Consumer, capsys: pytest.CaptureFixture[str]) -> None:
    consumer.bus.close()
    admin = consumer.admin()
    run_until(lambda: False, lambda: _group_deleted(admin, f"{consumer.config.prefix}.suite"), "the group is gone")
    admin.close()
    consumer.publish(41, 50)
    consumer.open()
    consumer.sees(50, "everything")
    assert "the group's offset is gone" in capsys.readouterr().out


def _group_deleted(admin: KafkaAdminClient, group: str) -> bool:
    from kafka.errors import KafkaError

    try:
        found = admin.delete_groups([group])
    except KafkaError:
        return False
    return "NonEmpty" not in str(found)


# F26 -------------------------------------------------------------------------------------------------------------


def test_members_come_and_go(kafka: Broker, tmp_path: Path, runtime: str) -> None:
    """F26. Members join and leave every 2 s for 30 s while requests come: none skipped, no job doubled.

    Bites: commit before the handler's answer is durable, and what a leaving member had in hand is skipped.
    """
    config, url = topics_on(kafka.address, partitions=6), f"sqlite:///{tmp_path / 'bus.db'}"
    database = Database(url)
    create_tables(database)
    copying, seen = Relay(database, config), set[str]()
    ended = threading.Event()

    class Noting(JobRequests):
        def handle(self, event: Event) -> Any:
            answer = super().handle(event)
            seen.add(event.subject)
            return answer

    def member(leaving: threading.Event) -> None:
        own = Database(url)
        bus = KafkaBus(own, SystemClock(), config, runtime=runtime)
        bus.subscribe("ledger", [JobRequested], Noting(own))
        while not leaving.is_set():
            try:
                if not bus.step():
                    leaving.wait(0.01)
            except BusUnavailableError:
                leaving.wait(0.1)
        bus.close()

    steady = [threading.Thread(target=member, args=(ended,)) for _ in range(2)]
    for thread in steady:
        thread.start()
    count, end, visitors = 0, time.monotonic() + 30, []
    while time.monotonic() < end:
        leaving = threading.Event()
        visitor = threading.Thread(target=member, args=(leaving,))
        visitor.start()
        visitors.append(visitor)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            outbox.publish(database, [job_requested(count + one) for one in range(10)])
            count += 10
            copying.step()
            ended.wait(0.1)
        leaving.set()
    run_until(copying.step, drained(database, copying), "relayed")
    run_until(lambda: False, lambda: len(seen) == count, f"all of {count} seen")
    ended.set()
    for thread in [*steady, *visitors]:
        thread.join(60)
    copying.drain()
    assert count_jobs(database) == count > 500
    assert read_dead_letters(database) == []


# F33 -------------------------------------------------------------------------------------------------------------


def poison(kind: str) -> dict[str, tuple[list[tuple[str, bytes]], bytes | None, bytes | None]]:
    """Give twenty records that cannot be borne: headers, key, body. `kind` is a type that the topic carries."""
    good = [("ce_type", kind.encode()), ("ce_id", b"x")]
    body = b'{"subject":"a","sequence":1,"time":"2026-11-23T12:00:00Z","source":"s"}'
    return {
        "no headers": ([], b"a", b"{}"),
        "no body": (good, b"a", None),
        "empty body": (good, b"a", b""),
        "no key": (good, None, body),
        "empty key": (good, b"", body),
        "another key": (good, b"b", body),
        "another id": (good, b"a", body),
        "not JSON": (good, b"a", b"\xff\xfe"),
        "cut JSON": (good, b"a", body[:30]),
        "a list": (good, b"a", b"[1, 2]"),
        "null": (good, b"a", b"null"),
        "another shape": (good, b"a", b'{"a": 1}'),
        "wrong types": (good, b"a", b'{"subject": [], "sequence": "x", "time": 5, "source": null}'),
        "a number too large": (good, b"a", body.replace(b":1,", b":" + b"9" * 400 + b",")),
        "a time that is none": (good, b"a", body.replace(b"2026-11-23", b"2026-13-45")),
        "deep": (good, b"a", b"[" * 100_000),
        "huge": (good, b"a", b'{"a": "' + b"x" * 900_000 + b'"}'),
        "a type of tomorrow": ([("ce_type", kind.replace(".v1", ".v9").encode()), ("ce_id", b"x")], b"a", body),
        "a type that is no text": ([("ce_type", b"\xff\xff"), ("ce_id", b"\x00")], b"a", body),
        "an object that is gone": (good, b"gone", b'{"gone": true}'),
    }


class OfEveryKind(Recorder):
    """A handler of every event, which cannot bear those whose object is gone."""

    def handle(self, event: Event) -> Any:
        if event.subject == "gone":
            raise MissingObjectError("object 00 is not in the store")
        return super().handle(event)


def test_twenty_kinds_of_poison_in_every_topic(
    kafka: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    """F33. Each becomes a dead letter with its place, reason and digest, healthy events go on, and after a fix every
    one is redriven from where it lies; what fails three times is in quarantine.
    """
    config, database = topics_on(kafka.address, 1), Database(f"sqlite:///{tmp_path / 'bus.db'}")
    first_of = {family: next(kind.kind for kind in ALL if family_of(kind.kind) == family) for family in TOPICS}
    producer = KafkaProducer(bootstrap_servers=kafka.address)
    written = 0
    for kind in first_of.values():
        for headers, key, body in poison(kind).values():
            producer.send(topic_of(kind, config.prefix), key=key, value=body, headers=headers)
            written += 1
    producer.flush()
    producer.close()
    assert written == 100
    copying, recorder = Relay(database, config), OfEveryKind()
    bus = KafkaBus(database, SystemClock(), config, runtime=runtime)
    bus.subscribe("suite", ALL, recorder)
    outbox.publish(database, [started("healthy", 1)])
    run_until(copying.step, drained(database, copying), "relayed")
    run_until(bus.step, lambda: len(read_dead_letters(database)) == 100, "the dead letters")
    run_until(bus.step, lambda: recorder.seen == [started("healthy", 1)], "the healthy event")
    letters = read_dead_letters(database)
    assert {(one.origin, one.position) for one in letters} == {
        (f"{config.prefix}.{family}", offset) for family in TOPICS for offset in range(20)
    }
    assert {len(one.digest) for one in letters} == {64}
    assert all(one.reason and one.error for one in letters)

    for tries in range(2):
        mark(database, [one.letter_id for one in letters], State.REDRIVE)
        run_until(bus.step, lambda: {one.redrives for one in read_dead_letters(database)} == {tries + 1}, "redriven")  # noqa: B023
    read: list[Record] = []

    def mended(record: Record) -> Event:
        read.append(record)
        return started("mended", len(read))

    monkeypatch.setattr(deadletters, "decode", mended)
    kept = letters[0].letter_id
    mark(database, [one.letter_id for one in letters if one.letter_id != kept], State.REDRIVE)
    run_until(bus.step, lambda: len(read_dead_letters(database)) == 1, "all but one redriven after a fix")
    assert {hashlib.sha256(one.body).hexdigest() for one in read} <= {one.digest for one in letters}
    assert len(recorder.seen) == 100
    monkeypatch.undo()
    mark(database, [kept], State.REDRIVE)
    run_until(bus.step, lambda: read_dead_letters(database)[0].state == State.QUARANTINED, "quarantined")
    assert read_dead_letters(database)[0].redrives == 3
    bus.close()
    copying.drain()
