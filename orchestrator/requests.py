"""What asks the orchestrator for work: events that become rows of the ledger. Each bears being seen twice."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from clarion import events
from clarion.adapters.database import insert_new, lock
from clarion.adapters.outbox import record_events
from clarion.crashpoints import effect
from clarion.model import PRIORITIES
from orchestrator.ledger import FAILED, REQUESTED, SUPERSEDED, jobs, next_of_job, supersede

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.adapters.database import Database
    from clarion.events import Event


class JobRequests:
    """The handler of job.requested: a row per job."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def handle(self, event: Event) -> Iterable[Event]:
        """Enter the job; passed over when it is known. What it takes the place of is superseded."""
        if not isinstance(event, events.JobRequested):
            return ()
        with effect("ledger.request"), self._database.transaction() as connection:
            lock(connection, "jobs", event.group_id)
            newest = _newest_revision(connection, event)
            if insert_new(connection, jobs, [_row_of(event)]) == 0:
                return ()
            if _is_fenced(event):
                return ()
            if newest is not None and (newest.revision, newest.attempt_class) > (event.revision, event.attempt_class):
                supersede(connection, event.subject, by=newest.job_id, now=event.time)
            else:
                self._supersede_older(connection, event)
        return ()

    def _supersede_older(self, connection: sa.Connection, event: events.JobRequested) -> None:
        earlier = jobs.c.attempt_class < event.attempt_class
        # The same work under another definition of its pipeline that came to nothing.
        failed = sa.and_(jobs.c.state == FAILED, jobs.c.job_id != event.subject)
        same_revision = sa.and_(jobs.c.revision == event.revision, sa.or_(earlier, failed))
        older = connection.execute(
            sa.select(jobs.c.job_id).where(
                jobs.c.group_id == event.group_id,
                jobs.c.pipeline_id == event.pipeline_id,
                sa.or_(jobs.c.revision < event.revision, same_revision),
                jobs.c.state != SUPERSEDED,
            )
        ).scalars()
        for job_id in older.all():
            supersede(connection, job_id, by=event.subject, now=event.time)


class JobRetries:
    """The handler of replay.ordered: a job that failed is taken up again, inside the same job."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def handle(self, event: Event) -> Iterable[Event]:
        """Let a failed job wait for another attempt, with a new budget; passed over when it has not failed."""
        if not isinstance(event, events.ReplayOrdered) or event.action != "retry":
            return ()
        here = sa.and_(jobs.c.job_id == event.job_id, jobs.c.state == FAILED, jobs.c.followed != event.event_id)
        fresh: dict[str, Any] = {"state": REQUESTED, "retries": 0, "cause": "", "operator": "", "reason": ""}
        fresh |= {"finished": None, "destinations": list(event.destinations), "replay": event.subject}
        with effect("ledger.retry"), self._database.transaction() as connection:
            if connection.execute(jobs.update().where(here).values(**fresh, followed=event.event_id)).rowcount:
                said = events.JobRetried(**next_of_job(connection, event.job_id, event.time), replay=event.subject)
                record_events(connection, [said])
        return ()


def _is_fenced(event: events.JobRequested) -> bool:
    """Tell whether a forced replay keeps its results to itself; then what was delivered before stays what counts."""
    return event.attempt_class > 0 and not event.destinations


def _row_of(event: events.JobRequested) -> dict[str, Any]:
    return {
        "job_id": event.subject,
        "name": event.name,
        "pipeline_id": event.pipeline_id,
        "definition": asdict(event.definition),
        "group_id": event.group_id,
        "revision": event.revision,
        "attempt_class": event.attempt_class,
        "replay": event.replay,
        "followed": "",
        "manifest": asdict(event.manifest),
        "priority": PRIORITIES.index(event.priority if event.priority in PRIORITIES else "normal"),
        "destinations": list(event.destinations),
        "state": REQUESTED,
        "attempt": 0,
        "retries": 0,
        "sequence": event.sequence,
        "requested": event.time.isoformat(),
        "cause": "",
        "operator": "",
        "reason": "",
    }


def _newest_revision(connection: sa.Connection, event: events.JobRequested) -> Any:  # noqa: ANN401  a row or None
    return connection.execute(
        sa.select(jobs.c.job_id, jobs.c.revision, jobs.c.attempt_class)
        .where(
            jobs.c.group_id == event.group_id,
            jobs.c.pipeline_id == event.pipeline_id,
            sa.or_(jobs.c.attempt_class == 0, sa.cast(jobs.c.destinations, sa.Text) != "[]"),
        )
        .order_by(jobs.c.revision.desc(), jobs.c.attempt_class.desc())
        .limit(1)
    ).one_or_none()
