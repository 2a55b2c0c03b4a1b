"""What the gateway knows of the jobs on its groups: as long as one has not ended, it keeps what the job is on."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import sqlalchemy as sa

from clarion import events
from clarion.adapters.database import insert_new
from clarion.crashpoints import effect
from gateway import tables
from gateway.holds import let_go

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.adapters.database import Database
    from clarion.events import Event

REQUESTED, FAILED, ENDED = "requested", "failed", "ended"

_STATES: dict[type[Event], str] = {
    events.JobRetried: REQUESTED,
    events.JobFailed: FAILED,
    events.JobSucceeded: ENDED,
    events.JobSuperseded: ENDED,
}


class GroupJobs:
    """The handler that notes what needs groups: their jobs, and replays. Being late, it keeps instances longer."""

    kinds: ClassVar = (events.GroupClosed, events.JobRequested, *_STATES, events.ReplayFinished)

    def __init__(self, database: Database) -> None:
        self._database = database

    def handle(self, event: Event) -> Iterable[Event]:
        """Note what is new of a job; of a group that an older version closed, how many pipelines it triggered."""
        with effect("retention.job"), self._database.transaction() as connection:
            if isinstance(event, events.GroupClosed):
                self._closed(connection, event)
            elif isinstance(event, events.JobRequested):
                self._requested(connection, event)
            elif isinstance(event, events.ReplayFinished):
                # One that was stopped may be taken up again.
                if event.state != "stopped":
                    let_go(connection, event.subject, event.time)
            elif type(event) in _STATES:
                self._changed(connection, event, _STATES[type(event)])
        return ()

    def _closed(self, connection: sa.Connection, event: events.GroupClosed) -> None:
        table = tables.revisions
        here = sa.and_(table.c.group_id == event.subject, table.c.revision == event.revision)
        count = len({one.pipeline_id for one in event.triggers})
        connection.execute(table.update().where(here, table.c.pipelines.is_(None)).values(pipelines=count))

    def _requested(self, connection: sa.Connection, event: events.JobRequested) -> None:
        table = tables.group_jobs
        of_group = {"group_id": event.group_id, "revision": event.revision, "pipeline_id": event.pipeline_id}
        new = {"job_id": event.subject, **of_group, "state": REQUESTED, "changed": event.time.isoformat()}
        if insert_new(connection, table, [new]) == 0:
            # Something was heard of it before: topics have no order among themselves.
            connection.execute(table.update().where(table.c.job_id == event.subject).values(**of_group))

    def _changed(self, connection: sa.Connection, event: Event, state: str) -> None:
        table = tables.group_jobs
        changed = {"state": state, "changed": event.time.isoformat()}
        if connection.execute(table.update().where(table.c.job_id == event.subject).values(**changed)).rowcount == 0:
            unknown = {"group_id": "", "revision": 0, "pipeline_id": ""}
            insert_new(connection, table, [{"job_id": event.subject, **unknown, **changed}])
