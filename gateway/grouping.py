"""The grouping owner: journal -> rules -> groups, one process, in the order of the journal.

Contract. Instances, groups, outgoing events and the journal position are committed together, in batches. A group's
completeness is judged on journal time: before a record is taken, every group whose time had come by then is closed,
so the same journal gives the same groups whenever and however often it is read. A rule that raises concerns its own
instance or group only.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import structlog

from clarion import events
from clarion.adapters.embedded import record_events
from clarion.crashpoints import effect
from clarion.dicom import read_attributes
from clarion.errors import InvalidInstanceError
from clarion.model import Action, Decision, Instance, ObjectRef, SeriesUid, SopInstanceUid, StudyUid, derive
from gateway import groups, journal, tables

if TYPE_CHECKING:
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
# A rule that failed on a group is asked again after this.
_RULE_RETRY = timedelta(seconds=60)


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
        self._grouped = 0
        database.create(SOURCE, tables.metadata, tables.SCHEMA_VERSION)

    def step(self) -> bool:
        """Take a batch of records, or close one group that is due; tell whether there may be more."""
        now = self._clock.now()
        entries = list(journal.read(self._folder, self._position(), _BATCH))
        if not entries:
            return self._judge_waiting(now)
        until = self._clock.monotonic() + _BATCH_S
        with effect("grouping.commit"), self._database.transaction() as connection:
            for entry in entries:
                while self._judge(connection, entry.time):
                    pass
                self._take(connection, entry)
                self._keep_position(connection, entry.after)
                if self._clock.monotonic() > until:
                    break
        return True

    def facts(self) -> dict[str, object]:
        """Say how many instances this process has taken."""
        return {"instances_taken": self._grouped}

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

    def _take(self, connection: sa.Connection, entry: journal.Entry) -> None:
        match entry.kind:
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
        self._grouped += 1
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
        key, state, reason = self._ask_rule(instance)
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
        with self._store.open(ref) as file:
            attributes = read_attributes(file.read(), fields["transfer_syntax_uid"])
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

    def _ask_rule(self, instance: Instance) -> tuple[str | None, str, str]:
        """Give the group key, the instance's state and the reason for it."""
        entity = self._registry.get(instance.called_ae)
        if entity is None:
            return None, "ignored", "called-ae-removed"
        try:
            key = entity.rule.group_of(instance)
        except InvalidInstanceError as error:
            return None, "quarantined", error.reason
        except Exception:
            # A stranger's rule: whatever it raises concerns this instance alone, which is kept with the reason.
            log.exception("rule.failed", rule=entity.rule_name)
            return None, "quarantined", "rule-failed"
        return (None, "ignored", "no-rule-takes-it") if key is None else (key, "grouped", "")

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
        fields = entry.fields
        digest = fields["object"]["digest"] if fields["object"] else ""
        quarantine_id = derive("quarantine", fields["sop_instance_uid"], digest, reason, fields["called_ae"])
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
            decision = Decision(action=Action.WAIT, reason="rule-removed", again=now + _RULE_RETRY)
        else:
            decision = self._decide(connection, row, entity, now)
        if decision.action is Action.CLOSE and entity is not None:
            self._close(connection, row, entity, now=now, reason=decision.reason)
        elif decision.action is Action.DISCARD:
            self._discard(connection, row, now, decision.reason)
        else:
            again = decision.again if decision.again is not None else now + _RULE_RETRY
            groups.wait(connection, row, decision, max(again, now))
        return True

    def _decide(self, connection: sa.Connection, row: sa.RowMapping, entity: CalledEntity, now: datetime) -> Decision:
        try:
            decision = entity.rule.is_complete(groups.value_of(connection, row), now)
            if decision.action is Action.CLOSE:
                entity.rule.triggers(groups.value_of(connection, row))
        except Exception:
            # A stranger's rule: the group stays open, visibly, and the rule is asked again later.
            log.exception("rule.failed", rule=entity.rule_name, group=row["group_id"])
            return Decision(action=Action.WAIT, reason="rule-failed", again=now + _RULE_RETRY)
        return decision

    def _close(
        self, connection: sa.Connection, row: sa.RowMapping, entity: CalledEntity, *, now: datetime, reason: str
    ) -> None:
        manifest = groups.manifest_of(connection, row)
        triggers = tuple(entity.rule.triggers(groups.value_of(connection, row)))
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
