"""Removes what retention lets go, within the grouping owner: rows and events first, then the bytes.

Contract. A step is one short transaction, or some files. The row of an instance, its count in `removals`, the event and
the row in `unwanted_objects` that its bytes are found by are written together; a crash before the bytes are gone is
made good by the next run, and a second run finds nothing to do. The bytes of a receipt are its own, so an instance that
is being received again loses nothing. What lies in a segment of the journal is only counted: compaction gives it back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from clarion import events
from clarion.adapters.database import insert_new
from clarion.adapters.objects import segment_of
from clarion.adapters.outbox import record_events
from clarion.crashpoints import effect
from clarion.errors import MissingObjectError, StoreUnavailableError
from clarion.model import ObjectRef
from gateway import groups, tables
from gateway.holds import lock_holds
from gateway.notices import ClockGuard, Notices
from gateway.records import count_waste, next_of_study
from gateway.retention import ENDED_GROUPS, conflicted_before, ignored_before, in_a_group, judge, noticed_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from clarion.adapters.database import Database
    from clarion.ports import Clock, ReceiptStore
    from gateway.retention import Policy

log = structlog.get_logger()

_ROWS = 200
_GROUPS = 50
_LOOK_S = 60.0
# So much of what duplicates may have to repair is compared in a step: grouping waits for it.
_AT_ONCE_BYTES = 16 * 2**20
# A record is longer than its data set: by about so much.
_RECORD_BYTES = 600
# How soon a group is looked at again: its retention may have been changed, or what holds it may be over.
_AGAIN = timedelta(days=1)
_HELD_AGAIN = timedelta(hours=1)


class Remover:
    """Removes a piece each step. For the grouping owner, the only writer of these tables."""

    def __init__(self, database: Database, store: ReceiptStore, clock: Clock, policy: Policy) -> None:
        self._database = database
        self._store = store
        self._clock = clock
        self._policy = policy
        self._look_at = float("-inf")
        self._notices = Notices(database, policy)
        self._guard = ClockGuard(database)
        # Objects whose bytes could not be removed: once in the life of a process is enough to try.
        self._passed_over: set[str] = set()
        self.removed = 0

    def step(self, now: datetime) -> bool:
        """Remove a piece as of a time, if it is time to look; tell whether there may be more."""
        if self._clock.monotonic() < self._look_at:
            return False
        if not self._guard.is_believable(now):
            self._look_at = self._clock.monotonic() + _LOOK_S
            return False
        pieces: tuple[Callable[[datetime], bool], ...] = (
            self._drop_bytes,
            self._empty_group,
            self._end_groups,
            self._ignored,
            self._conflicted,
            self._quarantined,
        )
        if any(piece(now) for piece in pieces):
            return True
        self._notices.tell(now)
        self._look_at = self._clock.monotonic() + _LOOK_S
        return False

    # Groups ----------------------------------------------------------------------------------------------------

    def _end_groups(self, now: datetime) -> bool:
        """Judge the groups whose time to be looked at has come; those whose instances may go are emptied next."""
        table = tables.groups
        query = (
            sa.select(table)
            .where(table.c.state.in_(ENDED_GROUPS))
            # What was put off to a day that lies far ahead was so by a clock that was wrong.
            .where(sa.or_(table.c.check_at < now.isoformat(), table.c.check_at > (now + 2 * _AGAIN).isoformat()))
            .order_by(table.c.check_at)
            .limit(_GROUPS)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).mappings().all()
        if not rows:
            return False
        with effect("retention.groups"), self._database.transaction(quiet=True) as connection:
            lock_holds(connection)
            for row in rows:
                verdict = judge(connection, row, self._policy, now)
                here = table.update().where(table.c.group_id == row["group_id"])
                if verdict.due is not None and verdict.due <= now:
                    connection.execute(here.values(state=groups.REMOVING, reason=verdict.reason))
                    continue
                again = now + _HELD_AGAIN if verdict.due is None else min(verdict.due, now + _AGAIN)
                connection.execute(here.values(check_at=again.isoformat()))
        return True

    def _empty_group(self, now: datetime) -> bool:
        """Remove some instances of a group; one that is in another group as well is only no member any more."""
        table, member, instance = tables.groups, tables.members, tables.instances
        with self._database.reading() as connection:
            query = sa.select(table).where(table.c.state == groups.REMOVING).limit(1)
            group = connection.execute(query).mappings().one_or_none()
        if group is None:
            return False
        group_id = group["group_id"]
        same = sa.and_(instance.c.sop_instance_uid == member.c.sop_instance_uid, instance.c.digest == member.c.digest)
        some = (
            sa.select(member.c.sop_instance_uid.label("uid"), in_a_group(other_than=group_id).label("kept"), instance)
            .select_from(member.outerjoin(instance, same))
            .where(member.c.group_id == group_id)
            .order_by(member.c.sop_instance_uid)
            .limit(_ROWS)
        )
        with effect("retention.group"), self._database.transaction() as connection:
            rows = connection.execute(some).mappings().all()
            # What conflicts is kept for whoever has to find out which of them is right.
            gone = [one for one in rows if one["object"] and not one["kept"] and not one["conflicted"]]
            self._remove(connection, instance, gone, now=now, reason="retention", group_id=group_id)
            uids = [one["uid"] for one in rows]
            connection.execute(
                member.delete().where(member.c.group_id == group_id, member.c.sop_instance_uid.in_(uids))
            )
            if len(rows) < _ROWS:
                done = table.update().where(table.c.group_id == group_id).values(state=groups.REMOVED)
                connection.execute(done)
        log.info("group.reduced", group=group_id, removed=len(gone), kept=len(rows) - len(gone))
        return True

    # What is in no group ---------------------------------------------------------------------------------------

    def _ignored(self, now: datetime) -> bool:
        condition = ignored_before(now - self._policy.ignored)
        return self._old(tables.instances, condition, now, "ignored-retention")

    def _conflicted(self, now: datetime) -> bool:
        condition = conflicted_before(self._noticed_until(now))
        return self._old(tables.instances, condition, now, "conflict-retention")

    def _quarantined(self, now: datetime) -> bool:
        condition = tables.quarantine.c.received < self._noticed_until(now).isoformat()
        return self._old(tables.quarantine, condition, now, "quarantine-retention")

    def _noticed_until(self, now: datetime) -> datetime:
        with self._database.reading() as connection:
            return noticed_until(connection, self._policy, now)

    def _old(self, table: sa.Table, condition: sa.ColumnElement[bool], now: datetime, reason: str) -> bool:
        query = sa.select(table).where(condition).order_by(table.c.received).limit(_ROWS)
        with self._database.reading() as connection:
            if connection.execute(query.limit(1)).first() is None:
                return False
        with effect("retention.old"), self._database.transaction() as connection:
            rows = connection.execute(query).mappings().all()
            self._remove(connection, table, rows, now=now, reason=reason)
        log.info("instances.removed", reason=reason, removed=len(rows))
        return True

    # Rows and bytes --------------------------------------------------------------------------------------------

    def _remove(
        self,
        connection: sa.Connection,
        table: sa.Table,
        rows: Sequence[sa.RowMapping],
        *,
        now: datetime,
        reason: str,
        group_id: str = "",
    ) -> None:
        """Remove rows within the transaction, and say so of each study."""
        if not rows:
            return
        keys = list(table.primary_key.columns)
        named = [tuple(one[key.name] for key in keys) for one in rows]
        connection.execute(table.delete().where(sa.tuple_(*keys).in_(named)))
        self._give_up(connection, [ObjectRef(**one["object"]) for one in rows if one["object"]])
        counts: Counter[tuple[str, str]] = Counter()
        sizes: Counter[tuple[str, str]] = Counter()
        for one in rows:
            of = one["study_uid"], one.get("state", "quarantined")
            counts[of] += 1
            sizes[of] += one["object"]["size_bytes"] if one["object"] else 0
        for (study_uid, state), count in sorted(counts.items()):
            _count(connection, study_uid, state, count)
            event = events.InstancesRemoved(
                **next_of_study(connection, study_uid, now, came=False),
                reason=reason,
                instances=count,
                size_bytes=sizes[study_uid, state],
                group_id=group_id,
            )
            record_events(connection, [event])
        self.removed += len(rows)

    def _give_up(self, connection: sa.Connection, refs: list[ObjectRef]) -> None:
        waste: Counter[tuple[str, int]] = Counter()
        for ref in refs:
            place = segment_of(ref)
            if place is not None:
                waste[place] += ref.size_bytes + _RECORD_BYTES
        count_waste(connection, waste)
        # Also of what lies in a segment: it may have been restored to a file.
        rows = [{"location": one.location, "object": asdict(one), "instead": None} for one in refs]
        insert_new(connection, tables.unwanted, rows)

    def _drop_bytes(self, _: datetime) -> bool:
        """Remove the files of some objects that nothing refers to.

        Nothing else is removed before all of them are: what a duplicate may have to repair is still wanted.
        """
        table = tables.unwanted
        query = sa.select(table).where(table.c.location.not_in(sorted(self._passed_over))).limit(_ROWS)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        if not rows:
            return False
        done, compared = [], 0
        for row in rows:
            if row.instead is not None and compared > _AT_ONCE_BYTES:
                continue
            ref = ObjectRef(**row.object)
            if row.instead is not None:
                compared += ref.size_bytes
                if not self._repair(ObjectRef(**row.instead), ref):
                    self._passed_over.add(ref.location)
                    continue
            done.append(ref)
        gone = self._remove_files(done)
        with effect("retention.dropped"), self._database.transaction(quiet=True) as connection:
            connection.execute(table.delete().where(table.c.location.in_([one.location for one in gone])))
        return True

    def _remove_files(self, refs: list[ObjectRef]) -> list[ObjectRef]:
        """Remove the files of objects, together or, where that fails, one by one; give those that are gone."""
        try:
            self._store.remove(refs)
        except StoreUnavailableError as error:
            if len(refs) > 1:
                return [gone for one in refs for gone in self._remove_files([one])]
            log.warning("object.notremoved", digest=refs[0].digest, reason=str(error), then="tried at the next start")
            self._passed_over.add(refs[0].location)
            return []
        return refs

    def _repair(self, kept: ObjectRef, duplicate: ObjectRef) -> bool:
        """Let a duplicate take the place of the copy that is kept, if that can no longer be read.

        Tell whether it may go now: not while neither can be read, and it perhaps could later.
        """
        if self._store.is_whole(kept):
            return True
        try:
            self._store.restore(kept, self._store.read(duplicate))
        except MissingObjectError as error:
            log.error("object.lost", digest=kept.digest, reason=str(error))  # noqa: TRY400  as its name says
            return True
        except StoreUnavailableError as error:
            log.warning("object.notrepaired", digest=kept.digest, reason=str(error), then="tried at the next start")
            return False
        log.warning("object.repaired", digest=kept.digest)
        return True


def _count(connection: sa.Connection, study_uid: str, state: str, instances: int) -> None:
    table = tables.removals
    insert_new(connection, table, [{"study_uid": study_uid, "state": state, "instances": 0}])
    here = sa.and_(table.c.study_uid == study_uid, table.c.state == state)
    connection.execute(table.update().where(here).values(instances=table.c.instances + instances))
