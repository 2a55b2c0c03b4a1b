"""Since when a destination has not been reached. It is kept, for an outage outlasts many a restart.

While it lasts attempts spend no tries, up to a limit. It ends when the destination is reached: whatever waits for it
has all its tries again, and what was sent before has as long as usual to be proved. Where nobody has tried for a while
(a closed window, a gateway that stood) it begins anew.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.adapters.database import replace
from clarion.crashpoints import effect
from gateway import tables
from gateway.outbound import SENT, WAITING

if TYPE_CHECKING:
    from clarion.adapters.database import Database

_FORGOTTEN = timedelta(hours=1)

_table = tables.outages
_deliveries = tables.deliveries


class Outages:
    """Reads and changes them. Safe from several threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.reading() as connection:
            self._on = set(connection.execute(sa.select(_table.c.destination)).scalars())

    def is_on(self, destination: str) -> bool:
        """Tell whether a destination was not reached when it was tried last."""
        return destination.lower() in self._on

    def failed(self, destination: str, now: datetime) -> timedelta:
        """Note that a destination was not reached; give how long that has been so."""
        key = destination.lower()
        with effect("delivery.outage"), self._database.transaction() as connection:
            known = connection.execute(sa.select(_table).where(_table.c.destination == key)).one_or_none()
            since = now
            if known is not None and now - datetime.fromisoformat(known.tried) < _FORGOTTEN:
                since = datetime.fromisoformat(known.since)
            replace(connection, _table, {"destination": key, "since": since.isoformat(), "tried": now.isoformat()})
        self._on.add(key)
        return now - since

    def worked(self, destination: str, *, verify_until: datetime) -> None:
        """A destination was reached: its outage, if there was one, has ended."""
        key = destination.lower()
        if key not in self._on:
            return
        here = _table.c.destination == key
        its = sa.func.lower(_deliveries.c.destination) == key
        change = _deliveries.update().where(its)
        until = verify_until.isoformat()
        with effect("delivery.outageended"), self._database.transaction() as connection:
            connection.execute(_table.delete().where(here))
            connection.execute(change.where(_deliveries.c.state == WAITING).values(spent=_deliveries.c.attempts))
            overdue = sa.and_(_deliveries.c.state == SENT, _deliveries.c.verify_until < until)
            connection.execute(change.where(overdue).values(verify_until=until, transaction_uid=None))
        self._on.discard(key)
