"""Groups whose instances a replay's plan needs: they are kept until the replay has come to its end."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.adapters.database import insert_new
from clarion.crashpoints import effect
from gateway import tables

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.adapters.database import Database

_ROWS = 500
_table = tables.group_holds


def hold(database: Database, replay_id: str, group_ids: Iterable[str]) -> None:
    """Keep the instances of some groups for a replay; saying so again changes nothing."""
    coming = iter(group_ids)
    while batch := list(islice(coming, _ROWS)):
        rows = [{"replay_id": replay_id, "group_id": one} for one in batch]
        with effect("retention.hold"), database.transaction(quiet=True) as connection:
            insert_new(connection, _table, rows)


def holder_of(connection: sa.Connection, group_id: str) -> str:
    """Name a replay that needs a group; empty when none does."""
    query = sa.select(_table.c.replay_id).where(_table.c.group_id == group_id).order_by(_table.c.replay_id).limit(1)
    return str(connection.execute(query).scalar_one_or_none() or "")


def let_go(connection: sa.Connection, replay_id: str) -> None:
    """Keep nothing any more for a replay, within the caller's transaction."""
    connection.execute(_table.delete().where(_table.c.replay_id == replay_id))
