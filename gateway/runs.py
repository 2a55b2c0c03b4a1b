"""The common case in bulk: a run of new instances that join groups which are open already.

Contract. What a run leaves in the tables, events included, is what `Records.take` and `Grouping` leave when they are
given the same records one by one, the rules asked at the same times; only the statements are few. A run ends before
the first record that is anything else: the caller takes that one, and begins another run.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, overload

import sqlalchemy as sa

from clarion.adapters.database import insert_many, insert_new
from clarion.adapters.outbox import record_events
from clarion.model import Action, ObjectRef
from gateway import groups, tables
from gateway.records import new_instance, row_of, stored_event
from gateway.rulings import TROUBLES, decide, key_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clarion.events import Event
    from clarion.model import Group, Instance
    from gateway.journal import Entry
    from gateway.registry import CalledEntity

_LOOKED_AHEAD = 64


class Run:
    """One run within the owner's transaction: `take` until it says no, then `flush`."""

    def __init__(self, connection: sa.Connection, registry: Mapping[str, CalledEntity], known: set[str]) -> None:
        self.connection = connection
        self._registry = registry
        # SOP Instance UIDs that are stored already, or have come in this batch: they may be duplicates or conflicts.
        self._known = known
        self._studies: dict[str, dict[str, Any]] = {}
        self._groups: dict[tuple[str, str, str], _OpenGroup] = {}
        self._waiting = self._due_elsewhere()
        self._more_wait = len(self._waiting) == _LOOKED_AHEAD
        self._instances: list[dict[str, Any]] = []
        self._members: list[dict[str, Any]] = []
        self._group_studies: set[tuple[str, str]] = set()
        self._events: list[Event] = []

    def take(self, entry: Entry, attributes: Mapping[str, str] | None) -> bool:
        """Take a record if it is the common case; tell whether it was."""
        if entry.kind != "stored" or entry.fields["sop_instance_uid"] in self._known:
            return False
        instance = new_instance(entry, ObjectRef(**entry.fields["object"]), attributes or {})
        entity = self._registry.get(instance.called_ae)
        if entity is None or not self._all_judged(instance.received):
            return False
        key, state, _ = key_of(entity, instance)
        study = self._study(instance.study_uid)
        if key is None or state != "grouped" or study is None:
            return False
        group = self._group(entity, key)
        if group is None or not group.judged(instance.received):
            return False
        self._add(instance, study, group)
        return True

    def flush(self) -> None:
        """Write what was taken."""
        if not self._instances:
            return
        insert_many(self.connection, tables.instances, self._instances)
        insert_many(self.connection, tables.members, self._members)
        studies = [{"group_id": group, "study_uid": study} for group, study in sorted(self._group_studies)]
        insert_new(self.connection, tables.group_studies, studies)
        record_events(self.connection, self._events)
        self._instances, self._members, self._group_studies, self._events = [], [], set(), []
        self._write_studies()
        self._write_groups()

    def _write_studies(self) -> None:
        table = tables.studies
        statement = (
            table.update()
            .where(table.c.study_uid == sa.bindparam("uid"))
            .values(sequence=sa.bindparam("to"), last_received=sa.bindparam("last"))
        )
        rows = [{"uid": uid, "to": one["sequence"], "last": one["last_received"]} for uid, one in self._studies.items()]
        self.connection.execute(statement, rows)

    def _write_groups(self) -> None:
        table = tables.groups
        statement = (
            table.update()
            .where(table.c.group_id == sa.bindparam("group"))
            .values(last_received=sa.bindparam("last"), check_at=sa.bindparam("check"), reason=sa.bindparam("why"))
        )
        rows = [
            {"group": one.group_id, "last": one.last.isoformat(), "check": one.check.isoformat(), "why": one.reason}
            for one in self._groups.values()
        ]
        self.connection.execute(statement, rows)

    def _add(self, instance: Instance, study: dict[str, Any], group: _OpenGroup) -> None:
        received = instance.received.isoformat()
        study["sequence"] += 1
        study["last_received"] = received
        group.last = group.check = instance.received
        self._known.add(instance.sop_instance_uid)
        self._instances.append(row_of(instance, "grouped", ""))
        self._members.append(
            {
                "group_id": group.group_id,
                "sop_instance_uid": instance.sop_instance_uid,
                "digest": instance.digest,
            }
        )
        self._group_studies.add((group.group_id, instance.study_uid))
        self._events.append(stored_event(instance, study["sequence"]))

    def _study(self, study_uid: str) -> dict[str, Any] | None:
        """Give a study's row; None when it is new."""
        if study_uid not in self._studies:
            table = tables.studies
            query = sa.select(table).where(table.c.study_uid == study_uid)
            row = self.connection.execute(query).mappings().one_or_none()
            if row is None:
                return None
            self._studies[study_uid] = dict(row)
        return self._studies[study_uid]

    def _group(self, entity: CalledEntity, key: str) -> _OpenGroup | None:
        """Give the group of a key; None when there is none that is open."""
        name = (entity.ae_title, entity.rule_name, key)
        if name not in self._groups:
            row = groups.newest(self.connection, called_ae=name[0], rule=name[1], key=key)
            if row is None or row["state"] != groups.OPEN:
                return None
            self._groups[name] = _OpenGroup(row, entity, self)
        return self._groups[name]

    def _load(self, group_id: str) -> _OpenGroup | None:
        """Take an open group into memory; None when its rule is no longer configured."""
        table = tables.groups
        row = self.connection.execute(sa.select(table).where(table.c.group_id == group_id)).mappings().one()
        entity = self._registry.get(row["called_ae"])
        if entity is None or entity.rule_name != row["rule"]:
            return None
        return self._groups.setdefault((row["called_ae"], row["rule"], row["key"]), _OpenGroup(row, entity, self))

    # What is due -----------------------------------------------------------------------------------------------

    def _due_elsewhere(self) -> list[tuple[str, datetime]]:
        """Give the open groups that are to be asked about next, and when."""
        table = tables.groups
        query = (
            sa.select(table.c.group_id, table.c.check_at)
            .where(table.c.state == groups.OPEN)
            .order_by(table.c.check_at)
            .limit(_LOOKED_AHEAD)
        )
        return [(row.group_id, datetime.fromisoformat(row.check_at)) for row in self.connection.execute(query)]

    def _all_judged(self, now: datetime) -> bool:
        """Ask about every group that is due before `now`; tell whether each simply waits on."""
        while self._waiting and self._waiting[0][1] < now:
            group_id, _ = self._waiting.pop(0)
            if self._load(group_id) is None or (not self._waiting and self._more_wait):
                return False
        return all(one.judged(now) for one in self._groups.values() if one.check < now)


class _OpenGroup:
    """An open group in memory: when it is to be asked about, and what its rule said last."""

    def __init__(self, row: sa.RowMapping, entity: CalledEntity, run: Run) -> None:
        self.group_id: str = row["group_id"]
        self.last = datetime.fromisoformat(row["last_received"])
        self.check = datetime.fromisoformat(row["check_at"])
        self.reason: str = row["reason"]
        self._entity = entity
        self._run = run
        self._group = groups.value_of(run.connection, row)

    def judged(self, now: datetime) -> bool:
        """Ask the rule if it is due; tell whether the group simply waits on."""
        if self.check >= now:
            return True
        decision, _ = decide(self._entity, self._value(), now)
        trouble = decision.reason in TROUBLES or self.reason in TROUBLES
        if decision.action is not Action.WAIT or decision.again is None or trouble:
            return False
        self.reason, self.check = decision.reason, max(decision.again, now)
        return True

    def _value(self) -> Group:
        return replace(self._group, last_received=self.last, instances=_FlushedMembers(self._run, self.group_id))


class _FlushedMembers(groups.Members):
    """A group's instances, those of the run included: written before they are looked at."""

    def __init__(self, run: Run, group_id: str) -> None:
        super().__init__(run.connection, group_id)
        self._run = run

    @overload
    def __getitem__(self, index: int) -> Instance: ...
    @overload
    def __getitem__(self, index: slice) -> list[Instance]: ...
    def __getitem__(self, index: int | slice) -> Instance | list[Instance]:
        self._run.flush()
        return super().__getitem__(index)  # type: ignore[return-value]  # as the parent

    def __len__(self) -> int:
        self._run.flush()
        return super().__len__()
