"""The ledger: the queue between requests and processors, and what became of each job.

Every change of a job's state and the event that reports it are one transaction. States: requested -> running ->
succeeded | failed; jobs of an older revision of their group become superseded, whatever their state.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from clarion import events
from clarion.adapters.database import TEXT
from clarion.adapters.outbox import record_events
from clarion.adapters.schema import Schema
from clarion.crashpoints import effect
from clarion.model import ObjectRef, ResultSet

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from clarion.adapters.database import Database
    from clarion.events import Event
    from clarion.ports import Clock

SOURCE = "orchestrator"
SCHEMA = Schema(stage="orchestrator", folder=Path(__file__).parent / "migrations", head="0001")
REQUESTED, RUNNING, SUCCEEDED, FAILED, SUPERSEDED = "requested", "running", "succeeded", "failed", "superseded"

metadata = sa.MetaData()
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("job_id", TEXT, primary_key=True),
    sa.Column("name", TEXT, nullable=False),
    sa.Column("pipeline_id", TEXT, nullable=False),
    sa.Column("definition", sa.JSON, nullable=False),
    sa.Column("group_id", TEXT, nullable=False, index=True),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("attempt_class", sa.Integer, nullable=False),
    sa.Column("replay", TEXT, nullable=False),
    # The last order of a replay that was followed: seen again, it is passed over.
    sa.Column("followed", TEXT, nullable=False),
    sa.Column("manifest", sa.JSON, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("destinations", sa.JSON, nullable=False),
    sa.Column("state", TEXT, nullable=False, index=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("retries", sa.Integer, nullable=False),
    sa.Column("sequence", sa.Integer, nullable=False),
    sa.Column("requested", TEXT, nullable=False),
    sa.Column("started", TEXT, nullable=True),
    sa.Column("finished", TEXT, nullable=True),
    sa.Column("cause", TEXT, nullable=False, default=""),
    sa.Column("operator", TEXT, nullable=False, default=""),
    sa.Column("reason", TEXT, nullable=False, default=""),
    sa.Column("result_set", sa.JSON, nullable=True),
)
operators = sa.Table(
    "job_operators",
    metadata,
    sa.Column("job_id", TEXT, sa.ForeignKey("jobs.job_id"), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("operator", TEXT, primary_key=True),
    sa.Column("state", TEXT, nullable=False),
    sa.Column("started", TEXT, nullable=True),
    sa.Column("finished", TEXT, nullable=True),
    sa.Column("reason", TEXT, nullable=False, default=""),
    sa.Column("log", sa.JSON, nullable=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the engine needs it."""

    job_id: str
    name: str
    pipeline_id: str
    definition: ObjectRef
    group_id: str
    revision: int
    manifest: ObjectRef
    destinations: tuple[str, ...]
    state: str
    attempt: int
    retries: int
    requested: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a job failed: the class of failure, where, and what to tell a person."""

    cause: str
    operator: str
    reason: str
    rules: tuple[str, ...] = ()


def supersede(connection: sa.Connection, job_id: str, *, by: str, now: datetime) -> None:
    """Let another job take this one's place, within the caller's transaction."""
    common = next_of_job(connection, job_id, now)
    connection.execute(jobs.update().where(jobs.c.job_id == job_id).values(state=SUPERSEDED, finished=now.isoformat()))
    record_events(connection, [events.JobSuperseded(**common, by=by)])


def next_of_job(connection: sa.Connection, job_id: str, now: datetime) -> dict[str, Any]:
    """Count up the job's event sequence; give what every event carries."""
    connection.execute(jobs.update().where(jobs.c.job_id == job_id).values(sequence=jobs.c.sequence + 1))
    sequence = connection.execute(sa.select(jobs.c.sequence).where(jobs.c.job_id == job_id)).scalar_one()
    return {"subject": job_id, "sequence": sequence, "time": now, "source": SOURCE}


class Ledger:
    """Reads and changes jobs, for the one engine."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        database.create(SCHEMA)

    def next_job(self, but: Iterable[str]) -> Job | None:
        """Give the job to start next: one that was interrupted, else by priority, then in order of request.

        `but` are the jobs that the engine has in hand or lets wait.
        """
        query = (
            sa.select(jobs)
            .where(jobs.c.state.in_((REQUESTED, RUNNING)), jobs.c.job_id.not_in(list(but)))
            .order_by(jobs.c.state == REQUESTED, jobs.c.priority, jobs.c.requested, jobs.c.job_id)
            .limit(1)
        )
        with self._database.reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _job(row)

    def is_superseded(self, job_id: str) -> bool:
        """Tell whether a newer revision took the job's place."""
        with self._database.reading() as connection:
            return connection.execute(sa.select(jobs.c.state).where(jobs.c.job_id == job_id)).scalar() == SUPERSEDED

    def start(self, job: Job, operator_names: list[str]) -> int | None:
        """Begin an attempt; gives its number, or None when the job has been superseded in the meantime."""
        now = self._clock.now()
        attempt = job.attempt + 1
        here = sa.and_(jobs.c.job_id == job.job_id, jobs.c.state == job.state, jobs.c.attempt == job.attempt)
        with effect("ledger.start"), self._database.transaction() as connection:
            # One that somebody else has in hand is not waited for.
            claim = sa.select(jobs.c.job_id).where(here).with_for_update(skip_locked=True)
            if connection.execute(claim).first() is None:
                return None
            connection.execute(
                jobs.update()
                .where(here)
                .values(
                    state=RUNNING,
                    attempt=attempt,
                    started=now.isoformat(),
                    retries=jobs.c.retries + (1 if job.state == RUNNING else 0),
                )
            )
            common = next_of_job(connection, job.job_id, now)
            for name in operator_names:
                connection.execute(
                    operators.insert().values(
                        job_id=job.job_id, attempt=attempt, operator=name, state="waiting", reason=""
                    )
                )
            record_events(connection, [events.JobStarted(**common, attempt=attempt)])
        return attempt

    def hand_back(self, job: Job, attempt: int) -> None:
        """The engine is told to stop: the job waits again, and the attempt is not held against it."""
        with effect("ledger.handback"), self._database.transaction() as connection:
            if _still_running(connection, job.job_id, attempt):
                connection.execute(jobs.update().where(jobs.c.job_id == job.job_id).values(state=REQUESTED))

    def operator_started(self, job_id: str, attempt: int, operator: str) -> None:
        """Note that an operator runs."""
        self._operator(job_id, attempt, operator, {"state": "running", "started": self._clock.now().isoformat()})

    def operator_ended(self, job_id: str, attempt: int, operator: str, *, reason: str, log: ObjectRef | None) -> None:
        """Note that an operator completed, or failed with a reason."""
        values = {
            "state": "failed" if reason else "completed",
            "finished": self._clock.now().isoformat(),
            "reason": reason,
            "log": asdict(log) if log else None,
        }
        self._operator(job_id, attempt, operator, values)

    def _operator(self, job_id: str, attempt: int, operator: str, values: dict[str, Any]) -> None:
        here = sa.and_(operators.c.job_id == job_id, operators.c.attempt == attempt, operators.c.operator == operator)
        with effect("ledger.operator"), self._database.transaction() as connection:
            connection.execute(operators.update().where(here).values(**values))

    def succeed(self, job: Job, attempt: int, result_set: ResultSet, ref: ObjectRef) -> None:
        """The job is done: its state, job.succeeded and result.registered in one transaction."""
        now = self._clock.now()
        with effect("ledger.succeed"), self._database.transaction() as connection:
            if not _still_running(connection, job.job_id, attempt):
                return
            succeeded = events.JobSucceeded(
                **next_of_job(connection, job.job_id, now), attempt=attempt, results=len(result_set.instances)
            )
            registered = events.ResultRegistered(
                **next_of_job(connection, job.job_id, now),
                result_set=ref,
                set_digest=result_set.digest,
                instances=len(result_set.instances),
                destinations=job.destinations,
            )
            connection.execute(
                jobs.update()
                .where(jobs.c.job_id == job.job_id)
                .values(state=SUCCEEDED, finished=now.isoformat(), result_set=asdict(ref))
            )
            record_events(connection, [succeeded, registered])

    def fail(self, job: Job, attempt: int, failure: Failure, quarantined: ObjectRef | None = None) -> None:
        """The job failed: its state and its events in one transaction; operators that had not ended are cancelled."""
        now = self._clock.now()
        with effect("ledger.fail"), self._database.transaction() as connection:
            if not _still_running(connection, job.job_id, attempt):
                return
            said: list[Event] = []
            if quarantined is not None:
                said.append(
                    events.ResultBlocked(
                        **next_of_job(connection, job.job_id, now), rules=failure.rules, result_set=quarantined
                    )
                )
            said.append(
                events.JobFailed(
                    **next_of_job(connection, job.job_id, now),
                    attempt=attempt,
                    cause=failure.cause,
                    operator=failure.operator,
                    reason=failure.reason,
                )
            )
            connection.execute(
                jobs.update()
                .where(jobs.c.job_id == job.job_id)
                .values(
                    state=FAILED,
                    finished=now.isoformat(),
                    cause=failure.cause,
                    operator=failure.operator,
                    reason=failure.reason,
                    result_set=asdict(quarantined) if quarantined else None,
                )
            )
            connection.execute(
                operators.update()
                .where(operators.c.job_id == job.job_id, operators.c.state.in_(("waiting", "running")))
                .values(state="cancelled")
            )
            record_events(connection, said)


def _still_running(connection: sa.Connection, job_id: str, attempt: int) -> bool:
    row = connection.execute(sa.select(jobs.c.state, jobs.c.attempt).where(jobs.c.job_id == job_id)).one()
    return bool(row.state == RUNNING and row.attempt == attempt)


def _job(row: Any) -> Job:  # noqa: ANN401  a row of `jobs`
    return Job(
        job_id=row.job_id,
        name=row.name,
        pipeline_id=row.pipeline_id,
        definition=ObjectRef(**row.definition),
        group_id=row.group_id,
        revision=row.revision,
        manifest=ObjectRef(**row.manifest),
        destinations=tuple(row.destinations),
        state=row.state,
        attempt=row.attempt,
        retries=row.retries,
        requested=row.requested,
    )
