"""A consumer on Faust: what the bus asks of kafka-python's consumer, given by a Faust app on a loop of its own.

Faust keeps the membership, fetches, and commits. Nothing of ours runs in it: its agent only puts records into a box,
from which the bus takes them on its own thread; a handler's exception never reaches it. Its faults that are contained
here, and how, are in docs/decisions/0011.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import faust
import structlog
from faust.app.base import BootStrategy
from faust.types import TP
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaConnectionError

from clarion.adapters.kafka import HEARTBEAT_S, METADATA_S, SESSION_S, client_settings

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Mapping
    from concurrent.futures import Future

    from kafka import ConsumerRebalanceListener
    from kafka.structs import OffsetAndMetadata

    from clarion.config import KafkaConfig

log = structlog.get_logger()

# Leaving may take a while when the broker is away or the group is being shared out; whoever leaves without saying so is
# no longer waited for after a session.
_CALL_S, _STOP_S, _AGAIN_S = 10.0, 3.0, 1.0
_COMMIT_S = 0.5
# When so many records of a partition wait for us no more are fetched, until half of them are gone.
_FULL = 1000


@dataclass(slots=True)
class _Partition:
    """What Faust has given us of a partition: `waiting` for the bus, and `taken` by it and not committed yet."""

    waiting: deque[Any] = field(default_factory=deque)
    taken: deque[Any] = field(default_factory=deque)
    paused: bool = False
    full: bool = False
    position: int | None = None

    def take(self, most: int) -> list[Any]:
        """Take records that wait."""
        found = [self.waiting.popleft() for _ in range(min(most, len(self.waiting)))]
        self.taken.extend(found)
        self.position = found[-1].message.offset + 1
        return [event.message for event in found]

    def go_back(self, offset: int) -> bool:
        """Let a record that was taken wait again, with all behind it; tell whether it is here."""
        while self.taken and self.taken[-1].message.offset >= offset:
            self.waiting.appendleft(self.taken.pop())
        self.position = offset
        return bool(self.waiting) and self.waiting[0].message.offset == offset

    def done_before(self, offset: int) -> list[Any]:
        """Give up what was taken before an offset."""
        done = []
        while self.taken and self.taken[0].message.offset < offset:
            done.append(self.taken.popleft())
        return done


class _Boot(BootStrategy):
    """Starts neither a web server nor a producer: only the relay produces."""

    enable_web = False
    enable_kafka_producer = False


class _App(faust.App):
    BootStrategy = _Boot


class _Forgetting(dict[TP, int | None]):
    """What Faust remembers of how far it has read: nothing.

    It would drop, without a word, whatever comes with a smaller offset, as all does after a broker was restored from a
    copy. It goes on from where the client does; the bus compares offsets.
    """

    def __getitem__(self, _place: TP) -> None:
        return None


async def _leave(app: _App) -> None:
    """Stop an app, with what it is to commit. Faust lets a commit that is under way stand for the last one."""
    if app.started:
        await app.consumer.commit()
    await app.stop()


class FaustConsumer:
    """The part of `kafka.KafkaConsumer` that `KafkaBus` uses. One thread calls it; Faust's loop runs on another.

    Every method may raise KafkaError. A record has `offset`, `key`, `value` and `headers`.
    """

    def __init__(
        self, config: KafkaConfig, group: str, topics: Iterable[str], listener: ConsumerRebalanceListener
    ) -> None:
        self._config, self._group, self._topics = config, group, tuple(topics)
        self._listener = listener
        # Asks for offsets; it is no member of the group.
        self._asking = KafkaConsumer(**client_settings(config), group_id=group, enable_auto_commit=False)
        self._box = threading.Condition()
        # The partitions that we have, and how often the group was shared out: changed only with the box locked.
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._shared_out, self._told, self._joined = 0, 0, False
        self._again_at = 0.0
        self._app: _App | None = None
        self._starting: Future[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"faust {group}", daemon=True)
        self._thread.start()

    # What the bus calls ----------------------------------------------------------------------------------------

    def poll(self, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        """Give records that wait, by partition, in order; wait for some up to the time."""
        self._keep_running()
        with self._box:
            self._box.wait_for(self._has_news, timeout_ms / 1000)
            if self._told != self._shared_out:
                self._told = self._shared_out
                self._listener.on_partitions_revoked(set())
                if self._joined:
                    self._listener.on_partitions_assigned(set(self._partitions))
            ready = self._ready()
            # Each has its share: one with a backlog keeps none waiting.
            return {place: partition.take(-(-max_records // len(ready))) for place, partition in ready.items()}

    def _ready(self) -> dict[TopicPartition, _Partition]:
        return {place: one for place, one in self._partitions.items() if one.waiting and not one.paused}

    def _has_news(self) -> bool:
        return self._told != self._shared_out or bool(self._ready())

    def seek(self, place: TopicPartition, offset: int) -> None:
        """Let the record at the offset be the next one. One that was shared out anew begins at what is committed."""
        with self._box:
            partition = self._partitions.get(place)
            if self._told != self._shared_out or partition is None or partition.go_back(offset):
                return
            partition.waiting.clear()
        self._call(self._seek(TP(*place), offset))

    def pause(self, *places: TopicPartition) -> None:
        """Hand out no records of partitions. Faust is not told: it would drop what it has fetched, for ever."""
        self._set_paused(places, paused=True)

    def resume(self, *places: TopicPartition) -> None:
        """Hand out records of partitions again."""
        self._set_paused(places, paused=False)

    def _set_paused(self, places: Iterable[TopicPartition], *, paused: bool) -> None:
        with self._box:
            for place in self._partitions.keys() & set(places):
                self._partitions[place].paused = paused and self._told == self._shared_out

    def paused(self) -> set[TopicPartition]:
        """Give the partitions that are paused."""
        with self._box:
            return {place for place, partition in self._partitions.items() if partition.paused}

    def commit(self, offsets: Mapping[TopicPartition, OffsetAndMetadata]) -> None:
        """Let the offsets be committed within half a second; what was shared out anew meanwhile comes again."""
        self._call(self._commit({place: one.offset for place, one in offsets.items()}, self._told))

    def assignment(self) -> set[TopicPartition]:
        """Give the partitions that this member has; none while `poll` has not yet told of a change."""
        with self._box:
            return set(self._partitions) if self._told == self._shared_out else set()

    def position(self, place: TopicPartition) -> int:
        """Give the offset of the record that comes next."""
        with self._box:
            position = self._partitions[place].position if place in self._partitions else None
        if position is None:
            position = self.committed(place)
        return self.beginning_offsets([place])[place] if position is None else position

    def committed(self, place: TopicPartition) -> int | None:
        """Give the group's offset in a partition."""
        found = self._asking.committed(place)
        return None if found is None else int(found)

    def beginning_offsets(self, places: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Give the first offset there is in each partition."""
        return dict(self._asking.beginning_offsets(places))

    def end_offsets(self, places: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Give the offset behind the last one of each partition."""
        return dict(self._asking.end_offsets(places))

    def close(self, *, autocommit: bool = False) -> None:
        """Leave the group, within a few seconds."""
        del autocommit
        self._stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S)
        self._asking.close(autocommit=False)

    # The app ---------------------------------------------------------------------------------------------------

    def _keep_running(self) -> None:
        """Have the app running, or on its way; one that has crashed or could not start is replaced by a new one."""
        failed = self._starting.exception() if self._starting is not None and self._starting.done() else None
        if self._app is not None and failed is None and not (self._app.crashed or self._app.should_stop):
            return
        if time.monotonic() < self._again_at:
            raise KafkaConnectionError(f"Faust's app is not running: {type(failed).__name__}")
        self._again_at = time.monotonic() + _AGAIN_S
        self._stop()
        self._call(self._create())
        # Starting takes as long as the group takes to be shared out; nobody waits for it here.
        self._starting = asyncio.run_coroutine_threadsafe(self._app_now().start(), self._loop)

    async def _create(self) -> None:
        self._app = self._make_app()

    def _app_now(self) -> _App:
        if self._app is None:
            raise KafkaConnectionError("Faust's app is not running")
        return self._app

    def _make_app(self) -> _App:
        security = self._config.security
        tls = ssl.create_default_context(cafile=security.ca_file) if security.protocol.endswith("SSL") else None
        credentials: Any = faust.SSLCredentials(tls) if tls else None
        if security.mechanism is not None:
            password = security.password.get_secret_value() if security.password else None
            credentials = faust.SASLCredentials(
                username=security.username, password=password, mechanism=security.mechanism, ssl_context=tls
            )
        app = _App(
            self._group,
            broker=[f"kafka://{one}" for one in self._config.bootstrap],
            broker_credentials=credentials,
            broker_client_id=self._group,
            broker_commit_interval=_COMMIT_S,
            broker_session_timeout=SESSION_S,
            broker_heartbeat_interval=HEARTBEAT_S,
            # Else Faust lets the environment (PROCESSING_GUARANTEE, BROKER_URL, ...) override all that is said here.
            env={},
            # Exactly-once mode never ends on SIGTERM.
            processing_guarantee="at_least_once",
            consumer_auto_offset_reset="earliest",
            consumer_metadata_max_age_ms=METADATA_S * 1000,
            # A record that waits for an hour must keep neither the group from being shared out nor us from stopping.
            stream_wait_empty=False,
            store="memory://",
            topic_allow_declare=False,
            topic_disable_leader=True,
            web_enabled=False,
            autodiscover=False,
            loop=self._loop,
        )
        topic = app.topic(*self._topics, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
        reading: Any = app.consumer
        reading._read_offset = _Forgetting()  # noqa: SLF001  see there
        app.agent(topic, name="box")(self._fill)
        app.on_partitions_revoked.connect(self._on_revoked)
        app.on_partitions_assigned.connect(self._on_assigned)
        return app

    def _stop(self) -> None:
        if self._app is None:
            return
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
        try:
            self._call(_leave(self._app), _STOP_S)
        except KafkaConnectionError as error:
            log.warning("faust.unstopped", group=self._group, reason=str(error))
        self._app = None
        self._share_out(set(), joined=False)

    def _call(self, work: Coroutine[Any, Any, None], deadline_s: float = _CALL_S) -> None:
        """Run something on Faust's loop and wait for it."""
        try:
            asyncio.run_coroutine_threadsafe(work, self._loop).result(deadline_s)
        except Exception as error:
            raise KafkaConnectionError(f"Faust: {type(error).__name__}") from error

    # On Faust's loop -------------------------------------------------------------------------------------------

    async def _fill(self, stream: Any) -> None:  # noqa: ANN401  Faust's stream
        """Be the agent: put what comes into the box."""
        async for event in stream.noack().events():
            if stream.app is not self._app:
                # Of an app that was replaced and has not ended yet.
                return
            place = TopicPartition(event.message.topic, event.message.partition)
            with self._box:
                partition = self._partitions.get(place)
                if partition is None:
                    continue
                partition.waiting.append(event)
                if len(partition.waiting) >= _FULL:
                    # Said each time: Faust takes it back when its own queue is no longer full.
                    partition.full = True
                    self._consumer().on_buffer_full(TP(*place))
                self._box.notify()

    async def _on_revoked(self, *app_and_revoked: object, **_signal: object) -> None:
        if app_and_revoked[0] is self._app:
            self._share_out(set(), joined=False)

    async def _on_assigned(self, *app_and_assigned: Any, **_signal: object) -> None:  # noqa: ANN401  Faust's signal
        assigned: Iterable[TP] = app_and_assigned[1]
        if app_and_assigned[0] is self._app:
            self._share_out({TopicPartition(one.topic, one.partition) for one in assigned}, joined=True)

    def _share_out(self, places: set[TopicPartition], *, joined: bool) -> None:
        with self._box:
            self._partitions = {place: _Partition() for place in sorted(places)}
            self._shared_out += 1
            self._joined = joined
            self._box.notify()

    async def _commit(self, offsets: dict[TopicPartition, int], told: int) -> None:
        for place, offset in offsets.items():
            with self._box:
                if told != self._shared_out:
                    return
                partition = self._partitions[place]
                done = partition.done_before(offset)
                if partition.full and len(partition.waiting) < _FULL // 2:
                    partition.full = False
                    self._consumer().on_buffer_drop(TP(*place))
            for event in done:
                event.ack()
            if not done:
                # What comes before nothing that was read: where a partition begins, or where it goes on behind a loss.
                await self._consumer()._commit({TP(*place): offset})  # noqa: SLF001  Faust commits only what it gave
                self._consumer()._committed_offset[TP(*place)] = offset  # noqa: SLF001

    async def _seek(self, place: TP, offset: int) -> None:
        await self._consumer().seek(place, offset)
        self._consumer()._committed_offset[place] = None  # noqa: SLF001  else Faust takes it for committed already

    def _consumer(self) -> Any:  # noqa: ANN401  Faust's consumer
        return self._app_now().consumer
