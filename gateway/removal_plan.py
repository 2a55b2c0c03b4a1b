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
from gateway.retention import (
    ENDED_GROUPS,
    NOTICE,
    Verdict,
    conflicted_before,
    groups_of,
    ignored_before,
    in_a_group,
    judge,
    noticed_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from clarion.adapters.database import Database
    from gateway.retention import Policy

_ROWS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptGroup:
    """A group that has ended: when its instances may go (None while something holds them), and why then.

    `instances` and `size_bytes` are of those that go with it: what is in another group too goes with the last of them,
    and what conflicts stays.
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
    may_be_released: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Loose:
    """Instances that are in no group that holds them, and would go: how many, and for which reason."""

    reason: str
    instances: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What would go until a moment, what is held, and what waits for its time after that; the oldest first."""

    groups: tuple[KeptGroup, ...]
    held: tuple[KeptGroup, ...]
    waiting: tuple[KeptGroup, ...]
    loose: tuple[Loose, ...]


def plan(database: Database, policy: Policy, until: datetime, *, now: datetime | None = None) -> Plan:
    """Say what would be gone at a moment if nothing else happened before, and what would be held still."""
    found = _Planner(database, policy, until, now or until)
    going, held, waiting = [], [], []
    for row in found.ended():
        one = found.described(row)
        if one.due is None:
            held.append(one)
        elif one.due <= until:
            going.append(one)
        else:
            waiting.append(one)
    return Plan(groups=tuple(going), held=tuple(held), waiting=tuple(waiting), loose=found.loose())


class _Planner:
    """Judges groups as the owner would, each once."""

    def __init__(self, database: Database, policy: Policy, until: datetime, now: datetime) -> None:
        self._database = database
        self._policy = policy
        self._until = until
        self._verdicts: dict[str, Verdict | None] = {}
        with database.reading() as connection:
            noticed = noticed_until(connection, policy, until)
        # What is said today may go in a week.
        self._set_aside_before = until - policy.quarantined if until >= now + NOTICE else noticed
        self._conflicts, self._conflict_bytes = 0, 0

    def ended(self) -> Iterator[sa.RowMapping]:
        """Give the groups that have ended, the oldest first, a page at a time."""
        table = tables.groups
        key = (table.c.closed, table.c.group_id)
        last: tuple[str, str] | None = None
        while True:
            states = (*ENDED_GROUPS, groups.REMOVING)
            page = sa.select(table).where(table.c.state.in_(states)).order_by(*key).limit(_ROWS)
            if last is not None:
                page = page.where(sa.tuple_(*key) > last)
            with self._database.reading() as connection:
                rows = connection.execute(page).mappings().all()
            yield from rows
            if len(rows) < _ROWS:
                return
            last = rows[-1]["closed"], rows[-1]["group_id"]

    def described(self, row: sa.RowMapping) -> KeptGroup:
        """Judge a group, and count what would go with it."""
        with self._database.reading() as connection:
            verdict = self._verdict(connection, row["group_id"]) or Verdict(due=None, reason="")
            instances, size = self._counted(connection, row["group_id"], going=self._goes(connection, row["group_id"]))
            return KeptGroup(
                group_id=row["group_id"],
                called_ae=row["called_ae"],
                rule=row["rule"],
                studies=groups.studies_of(connection, row["group_id"]),
                closed=row["closed"],
                instances=instances,
                size_bytes=size,
                due=verdict.due,
                reason=verdict.reason,
                may_be_released=verdict.due is None and verdict.may_be_released,
            )

    def _verdict(self, connection: sa.Connection, group_id: str) -> Verdict | None:
        """Judge a group; None for one that has not ended."""
        if group_id not in self._verdicts:
            query = sa.select(tables.groups).where(tables.groups.c.group_id == group_id)
            row = connection.execute(query).mappings().one()
            ended = row["state"] in (*ENDED_GROUPS, groups.REMOVING)
            self._verdicts[group_id] = judge(connection, row, self._policy, self._until) if ended else None
        return self._verdicts[group_id]

    def _goes(self, connection: sa.Connection, group_id: str) -> bool:
        verdict = self._verdict(connection, group_id)
        return verdict is not None and verdict.due is not None and verdict.due <= self._until

    def _counted(self, connection: sa.Connection, group_id: str, *, going: bool) -> tuple[int, int]:
        """Count the instances that go with a group that goes, or that a group alone holds, and their bytes.

        What is in several groups goes with the last of them: it is counted with one.
        """
        instance, member = tables.instances, tables.members.c
        same = sa.and_(member.sop_instance_uid == instance.c.sop_instance_uid, member.digest == instance.c.digest)
        of_group = (
            sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(_size_of(instance)), 0))
            .select_from(tables.members.join(instance, same))
            .where(member.group_id == group_id)
        )
        shared = in_a_group(other_than=group_id)
        alone = of_group.where(sa.not_(instance.c.conflicted), sa.not_(shared))
        count, size = connection.execute(alone).one()
        several = sa.or_(shared, instance.c.conflicted) if going else sa.false()
        columns = (instance.c.sop_instance_uid, instance.c.digest, instance.c.study_uid, instance.c.conflicted,
                   instance.c.received, instance.c.object)  # fmt: skip
        rest = of_group.with_only_columns(*columns).where(several)
        for row in connection.execute(rest):
            with_it = groups_of(connection, row.study_uid, row.sop_instance_uid, row.digest)
            if group_id != max(with_it) or not all(self._goes(connection, one) for one in with_it):
                continue
            if not row.conflicted:
                count, size = count + 1, size + row.object["size_bytes"]
            elif row.received < self._set_aside_before.isoformat():
                self._conflicts, self._conflict_bytes = (
                    self._conflicts + 1,
                    self._conflict_bytes + row.object["size_bytes"],
                )
        return count, int(size)

    def loose(self) -> tuple[Loose, ...]:
        """Count what is in no group. After the groups: what conflicts may be in one that goes."""
        before, quarantine = self._set_aside_before, tables.quarantine
        with self._database.reading() as connection:
            ignored = _loose(connection, tables.instances, ignored_before(self._until - self._policy.ignored))
            conflicts, size = _loose(connection, tables.instances, conflicted_before(before))
            set_aside = _loose(connection, quarantine, quarantine.c.received < before.isoformat())
        counted = {
            "ignored-retention": ignored,
            "conflict-retention": (conflicts + self._conflicts, size + self._conflict_bytes),
            "quarantine-retention": set_aside,
        }
        return tuple(
            Loose(reason=reason, instances=count, size_bytes=size) for reason, (count, size) in counted.items() if count
        )


def _loose(connection: sa.Connection, table: sa.Table, condition: sa.ColumnElement[bool]) -> tuple[int, int]:
    query = sa.select(sa.func.count(), sa.func.sum(_size_of(table))).select_from(table).where(condition)
    instances, size = connection.execute(query).one()
    return instances, int(size or 0)


def _size_of(table: sa.Table) -> sa.ColumnElement[int]:
    return sa.cast(table.c.object["size_bytes"].as_string(), sa.BigInteger)


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A group that was released: by whom and why, and when its instances go; `already` if that was done before."""

    group_id: str
    released: str
    due: datetime | None
    already: bool


def release(database: Database, group_id: str, policy: Policy, *, by: str, reason: str, now: datetime) -> Released:
    """Let a group's instances go when their time comes, though something failed; its id may be cut short.

    Raises ConfigError.
    """
    if not reason.strip():
        raise ConfigError(["--reason: say why; it is kept in the study's timeline"])
    table = tables.groups
    with effect("retention.release"), database.transaction() as connection:
        begins = sa.select(table).where(table.c.group_id.startswith(group_id.lower(), autoescape=True)).limit(2)
        found = connection.execute(begins).mappings().all() if group_id else []
        if len(found) != 1:
            many = "two or more groups' ids begin so" if found else "no group"
            raise ConfigError([f"{group_id!r}: {many}; `clarion cleanup plan` shows those that are held"])
        row, group_id = found[0], found[0]["group_id"]
        if row["state"] not in ENDED_GROUPS:
            raise ConfigError([f"group {group_id} is {row['state']}: only one that has ended can be released"])
        verdict = judge(connection, row, policy, now)
        if row["released"]:
            return Released(group_id=group_id, released=row["released"], due=verdict.due, already=True)
        if not verdict.may_be_released:
            raise ConfigError([f"group {group_id} is not held for anything that failed: {verdict.reason}"])
        changed = {"released": f"{by}: {reason}", "check_at": row["closed"]}
        ended = sa.and_(table.c.group_id == group_id, table.c.state.in_(ENDED_GROUPS))
        if connection.execute(table.update().where(ended).values(**changed)).rowcount == 0:
            raise ConfigError([f"group {group_id} has changed meanwhile; look again"])
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
        row = connection.execute(sa.select(table).where(table.c.group_id == group_id)).mappings().one()
        due = judge(connection, row, policy, now).due
        return Released(group_id=group_id, released=row["released"], due=due, already=False)
