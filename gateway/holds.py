"""Groups whose instances a replay's plan needs: they are kept until the replay has come to its end."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.adapters.database import insert_new, lock
from clarion.crashpoints import effect
from gateway import groups, tables

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from clarion.adapters.database import Database

_ROWS = 500
# What a replay asked for may be heard of after its end: topics have no order among themselves.
_LINGER = timedelta(days=1)
_table = tables.group_holds


def lock_holds(connection: sa.Connection) -> None:
    """Let a group be held, or its instances go, one after the other."""
    lock(connection, "retention")


def hold(database: Database, replay_id: str, group_ids: Sequence[str]) -> set[str]:
    """Keep the instances of some groups for a replay; gives those for which it is too late. Twice is harmless."""
    table, gone = tables.groups, set()
    for first in range(0, len(group_ids), _ROWS):
        some = group_ids[first : first + _ROWS]
        with effect("retention.hold"), database.transaction(quiet=True) as connection:
            lock_holds(connection)
            states = sa.select(table.c.group_id).where(
                table.c.group_id.in_(some), table.c.state.in_((groups.REMOVING, groups.REMOVED))
            )
            gone |= set(connection.execute(states).scalars())
            rows = [{"replay_id": replay_id, "group_id": one, "until": None} for one in some if one not in gone]
            insert_new(connection, _table, rows)
    return gone


def keep_only(database: Database, replay_id: str, needed: Iterable[str]) -> None:
    """Let go what is held for a replay and not needed by it."""
    with database.reading() as connection:
        held = set(connection.execute(sa.select(_table.c.group_id).where(_table.c.replay_id == replay_id)).scalars())
    spare = sorted(held.difference(needed))
    for first in range(0, len(spare), _ROWS):
        here = sa.and_(_table.c.replay_id == replay_id, _table.c.group_id.in_(spare[first : first + _ROWS]))
        with effect("retention.hold"), database.transaction(quiet=True) as connection:
            connection.execute(_table.delete().where(here))


def holder_of(connection: sa.Connection, group_id: str, now: datetime) -> str:
    """Name a replay that needs a group; empty when none does."""
    here = sa.and_(_table.c.group_id == group_id, sa.or_(_table.c.until.is_(None), _table.c.until > now.isoformat()))
    return str(connection.execute(sa.select(sa.func.min(_table.c.replay_id)).where(here)).scalar() or "")


def let_go(connection: sa.Connection, replay_id: str, ended: datetime) -> None:
    """Keep nothing any more for a replay that has ended, but for a while, within the caller's transaction."""
    connection.execute(_table.delete().where(_table.c.until < ended.isoformat()))
    until = (ended + _LINGER).isoformat()
    connection.execute(_table.update().where(_table.c.replay_id == replay_id).values(until=until))
