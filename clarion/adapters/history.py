"""What was said before, read from the table `events` beside the live consumers and without moving them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.adapters.outbox import events_table, read_after, record_of
from clarion.model import Span

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from clarion.adapters.database import Database
    from clarion.codec import Record

ORIGIN = "events"


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
            rows = read_after(connection, span.position - 1, limit, kinds)
        found = [(int(str(row.position)) + 1, record_of(row)) for row in rows if int(str(row.position)) < span.end]
        return found, found[-1][0] if len(found) == limit else span.end

    def close(self) -> None:
        """Nothing is held."""
