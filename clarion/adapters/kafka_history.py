"""What the topics still have of what was said before: a consumer of its own that is in no group and commits nothing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from clarion.adapters.kafka import client_settings, record_at
from clarion.adapters.topics import topic_of
from clarion.errors import BusUnavailableError
from clarion.model import Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from clarion.codec import Record
    from clarion.config import KafkaConfig

_POLL_MS = 1000
# So many polls without a record, though the span has not ended, are a broker in trouble.
_EMPTY_POLLS = 20


class KafkaHistory:
    """Reads partitions that it assigns to itself, from offsets that it finds by time. One thread."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._client: KafkaConsumer | None = None
        self._at: tuple[TopicPartition, int] | None = None
        self._empty = 0

    def spans(self, kinds: Sequence[str], since: datetime) -> list[Span]:
        """Give, per partition, the offsets from the first record of a time on up to the present end."""
        with self._reading() as client:
            topics = sorted({topic_of(kind, self._config.prefix) for kind in kinds})
            places = [TopicPartition(topic, number) for topic in topics for number in self._partitions(client, topic)]
            ends = client.end_offsets(places)
            begins = client.beginning_offsets(places)
            asked = dict.fromkeys(places, int(since.timestamp() * 1000))
            by_time = {place: found for place, found in client.offsets_for_times(asked).items() if found is not None}
            starts = {place: by_time[place].offset if place in by_time else ends[place] for place in places}
            return [
                Span(
                    origin=place.topic,
                    partition=place.partition,
                    position=max(begins[place], starts[place]),
                    end=ends[place],
                )
                for place in places
                if starts[place] < ends[place]
            ]

    def read(self, span: Span, kinds: Sequence[str], limit: int) -> tuple[list[tuple[int, Record]], int]:
        """Give a bounded number of records, each with the offset behind it, and how far the span has been read."""
        with self._reading() as client:
            place = TopicPartition(span.origin, span.partition)
            if self._at != (place, span.position):
                client.assign([place])
                client.seek(place, span.position)
            found = client.poll(timeout_ms=_POLL_MS, max_records=limit).get(place, [])
            position = min(int(client.position(place)), span.end)
            self._at = (place, position)
            self._empty = 0 if position > span.position else self._empty + 1
            if self._empty > _EMPTY_POLLS:
                self._empty = 0
                raise BusUnavailableError(f"Kafka gives nothing of {span.origin} from offset {span.position} on")
            wanted = ((one.offset + 1, record_at(one)) for one in found if one.offset < span.end)
            return [(behind, record) for behind, record in wanted if record.headers.get("ce_type") in kinds], position

    def at(self, origin: str, partition: int, offset: int) -> Record | None:
        """Give the record at an offset, whoever wrote it; None when the topic does not have it any more."""
        with self._reading() as client:
            place = TopicPartition(origin, partition)
            if partition not in self._partitions(client, origin):
                return None
            client.assign([place])
            client.seek(place, offset)
            self._at = None
            if not client.beginning_offsets([place])[place] <= offset < client.end_offsets([place])[place]:
                return None
            found = client.poll(timeout_ms=_POLL_MS * 5, max_records=1).get(place, [])
        return record_at(found[0]) if found and found[0].offset == offset else None

    def close(self) -> None:
        """Leave the broker."""
        if self._client is not None:
            self._client.close(autocommit=False)
            self._client, self._at = None, None

    @contextmanager
    def _reading(self) -> Iterator[KafkaConsumer]:
        try:
            if self._client is None:
                self._client = KafkaConsumer(
                    **client_settings(self._config),
                    client_id=f"{self._config.prefix}-replay",
                    group_id=None,
                    enable_auto_commit=False,
                    auto_offset_reset="earliest",
                    allow_auto_create_topics=False,
                )
            yield self._client
        except KafkaError as error:
            self.close()
            raise BusUnavailableError(f"Kafka cannot be read now: {type(error).__name__}") from error

    @staticmethod
    def _partitions(client: KafkaConsumer, topic: str) -> list[int]:
        return sorted(client.partitions_for_topic(topic) or ())
