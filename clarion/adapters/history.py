"""What was said before, read from the table `events` beside the live consumers and without moving them.

For replays, and for a person who looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.adapters.outbox import ORIGIN, events_table, read_after, record_of
from clarion.model import Span

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from clarion.adapters.database import Database
    from clarion.codec import Record


class OutboxHistory:
    """The history that the embedded bus has, and that outlives every topic."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def spans(self, kinds: Sequence[str], since: datetime) -> list[Span]:
        """Give where events of these kinds lie that were said from a time on, up to now."""
        del kinds
        position = events_table.c.position
        first = sa.select(sa.func.min(position)).where(events_table.c.time >= since.isoformat())
        with self._database.reading() as connection:
            start = connection.execute(first).scalar()
            last = connection.execute(sa.select(sa.func.max(position))).scalar()
        if start is None or last is None:
            return []
        return [Span(origin=ORIGIN, partition=0, position=int(start), end=int(last) + 1)]

    def read(self, span: Span, kinds: Sequence[str], limit: int) -> tuple[list[tuple[int, Record]], int]:
        """Give a bounded number of records, each with the position behind it, and how far the span has been read."""
        with self._database.reading() as connection:
            rows = read_after(connection, span.position - 1, limit, kinds, until=span.end - 1)
        found = [(int(str(row.position)) + 1, record_of(row)) for row in rows]
        return found, found[-1][0] if len(found) == limit else span.end

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """An event in the table: its position and its record, which says the rest."""

    position: int
    record: Record

    @property
    def event_id(self) -> str:
        """The event's identifier."""
        return self.record.headers["ce_id"]

    @property
    def kind(self) -> str:
        """Its type with its version."""
        return self.record.headers["ce_type"]

    @property
    def time(self) -> str:
        """When it was said, UTC as ISO text."""
        return self.record.headers["ce_time"]


def list_events(
    database: Database,
    limit: int,
    *,
    after: int | None = None,
    kinds: Sequence[str] = (),
    subjects: Sequence[str] | None = None,
) -> list[EventRow]:
    """List events in order: the first ones behind a position, or the latest; of types that begin so, of subjects."""
    table, position = events_table, events_table.c.position
    # The places first, which SQLite finds in an index: a subject may have many events, and each is a page.
    places = sa.select(position).order_by(position.desc() if after is None else position).limit(limit)
    if kinds:
        places = places.where(sa.or_(*(table.c.kind.startswith(one, autoescape=True) for one in kinds)))
    if subjects is not None:
        places = places.where(table.c.subject.in_(subjects))
    if after is not None:
        places = places.where(position > after)
    with database.reading() as connection:
        rows = connection.execute(sa.select(table).where(position.in_(places)).order_by(position))
        return [_event_row(row) for row in rows]


def _event_row(row: sa.Row[tuple[object, ...]]) -> EventRow:
    return EventRow(position=int(str(row.position)), record=record_of(row))


def find_event(database: Database, event_id: str) -> EventRow | None:
    """Give an event by its id, or by the beginning of it when only one begins so."""
    query = sa.select(events_table).where(events_table.c.event_id.startswith(event_id, autoescape=True)).limit(2)
    with database.reading() as connection:
        rows = connection.execute(query).all()
    return _event_row(rows[0]) if len(rows) == 1 else None


def count_events(database: Database) -> dict[str, int]:
    """Count the events by type. Reads them all."""
    query = sa.select(events_table.c.kind, sa.func.count()).group_by(events_table.c.kind).order_by(events_table.c.kind)
    with database.reading() as connection:
        return {row[0]: row[1] for row in connection.execute(query)}


def last_position(database: Database) -> int:
    """Give the position of the latest event; 0 when there is none."""
    with database.reading() as connection:
        return int(connection.execute(sa.select(sa.func.max(events_table.c.position))).scalar() or 0)


def first_time_after(database: Database, position: int) -> str | None:
    """Give the time of the first event behind a position; None when there is none."""
    table = events_table
    query = sa.select(table.c.time).where(table.c.position > position).order_by(table.c.position).limit(1)
    with database.reading() as connection:
        return connection.execute(query).scalar_one_or_none()
