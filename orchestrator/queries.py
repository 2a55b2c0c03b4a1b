"""What the console may ask of the orchestrator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.model import PRIORITIES, ObjectRef
from orchestrator.ledger import jobs, operators

if TYPE_CHECKING:
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


def count_jobs(database: Database) -> dict[str, int]:
    """Count the jobs by state."""
    with database.reading() as connection:
        rows = connection.execute(sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)).all()
    return {row[0]: row[1] for row in rows}
