"""How long received instances are kept, and why longer: decided from the tables, changing nothing.

A group's instances are kept for `received` after the group and all jobs on it have ended. Never for less because
something failed: a job that failed, or that a group triggered and nobody has requested yet, or a rule that failed until
the group was given up, holds them until a person takes it up or releases the group (or for `failed`, if a site wants
that); so does a replay that is planned, until it has come to its end. What no rule takes is kept for `ignored`
after it came; what conflicts with another instance, or is in quarantine, for `quarantined`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from gateway import tables
from gateway.groups import CLOSED, DISCARDED, REMOVING
from gateway.holds import holder_of
from gateway.jobs import ENDED, FAILED
from gateway.rulings import TROUBLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clarion.config import GatewayConfig

ENDED_GROUPS = (CLOSED, DISCARDED)
NOTICE = timedelta(days=7)
"""So long before something in quarantine is removed, it is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How long each kind of instance is kept; `failed` is None when a failed job holds its group for good."""

    received: timedelta = timedelta(days=7)
    ignored: timedelta = timedelta(days=7)
    quarantined: timedelta = timedelta(days=90)
    failed: timedelta | None = None


def policy_of(config: GatewayConfig) -> Policy:
    """Read the policy from the configuration."""
    intake, failed = config.intake, config.intake.failed_retention_days
    return Policy(
        received=timedelta(days=intake.retention_days),
        ignored=timedelta(days=intake.ignored_retention_days),
        quarantined=timedelta(days=config.quarantine.retention_days),
        failed=None if failed is None else timedelta(days=failed),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """When a group's instances may go, and why then; `due` is None while something holds them.

    A person may release what is held because something failed, or was never asked for.
    """

    due: datetime | None
    reason: str
    may_be_released: bool = False


def judge(connection: sa.Connection, row: sa.RowMapping, policy: Policy, now: datetime) -> Verdict:
    """Say when the instances of a group that has ended, a row of `groups`, may go."""
    if row["state"] == REMOVING:
        return Verdict(due=now, reason=row["reason"])
    ended = datetime.fromisoformat(row["closed"])
    jobs, revisions = tables.group_jobs.c, tables.revisions.c
    on_it = connection.execute(sa.select(tables.group_jobs).where(jobs.group_id == row["group_id"])).all()
    for job in on_it:
        if job.state not in {ENDED, FAILED}:
            return Verdict(due=None, reason=f"job {job.job_id} of pipeline {job.pipeline_id} has not ended")
        ended = max(ended, datetime.fromisoformat(job.changed))
    replay_id = holder_of(connection, row["group_id"], now)
    if replay_id:
        return Verdict(due=None, reason=f"replay {replay_id} is about it")
    due, reason = ended + policy.received, "all jobs on it have ended" if on_it else "it triggered no job"
    if row["released"]:
        return Verdict(due=due, reason=f"released by {row['released']}")
    asked_for = connection.execute(
        sa.select(revisions.revision, revisions.pipelines).where(revisions.group_id == row["group_id"])
    ).all()
    for revision, pipelines in asked_for:
        requested = {one.pipeline_id for one in on_it if one.revision == revision}
        if pipelines is None or len(requested) < pipelines:
            said = f"revision {revision} triggered a job that has not been requested"
            return Verdict(due=None, reason=said, may_be_released=True)
    failure = _failure(row, on_it)
    if not failure:
        return Verdict(due=due, reason=reason)
    if policy.failed is None:
        return Verdict(due=None, reason=failure, may_be_released=True)
    return Verdict(due=max(due, ended + policy.failed), reason=failure, may_be_released=True)


def _failure(row: sa.RowMapping, jobs: Sequence[sa.Row[Any]]) -> str:
    """Say what failed, so that a person may have to see to the group; nothing if all went well."""
    if row["state"] == DISCARDED and row["reason"].partition(" ")[0] in TROUBLES:
        return f"it was given up: {row['reason']}"
    failed = [f"job {one.job_id} of pipeline {one.pipeline_id} failed" for one in jobs if one.state == FAILED]
    return failed[0] if failed else ""


def ignored_before(moment: datetime) -> sa.ColumnElement[bool]:
    """Say which instances no rule took, and came before a moment."""
    one = tables.instances.c
    # As the index has it: SQLite uses a partial index only for its own words.
    return sa.and_(sa.text("state = 'ignored'"), sa.not_(one.conflicted), one.received < moment.isoformat())


def noticed_until(connection: sa.Connection, policy: Policy, now: datetime) -> datetime:
    """Say before when something must have been set aside to go now: a week after it was said that it would."""
    table = tables.notices
    query = sa.select(sa.func.max(table.c.until)).where(table.c.told <= (now - NOTICE).isoformat())
    until = connection.execute(query).scalar()
    oldest = datetime.min.replace(tzinfo=UTC)
    return min(now - policy.quarantined, oldest if until is None else datetime.fromisoformat(until))


def quarantine_ends(received: str, policy: Policy) -> str:
    """Say when something that was set aside goes, if it is said in time and nobody changes how long it is kept."""
    return (datetime.fromisoformat(received) + policy.quarantined).isoformat()


def conflicted_before(moment: datetime) -> sa.ColumnElement[bool]:
    """Say which instances came with different content before a moment, and are in no group that is kept."""
    one = tables.instances.c
    return sa.and_(sa.text("conflicted"), one.received < moment.isoformat(), sa.not_(in_a_group()))


def groups_of(connection: sa.Connection, study_uid: str, sop_instance_uid: str, digest: str) -> list[str]:
    """List the groups that an instance is in."""
    of_study, member = tables.group_studies.c, tables.members.c
    query = (
        sa.select(member.group_id)
        .select_from(tables.group_studies.join(tables.members, member.group_id == of_study.group_id))
        .where(of_study.study_uid == study_uid, member.sop_instance_uid == sop_instance_uid, member.digest == digest)
    )
    return list(connection.execute(query).scalars())


def in_a_group(other_than: str = "") -> sa.ColumnElement[bool]:
    """Say whether an instance, a row of `instances`, is in a group; of a study's groups there are few."""
    one, of_study, member = tables.instances.c, tables.group_studies.c, tables.members.c
    return (
        sa.select(sa.literal(1))
        .select_from(tables.group_studies.join(tables.members, member.group_id == of_study.group_id))
        .where(
            of_study.study_uid == one.study_uid,
            of_study.group_id != other_than,
            member.sop_instance_uid == one.sop_instance_uid,
            member.digest == one.digest,
        )
        .exists()
    )
