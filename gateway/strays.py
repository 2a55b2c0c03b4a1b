"""Finds the files of receipts that nothing refers to: a crash, or a disk that failed, came between file and record.

Who sent them was not told success. They are harmless and take room: up to a data set for each time that it happened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.adapters.objects import received_name
from gateway import journal, tables
from gateway.grouping import READER
from gateway.scrubbing import referred

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from clarion.adapters.database import Database
    from clarion.adapters.objects import FileStore

# Nothing that is being received lies in its place without a record for so long.
_OLD_S = 86400.0
_ALL = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """A file that nothing refers to."""

    path: Path
    size_bytes: int


def find_strays(database: Database, store: FileStore, folder: Path, *, older_than_s: float = _OLD_S) -> list[Stray]:
    """Give the files of receipts, older than a day, that no row and no record names which is still to be read."""
    # In this order: what is named later than the files were listed is younger than they are.
    files = store.received_files(older_than_s)
    if files:
        for location in _named(database, folder):
            files.pop(received_name(location), None)
    return [Stray(path=path, size_bytes=path.stat().st_size) for path in files.values() if path.exists()]


def _named(database: Database, folder: Path) -> Iterator[str]:
    table = tables.journal_positions
    with database.reading() as connection:
        rows = connection.execute(sa.select(table).where(table.c.reader == READER)).all()
    positions = {row.log: journal.Position(row.segment, row.offset) for row in rows}
    # What the owner reads meanwhile is first in the journal and then in the tables: the journal comes first.
    for log in journal.logs(folder):
        for entry in journal.read(folder / log, positions.get(log, journal.START), _ALL):
            described = entry.fields.get("object")
            if described:
                yield described["location"]
    for one in referred(database):
        yield one.ref.location
    with database.reading() as connection:
        yield from connection.execute(sa.select(tables.unwanted.c.location)).scalars().all()
