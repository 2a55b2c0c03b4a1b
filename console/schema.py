"""The tables of every stage, made by one process, so that no two find each other at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clarion.adapters import outbox
from gateway import tables
from orchestrator import ledger
from streams import tables as streams_tables

if TYPE_CHECKING:
    from clarion.adapters.database import Database


def create_tables(database: Database) -> None:
    """Make what is not there yet."""
    database.create(outbox.SCHEMA)
    database.create(tables.SCHEMA)
    database.create(ledger.SCHEMA)
    database.create(streams_tables.SCHEMA)
