"""The story of each study, built from the events: what happened, when, and why.

Rows are kept once per (study, event), so seeing an event twice changes nothing. A job belongs to the studies of its
group, a delivery to those of its job; `timeline_links` remembers that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import sqlalchemy as sa

from clarion import events
from clarion.adapters.database import insert_new
from clarion.crashpoints import effect
from clarion.errors import TransientError
from streams.tables import SCHEMA, links, timeline

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.adapters.database import Database
    from clarion.events import Event

_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class _Line:
    state: str
    text: str
    studies: tuple[str, ...] = ()
    parent: str = ""


def _line(event: Event) -> _Line | None:
    """Say an event as a line of the story; `studies` where the event names them itself."""
    return _study_line(event) or _group_line(event) or _job_line(event) or _delivery_line(event)


def _study_line(event: Event) -> _Line | None:
    match event:
        case events.InstanceIgnored():
            return _Line("Ignored", f"Instance from {event.calling_ae} ignored: {event.reason}", (event.subject,))
        case events.InstanceQuarantined():
            text = f"Data set from {event.calling_ae} set aside: {event.reason}"
            return _Line("Quarantined", text, (event.subject,))
        case events.InstanceConflicted():
            used = "newest" if event.used_digest == event.other_digest else "first"
            text = f"Instance {event.sop_instance_uid} came again with other content; both kept, the {used} is used"
            return _Line("Conflicted", text, (event.subject,))
        case events.AssociationEnded():
            text = f"{event.calling_ae} → {event.called_ae}: {event.stored} instances stored"
            text += f", {event.refused} refused" if event.refused else ""
            return _Line("Received", f"{text} (association {event.reason})", (event.subject,))
        case events.InstancesRemoved():
            text = f"{event.instances} instances removed: {event.reason}"
            return _Line("Removed", text, (event.subject,))
    return None


def _group_line(event: Event) -> _Line | None:
    match event:
        case events.GroupOpened():
            return _Line("Received", f"Rule {event.rule} opened a group for {event.called_ae}", event.studies)
        case events.GroupRevised():
            return _Line("Received", f"Late instances: revision {event.revision} begins", event.studies)
        case events.GroupClosed():
            text = f"Group complete with {event.instances} instances, revision {event.revision} ({event.reason})"
            # A late revision that triggers nothing leaves the study where its jobs are: it is its own successor.
            nothing_follows = event.revision > 1 and not event.triggers
            return _Line("Grouped", text, event.studies, event.subject if nothing_follows else "")
        case events.GroupBlocked():
            text = f"Group cannot be judged: {event.reason}; asked again every minute"
            if not event.reason:
                return _Line("Received", "Group can be judged again", event.studies)
            return _Line("Failed", text, event.studies)
        case events.GroupDiscarded():
            return _Line("Ignored", f"Group given up: {event.reason}; its instances are kept", event.studies)
        case events.GroupReleased():
            text = f"Released by {event.by}, no longer kept for what failed: {event.reason}"
            return _Line("Released", text, event.studies)
    return None


def _job_line(event: Event) -> _Line | None:
    match event:
        case events.JobRequested():
            text = f"Pipeline {event.pipeline_id} requested as {event.name}"
            text += f", by replay {event.replay}" if event.replay else ""
            return _Line("Triggered", text, event.studies, event.group_id)
        case events.JobRetried():
            return _Line("Triggered", f"Taken up again by replay {event.replay}")
        case events.JobStarted():
            return _Line("Running", f"Attempt {event.attempt} started")
        case events.JobSucceeded():
            return _Line("Produced", f"{event.results} results passed the result gate (attempt {event.attempt})")
        case events.JobFailed():
            where = f" in operator {event.operator}" if event.operator else ""
            return _Line("Failed", f"Job failed{where}: {event.cause}: {event.reason}")
        case events.JobSuperseded():
            return _Line("Superseded", "A job for a newer revision takes this one's place")
        case events.ResultBlocked():
            return _Line("Quarantined", f"Results kept back by the result gate: {', '.join(event.rules)}")
    return None


def _delivery_line(event: Event) -> _Line | None:
    match event:
        case events.DeliveryRequested():
            text = f"Delivery of {event.instances} results to {event.destination} requested"
            return _Line("Produced", text, parent=event.job_id)
        case events.ResultDelivered():
            return _Line("Sent", f"{len(event.instances)} results accepted by {event.destination}")
        case events.DeliveryFailed():
            text = f"Delivery to {event.destination} failed (attempt {event.attempt}): {event.reason}"
            return _Line("Failed" if event.final else "Produced", text if event.final else f"{text}; tried again")
        case events.DeliveryRetried():
            who = f"replay {event.replay}" if event.replay else "a person"
            return _Line("Produced", f"Delivery to {event.destination} taken up again by {who}")
        case events.DeliverySuperseded():
            return _Line("Superseded", f"Given up for {event.destination}: a newer revision takes its place")
        case events.ResultVerified():
            return _Line("Verified", f"{event.destination} keeps every result ({event.how})")
    return None


class Timeline:
    """Writes the story down."""

    kinds: ClassVar = tuple(
        kind
        for kind in events.ALL
        if kind not in {events.InstanceStored, events.ResultRegistered} and not kind.kind.startswith("replay.")
    )

    def __init__(self, database: Database) -> None:
        self._database = database
        database.create(SCHEMA)

    def handle(self, event: Event) -> Iterable[Event]:
        """Keep the event's line in every study it belongs to."""
        line = _line(event)
        if line is None:
            return ()
        with effect("timeline.commit"), self._database.transaction() as connection:
            studies = line.studies or _linked(connection, line.parent or event.subject)
            if not studies:
                # On Kafka a delivery may be read before its job: topics have no order among themselves.
                raise TransientError(f"{event.kind}: nothing is known yet of what it belongs to", _WAIT_S)
            for study_uid in studies:
                insert_new(connection, links, [{"subject": event.subject, "study_uid": study_uid}])
                insert_new(connection, timeline, [_row(event, line, study_uid)])
        return ()


def _row(event: Event, line: _Line, study_uid: str) -> dict[str, str]:
    return {
        "study_uid": study_uid,
        "event_id": event.event_id,
        "kind": event.kind,
        "subject": event.subject,
        "parent": line.parent,
        "time": event.time.isoformat(),
        "state": line.state,
        "text": line.text,
    }


def _linked(connection: sa.Connection, subject: str) -> tuple[str, ...]:
    query = sa.select(links.c.study_uid).where(links.c.subject == subject).order_by(links.c.study_uid)
    return tuple(connection.execute(query).scalars())
