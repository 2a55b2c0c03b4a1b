"""Deliveries in the database: what is to be sent where, and how far it is; every change with its event."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from clarion import events
from clarion.adapters.database import replace
from clarion.adapters.outbox import record_events
from clarion.crashpoints import effect
from clarion.model import ObjectRef, ResultInstance
from gateway import tables
from gateway.statuses import Outcome, classify, describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from clarion.adapters.database import Database

SOURCE = "gateway"
WAITING, SENT, VERIFIED, UNVERIFIED, FAILED = "waiting", "sent", "verified", "unverified", "failed"
SUPERSEDED = "superseded"
RETRYABLE = (WAITING, FAILED, UNVERIFIED, SUPERSEDED)
UNKNOWN_DESTINATION = "unknown-destination"
NOT_REACHED = "not reached: "
"""How the reason begins for which a delivery waits whose destination is away."""
BY_A_PERSON = "taken-up"
"""Why a delivery waits that somebody took up: it does not wait for a window."""

_table = tables.deliveries
_items = tables.delivery_instances


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A delivery as it stands; `attempts` counts all, `spent` those that do not count any more."""

    delivery_id: str
    job_id: str
    destination: str
    state: str
    attempts: int
    spent: int
    transaction_uid: str | None
    verify_until: datetime | None
    reason: str = ""

    def is_overdue(self, now: datetime) -> bool:
        """Tell whether it ought to have been proved by now."""
        return self.verify_until is not None and now > self.verify_until


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One instance of a delivery; `status` is None before it was answered."""

    instance: ResultInstance
    status: int | None


Answered = tuple[str, int, str]
"""SOP Instance UID, status, and a note; without one the status is described."""


class Outbound:
    """Reads and changes deliveries. Safe from several threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def due(self, now: datetime, passing_over: Iterable[str] = ()) -> list[Delivery]:
        """List what is to be sent or verified by now, in order of registration; nothing of the named destinations."""
        query = (
            sa.select(*_SHOWN)
            .where(_table.c.state.in_((WAITING, SENT)), _table.c.due <= now.isoformat())
            .where(sa.func.lower(_table.c.destination).not_in(sorted(passing_over)))
            .order_by(_table.c.requested, _table.c.delivery_id)
        )
        with self._database.reading() as connection:
            return [_delivery(row) for row in connection.execute(query)]

    def items(self, delivery_id: str) -> list[Item]:
        """List a delivery's instances in the order of its set."""
        query = sa.select(_items).where(_items.c.delivery_id == delivery_id).order_by(_items.c.position)
        with self._database.reading() as connection:
            return [
                Item(
                    instance=ResultInstance(**{**row.described, "object": ObjectRef(**row.described["object"])}),
                    status=row.status,
                )
                for row in connection.execute(query)
            ]

    def begin_attempt(self, delivery_id: str, due: datetime) -> int | None:
        """Count an attempt; should we die in it, the next one is due at `due`. None when it no longer waits."""
        here = _table.c.delivery_id == delivery_id
        claim = sa.select(_table.c.attempts).where(here, _table.c.state == WAITING).with_for_update(skip_locked=True)
        with effect("delivery.attempt"), self._database.transaction() as connection:
            # One that somebody else has in hand is not waited for.
            attempts = connection.execute(claim).scalar_one_or_none()
            if attempts is None:
                return None
            connection.execute(_table.update().where(here).values(attempts=attempts + 1, due=due.isoformat()))
            return int(attempts) + 1

    def answered(self, delivery_id: str, answers: Sequence[Answered]) -> None:
        """Note the statuses of some instances."""
        here = sa.and_(_items.c.delivery_id == delivery_id, _items.c.sop_instance_uid == sa.bindparam("uid"))
        statement = _items.update().where(here).values(status=sa.bindparam("code"), note=sa.bindparam("said"))
        rows = [{"uid": uid, "code": status, "said": note or describe(status)} for uid, status, note in answers]
        with effect("delivery.record"), self._database.transaction() as connection:
            connection.execute(statement, rows)

    def settle_sent(self, delivery: Delivery, *, now: datetime, verify_until: datetime, verify: bool) -> None:
        """Every instance was answered with success: sent."""
        statuses = tuple(
            events.InstanceStatus(sop_instance_uid=item.instance.sop_instance_uid, status=item.status or 0)
            for item in self.items(delivery.delivery_id)
        )
        with effect("delivery.settle"), self._database.transaction() as connection:
            if not _is(connection, delivery.delivery_id, WAITING):
                return
            event = events.ResultDelivered(
                **next_of_delivery(connection, delivery.delivery_id, now),
                destination=delivery.destination,
                instances=statuses,
            )
            self._change(
                connection,
                delivery.delivery_id,
                state=SENT if verify else UNVERIFIED,
                due=now.isoformat(),
                verify_until=verify_until.isoformat(),
                reason="",
            )
            record_events(connection, [event])

    def settle_unreached(self, delivery: Delivery, *, now: datetime, reason: str) -> None:
        """An attempt reached nobody: it does not count, and an outage is said once."""
        here = sa.and_(_table.c.delivery_id == delivery.delivery_id, _table.c.spent == delivery.spent)
        with effect("delivery.settle"), self._database.transaction() as connection:
            if not _is(connection, delivery.delivery_id, WAITING):
                return
            values = {"spent": delivery.spent + 1, "due": now.isoformat(), "reason": f"{NOT_REACHED}{reason}"}
            if connection.execute(_table.update().where(here).values(**values)).rowcount == 0:
                return  # somebody has taken it up meanwhile
            if not delivery.reason.startswith(NOT_REACHED):
                record_events(connection, [_failed(connection, delivery, now=now, reason=reason, final=False)])

    def settle_failed(self, delivery: Delivery, *, now: datetime, reason: str, again: datetime | None) -> None:
        """An attempt failed: tried again at `again`, or never when that is None."""
        with effect("delivery.settle"), self._database.transaction() as connection:
            if _is(connection, delivery.delivery_id, WAITING):
                self._fail(connection, delivery, now=now, reason=reason, again=again)

    def _fail(
        self, connection: sa.Connection, delivery: Delivery, *, now: datetime, reason: str, again: datetime | None
    ) -> None:
        event = _failed(connection, delivery, now=now, reason=reason, final=again is None)
        state = FAILED if again is None else WAITING
        self._change(connection, delivery.delivery_id, state=state, due=(again or now).isoformat(), reason=reason)
        record_events(connection, [event])

    def commitment_asked(self, delivery_id: str, transaction_uid: str, due: datetime) -> None:
        """Note that the peer agreed to report on a transaction; looked at again at `due`."""
        with effect("commitment.record"), self._database.transaction() as connection:
            if not _is(connection, delivery_id, SENT):
                return
            self._change(connection, delivery_id, transaction_uid=transaction_uid, due=due.isoformat())

    def look_again(self, delivery_id: str, due: datetime) -> None:
        """Look at the delivery again at `due`."""
        with effect("delivery.look"), self._database.transaction() as connection:
            if not _is(connection, delivery_id, SENT):
                return
            self._change(connection, delivery_id, due=due.isoformat())

    def commitment(self, transaction_uid: str, peer: str) -> set[str] | None:
        """Give the SOP Instance UIDs that the peer said it keeps for a transaction; None when it said nothing yet.

        Only what the destination itself reported counts: no peer can prove another's delivery.
        """
        table = tables.commitments
        query = sa.select(table).where(table.c.transaction_uid == transaction_uid, table.c.peer == peer)
        with self._database.reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else set(row.stored)

    def commitment_reported(
        self, transaction_uid: str, peer: str, *, now: datetime, stored: tuple[str, ...], failed: tuple[str, ...]
    ) -> None:
        """Note a report that came on our own association."""
        values = {"transaction_uid": transaction_uid, "peer": peer, "received": now.isoformat()}
        with effect("commitment.report"), self._database.transaction() as connection:
            replace(connection, tables.commitments, {**values, "stored": list(stored), "failed": list(failed)})

    def settle_verified(self, delivery: Delivery, *, now: datetime, how: str) -> None:
        """The peer keeps every instance: verified."""
        with effect("delivery.verify"), self._database.transaction() as connection:
            if not _is(connection, delivery.delivery_id, SENT):
                return
            event = events.ResultVerified(
                **next_of_delivery(connection, delivery.delivery_id, now), destination=delivery.destination, how=how
            )
            self._change(connection, delivery.delivery_id, state=VERIFIED, reason=how)
            record_events(connection, [event])

    def settle_unverified(self, delivery_id: str, reason: str) -> None:
        """The peer can tell nothing: it stays sent."""
        with effect("delivery.unverified"), self._database.transaction() as connection:
            if not _is(connection, delivery_id, SENT):
                return
            self._change(connection, delivery_id, state=UNVERIFIED, reason=reason)

    def lost(self, delivery: Delivery, *, missing: set[str], now: datetime, again: datetime | None) -> None:
        """The peer accepted instances and does not have them: exactly those are sent again."""
        here = sa.and_(_items.c.delivery_id == delivery.delivery_id, _items.c.sop_instance_uid.in_(sorted(missing)))
        with effect("delivery.lost"), self._database.transaction() as connection:
            if not _is(connection, delivery.delivery_id, SENT):
                return
            connection.execute(_items.update().where(here).values(status=None, note="accepted, then lost"))
            self._change(connection, delivery.delivery_id, transaction_uid=None)
            reason = f"accepted-then-lost: {len(missing)} instances"
            self._fail(connection, delivery, now=now, reason=reason, again=again)

    def requeue(self, names: Iterable[str], now: datetime) -> int:
        """Take up deliveries whose destination was unknown and now is not; gives the count."""
        known = sa.func.lower(_table.c.destination).in_([name.lower() for name in names])
        here = sa.and_(_table.c.state == FAILED, _table.c.reason == UNKNOWN_DESTINATION, known)
        with self._database.reading() as connection:
            if connection.execute(sa.select(_table.c.delivery_id).where(here)).first() is None:
                return 0
        return len(self._retry(here, now, ""))

    def retry(self, delivery_ids: Iterable[str], now: datetime) -> list[str]:
        """Take up deliveries now, with a new budget, that wait, failed, stayed unverified or were superseded.

        Gives those it took up. Only what was not answered with success is sent, or everything when it was all answered
        and cannot be proved.
        """
        here = sa.and_(_table.c.state.in_(RETRYABLE), _table.c.delivery_id.in_(sorted(delivery_ids)))
        return self._retry(here, now, BY_A_PERSON)

    def _retry(self, here: sa.ColumnElement[bool], now: datetime, reason: str) -> list[str]:
        fresh: dict[str, Any] = {
            "state": WAITING,
            "due": now.isoformat(),
            "reason": reason,
            "transaction_uid": None,
        }
        fresh["spent"] = _table.c.attempts
        with effect("delivery.retry"), self._database.transaction() as connection:
            taken = list(connection.execute(sa.select(_table.c.delivery_id).where(here)).scalars())
            connection.execute(_table.update().where(_table.c.delivery_id.in_(taken)).values(**fresh))
            for delivery_id in taken:
                _forget_refusals(connection, delivery_id)
                common = next_of_delivery(connection, delivery_id, now)
                where = sa.select(_table.c.destination).where(_table.c.delivery_id == delivery_id)
                destination = connection.execute(where).scalar_one()
                record_events(connection, [events.DeliveryRetried(**common, destination=destination, replay="")])
        return taken

    def _change(self, connection: sa.Connection, delivery_id: str, **values: object) -> None:
        connection.execute(_table.update().where(_table.c.delivery_id == delivery_id).values(**values))


def _failed(
    connection: sa.Connection, delivery: Delivery, *, now: datetime, reason: str, final: bool
) -> events.DeliveryFailed:
    return events.DeliveryFailed(
        **next_of_delivery(connection, delivery.delivery_id, now),
        destination=delivery.destination,
        attempt=delivery.attempts,
        reason=reason,
        final=final,
    )


def _is(connection: sa.Connection, delivery_id: str, state: str) -> bool:
    """Tell whether a delivery is still in a state, and keep it there to the end of the transaction.

    Meanwhile it may have been superseded, or taken up by a person or a replay.
    """
    query = sa.select(_table.c.state).where(_table.c.delivery_id == delivery_id).with_for_update()
    return bool(connection.execute(query).scalar_one() == state)


def next_of_delivery(connection: sa.Connection, delivery_id: str, now: datetime) -> dict[str, Any]:
    """Count up the delivery's event sequence; give what its events carry."""
    here = _table.c.delivery_id == delivery_id
    connection.execute(_table.update().where(here).values(sequence=_table.c.sequence + 1))
    sequence = connection.execute(sa.select(_table.c.sequence).where(here)).scalar_one()
    return {"subject": delivery_id, "sequence": sequence, "time": now, "source": SOURCE}


def _forget_refusals(connection: sa.Connection, delivery_id: str) -> None:
    """What was refused may be taken now; when nothing was, everything is sent again."""
    rows = connection.execute(sa.select(_items).where(_items.c.delivery_id == delivery_id)).all()
    refused = [one.sop_instance_uid for one in rows if one.status is None or classify(one.status) is not Outcome.DONE]
    again = refused or [one.sop_instance_uid for one in rows]
    here = sa.and_(_items.c.delivery_id == delivery_id, _items.c.sop_instance_uid.in_(again))
    connection.execute(_items.update().where(here).values(status=None, note="to be sent again"))


_SHOWN = [
    _table.c[name]
    for name in (
        "delivery_id", "job_id", "destination", "state", "attempts", "spent", "reason", "transaction_uid",
        "verify_until",
    )
]  # fmt: skip


def _delivery(row: Any) -> Delivery:  # noqa: ANN401  a row of `deliveries`
    return Delivery(
        delivery_id=row.delivery_id,
        job_id=row.job_id,
        destination=row.destination,
        state=row.state,
        attempts=row.attempts,
        spent=row.spent,
        transaction_uid=row.transaction_uid,
        verify_until=datetime.fromisoformat(row.verify_until) if row.verify_until else None,
        reason=row.reason,
    )


def backoff(attempt: int, first_s: float, longest_s: float) -> timedelta:
    """How long to wait after the n-th attempt: doubling, bounded."""
    return timedelta(seconds=min(longest_s, first_s * 2 ** (attempt - 1)))


def outcome_of(item: Item) -> Outcome:
    """Say what is to be done about one item."""
    return Outcome.AGAIN if item.status is None else classify(item.status)


def judge(items: list[Item]) -> tuple[Outcome, str]:
    """Judge an attempt by its items: all done, try again, or never, with the reason naming instance and status.

    While one may still succeed the delivery goes on, though another never will.
    """
    outcomes = [(item, outcome_of(item)) for item in items]
    for wanted in (Outcome.AGAIN, Outcome.NEVER):
        bad = [item for item, outcome in outcomes if outcome is wanted]
        if bad:
            first = bad[0]
            said = describe(first.status) if first.status is not None else "not sent"
            return wanted, f"{len(bad)} of {len(items)} instances; first {first.instance.sop_instance_uid}: {said}"
    return Outcome.DONE, ""
