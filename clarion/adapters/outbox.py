"""The outbox: the `events` table that every stage writes in the transaction that changes its state.

On the embedded bus this table is the bus; with Kafka a relay copies it, in order. Writers are one at a time, so
positions are committed in their order and a reader that remembers the last one misses nothing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.codec import Record, encode
from clarion.crashpoints import effect

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from clarion.adapters.database import Database
    from clarion.events import Event

SCHEMA_VERSION = 1

tables = sa.MetaData()
events_table = sa.Table(
    "events",
    tables,
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("event_id", sa.Text, nullable=False, unique=True),
    sa.Column("kind", sa.Text, nullable=False, index=True),
    sa.Column("subject", sa.Text, nullable=False, index=True),
    sa.Column("headers", sa.Text, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)
consumers = sa.Table(
    "consumers",
    tables,
    sa.Column("consumer", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
)
dead_letters = sa.Table(
    "dead_letters",
    tables,
    sa.Column("consumer", sa.Text, primary_key=True),
    sa.Column("origin", sa.Text, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("event_id", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("time", sa.Text, nullable=False),
    sa.Column("letter_id", sa.Text, nullable=False, unique=True),
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("redrives", sa.Integer, nullable=False),
)


def record_events(connection: sa.Connection, events: Iterable[Event]) -> None:
    """Write events within the caller's transaction; one that was written before is passed over."""
    rows = [
        {
            "event_id": record.headers["ce_id"],
            "kind": record.headers["ce_type"],
            "subject": record.key,
            "headers": json.dumps(dict(record.headers)),
            "body": record.body,
        }
        for record in map(encode, events)
    ]
    if rows:
        connection.execute(events_table.insert().prefix_with("OR IGNORE", dialect="sqlite"), rows)


def publish(database: Database, events: Iterable[Event]) -> None:
    """Make events durable in a transaction of their own."""
    outgoing = list(events)
    if not outgoing:
        return
    with effect("bus.publish"), database.transaction() as connection:
        record_events(connection, outgoing)


def position_of(database: Database, consumer: str) -> int:
    """Give the position up to which a reader of the table has come; 0 when it has not begun."""
    query = sa.select(consumers.c.position).where(consumers.c.consumer == consumer)
    with database.reading() as connection:
        return int(connection.execute(query).scalar_one_or_none() or 0)


def keep_position(database: Database, consumer: str, position: int) -> None:
    """Keep a reader's position."""
    with effect("bus.position"), database.transaction() as connection:
        connection.execute(
            consumers.insert().prefix_with("OR REPLACE", dialect="sqlite"),
            {"consumer": consumer, "position": position},
        )


def record_of(row: sa.Row[tuple[object, ...]]) -> Record:
    """Give the record that a row of the table holds."""
    return Record(key=str(row.subject), headers=json.loads(str(row.headers)), body=row.body)


def find_record(database: Database, event_id: str) -> Record | None:
    """Give the record of an event that a stage published; None for what somebody else wrote to a topic."""
    query = sa.select(events_table).where(events_table.c.event_id == event_id)
    with database.reading() as connection:
        row = connection.execute(query).one_or_none()
    return None if row is None else record_of(row)


def read_after(
    connection: sa.Connection, position: int, limit: int, kinds: Sequence[str] | None = None
) -> Sequence[sa.Row[tuple[object, ...]]]:
    """Give rows behind a position, in order; only of some kinds, or of all."""
    query = sa.select(events_table).where(events_table.c.position > position)
    if kinds is not None:
        query = query.where(events_table.c.kind.in_(kinds))
    return connection.execute(query.order_by(events_table.c.position).limit(limit)).all()
