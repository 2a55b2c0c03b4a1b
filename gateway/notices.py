"""What retention has to remember: what it has said will go, and whether the clock can be believed.

Within the grouping owner. What is removed is gone, so two things come before: of what was set aside it is said a week
ahead, and a clock that has jumped is not believed for a day.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from clarion.adapters.database import insert_new, replace
from clarion.crashpoints import effect
from gateway import tables
from gateway.retention import NOTICE, conflicted_before

if TYPE_CHECKING:
    from clarion.adapters.database import Database
    from gateway.retention import Policy

log = structlog.get_logger()

_DAY = timedelta(days=1)
_LOOKED, _DISTRUSTED = "looked", "distrusted"
_MARK_AGAIN = timedelta(hours=1)


class Notices:
    """Says once a day what leaves quarantine within a week, and keeps that it was said."""

    def __init__(self, database: Database, policy: Policy) -> None:
        self._database = database
        self._policy = policy
        self._told: datetime | None = None

    def tell(self, now: datetime) -> None:
        """Say what is to be removed within a week, if that was not done today."""
        if self._told is not None and self._told <= now < self._told + _DAY:
            return
        table, until = tables.notices, now + NOTICE + _DAY - self._policy.quarantined
        quarantine = tables.quarantine
        with effect("retention.notice"), self._database.transaction(quiet=True) as connection:
            last = connection.execute(
                sa.select(sa.func.max(table.c.told)).where(table.c.told <= now.isoformat())
            ).scalar()
            if last is not None and now < datetime.fromisoformat(last) + _DAY:
                self._told = datetime.fromisoformat(last)
                return
            insert_new(connection, table, [{"told": now.isoformat(), "until": until.isoformat()}])
            self._forget(connection, now)
            expiring = (
                (quarantine, quarantine.c.received < until.isoformat()),
                (tables.instances, conflicted_before(until)),
            )
            counts = [
                connection.execute(sa.select(sa.func.count()).select_from(one).where(which)).scalar_one()
                for one, which in expiring
            ]
        self._told = now
        if any(counts):
            log.warning(
                "quarantine.expiring",
                set_aside=counts[0],
                conflicted=counts[1],
                then="removed within eight days; `clarion cleanup plan --days 8` counts them",
            )

    def _forget(self, connection: sa.Connection, now: datetime) -> None:
        """Forget notices that a later one stands for."""
        table = tables.notices
        in_force = sa.select(sa.func.max(table.c.told)).where(table.c.told <= (now - NOTICE).isoformat())
        last = connection.execute(in_force).scalar()
        if last is not None:
            connection.execute(table.delete().where(table.c.told < last))


class ClockGuard:
    """Tells whether the time can be believed: after it has jumped ahead by a day, or nobody has looked, not for a day.

    A battery that is flat, or a wrong server, would have everything removed that nothing holds.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._marks: dict[str, datetime] | None = None

    def is_believable(self, now: datetime) -> bool:
        """Look at the time; tell whether things may be removed by it."""
        if self._marks is None:
            with self._database.reading() as connection:
                rows = connection.execute(sa.select(tables.retention_marks)).all()
            self._marks = {row.name: datetime.fromisoformat(row.time) for row in rows}
        marks = dict(self._marks)
        looked, distrusted = marks.get(_LOOKED), marks.get(_DISTRUSTED)
        if looked is not None and now > looked + _DAY + _MARK_AGAIN:
            log.warning(
                "retention.waits",
                last_looked=looked.isoformat(),
                now=now.isoformat(),
                then="goes on in a day; is the clock right?",
            )
            marks[_DISTRUSTED] = now
        elif distrusted is not None and not distrusted <= now < distrusted + _DAY:
            del marks[_DISTRUSTED]
        if looked is None or not looked <= now < looked + _MARK_AGAIN:
            marks[_LOOKED] = now
        if marks != self._marks:
            self._keep(marks)
        return _DISTRUSTED not in marks

    def _keep(self, marks: dict[str, datetime]) -> None:
        table = tables.retention_marks
        with effect("retention.mark"), self._database.transaction(quiet=True) as connection:
            for name, time in marks.items():
                replace(connection, table, {"name": name, "time": time.isoformat()})
            connection.execute(table.delete().where(table.c.name.not_in(sorted(marks))))
        self._marks = marks
