"""What Faust does wrong when it is left alone, shown on a real broker; and that our consumer on it does not."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path
from typing import Any

import faust
import pytest
from faust.app.base import BootStrategy
from faust.types import TP
from kafka import ConsumerRebalanceListener, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata
from support.kafka import Broker, topics_on

from clarion.adapters import faust_consumer
from clarion.adapters.faust_consumer import FaustConsumer
from clarion.config import KafkaConfig

DEADLINE_S = 60


@pytest.fixture
def config(kafka: Broker) -> KafkaConfig:
    return topics_on(kafka.address, partitions=1)


def produce(config: KafkaConfig, count: int, size: int = 10) -> None:
    producer = KafkaProducer(bootstrap_servers=list(config.bootstrap))
    for _ in range(count):
        producer.send(f"{config.prefix}.jobs", key=b"k", value=b"x" * size)
    producer.flush()
    producer.close()


# Left alone ------------------------------------------------------------------------------------------------------


class Alone(faust.App):
    class BootStrategy(BootStrategy):
        enable_web = False
        enable_kafka_producer = False


async def run_alone(config: KafkaConfig, handle: Any, done: Any) -> int:
    """Run a plain agent until `done`; gives the offset that the group then has."""
    app = Alone(
        f"{config.prefix}.alone", broker=f"kafka://{config.bootstrap[0]}", topic_allow_declare=False, env={},
        topic_disable_leader=True, web_enabled=False, autodiscover=False, store="memory://",
    )  # fmt: skip
    topic = app.topic(f"{config.prefix}.jobs", value_type=bytes, key_serializer="raw", value_serializer="raw")

    async def agent(stream: Any) -> None:
        async for event in stream.events():
            handle(app, event.message)

    app.agent(topic, name="plain")(agent)
    await app.start()
    await asyncio.wait_for(_until(app, done), DEADLINE_S)
    await app.consumer.commit()
    offsets = await app.consumer.seek_to_committed()
    await app.stop()
    return max(offsets.values())


async def _until(app: Alone, done: Any) -> None:
    while not done(app):
        await asyncio.wait([asyncio.ensure_future(asyncio.Event().wait())], timeout=0.05)


def test_faust_that_pauses_a_partition_loses_what_it_has_fetched(config: KafkaConfig) -> None:
    """The reason why we never let it. When this fails Faust has mended it: docs/decisions/0011 can be shorter."""
    produce(config, 600)
    place, seen = TP(f"{config.prefix}.jobs", 0), list[int]()
    paused: list[float] = []

    def handle(app: Alone, message: Any) -> None:
        seen.append(message.offset)
        if message.offset == 50:
            app.consumer.pause_partitions({place})
            paused.append(asyncio.get_running_loop().time())

    def done(app: Alone) -> bool:
        if paused and asyncio.get_running_loop().time() > paused[0] + 2:
            app.consumer.resume_partitions({place})
            paused.clear()
            produce(config, 10)
        return 609 in seen

    committed = asyncio.run(run_alone(config, handle, done))
    assert seen[:51] == list(range(51))
    assert len(seen) < 610, "records that had been fetched never came"
    assert committed > 600, "and were committed as if they had"


def test_faust_lets_a_record_pass_whose_handler_raises(config: KafkaConfig) -> None:
    produce(config, 10)
    seen: list[int] = []

    def handle(_app: Alone, message: Any) -> None:
        if message.offset == 4 and message.offset not in seen:
            seen.append(-1)
            raise ValueError("a handler's fault")
        seen.append(message.offset)

    committed = asyncio.run(run_alone(config, handle, lambda _: 9 in seen))
    assert -1 in seen
    assert 4 not in seen, "it never came again"
    assert committed == 10


# Ours on it ------------------------------------------------------------------------------------------------------


def read(consumer: FaustConsumer, count: int) -> list[Any]:
    found: list[Any] = []
    end = time.monotonic() + DEADLINE_S
    while len(found) < count:
        for records in consumer.poll(timeout_ms=200, max_records=300).values():
            found += records
        assert time.monotonic() < end, f"{len(found)} of {count} came"
    return found


class Nobody(ConsumerRebalanceListener):
    def on_partitions_revoked(self, revoked: Any) -> None:
        pass

    def on_partitions_assigned(self, assigned: Any) -> None:
        pass


def consumer_on(config: KafkaConfig) -> FaustConsumer:
    return FaustConsumer(config, f"{config.prefix}.ours", [f"{config.prefix}.jobs"], Nobody())


def threads() -> set[str]:
    return {one.name for one in threading.enumerate() if one.name != "MainThread"}


def listening() -> set[str]:
    """Give the sockets on which this process listens."""
    ours = {link.readlink().name for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.exists()}
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {one[1] for one in lines if one[3] == "0A" and f"socket:[{one[9]}]" in ours}


def test_the_environment_changes_nothing_and_no_port_is_opened(
    config: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faust reads its settings from there first. Bites: leave `env` out, and it goes to another broker."""
    monkeypatch.setenv("BROKER_URL", "kafka://127.0.0.1:9")
    monkeypatch.setenv("PROCESSING_GUARANTEE", "exactly_once")
    monkeypatch.setenv("APP_WEB_ENABLED", "1")
    before = listening()
    produce(config, 3)
    consumer = consumer_on(config)
    try:
        assert [one.offset for one in read(consumer, 3)] == [0, 1, 2]
        assert listening() == before
        with socket.create_server(("127.0.0.1", 0)):
            assert len(listening()) == len(before) + 1, "a port would be seen"
    finally:
        consumer.close()


@pytest.mark.parametrize(("count", "size"), [(20_000, 500), (60_000, 10)])
def test_a_partition_that_waits_is_held_within_a_bound_and_loses_nothing(
    config: KafkaConfig, monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    """Paused in the middle of what was fetched, for long; then everything comes, in order, once; then it is committed.

    Bites: let Faust pause it, and what had been fetched never comes.
    """
    monkeypatch.setattr(faust_consumer, "_FULL", 100)
    produce(config, count, size)
    place = TopicPartition(f"{config.prefix}.jobs", 0)
    before, consumer = threads(), consumer_on(config)
    try:
        first = read(consumer, 11)
        consumer.seek(place, first[10].offset)
        consumer.commit({place: OffsetAndMetadata(first[10].offset, "", -1)})
        consumer.pause(place)
        for _ in range(15):
            assert consumer.poll(timeout_ms=200, max_records=300) == {}
        held = len(consumer._partitions[place].waiting)
        assert 100 <= held < count * 3 // 4, "one fetch, not the topic"
        consumer.resume(place)
        offsets = list[int]()
        while len(offsets) < count - 10:
            some = [one.offset for one in read(consumer, 1)]
            consumer.commit({place: OffsetAndMetadata(some[-1] + 1, "", -1)})
            offsets += some
        assert offsets == list(range(10, count))
    finally:
        consumer.close()
    assert threads() == before, "nothing of Faust is left running"
    again = consumer_on(config)
    try:
        assert again.committed(place) == count
    finally:
        again.close()


def test_leaving_waits_for_no_record(config: KafkaConfig) -> None:
    """A record in hand, paused and uncommitted, comes again to the next member; leaving does not wait for it.

    Bites: `stream_wait_empty`, Faust's default, and leaving never ends.
    """
    produce(config, 5)
    place, consumer = TopicPartition(f"{config.prefix}.jobs", 0), consumer_on(config)
    assert len(read(consumer, 5)) == 5
    consumer.seek(place, 2)
    consumer.commit({place: OffsetAndMetadata(2, "", -1)})
    consumer.pause(place)
    consumer.close()
    again = consumer_on(config)
    try:
        assert [one.offset for one in read(again, 3)] == [2, 3, 4]
    finally:
        again.close()
