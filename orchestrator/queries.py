"""What the console may ask of the orchestrator."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.model import PRIORITIES, ObjectRef
from orchestrator.ledger import SUCCEEDED, jobs, operators

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clarion.adapters.database import Database


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRow:
    """How one operator of a job's last attempt stands."""

    operator: str
    state: str
    started: str | None
    finished: str | None
    reason: str
    log: ObjectRef | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """How a job stands."""

    job_id: str
    name: str
    pipeline_id: str
    group_id: str
    revision: int
    priority: str
    state: str
    attempt: int
    requested: str
    started: str | None
    finished: str | None
    cause: str
    reason: str
    result_set: ObjectRef | None
    operators: tuple[OperatorRow, ...]


def list_jobs(database: Database, job_ids: list[str]) -> list[JobRow]:
    """List some jobs with the operators of their last attempt."""
    with database.reading() as connection:
        rows = connection.execute(sa.select(jobs).where(jobs.c.job_id.in_(job_ids)).order_by(jobs.c.requested)).all()
        steps = connection.execute(
            sa.select(operators)
            .where(operators.c.job_id.in_(job_ids))
            .order_by(operators.c.started.is_(None), operators.c.started)
        ).all()
    return [
        JobRow(
            job_id=row.job_id,
            name=row.name,
            pipeline_id=row.pipeline_id,
            group_id=row.group_id,
            revision=row.revision,
            priority=PRIORITIES[row.priority],
            state=row.state,
            attempt=row.attempt,
            requested=row.requested,
            started=row.started,
            finished=row.finished,
            cause=row.cause,
            reason=row.reason,
            result_set=ObjectRef(**row.result_set) if row.result_set else None,
            operators=tuple(
                OperatorRow(
                    operator=one.operator,
                    state=one.state,
                    started=one.started,
                    finished=one.finished,
                    reason=one.reason,
                    log=ObjectRef(**one.log) if one.log else None,
                )
                for one in steps
                if one.job_id == row.job_id and one.attempt == row.attempt
            ),
        )
        for row in rows
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupJob:
    """A job as a replay's plan needs it; `version` is the digest of its pipeline's definition."""

    job_id: str
    pipeline_id: str
    version: str
    group_id: str
    revision: int
    attempt_class: int
    state: str
    cause: str
    result_set: ObjectRef | None


def jobs_of_groups(database: Database, group_ids: Sequence[str]) -> list[GroupJob]:
    """List the jobs of some groups, in the order of their requests."""
    query = sa.select(jobs).where(jobs.c.group_id.in_(group_ids)).order_by(jobs.c.requested, jobs.c.attempt_class)
    with database.reading() as connection:
        return [
            GroupJob(
                job_id=row.job_id,
                pipeline_id=row.pipeline_id,
                version=row.definition["digest"],
                group_id=row.group_id,
                revision=row.revision,
                attempt_class=row.attempt_class,
                state=row.state,
                cause=row.cause,
                result_set=ObjectRef(**row.result_set) if row.result_set else None,
            )
            for row in connection.execute(query)
        ]


def mean_minutes(database: Database, lately: int = 200) -> dict[str, float]:
    """Say how many minutes the latest jobs of each pipeline that succeeded have taken on average."""
    here = sa.and_(jobs.c.state == SUCCEEDED, jobs.c.started.is_not(None), jobs.c.finished.is_not(None))
    query = sa.select(jobs.c.pipeline_id, jobs.c.started, jobs.c.finished).where(here)
    taken: dict[str, list[float]] = {}
    with database.reading() as connection:
        for row in connection.execute(query.order_by(jobs.c.finished.desc()).limit(lately)):
            span = datetime.fromisoformat(row.finished) - datetime.fromisoformat(row.started)
            taken.setdefault(row.pipeline_id, []).append(span.total_seconds() / 60)
    return {pipeline_id: statistics.fmean(values) for pipeline_id, values in taken.items()}


def count_jobs(database: Database) -> dict[str, int]:
    """Count the jobs by state."""
    with database.reading() as connection:
        rows = connection.execute(sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)).all()
    return {row[0]: row[1] for row in rows}
