"""The grouping owner: journal -> rules -> groups, one process, in the order of the journal.

Contract. Instances, groups, outgoing events and the journal position are committed together, in batches. Before a
record is taken, every group whose time had come by the time of that record is judged; when the journal is empty, by
the time read before looking at it (docs/decisions/0005). What is wrong with a record or a rule concerns that record
or group alone. Objects are read before the transaction begins: nobody waits for a slow disk with the database locked.
"""

from __future__ import annotations

import heapq
import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import DBAPIError

from clarion import events
from clarion.adapters.database import may_pass, replace
from clarion.adapters.outbox import record_events
from clarion.attributes import read_attributes, read_head
from clarion.crashpoints import effect
from clarion.dicom import read_header
from clarion.elements import DEFLATED_LE, EXPLICIT_LE, plain_encoding
from clarion.errors import InvalidInstanceError, MissingObjectError, StoreUnavailableError, describe
from clarion.model import Action, Decision, ObjectRef, Trigger
from gateway import groups, journal, tables
from gateway.compaction import Compactor
from gateway.lull import Lull
from gateway.records import SOURCE, Records
from gateway.removal import Remover
from gateway.retention import Policy
from gateway.rulings import GROUPING_FAILED, RULE_RETRY, TROUBLES, decide, removed
from gateway.runs import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from pathlib import Path

    from clarion.adapters.database import Database
    from clarion.ports import Clock, ReceiptStore
    from gateway.doorbell import Doorbell
    from gateway.registry import CalledEntity

log = structlog.get_logger()

READER = "grouping"
# A write transaction is kept short: so many records, or so long; and so long for reading objects before it.
_BATCH = 500
_FEW = 64
_BATCH_S = 0.05
_PREPARE_S = 0.25
_LOOK_AT_CLOCK = 16
_RING_S = 0.25
# While records never cease, a piece of what else is to be done so often.
_TIDY_S = 1.0
# An object that cannot be read so often, and for so long, is set aside.
_STORE_TRIES = 5
_STORE_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A record with the header of its object, or with why there is none."""

    entry: journal.Entry
    attributes: Mapping[str, str] | None = None
    fault: str = ""


@dataclass(slots=True)
class _Backlog:
    """How far behind the journal the owner was when it last looked."""

    records: int = 0
    oldest: datetime | None = None
    more: bool = field(default=False)


class Grouping:
    """Takes records from the journal and closes groups; one step at a time."""

    def __init__(
        self,
        *,
        journal_folder: Path,
        database: Database,
        store: ReceiptStore,
        clock: Clock,
        registry: dict[str, CalledEntity],
        policy: Policy | None = None,
        doorbell: Doorbell | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._compactor = Compactor(journal_folder, database, store, reader=READER)
        self._remover = Remover(database, store, clock, policy or Policy())
        self._tidied = 0.0
        self._wake = wake
        self._rung = 0.0
        self._news = False
        self._folder = journal_folder
        self._doorbell = doorbell
        self._database = database
        self._store = store
        self._clock = clock
        self._registry = registry
        self._records = Records(registry, clock)
        self._taken = 0
        # So many records are read at a time: no more than there is time to take.
        self._most = _BATCH
        # Whether the last batch left records in the journal.
        self._behind = False
        self._lull = Lull(self._ends)
        self._backlog = _Backlog()
        # Where an object could not be read, how often, and since when.
        self._unreadable: tuple[journal.Position, int, float] | None = None
        database.create(tables.SCHEMA)

    def step(self) -> bool:
        """Take a batch of records, or close one group that is due; tell whether there may be more."""
        if self._doorbell is not None and not self._behind and not self._lull.is_here():
            return True
        now = self._clock.now()
        entries = self._read()
        if not entries and self._doorbell is not None:
            # Looked at once more, after saying that we sleep: nobody writes in between without ringing.
            self._doorbell.sleeps()
            entries = self._read()
        oldest = next((one.time for one in entries if one.kind != journal.DAMAGED), None)
        self._backlog = _Backlog(len(entries), oldest, len(entries) == self._most)
        if not entries:
            self._behind = False
            return self._judge_waiting(now) or self._tidy(now)
        known = self._known(entries)
        prepared = self._prepare(entries, known)
        moved: dict[str, journal.Position] = {}
        with effect("grouping.commit"), self._database.transaction() as connection:
            taken = self._take_all(connection, prepared, {uid for uid, _ in known}, moved)
            self._keep_positions(connection, moved)
        self._ring()
        self._behind = taken < len(entries) or len(entries) == self._most
        if not self._behind:
            self._lull.all_taken()
        self._most = max(_FEW, taken) if taken < len(entries) else min(_BATCH, self._most + self._most // 8)
        self._taken += taken
        self._backlog.records -= taken
        if time.monotonic() - self._tidied > _TIDY_S:
            # As of the records that are taken, not of now: a late instance may be waiting behind them.
            self._tidy(min(now, oldest or now))
        return True

    def _tidy(self, now: datetime) -> bool:
        """Remove a piece of what need not be kept, or give a piece of the journal back; tell whether there was one."""
        self._tidied = time.monotonic()
        if self._remover.step(now):
            self._compactor.rows_removed()
            return True
        return self._compactor.step()

    def _ring(self, after_s: float = _RING_S) -> None:
        """Wake who works off our events, if there are others than of instances that joined their groups.

        Who wants those looks once a second; and while instances stream in, nothing is worth a ring each time.
        """
        if self._news and time.monotonic() - self._rung > after_s:
            self._rung, self._news = time.monotonic(), False
            self._wake()

    def _ends(self) -> object:
        """Say how far the logs are committed."""
        return [journal.committed_end(self._folder / log) for log in journal.logs(self._folder)]

    def _take_all(
        self, connection: sa.Connection, prepared: list[_Prepared], known: set[str], moved: dict[str, journal.Position]
    ) -> int:
        """Take records, in bulk where that is possible, until the time is over; give how many."""
        until, at, in_bulk = self._clock.monotonic() + _BATCH_S, 0, True
        while at < len(prepared) and not (at and self._clock.monotonic() > until):
            ran = self._run(connection, prepared[at:], known, until) if in_bulk else None
            in_bulk = ran is not None
            for one in prepared[at : at + (ran or 0)]:
                moved[one.entry.log] = one.entry.after
            at += ran or 0
            if at == len(prepared) or (at and self._clock.monotonic() > until):
                break
            one = prepared[at]
            if not self._judge_all(connection, one.entry.time, until):
                break
            self._take_or_set_aside(connection, one)
            known.add(str(one.entry.fields.get("sop_instance_uid")))
            moved[one.entry.log] = one.entry.after
            at += 1
        return at

    def _run(self, connection: sa.Connection, prepared: list[_Prepared], known: set[str], until: float) -> int | None:
        """Take the common case in bulk; give how many records, None when they have to be taken one by one."""
        count = 0
        try:
            with connection.begin_nested():
                run = Run(connection, self._registry, known)
                for one in prepared:
                    if one.fault or not run.take(one.entry, one.attributes):
                        break
                    count += 1
                    if count % _LOOK_AT_CLOCK == 0 and self._clock.monotonic() > until:
                        break
                run.flush()
        except Exception as error:
            if isinstance(error, DBAPIError) and may_pass(error):
                raise
            log.error("run.failed", error=describe(error), then="its records are taken one by one")  # noqa: TRY400
            return None
        return count

    def facts(self) -> dict[str, object]:
        """Say how many records this process has taken, and how many wait in the journal since when."""
        backlog = self._backlog
        facts: dict[str, object] = {"records_taken": self._taken, "records_waiting": backlog.records}
        if backlog.records and backlog.oldest is not None:
            facts["waiting_since"] = backlog.oldest.isoformat()
        if self._remover.removed:
            facts["instances_removed"] = self._remover.removed
        if self._compactor.freed:
            facts["segments_freed"] = self._compactor.freed
        if backlog.more:
            facts["records_waiting"] = f"{max(1, backlog.records)} or more"
        return facts

    def drain(self) -> None:
        """Nothing is in hand between steps."""

    def _read(self) -> list[journal.Entry]:
        """Give the next records of all logs, by the time they were journalled, as far as each log has been read."""
        positions = self._positions()
        read = [
            journal.read(self._folder / log, positions.get(log, journal.START), self._most)
            for log in journal.logs(self._folder)
        ]
        return list(itertools.islice(heapq.merge(*read, key=lambda one: one.time), self._most))

    def _positions(self) -> dict[str, journal.Position]:
        table = tables.journal_positions
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(table).where(table.c.reader == READER)).all()
        return {row.log: journal.Position(row.segment, row.offset) for row in rows}

    def _keep_positions(self, connection: sa.Connection, moved: dict[str, journal.Position]) -> None:
        for log_name, position in moved.items():
            row = {"reader": READER, "log": log_name, "segment": position.segment, "offset": position.offset}
            replace(connection, tables.journal_positions, row)

    # Records ---------------------------------------------------------------------------------------------------

    def _prepare(self, entries: list[journal.Entry], known: set[tuple[str, str]]) -> list[_Prepared]:
        """Read the headers that the batch needs; stops where the time is over, or an object is worth waiting for."""
        prepared: list[_Prepared] = []
        until = self._clock.monotonic() + _PREPARE_S
        for entry in entries:
            try:
                prepared.append(self._prepare_one(entry, known))
            except StoreUnavailableError:
                if prepared:
                    break
                raise
            if self._clock.monotonic() > until:
                break
        return prepared

    def _known(self, entries: list[journal.Entry]) -> set[tuple[str, str]]:
        table = tables.instances
        uids = sorted({str(entry.fields.get("sop_instance_uid")) for entry in entries if entry.kind == "stored"})
        query = sa.select(table.c.sop_instance_uid, table.c.digest).where(table.c.sop_instance_uid.in_(uids))
        with self._database.reading() as connection:
            return {(row.sop_instance_uid, row.digest) for row in connection.execute(query)}

    def _prepare_one(self, entry: journal.Entry, known: set[tuple[str, str]]) -> _Prepared:
        """Read the header of a stored instance that is not known. Raises StoreUnavailableError while it may pass."""
        if entry.kind != "stored":
            return _Prepared(entry)
        try:
            ref = ObjectRef(**entry.fields["object"])
            if (entry.fields["sop_instance_uid"], ref.digest) in known:
                return _Prepared(entry)
            syntax = entry.fields["transfer_syntax_uid"]
            if entry.fields.get("unchecked"):
                return self._check(entry, self._store.read(ref), syntax)
            head = entry.head or self._store.read_head(ref, journal.HEAD_BYTES)
            attributes = read_head(head, ref.size_bytes, syntax)
            if attributes is None and len(head) < journal.HEAD_BYTES:
                attributes = read_head(self._store.read_head(ref, journal.HEAD_BYTES), ref.size_bytes, syntax)
            if attributes is None:
                attributes = read_attributes(self._store.read(ref), syntax)
            return _Prepared(entry, attributes)
        except StoreUnavailableError as error:
            if self._wait_for_store(entry):
                raise
            return self._failed(entry, "object-unreadable", error)
        except MissingObjectError as error:
            return self._failed(entry, "object-missing", error)
        except Exception as error:  # noqa: BLE001  anything unforeseen: the next record must not wait for this one
            return self._failed(entry, GROUPING_FAILED, error)

    def _check(self, entry: journal.Entry, data: bytes, syntax: str) -> _Prepared:
        """Read to the end what intake had no time for; what is not whole is set aside."""
        try:
            plain = plain_encoding(data, syntax)
        except InvalidInstanceError as error:
            return _Prepared(entry, fault=error.reason)
        encoding = EXPLICIT_LE if syntax == DEFLATED_LE else syntax
        fault = read_header(plain, encoding).fault
        if fault is not None:
            log.warning("record.setaside", kind=entry.kind, reason=fault.reason)
            return _Prepared(entry, fault=fault.reason)
        return _Prepared(entry, read_attributes(plain, encoding))

    def _wait_for_store(self, entry: journal.Entry) -> bool:
        """Tell whether an object that cannot be read now is worth waiting for; a bad sector is not, for ever."""
        now = self._clock.monotonic()
        before, since = 0, now
        if self._unreadable is not None and self._unreadable[0] == entry.after:
            _, before, since = self._unreadable
        self._unreadable = (entry.after, before + 1, since)
        return before + 1 < _STORE_TRIES or now - since < _STORE_PATIENCE_S

    def _failed(self, entry: journal.Entry, reason: str, error: Exception) -> _Prepared:
        log.error("record.setaside", kind=entry.kind, reason=reason, error=describe(error))
        return _Prepared(entry, fault=reason)

    def _take_or_set_aside(self, connection: sa.Connection, one: _Prepared) -> None:
        """Take one record; whatever is wrong with it concerns it alone and is kept with the reason."""
        self._news = True
        if not one.fault:
            try:
                with connection.begin_nested():
                    self._records.take(connection, one.entry, one.attributes)
            except Exception as error:
                if isinstance(error, DBAPIError) and may_pass(error):
                    raise
                one = self._failed(one.entry, GROUPING_FAILED, error)
        if one.fault:
            self._set_aside(connection, one.entry, one.fault)

    def _set_aside(self, connection: sa.Connection, entry: journal.Entry, reason: str) -> None:
        """Keep what a record is about; of one that the database refuses even so, the place."""
        try:
            with connection.begin_nested():
                self._records.set_aside(connection, entry, reason)
        except Exception as error:
            if isinstance(error, DBAPIError) and may_pass(error):
                raise
            log.error("record.refused", kind=entry.kind, error=describe(error))  # noqa: TRY400  no foreign text
            place = {"segment": entry.after.segment, "offset": entry.begin}
            with connection.begin_nested():
                self._records.set_aside(connection, entry._replace(fields=place), reason)

    # Groups ----------------------------------------------------------------------------------------------------

    def _due(self, connection: sa.Connection, now: datetime) -> sa.RowMapping | None:
        """Find an open group whose time to be asked about has come before `now`."""
        table = tables.groups
        query = (
            sa.select(table)
            .where(table.c.state == groups.OPEN, table.c.check_at < now.isoformat())
            .order_by(table.c.check_at)
            .limit(1)
        )
        return connection.execute(query).mappings().one_or_none()

    def _judge_waiting(self, now: datetime) -> bool:
        """Ask the rule about one group that is due while the journal is empty; tell whether there was one."""
        with self._database.reading() as connection:
            if self._due(connection, now) is None:
                return False
        with effect("grouping.close"), self._database.transaction() as connection:
            judged = self._judge(connection, now)
        self._ring(after_s=0.0)
        return judged

    def _judge_all(self, connection: sa.Connection, now: datetime, until: float) -> bool:
        """Ask the rules about every group that is due; tell whether the time was enough for all."""
        while self._judge(connection, now):
            if self._clock.monotonic() > until:
                return False
        return True

    def _judge(self, connection: sa.Connection, now: datetime) -> bool:
        """Ask the rule about one group that is due; tell whether there was one."""
        row = self._due(connection, now)
        if row is None:
            return False
        self._news = True
        entity = self._registry.get(row["called_ae"])
        if entity is None or entity.rule_name != row["rule"]:
            ruling = removed(groups.value_of(connection, row), now)
        else:
            ruling = decide(entity, groups.value_of(connection, row), now)
        try:
            with connection.begin_nested():
                self._follow(connection, row, *ruling, now=now)
        except StoreUnavailableError:
            raise
        except Exception as error:
            if isinstance(error, DBAPIError) and may_pass(error):
                raise
            log.error("group.failed", group=row["group_id"], error=describe(error))  # noqa: TRY400  no foreign text
            self._keep_open(connection, row, Decision(action=Action.WAIT, reason=GROUPING_FAILED), now)
        return True

    def _follow(
        self,
        connection: sa.Connection,
        row: sa.RowMapping,
        decision: Decision,
        triggers: tuple[Trigger, ...],
        *,
        now: datetime,
    ) -> None:
        if decision.action is Action.CLOSE:
            self._close(connection, row, triggers, now=now, reason=decision.reason)
        elif decision.action is Action.DISCARD:
            groups.discard(connection, row, now=now, reason=decision.reason)
            event = events.GroupDiscarded(
                **self._next(connection, row, now), revision=row["revision"], reason=decision.reason
            )
            record_events(connection, [event])
        else:
            self._keep_open(connection, row, decision, now)

    def _keep_open(self, connection: sa.Connection, row: sa.RowMapping, decision: Decision, now: datetime) -> None:
        """Let the group wait; what keeps it from being judged is said once."""
        again = decision.again if decision.again is not None else now + RULE_RETRY
        groups.keep_open(connection, row, decision.reason, max(again, now))
        before, after = (one if one in TROUBLES else "" for one in (row["reason"], decision.reason))
        if before != after:
            event = events.GroupBlocked(**self._next(connection, row, now), revision=row["revision"], reason=after)
            record_events(connection, [event])

    def _close(
        self,
        connection: sa.Connection,
        row: sa.RowMapping,
        triggers: tuple[Trigger, ...],
        *,
        now: datetime,
        reason: str,
    ) -> None:
        manifest = groups.manifest_of(connection, row)
        with effect("grouping.manifest"):
            ref = self._store.put(manifest.encode())
        groups.close(connection, row, manifest, ref=ref, now=now, reason=reason, triggers=triggers)
        event = events.GroupClosed(
            **self._next(connection, row, now),
            rule=row["rule"],
            called_ae=row["called_ae"],
            revision=row["revision"],
            instances=len(manifest.entries),
            manifest=ref,
            reason=reason,
            triggers=triggers,
        )
        record_events(connection, [event])
        log.info("group.closed", group=row["group_id"], revision=row["revision"], instances=len(manifest.entries))

    def _next(self, connection: sa.Connection, row: sa.RowMapping, now: datetime) -> dict[str, Any]:
        """Count up the group's event sequence; give what its events carry."""
        return {
            "subject": row["group_id"],
            "sequence": groups.next_sequence(connection, row["group_id"]),
            "time": now,
            "source": SOURCE,
            "studies": groups.studies_of(connection, row["group_id"]),
        }
