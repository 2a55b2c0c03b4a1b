"""The grouping owner: journal -> rules -> groups, one process, in the order of the journal.

Contract. Instances, groups, outgoing events and the journal position are committed together, in batches. A group's
completeness is judged on journal time: before a record is taken, every group whose time had come by then is closed,
so the same journal gives the same groups whenever and however often it is read. A rule that raises concerns its own
instance or group only.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import OperationalError

from clarion import events
from clarion.adapters.embedded import record_events
from clarion.crashpoints import effect
from clarion.dicom import read_attributes
from clarion.errors import MissingObjectError, StoreUnavailableError, describe
from clarion.model import (
    UNKNOWN_STUDY,
    Action,
    Instance,
    ObjectRef,
    SeriesUid,
    SopInstanceUid,
    StudyUid,
    Trigger,
    derive,
)
from gateway import groups, journal, tables
from gateway.rulings import RULE_RETRY, decide, key_of, removed

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from clarion.adapters.database import Database
    from clarion.events import Event
    from clarion.ports import Clock, ObjectStore
    from gateway.registry import CalledEntity

log = structlog.get_logger()

READER = "grouping"
SOURCE = "gateway"
# A write transaction is kept short: so many records, or so long.
_BATCH = 200
_BATCH_S = 0.05
# An object that cannot be read so often is set aside.
_STORE_TRIES = 5
_NOTHING_KNOWN: dict[str, Any] = {
    "study_uid": UNKNOWN_STUDY,
    "sop_instance_uid": "",
    "sop_class_uid": "",
    "transfer_syntax_uid": "",
    "calling_ae": "",
    "called_ae": "",
    "object": None,
}


class Grouping:
    """Takes records from the journal and closes groups; one step at a time."""

    def __init__(
        self,
        *,
        journal_folder: Path,
        database: Database,
        store: ObjectStore,
        clock: Clock,
        registry: dict[str, CalledEntity],
    ) -> None:
        self._folder = journal_folder
        self._database = database
        self._store = store
        self._clock = clock
        self._registry = registry
        self._taken = 0
        self._unreadable: tuple[journal.Position, int] | None = None
        database.create(SOURCE, tables.metadata, tables.SCHEMA_VERSION)

    def step(self) -> bool:
        """Take a batch of records, or close one group that is due; tell whether there may be more."""
        now = self._clock.now()
        entries = list(journal.read(self._folder, self._position(), _BATCH))
        if not entries:
            return self._judge_waiting(now)
        until, taken = self._clock.monotonic() + _BATCH_S, 0
        with effect("grouping.commit"), self._database.transaction() as connection:
            for entry in entries:
                while self._judge(connection, entry.time):
                    pass
                self._take_or_set_aside(connection, entry)
                self._keep_position(connection, entry.after)
                taken += 1
                if self._clock.monotonic() > until:
                    break
        self._taken += taken
        return True

    def facts(self) -> dict[str, object]:
        """Say how many records this process has taken."""
        return {"records_taken": self._taken}

    def drain(self) -> None:
        """Nothing is in hand between steps."""

    def _position(self) -> journal.Position:
        table = tables.journal_positions
        with self._database.reading() as connection:
            row = connection.execute(sa.select(table).where(table.c.reader == READER)).one_or_none()
        return journal.START if row is None else journal.Position(row.segment, row.offset)

    def _keep_position(self, connection: sa.Connection, position: journal.Position) -> None:
        connection.execute(
            tables.journal_positions.insert().prefix_with("OR REPLACE", dialect="sqlite"),
            {"reader": READER, "segment": position.segment, "offset": position.offset},
        )

    # Records ---------------------------------------------------------------------------------------------------

    def _take_or_set_aside(self, connection: sa.Connection, entry: journal.Entry) -> None:
        """Take one record; whatever is wrong with it concerns it alone and is kept with the reason."""
        try:
            with connection.begin_nested():
                self._take(connection, entry)
        except OperationalError:
            raise
        except StoreUnavailableError as error:
            if self._wait_for_store(entry):
                raise
            self._set_aside(connection, entry, "object-unreadable", error)
        except MissingObjectError as error:
            self._set_aside(connection, entry, "object-missing", error)
        except Exception as error:  # noqa: BLE001  anything unforeseen: the next record must not wait for this one
            self._set_aside(connection, entry, "grouping-failed", error)

    def _wait_for_store(self, entry: journal.Entry) -> bool:
        """Tell whether an object that cannot be read now is worth waiting for; a bad sector is not, for ever."""
        before = self._unreadable[1] if self._unreadable and self._unreadable[0] == entry.after else 0
        self._unreadable = (entry.after, before + 1)
        return before + 1 < _STORE_TRIES

    def _set_aside(self, connection: sa.Connection, entry: journal.Entry, reason: str, error: Exception) -> None:
        log.error("record.setaside", kind=entry.kind, reason=reason, error=describe(error))
        with connection.begin_nested():
            self._take_quarantined(connection, entry, reason)

    def _take(self, connection: sa.Connection, entry: journal.Entry) -> None:
        match entry.kind:
            case journal.DAMAGED:
                self._take_quarantined(connection, entry, "journal-damaged")
            case "stored":
                self._take_stored(connection, entry)
            case "quarantined":
                self._take_quarantined(connection, entry, entry.fields["reason"])
            case "ignored":
                self._take_ignored(connection, entry)
            case "ended":
                self._take_ended(connection, entry)
            case "commitment":
                connection.execute(
                    tables.commitments.insert().prefix_with("OR REPLACE", dialect="sqlite"),
                    {**entry.fields, "received": entry.time.isoformat()},
                )
            case _:
                log.error("journal.unknownrecord", kind=entry.kind)

    def _take_stored(self, connection: sa.Connection, entry: journal.Entry) -> None:
        ref = ObjectRef(**entry.fields["object"])
        table = tables.instances
        known = connection.execute(
            sa.select(table)
            .where(table.c.sop_instance_uid == entry.fields["sop_instance_uid"])
            .order_by(table.c.received)
        ).mappings().all()  # fmt: skip
        same = next((row for row in known if row["digest"] == ref.digest), None)
        if same is not None:
            instance = self._as_sent(groups.instance_of(same), entry)
        else:
            instance = self._new_instance(entry, ref)
        key, state, reason = key_of(self._registry.get(instance.called_ae), instance)
        if state == "quarantined":
            self._take_quarantined(connection, entry, reason)
            return
        if same is None:
            self._insert(connection, instance, state, reason)
            if known:
                self._note_conflict(connection, instance, known[0]["digest"])
        if key is not None:
            self._join(connection, instance, key)

    def _new_instance(self, entry: journal.Entry, ref: ObjectRef) -> Instance:
        fields = entry.fields
        attributes = read_attributes(self._store.read(ref), fields["transfer_syntax_uid"])
        return Instance(
            sop_instance_uid=SopInstanceUid(fields["sop_instance_uid"]),
            digest=ref.digest,
            study_uid=StudyUid(fields["study_uid"]),
            series_uid=SeriesUid(fields["series_uid"]),
            sop_class_uid=fields["sop_class_uid"],
            transfer_syntax_uid=fields["transfer_syntax_uid"],
            calling_ae=fields["calling_ae"],
            called_ae=fields["called_ae"],
            received=entry.time,
            object=ref,
            attributes=attributes,
        )

    def _as_sent(self, known: Instance, entry: journal.Entry) -> Instance:
        """Give a known instance as it was sent this time: perhaps to another AE title."""
        fields = {name: getattr(known, name) for name in Instance.__dataclass_fields__}
        sent = {"calling_ae": entry.fields["calling_ae"], "called_ae": entry.fields["called_ae"]}
        return Instance(**{**fields, **sent, "received": entry.time})

    def _insert(self, connection: sa.Connection, instance: Instance, state: str, reason: str) -> None:
        values = {name: getattr(instance, name) for name in Instance.__dataclass_fields__}
        stored = {**values, "received": instance.received.isoformat(), "object": asdict(instance.object)}
        connection.execute(tables.instances.insert().values(**stored, state=state, reason=reason, conflicted=False))
        sequence = self._next_of_study(connection, instance.study_uid, instance.received)
        common: dict[str, Any] = {
            "subject": instance.study_uid,
            "sequence": sequence,
            "time": instance.received,
            "source": SOURCE,
        }
        event: Event
        if state == "ignored":
            event = events.InstanceIgnored(
                **common,
                sop_instance_uid=instance.sop_instance_uid,
                sop_class_uid=instance.sop_class_uid,
                calling_ae=instance.calling_ae,
                called_ae=instance.called_ae,
                reason=reason,
            )
        else:
            event = events.InstanceStored(
                **common,
                series_uid=instance.series_uid,
                sop_instance_uid=instance.sop_instance_uid,
                digest=instance.digest,
                sop_class_uid=instance.sop_class_uid,
                transfer_syntax_uid=instance.transfer_syntax_uid,
                calling_ae=instance.calling_ae,
                called_ae=instance.called_ae,
                object=instance.object,
                received=instance.received,
            )
        record_events(connection, [event])

    def _note_conflict(self, connection: sa.Connection, instance: Instance, first_digest: str) -> None:
        table = tables.instances
        connection.execute(
            table.update().where(table.c.sop_instance_uid == instance.sop_instance_uid).values(conflicted=True)
        )
        entity = self._registry.get(instance.called_ae)
        newest = entity is not None and entity.overwrite_same_instance
        record_events(
            connection,
            [
                events.InstanceConflicted(
                    subject=instance.study_uid,
                    sequence=self._next_of_study(connection, instance.study_uid, instance.received),
                    time=instance.received,
                    source=SOURCE,
                    sop_instance_uid=instance.sop_instance_uid,
                    kept_digest=first_digest,
                    other_digest=instance.digest,
                    used_digest=instance.digest if newest else first_digest,
                    calling_ae=instance.calling_ae,
                    called_ae=instance.called_ae,
                )
            ],
        )

    def _join(self, connection: sa.Connection, instance: Instance, key: str) -> None:
        entity = self._registry[instance.called_ae]
        row, new = groups.find_or_open(
            connection, called_ae=entity.ae_title, rule=entity.rule_name, key=key, now=instance.received
        )
        changed, revised = groups.add_member(connection, row, instance, replace=entity.overwrite_same_instance)
        if not changed or not (new or revised):
            return
        studies = groups.studies_of(connection, row["group_id"])
        sequence = groups.next_sequence(connection, row["group_id"])
        event: Event
        if new:
            event = events.GroupOpened(
                subject=row["group_id"],
                sequence=sequence,
                time=instance.received,
                source=SOURCE,
                rule=entity.rule_name,
                called_ae=entity.ae_title,
                studies=studies,
            )
        else:
            event = events.GroupRevised(
                subject=row["group_id"],
                sequence=sequence,
                time=instance.received,
                source=SOURCE,
                revision=row["revision"] + 1,
                studies=studies,
            )
        record_events(connection, [event])

    def _take_quarantined(self, connection: sa.Connection, entry: journal.Entry, reason: str) -> None:
        fields = {**_NOTHING_KNOWN, **entry.fields}
        digest = fields["object"]["digest"] if fields["object"] else ""
        # Of a damaged place in the journal only the place is known.
        known = fields["sop_instance_uid"] or f"journal {entry.after.segment} {entry.after.offset}"
        quarantine_id = derive("quarantine", known, digest, reason, fields["called_ae"])
        table = tables.quarantine
        if connection.execute(sa.select(table).where(table.c.quarantine_id == quarantine_id)).first() is not None:
            return
        described = ("study_uid", "sop_instance_uid", "sop_class_uid", "transfer_syntax_uid", "calling_ae", "called_ae")
        connection.execute(
            table.insert().values(
                quarantine_id=quarantine_id,
                received=entry.time.isoformat(),
                reason=reason,
                object=fields["object"],
                **{name: fields[name] for name in described},
            )
        )
        event = events.InstanceQuarantined(
            subject=fields["study_uid"],
            sequence=self._next_of_study(connection, fields["study_uid"], entry.time),
            time=entry.time,
            source=SOURCE,
            sop_instance_uid=fields["sop_instance_uid"],
            calling_ae=fields["calling_ae"],
            called_ae=fields["called_ae"],
            reason=reason,
            object=ObjectRef(**fields["object"]) if fields["object"] else None,
        )
        record_events(connection, [event])

    def _take_ignored(self, connection: sa.Connection, entry: journal.Entry) -> None:
        fields = entry.fields
        names = ("sop_instance_uid", "sop_class_uid", "called_ae", "reason")
        connection.execute(
            tables.ignored.insert()
            .prefix_with("OR IGNORE", dialect="sqlite")
            .values(
                ignored_id=derive("ignored", fields["sop_instance_uid"], fields["called_ae"]),
                received=entry.time.isoformat(),
                **{name: fields[name] for name in names},
            )
        )

    def _take_ended(self, connection: sa.Connection, entry: journal.Entry) -> None:
        fields = entry.fields
        event = events.AssociationEnded(
            subject=fields["study_uid"],
            sequence=self._next_of_study(connection, fields["study_uid"], entry.time),
            time=entry.time,
            source=SOURCE,
            association=fields["association"],
            calling_ae=fields["calling_ae"],
            called_ae=fields["called_ae"],
            reason=fields["reason"],
            stored=fields["stored"],
            refused=fields["refused"],
        )
        record_events(connection, [event])

    def _next_of_study(self, connection: sa.Connection, study_uid: str, time: datetime) -> int:
        table = tables.studies
        moved = connection.execute(
            table.update()
            .where(table.c.study_uid == study_uid)
            .values(sequence=table.c.sequence + 1, last_received=time.isoformat())
        )
        if moved.rowcount == 0:
            connection.execute(
                table.insert().values(
                    study_uid=study_uid, sequence=1, first_received=time.isoformat(), last_received=time.isoformat()
                )
            )
        query = sa.select(table.c.sequence).where(table.c.study_uid == study_uid)
        return int(connection.execute(query).scalar_one())

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
            return self._judge(connection, now)

    def _judge(self, connection: sa.Connection, now: datetime) -> bool:
        """Ask the rule about one group that is due; tell whether there was one."""
        row = self._due(connection, now)
        if row is None:
            return False
        entity = self._registry.get(row["called_ae"])
        if entity is None or entity.rule_name != row["rule"]:
            decision, triggers = removed(now)
        else:
            decision, triggers = decide(entity, groups.value_of(connection, row), now)
        if decision.action is Action.CLOSE:
            self._close(connection, row, triggers, now=now, reason=decision.reason)
        elif decision.action is Action.DISCARD:
            self._discard(connection, row, now, decision.reason)
        else:
            again = decision.again if decision.again is not None else now + RULE_RETRY
            groups.keep_open(connection, row, decision.reason, max(again, now))
        return True

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
        groups.close(connection, row, manifest, ref=ref, now=now, reason=reason)
        event = events.GroupClosed(
            subject=row["group_id"],
            sequence=groups.next_sequence(connection, row["group_id"]),
            time=now,
            source=SOURCE,
            rule=row["rule"],
            called_ae=row["called_ae"],
            revision=row["revision"],
            instances=len(manifest.entries),
            manifest=ref,
            reason=reason,
            triggers=triggers,
            studies=groups.studies_of(connection, row["group_id"]),
        )
        record_events(connection, [event])
        log.info("group.closed", group=row["group_id"], revision=row["revision"], instances=len(manifest.entries))

    def _discard(self, connection: sa.Connection, row: sa.RowMapping, now: datetime, reason: str) -> None:
        groups.discard(connection, row, now=now, reason=reason)
        event = events.GroupDiscarded(
            subject=row["group_id"],
            sequence=groups.next_sequence(connection, row["group_id"]),
            time=now,
            source=SOURCE,
            revision=row["revision"],
            reason=reason,
            studies=groups.studies_of(connection, row["group_id"]),
        )
        record_events(connection, [event])
