"""What retention would remove, and what it has to keep: for `clarion cleanup`, by the rules that the owner goes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion import events
from clarion.adapters.outbox import record_events
from clarion.crashpoints import effect
from clarion.errors import ConfigError
from gateway import groups, tables
from gateway.records import SOURCE
from gateway.retention import ENDED_GROUPS, conflicted_before, ignored_before, in_a_group, judge

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from clarion.adapters.database import Database
    from gateway.retention import Policy

_ROWS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptGroup:
    """A group that has ended: when its instances may go (None while something holds them), and why then.

    `instances` and `size_bytes` are of those that would go: not of what is in another group too, or conflicts.
    """

    group_id: str
    called_ae: str
    rule: str
    studies: tuple[str, ...]
    closed: str
    instances: int
    size_bytes: int
    due: datetime | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loose:
    """Instances that are in no group that holds them, and would go: how many, and for which reason."""

    reason: str
    instances: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What would go until a moment, and what is held, the oldest first."""

    groups: tuple[KeptGroup, ...]
    held: tuple[KeptGroup, ...]
    loose: tuple[Loose, ...]


def plan(database: Database, policy: Policy, until: datetime) -> Plan:
    """Say what would be gone at a moment if nothing else happened before, and what would be held still."""
    going, held = [], []
    for one in _kept(database, policy):
        if one.due is None:
            held.append(one)
        elif one.due <= until:
            going.append(one)
    instances, quarantine = tables.instances, tables.quarantine
    loose = (
        ("ignored-retention", instances, ignored_before(until - policy.ignored)),
        ("conflict-retention", instances, conflicted_before(until - policy.quarantined)),
        (
            "quarantine-retention",
            quarantine,
            quarantine.c.received < (until - policy.quarantined).isoformat(),
        ),
    )
    with database.reading() as connection:
        counted = tuple(_loose(connection, *one) for one in loose)
    return Plan(groups=tuple(going), held=tuple(held), loose=tuple(one for one in counted if one.instances))


def _kept(database: Database, policy: Policy) -> Iterator[KeptGroup]:
    """Judge every group that has ended, a page at a time."""
    table = tables.groups
    key = (table.c.closed, table.c.group_id)
    last: tuple[str, str] | None = None
    while True:
        states = (*ENDED_GROUPS, groups.REMOVING)
        page = sa.select(table).where(table.c.state.in_(states)).order_by(*key).limit(_ROWS)
        if last is not None:
            page = page.where(sa.tuple_(*key) > last)
        with database.reading() as connection:
            rows = connection.execute(page).mappings().all()
            found = [_judged(connection, row, policy) for row in rows]
        yield from found
        if len(rows) < _ROWS:
            return
        last = rows[-1]["closed"], rows[-1]["group_id"]


def _judged(connection: sa.Connection, row: sa.RowMapping, policy: Policy) -> KeptGroup:
    verdict = judge(connection, row, policy)
    member, instance = tables.members.c, tables.instances
    same = sa.and_(member.sop_instance_uid == instance.c.sop_instance_uid, member.digest == instance.c.digest)
    counted = (
        sa.select(sa.func.count(), sa.func.sum(_size_of(instance)))
        .select_from(tables.members.join(instance, same))
        .where(
            member.group_id == row["group_id"],
            sa.not_(instance.c.conflicted),
            sa.not_(in_a_group(other_than=row["group_id"])),
        )
    )
    instances, size = connection.execute(counted).one()
    return KeptGroup(
        group_id=row["group_id"],
        called_ae=row["called_ae"],
        rule=row["rule"],
        studies=groups.studies_of(connection, row["group_id"]),
        closed=row["closed"],
        instances=instances,
        size_bytes=int(size or 0),
        due=verdict.due,
        reason=verdict.reason,
    )


def _loose(connection: sa.Connection, reason: str, table: sa.Table, condition: sa.ColumnElement[bool]) -> Loose:
    query = sa.select(sa.func.count(), sa.func.sum(_size_of(table))).select_from(table).where(condition)
    instances, size = connection.execute(query).one()
    return Loose(reason=reason, instances=instances, size_bytes=int(size or 0))


def _size_of(table: sa.Table) -> sa.ColumnElement[int]:
    return sa.cast(table.c.object["size_bytes"].as_string(), sa.BigInteger)


def release(database: Database, group_id: str, *, by: str, reason: str, now: datetime) -> None:
    """Let a group's instances go when their time comes, whatever became of its jobs. Raises ConfigError."""
    table = tables.groups
    with effect("retention.release"), database.transaction() as connection:
        row = connection.execute(sa.select(table).where(table.c.group_id == group_id)).mappings().one_or_none()
        if row is None:
            raise ConfigError([f"no group {group_id!r}; `clarion cleanup plan` shows those that are held"])
        if row["state"] not in ENDED_GROUPS:
            raise ConfigError([f"group {group_id} is {row['state']}: only one that has ended can be released"])
        if row["released"]:
            return
        changed = {"released": f"{by}: {reason}", "check_at": row["closed"]}
        connection.execute(table.update().where(table.c.group_id == group_id).values(**changed))
        event = events.GroupReleased(
            subject=group_id,
            sequence=groups.next_sequence(connection, group_id),
            time=now,
            source=SOURCE,
            studies=groups.studies_of(connection, group_id),
            by=by,
            reason=reason,
        )
        record_events(connection, [event])
