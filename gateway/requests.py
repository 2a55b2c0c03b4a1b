"""What asks for deliveries, or calls them off: events that become rows. Each bears being seen twice."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from clarion import events
from clarion.adapters.database import insert_new, lock, replace
from clarion.adapters.outbox import record_events
from clarion.crashpoints import effect
from clarion.model import ResultSet, derive_delivery_id
from gateway import tables
from gateway.outbound import FAILED, SOURCE, SUPERSEDED, WAITING, next_of_delivery

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from clarion.adapters.database import Database
    from clarion.events import Event
    from clarion.ports import ObjectStore

_table = tables.deliveries
_items = tables.delivery_instances


class DeliveryRequests:
    """The handler of delivery.requested: a row per delivery and per instance."""

    def __init__(self, database: Database, store: ObjectStore) -> None:
        self._database = database
        self._store = store

    def handle(self, event: Event) -> Iterable[Event]:
        """Note the delivery; passed over when it is known."""
        if isinstance(event, events.DeliveryRequested):
            self.enter(event)
        return ()

    def enter(self, event: events.DeliveryRequested, *, followed: str = "") -> None:
        """Note the delivery; `followed` is the order of a replay that asked for it."""
        instances = ResultSet.decode(self._store.read(event.result_set)).instances
        with effect("delivery.request"), self._database.transaction() as connection:
            lock(connection, "deliveries", event.job_id)
            if insert_new(connection, _table, [{**_row_of(event), "followed": followed}]) == 0:
                return
            rows = [
                {
                    "delivery_id": event.subject,
                    "sop_instance_uid": instance.sop_instance_uid,
                    "position": position,
                    "described": asdict(instance),
                    "status": None,
                    "note": "",
                }
                for position, instance in enumerate(instances)
            ]
            insert_new(connection, _items, rows)
            if followed:
                record_events(connection, [event], cause=event.job_id)
            _supersede(connection, event.job_id, event.time)


def _row_of(event: events.DeliveryRequested) -> dict[str, Any]:
    return {
        "delivery_id": event.subject,
        "job_id": event.job_id,
        "destination": event.destination,
        "result_set": asdict(event.result_set),
        "state": WAITING,
        "sequence": event.sequence,
        "attempts": 0,
        "spent": 0,
        "due": event.time.isoformat(),
        "requested": event.time.isoformat(),
        "reason": "",
    }


class ReplayedDeliveries:
    """The handler of replay.ordered: the results of a job are sent to a destination, whatever was sent there before."""

    def __init__(self, database: Database, store: ObjectStore) -> None:
        self._database = database
        self._requests = DeliveryRequests(database, store)

    def handle(self, event: Event) -> Iterable[Event]:
        """Register the deliveries, or take known ones up again, whole and with a new budget."""
        if not isinstance(event, events.ReplayOrdered) or event.action != "send" or event.result_set is None:
            return ()
        for destination in event.destinations:
            requested = events.DeliveryRequested(
                subject=derive_delivery_id(event.job_id, destination, event.set_digest),
                sequence=1,
                time=event.time,
                source=SOURCE,
                job_id=event.job_id,
                destination=destination,
                result_set=event.result_set,
                instances=event.instances,
            )
            with self._database.reading() as connection:
                known = connection.execute(sa.select(_table).where(_table.c.delivery_id == requested.subject)).first()
            if known is None:
                # The event that the router would have made, with the row that says that this order was followed.
                self._requests.enter(requested, followed=event.event_id)
            else:
                self._send_again(requested, event)
        return ()

    def _send_again(self, known: events.DeliveryRequested, order: events.ReplayOrdered) -> None:
        here = sa.and_(_table.c.delivery_id == known.subject, _table.c.followed != order.event_id)
        fresh = {"state": WAITING, "due": order.time.isoformat(), "reason": "", "transaction_uid": None}
        changed = _table.update().where(here).values(**fresh, spent=_table.c.attempts, followed=order.event_id)
        items = _items.update().where(_items.c.delivery_id == known.subject)
        with effect("delivery.replay"), self._database.transaction() as connection:
            if connection.execute(changed).rowcount:
                connection.execute(items.values(status=None, note="to be sent again"))
                common = next_of_delivery(connection, known.subject, order.time)
                said = events.DeliveryRetried(**common, destination=known.destination, replay=order.subject)
                record_events(connection, [said])


class SupersededJobs:
    """The handler of job.superseded: results of an older revision that have not left yet are not sent."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def handle(self, event: Event) -> Iterable[Event]:
        """Give up the job's deliveries that wait or failed; one that was made, or is verified, stays as it is."""
        if not isinstance(event, events.JobSuperseded):
            return ()
        with effect("delivery.supersede"), self._database.transaction() as connection:
            lock(connection, "deliveries", event.subject)
            replace(connection, tables.superseded_jobs, {"job_id": event.subject, "by": event.by})
            _supersede(connection, event.subject, event.time)
        return ()


def _supersede(connection: sa.Connection, job_id: str, now: datetime) -> None:
    """Give up what of a superseded job's deliveries has not been made."""
    table = tables.superseded_jobs
    by = connection.execute(sa.select(table.c.by).where(table.c.job_id == job_id)).scalar_one_or_none()
    if by is None:
        return
    here = sa.and_(_table.c.job_id == job_id, _table.c.state.in_((WAITING, FAILED)))
    waiting = connection.execute(sa.select(_table.c.delivery_id, _table.c.destination).where(here)).all()
    said = [
        events.DeliverySuperseded(**next_of_delivery(connection, row.delivery_id, now), destination=row.destination)
        for row in waiting
    ]
    connection.execute(_table.update().where(here).values(state=SUPERSEDED, reason=f"by job {by}"))
    record_events(connection, said)
