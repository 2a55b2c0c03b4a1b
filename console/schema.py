"""The tables of every stage, made by one process, so that no two find each other at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clarion.adapters import outbox
from gateway import tables
from orchestrator import ledger
from streams import timeline

if TYPE_CHECKING:
    from clarion.adapters.database import Database


def create_tables(database: Database) -> None:
    """Make what is not there yet."""
    database.create("bus", outbox.tables, outbox.SCHEMA_VERSION)
    database.create("gateway", tables.metadata, tables.SCHEMA_VERSION)
    database.create("orchestrator", ledger.metadata, ledger.SCHEMA_VERSION)
    database.create("streams", timeline.metadata, timeline.SCHEMA_VERSION)
