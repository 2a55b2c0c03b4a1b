"""What becomes of one journal record: rows and events, within the grouping owner's transaction.

A record says what intake did: stored, quarantined, ignored, an association that ended, a commitment that was reported.
Every function may be called again with the same record: what is known is passed over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import structlog

from clarion import events
from clarion.adapters.database import insert_new
from clarion.adapters.database import replace as replace_row
from clarion.adapters.outbox import record_events
from clarion.model import UNKNOWN_STUDY, Instance, ObjectRef, SeriesUid, SopInstanceUid, StudyUid, derive
from gateway import groups, journal, tables
from gateway.answers import judge
from gateway.rulings import key_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from clarion.events import Event
    from clarion.ports import Clock
    from gateway.registry import CalledEntity

log = structlog.get_logger()

SOURCE = "gateway"
_NOTHING_KNOWN: dict[str, Any] = {
    "study_uid": UNKNOWN_STUDY,
    "sop_instance_uid": "",
    "sop_class_uid": "",
    "transfer_syntax_uid": "",
    "calling_ae": "",
    "called_ae": "",
    "object": None,
}


class Records:
    """Takes records into the tables; `registry` maps called AE titles to their rules."""

    def __init__(self, registry: Mapping[str, CalledEntity], clock: Clock) -> None:
        self._registry = registry
        self._clock = clock

    def take(self, connection: sa.Connection, entry: journal.Entry, attributes: Mapping[str, str] | None) -> None:
        """Take one record; `attributes` are the header of an instance that was not known before."""
        match entry.kind:
            case journal.DAMAGED:
                self.set_aside(connection, entry, "journal-damaged")
            case "stored":
                self._stored(connection, entry, attributes)
            case "quarantined":
                self.set_aside(connection, entry, entry.fields["reason"])
            case "ignored":
                self._ignored(connection, entry)
            case "ended":
                self._ended(connection, entry)
            case "commitment-asked":
                insert_new(connection, tables.commitment_answers, [judge(connection, entry.fields, entry.time)])
            case "commitment":
                replace_row(connection, tables.commitments, {**entry.fields, "received": entry.time.isoformat()})
            case _:
                log.error("journal.unknownrecord", kind=entry.kind)

    def set_aside(self, connection: sa.Connection, entry: journal.Entry, reason: str) -> None:
        """Put what the record is about into quarantine."""
        fields = {**_NOTHING_KNOWN, **entry.fields}
        digest = fields["object"]["digest"] if fields["object"] else ""
        # Of a damaged place in the journal only the place is known.
        known = fields["sop_instance_uid"] or f"journal {entry.log} {entry.after.segment} {entry.after.offset}"
        quarantine_id = derive("quarantine", known, digest, reason, fields["called_ae"])
        table = tables.quarantine
        known_row = connection.execute(sa.select(table.c.object).where(table.c.quarantine_id == quarantine_id)).first()
        # Of damage nobody knows when it was written: it is kept from when it was found.
        time = self._clock.now() if entry.kind == journal.DAMAGED else entry.time
        if known_row is not None:
            _not_wanted(connection, entry, known_row.object)
            connection.execute(
                table.update().where(table.c.quarantine_id == quarantine_id).values(received=time.isoformat())
            )
            return
        described = ("study_uid", "sop_instance_uid", "sop_class_uid", "transfer_syntax_uid", "calling_ae", "called_ae")
        connection.execute(
            table.insert().values(
                quarantine_id=quarantine_id,
                received=time.isoformat(),
                reason=reason,
                object=fields["object"],
                **{name: fields[name] for name in described},
            )
        )
        event = events.InstanceQuarantined(
            **next_of_study(connection, fields["study_uid"], time),
            sop_instance_uid=fields["sop_instance_uid"],
            calling_ae=fields["calling_ae"],
            called_ae=fields["called_ae"],
            reason=reason,
            object=ObjectRef(**fields["object"]) if fields["object"] else None,
        )
        record_events(connection, [event])

    def _stored(self, connection: sa.Connection, entry: journal.Entry, attributes: Mapping[str, str] | None) -> None:
        ref = ObjectRef(**entry.fields["object"])
        table = tables.instances
        known = connection.execute(
            sa.select(table)
            .where(table.c.sop_instance_uid == entry.fields["sop_instance_uid"])
            .order_by(table.c.received)
        ).mappings().all()  # fmt: skip
        same = next((row for row in known if row["digest"] == ref.digest), None)
        if same is not None:
            instance = _as_sent(groups.instance_of(same), entry)
        else:
            instance = new_instance(entry, ref, attributes or {})
        key, state, reason = key_of(self._registry.get(instance.called_ae), instance)
        if state == "quarantined":
            self.set_aside(connection, entry, reason)
            return
        if same is not None:
            _not_wanted(connection, entry, same["object"])
        if same is None:
            _insert(connection, instance, state, reason)
            if known:
                self._note_conflict(connection, instance, known[0]["digest"])
        elif same["state"] == "ignored" and state == "grouped":
            here = sa.and_(table.c.sop_instance_uid == instance.sop_instance_uid, table.c.digest == instance.digest)
            connection.execute(table.update().where(here).values(state=state, reason=""))
            record_events(connection, [stored_event(instance, _sequence_of(connection, instance))])
        elif same["state"] == "ignored":
            # It came again, and is kept from now.
            here = sa.and_(table.c.sop_instance_uid == instance.sop_instance_uid, table.c.digest == instance.digest)
            connection.execute(table.update().where(here).values(received=entry.time.isoformat()))
        if key is not None:
            self._join(connection, instance, key)

    def _note_conflict(self, connection: sa.Connection, instance: Instance, first_digest: str) -> None:
        table = tables.instances
        connection.execute(
            table.update().where(table.c.sop_instance_uid == instance.sop_instance_uid).values(conflicted=True)
        )
        entity = self._registry.get(instance.called_ae)
        newest = entity is not None and entity.overwrite_same_instance
        event = events.InstanceConflicted(
            **next_of_study(connection, instance.study_uid, instance.received),
            sop_instance_uid=instance.sop_instance_uid,
            kept_digest=first_digest,
            other_digest=instance.digest,
            used_digest=instance.digest if newest else first_digest,
            calling_ae=instance.calling_ae,
            called_ae=instance.called_ae,
        )
        record_events(connection, [event])

    def _join(self, connection: sa.Connection, instance: Instance, key: str) -> None:
        entity = self._registry[instance.called_ae]
        row, new = groups.find_or_open(
            connection, called_ae=entity.ae_title, rule=entity.rule_name, key=key, now=instance.received
        )
        changed, revised = groups.add_member(connection, row, instance, replace=entity.overwrite_same_instance)
        if not changed or not (new or revised):
            return
        common: dict[str, Any] = {
            "subject": row["group_id"],
            "sequence": groups.next_sequence(connection, row["group_id"]),
            "time": instance.received,
            "source": SOURCE,
            "studies": groups.studies_of(connection, row["group_id"]),
        }
        event: Event
        if new:
            event = events.GroupOpened(**common, rule=entity.rule_name, called_ae=entity.ae_title)
        else:
            event = events.GroupRevised(**common, revision=row["revision"] + 1)
        record_events(connection, [event], cause=instance.study_uid)

    def _ignored(self, connection: sa.Connection, entry: journal.Entry) -> None:
        fields = {**_NOTHING_KNOWN, **entry.fields}
        names = ("study_uid", "sop_instance_uid", "sop_class_uid", "called_ae", "reason")
        row = {
            "ignored_id": derive("ignored", fields["sop_instance_uid"], fields["called_ae"]),
            "received": entry.time.isoformat(),
            **{name: fields[name] for name in names},
        }
        if insert_new(connection, tables.ignored, [row]) == 0:
            return
        record_events(connection, [_ignored_event(connection, fields, entry.time, fields["reason"])])

    def _ended(self, connection: sa.Connection, entry: journal.Entry) -> None:
        fields = entry.fields
        event = events.AssociationEnded(
            **next_of_study(connection, fields["study_uid"], entry.time),
            association=fields["association"],
            calling_ae=fields["calling_ae"],
            called_ae=fields["called_ae"],
            reason=fields["reason"],
            stored=fields["stored"],
            refused=fields["refused"],
        )
        record_events(connection, [event])


def _not_wanted(connection: sa.Connection, entry: journal.Entry, kept: Mapping[str, Any] | None) -> None:
    """Give up the data set of a record: `kept` is the copy that the tables refer to."""
    found = entry.fields.get("object")
    if not found or found == kept:
        return
    if entry.head:
        count_waste(connection, {(entry.log, entry.after.segment): entry.after.offset - entry.since})
    else:
        insert_new(connection, tables.unwanted, [{"location": found["location"], "object": found, "instead": kept}])


def count_waste(connection: sa.Connection, sizes: Mapping[tuple[str, int], int]) -> None:
    """Count bytes of segments as not wanted."""
    table = tables.segment_waste
    insert_new(connection, table, [{"log": name, "segment": number, "bytes": 0} for name, number in sorted(sizes)])
    for (name, number), size in sizes.items():
        here = sa.and_(table.c.log == name, table.c.segment == number)
        connection.execute(table.update().where(here).values(bytes=table.c.bytes + size))


def new_instance(entry: journal.Entry, ref: ObjectRef, attributes: Mapping[str, str]) -> Instance:
    """Make the value of an instance that was not known before."""
    fields = entry.fields
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


def _as_sent(known: Instance, entry: journal.Entry) -> Instance:
    """Give a known instance as it was sent this time: perhaps to another AE title."""
    sent = {"calling_ae": entry.fields["calling_ae"], "called_ae": entry.fields["called_ae"], "received": entry.time}
    return replace(known, **sent)


def row_of(instance: Instance, state: str, reason: str) -> dict[str, Any]:
    """Make the row of an instance that is new."""
    values = {name: getattr(instance, name) for name in Instance.__dataclass_fields__}
    place = {name: getattr(instance.object, name) for name in ObjectRef.__dataclass_fields__}
    described = {"received": instance.received.isoformat(), "object": place}
    return {**values, **described, "state": state, "reason": reason, "conflicted": False}


def _insert(connection: sa.Connection, instance: Instance, state: str, reason: str) -> None:
    row = row_of(instance, state, reason)
    connection.execute(tables.instances.insert().values(**row))
    if state == "ignored":
        event = _ignored_event(connection, row, instance.received, reason)
    else:
        event = stored_event(instance, _sequence_of(connection, instance))
    record_events(connection, [event])


def _ignored_event(connection: sa.Connection, fields: Mapping[str, Any], time: datetime, reason: str) -> Event:
    names = ("sop_instance_uid", "sop_class_uid", "calling_ae", "called_ae")
    return events.InstanceIgnored(
        **next_of_study(connection, fields["study_uid"], time),
        **{name: fields[name] for name in names},
        reason=reason,
    )


def stored_event(instance: Instance, sequence: int) -> events.InstanceStored:
    """Make the event of an instance that was stored; `sequence` is the study's."""
    return events.InstanceStored(
        subject=instance.study_uid,
        sequence=sequence,
        time=instance.received,
        source=SOURCE,
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


def _sequence_of(connection: sa.Connection, instance: Instance) -> int:
    return int(next_of_study(connection, instance.study_uid, instance.received)["sequence"])


def next_of_study(connection: sa.Connection, study_uid: str, time: datetime, *, came: bool = True) -> dict[str, Any]:
    """Count up the study's event sequence, and note when something last `came`; give what every event carries."""
    table = tables.studies
    noted = {"last_received": time.isoformat()} if came else {}
    moved = connection.execute(
        table.update().where(table.c.study_uid == study_uid).values(sequence=table.c.sequence + 1, **noted)
    )
    if moved.rowcount == 0:
        connection.execute(
            table.insert().values(
                study_uid=study_uid, sequence=1, first_received=time.isoformat(), last_received=time.isoformat()
            )
        )
    query = sa.select(table.c.sequence).where(table.c.study_uid == study_uid)
    sequence = int(connection.execute(query).scalar_one())
    return {"subject": study_uid, "sequence": sequence, "time": time, "source": SOURCE}
