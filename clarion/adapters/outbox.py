"""The outbox: the `events` table that every stage writes in the transaction that changes its state.

On the embedded bus this table is the bus; with Kafka a relay copies it, in order.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from clarion.adapters.database import BIG, TEXT, as_json, insert_many, insert_new, lock, replace
from clarion.adapters.schema import Schema
from clarion.adapters.topics import family_of
from clarion.codec import Record, encode
from clarion.crashpoints import effect
from clarion.model import derive

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from clarion.adapters.database import Database
    from clarion.events import Event

SCHEMA = Schema(stage="bus", folder=Path(__file__).parent / "migrations" / "bus", head="0002")

ORIGIN = "events"
"""How a place in this table is named, where a place in a topic has the topic's name."""
RELAY = "relay"
"""The reader of this table that copies it to Kafka."""

tables = sa.MetaData()
events_table = sa.Table(
    "events",
    tables,
    sa.Column("position", BIG, primary_key=True, autoincrement=True),
    # Derived from kind, subject and sequence. Not indexed: ids lie as if at random, and each would touch a page.
    sa.Column("event_id", TEXT, nullable=False),
    sa.Column("kind", TEXT, nullable=False, index=True),
    sa.Column("subject", TEXT, nullable=False),
    sa.Column("sequence", BIG, nullable=False),
    sa.Column("time", TEXT, nullable=False, index=True),
    sa.Column("headers", TEXT, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Index("events_sequence", "subject", "sequence", "kind", unique=True),
    sqlite_autoincrement=True,
)
consumers = sa.Table(
    "consumers",
    tables,
    sa.Column("consumer", TEXT, primary_key=True),
    sa.Column("position", BIG, nullable=False),
)
dead_letters = sa.Table(
    "dead_letters",
    tables,
    sa.Column("consumer", TEXT, primary_key=True),
    sa.Column("origin", TEXT, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("position", BIG, primary_key=True),
    sa.Column("event_id", TEXT, nullable=False),
    sa.Column("kind", TEXT, nullable=False),
    sa.Column("subject", TEXT, nullable=False),
    sa.Column("digest", TEXT, nullable=False),
    sa.Column("error", TEXT, nullable=False),
    sa.Column("reason", TEXT, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("time", TEXT, nullable=False),
    sa.Column("letter_id", TEXT, nullable=False, unique=True),
    sa.Column("state", TEXT, nullable=False, index=True),
    sa.Column("redrives", sa.Integer, nullable=False),
)


def record_events(connection: sa.Connection, events: Iterable[Event], *, cause: str = "") -> int:
    """Write events within the caller's transaction; one that was written before is passed over. Gives how many are new.

    `cause` is the subject of what they follow from, so that they continue its trace. Positions are given in the order
    of the commits, so that a reader that remembers the last one misses none: until this transaction ends no other one
    writes events.
    """
    rows = [_row_of(connection, event, cause) for event in events]
    if not rows:
        return 0
    lock(connection, "events")
    return insert_many(connection, events_table, rows, new_only=True)


def _row_of(connection: sa.Connection, event: Event, cause: str) -> dict[str, Any]:
    record = encode(event)
    return {
        "event_id": record.headers["ce_id"],
        "kind": event.kind,
        "subject": event.subject,
        "sequence": event.sequence,
        "time": record.headers["ce_time"],
        "headers": as_json({**record.headers, "traceparent": _traceparent(connection, record, cause)}),
        "body": record.body,
    }


def _traceparent(connection: sa.Connection, record: Record, cause: str) -> str:
    """Give the W3C trace context of an event: the trace of its subject's first event, else of what it follows from.

    Derived like everything else, so that an event that is said again has the same: a study begins a trace, and its
    groups, jobs and deliveries continue it. The span is the event itself.
    """
    kind = record.headers["ce_type"]
    if family_of(kind) == "studies":
        trace = trace_of(record.key)
    else:
        trace = _known_trace(connection, record.key) or _known_trace(connection, cause) or trace_of(cause or record.key)
    return f"00-{trace}-{record.headers['ce_id'].replace('-', '')[:16]}-01"


@functools.lru_cache(1024)
def trace_of(subject: str) -> str:
    """Give the trace id that a subject begins."""
    return derive("trace", subject).replace("-", "")


def _known_trace(connection: sa.Connection, subject: str) -> str | None:
    if not subject:
        return None
    here = events_table.c.subject == subject
    query = sa.select(events_table.c.headers).where(here).order_by(events_table.c.sequence).limit(1)
    headers = connection.execute(query).scalar_one_or_none()
    return None if headers is None else str(json.loads(headers).get("traceparent", "")[3:35]) or None


def publish(database: Database, events: Iterable[Event], *, cause: str = "") -> None:
    """Make events durable in a transaction of their own; `cause` as in `record_events`."""
    outgoing = list(events)
    if not outgoing:
        return
    with effect("bus.publish"), database.transaction() as connection:
        record_events(connection, outgoing, cause=cause)


def position_of(database: Database, consumer: str) -> int:
    """Give the position up to which a reader of the table has come; 0 when it has not begun."""
    query = sa.select(consumers.c.position).where(consumers.c.consumer == consumer)
    with database.reading() as connection:
        return int(connection.execute(query).scalar_one_or_none() or 0)


def positions_of(connection: sa.Connection, readers: Sequence[str]) -> dict[str, int]:
    """Give the positions of those of some readers that have begun."""
    query = sa.select(consumers.c.consumer, consumers.c.position).where(consumers.c.consumer.in_(readers))
    return {row.consumer: int(row.position) for row in connection.execute(query)}


def keep_position(database: Database, consumer: str, position: int) -> None:
    """Keep a reader's position. Wakes nobody, or readers that move on would keep waking each other."""
    with effect("bus.position"), database.transaction(quiet=True) as connection:
        replace(connection, consumers, {"consumer": consumer, "position": position})


def move_positions(database: Database, moves: Mapping[str, tuple[int, int]]) -> None:
    """Move readers from a position to another, those that are still there; who has not begun is at 0."""
    table = consumers
    with effect("bus.position"), database.transaction(quiet=True) as connection:
        for consumer, (before, after) in moves.items():
            here = sa.and_(table.c.consumer == consumer, table.c.position == before)
            moved = connection.execute(table.update().where(here).values(position=after)).rowcount
            if not moved and before == 0:
                insert_new(connection, table, [{"consumer": consumer, "position": after}])


def record_of(row: sa.Row[tuple[object, ...]]) -> Record:
    """Give the record that a row of the table holds."""
    return Record(key=str(row.subject), headers=json.loads(str(row.headers)), body=row.body)


def find_record(database: Database, subject: str, event_id: str) -> Record | None:
    """Give the record of an event that a stage published; None for what somebody else wrote to a topic."""
    query = sa.select(events_table).where(events_table.c.subject == subject, events_table.c.event_id == event_id)
    with database.reading() as connection:
        row = connection.execute(query).one_or_none()
    return None if row is None else record_of(row)


def read_of_subjects(database: Database, subjects: Sequence[str], kind: str) -> list[Record]:
    """Give the records of a type that some subjects have, in order."""
    # The type is compared here: asked for it, SQLite reads every event of the type instead of those of the subjects.
    query = sa.select(events_table).where(events_table.c.subject.in_(subjects)).order_by(events_table.c.position)
    with database.reading() as connection:
        return [record_of(row) for row in connection.execute(query) if row.kind == kind]


def read_after(
    connection: sa.Connection,
    position: int,
    limit: int,
    kinds: Sequence[str] | None = None,
    *,
    until: int | None = None,
) -> Sequence[sa.Row[tuple[object, ...]]]:
    """Give rows behind a position, in order; only of some kinds, or of all; up to a last position, if there is one."""
    query = sa.select(events_table).where(events_table.c.position > position)
    if until is not None:
        query = query.where(events_table.c.position <= until)
    if kinds is not None:
        query = query.where(events_table.c.kind.in_(kinds))
    return connection.execute(query.order_by(events_table.c.position).limit(limit)).all()
