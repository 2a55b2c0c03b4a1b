"""Runs the replay that is to run: orders what its plan says, as fast as it may, and notes what became of it.

Contract. One step is bounded and is taken only when live events wait for nobody. What is ordered and that it was
ordered are one transaction, so a crash neither skips nor doubles an item. In the mode `redeliver` the events are read
again where they lie, from a place of its own that moves no live consumer, and handed to the same handler as ever; what
the topics no longer have comes from the table of events. Only what the plan says is published, whatever the handler
would say today.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

import sqlalchemy as sa
import structlog

from clarion import events
from clarion.adapters.outbox import find_record, record_events
from clarion.codec import Record, decode, encode
from clarion.crashpoints import effect
from clarion.errors import BusUnavailableError, InvalidEventError, PermanentError
from clarion.model import ObjectRef, Span
from clarion.patience import reason_of
from streams.replays import DONE, FAILED, FINISHED, ORDERED, PLANNED, RUNNING, SOURCE, STOPPED, Limits, end, read_items
from streams.tables import replay_items, replay_spans, replays, timeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clarion.adapters.database import Database
    from clarion.events import Event
    from clarion.plugins import StreamHandler
    from clarion.ports import Clock

log = structlog.get_logger()

KINDS = (events.GroupClosed.kind,)
KIND_OF_JOB = events.JobRequested.kind
_READ = 500
# An item of which nothing has been heard for so long has failed.
_PATIENCE = timedelta(hours=24)
# Failures say something about the whole when there are a few.
_FEW = 5
_ENDS = {
    "job.succeeded.v1": (DONE, ""),
    "job.failed.v1": (FAILED, ""),
    "job.superseded.v1": (FAILED, "superseded"),
    "result.delivered.v1": (DONE, ""),
    "delivery.superseded.v1": (FAILED, "superseded"),
}
_RETRIED = ("job.retried.v1", "delivery.retried.v1")


class EventHistory(Protocol):
    """What was said before, read beside the live consumers and without moving them."""

    def spans(self, kinds: Sequence[str], since: datetime) -> list[Span]:
        """Give where events of these kinds lie that were said from a time on. Raises BusUnavailableError."""

    def read(self, span: Span, kinds: Sequence[str], limit: int) -> tuple[list[tuple[int, Record]], int]:
        """Give some records, each with the position behind it, and how far the span is read. As above."""

    def close(self) -> None:
        """Let go of what is held."""


class ReplayRunner:
    """Runs one replay at a time, in the order in which they were started; `match` is the handler of group.closed."""

    def __init__(self, database: Database, clock: Clock, *, history: EventHistory, match: StreamHandler) -> None:
        self._database = database
        self._clock = clock
        self._history = history
        self._match = match

    def step(self) -> bool:
        """Settle what has ended, order what may begin; tell whether there may be more at once."""
        query = sa.select(replays).where(replays.c.state == RUNNING).order_by(replays.c.started).limit(1)
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            self._history.close()
            return False
        moved = self._settle(row)
        reason = self._objection(row)
        if reason:
            self._end(row, STOPPED, reason)
            return True
        return self._go_on(row) or moved

    # Ordering --------------------------------------------------------------------------------------------------

    def _go_on(self, row: sa.RowMapping) -> bool:
        room = self._room(row)
        span = self._span(row) if row["mode"] == "redeliver" else None
        if span is not None:
            return room > 0 and self._read_on(row, span, room)
        waiting = read_items(self._database, row["replay_id"], states=[PLANNED], limit=min(max(room, 1), _READ))
        for item in waiting[:room]:
            self._order(row, item, self._source_of(item))
        if not waiting and self._counts(row).get(ORDERED, 0) == 0:
            self._end(row, FINISHED, "")
            return True
        return bool(waiting[:room])

    def _room(self, row: sa.RowMapping) -> int:
        """Tell how many items may be ordered now, by what is under way and by the rate."""
        limits = Limits(**row["limits"])
        since = (self._clock.now() - timedelta(minutes=1)).isoformat()
        table = replay_items
        begun = sa.and_(table.c.replay_id == row["replay_id"], table.c.state.in_((ORDERED, DONE, FAILED)))
        lately = sa.select(sa.func.count()).where(begun, table.c.ordered > since)
        with self._database.reading() as connection:
            ordered = int(connection.execute(lately).scalar_one())
        return max(0, min(limits.in_flight - self._counts(row).get(ORDERED, 0), limits.per_minute - ordered))

    def _counts(self, row: sa.RowMapping) -> dict[str, int]:
        """Count the items under way and those that have ended, by state."""
        table = replay_items
        here = sa.and_(table.c.replay_id == row["replay_id"], table.c.state.in_((ORDERED, DONE, FAILED)))
        counted = sa.select(table.c.state, sa.func.count()).where(here).group_by(table.c.state)
        with self._database.reading() as connection:
            return {one[0]: one[1] for one in connection.execute(counted)}

    def _span(self, row: sa.RowMapping) -> Span | None:
        """Give the first stretch that has not been read to its end; finds the stretches when there are none yet."""
        table = replay_spans
        query = sa.select(table).where(table.c.replay_id == row["replay_id"])
        with self._database.reading() as connection:
            found = connection.execute(query.order_by(table.c.origin, table.c.partition)).mappings().all()
        if not found:
            spans = self._history.spans(KINDS, datetime.fromisoformat(row["window_start"]))
            # One that is empty says that the places were looked for, should there be nothing in them.
            spans = spans or [Span(origin="nothing", partition=0, position=0, end=0)]
            rows = [{**asdict(one), "start": one.position, "replay_id": row["replay_id"]} for one in spans]
            with effect("replay.order"), self._database.transaction() as connection:
                connection.execute(table.insert(), rows)
            return self._span(row)
        left = [one for one in found if one["position"] < one["end"]]
        return Span(**{name: left[0][name] for name in Span.__dataclass_fields__}) if left else None

    def _read_on(self, row: sa.RowMapping, span: Span, room: int) -> bool:
        """Read a stretch on; what the plan wants of it is ordered, as much as there is room for."""
        found, position = self._history.read(span, KINDS, _READ)
        by_event = {record.headers.get("ce_id", ""): (behind, record) for behind, record in found}
        for item in self._wanted(row, list(by_event)):
            behind, record = by_event[item["source_event"]]
            if room == 0:
                # Not yet; it is read again when there is room.
                position = min(position, behind - 1)
                break
            room -= 1
            self._order(row, item, record)
        self._keep(row, span, position, sum(behind <= position for behind, _ in found))
        return position > span.position

    def _wanted(self, row: sa.RowMapping, event_ids: list[str]) -> list[dict[str, Any]]:
        table = replay_items
        query = sa.select(table).where(
            table.c.replay_id == row["replay_id"], table.c.state == PLANNED, table.c.source_event.in_(event_ids)
        )
        if not event_ids:
            return []
        with self._database.reading() as connection:
            rows = [dict(one) for one in connection.execute(query).mappings()]
        order = {event_id: number for number, event_id in enumerate(event_ids)}
        return sorted(rows, key=lambda one: (order[one["source_event"]], one["number"]))

    def _keep(self, row: sa.RowMapping, span: Span, position: int, count: int) -> None:
        table = replay_spans
        here = sa.and_(
            table.c.replay_id == row["replay_id"],
            table.c.origin == span.origin,
            table.c.partition == span.partition,
        )
        read = replays.update().where(replays.c.replay_id == row["replay_id"])
        with effect("replay.order"), self._database.transaction() as connection:
            connection.execute(table.update().where(here).values(position=position))
            connection.execute(read.values(records_read=replays.c.records_read + count))

    def _source_of(self, item: dict[str, Any]) -> Record | None:
        if item["action"] != "request":
            return None
        return find_record(self._database, item["group_id"], item["source_event"])

    def _order(self, row: sa.RowMapping, item: dict[str, Any], record: Record | None) -> None:
        """Publish what an item says, and note that; or note why it cannot be."""
        now = self._clock.now()
        body = json.loads(item["body"])
        try:
            if item["action"] == "request":
                self._check(item, record)
        except BusUnavailableError:
            raise
        except Exception as error:  # noqa: BLE001  whatever the handler raises concerns this item alone
            self._note(row, item, FAILED, reason_of(error), now)
            return
        with effect("replay.order"), self._database.transaction() as connection:
            event = self._event(connection, row, item, body, now)
            new = record_events(connection, [event], cause=item["group_id"])
            values: dict[str, Any] = {"state": ORDERED, "ordered": now.isoformat()}
            if not new:
                values = {"state": DONE, "ended": now.isoformat(), "note": "was requested already"}
            self._set(connection, row, item, values)

    def _check(self, item: dict[str, Any], record: Record | None) -> None:
        """Let the handler see the event again: it must still ask for what the plan says."""
        if record is None:
            raise PermanentError("the event that it follows from is neither in a topic nor in the database")
        asked = {event.subject for event in self._match.handle(decode(record))}
        if item["target"] not in asked:
            raise PermanentError("today's rules and pipelines no longer ask for this job; plan again")

    @staticmethod
    def _event(
        connection: sa.Connection, row: sa.RowMapping, item: dict[str, Any], body: dict[str, Any], now: datetime
    ) -> Event:
        """Make the event of an item; a job's is its first, an order is the next of its replay."""
        if item["action"] in {"request", "rerun"}:
            headers = {"ce_type": KIND_OF_JOB, "ce_id": body["event_id"]}
            record = Record(key=item["target"], headers=headers, body=json.dumps(body["event"]).encode())
            event = decode(record)
            if isinstance(event, events.JobRequested):
                return replace(event, time=now, replay=row["replay_id"])
            raise InvalidEventError(f"a plan asks for {event.kind}")
        here = replays.c.replay_id == row["replay_id"]
        connection.execute(replays.update().where(here).values(sequence=replays.c.sequence + 1))
        sequence = int(connection.execute(sa.select(replays.c.sequence).where(here)).scalar_one())
        ref = body["result_set"] and ObjectRef(**body["result_set"])
        order = {**body, "result_set": ref, "destinations": tuple(body["destinations"])}
        return events.ReplayOrdered(subject=row["replay_id"], sequence=sequence, time=now, source=SOURCE, **order)

    # Settling --------------------------------------------------------------------------------------------------

    def _settle(self, row: sa.RowMapping) -> bool:
        """Note what has become of the items under way, by the stories of their jobs and deliveries."""
        moved = False
        now = self._clock.now()
        for item in read_items(self._database, row["replay_id"], states=[ORDERED], limit=_READ):
            state, note = self._outcome(row, item)
            if not state and now > datetime.fromisoformat(item["ordered"]) + _PATIENCE:
                state, note = FAILED, f"nothing was heard of it for {_PATIENCE}"
            if state:
                self._note(row, item, state, note, now)
                moved = True
        return moved

    def _outcome(self, row: sa.RowMapping, item: dict[str, Any]) -> tuple[str, str]:
        query = sa.select(timeline).where(timeline.c.subject == item["target"]).order_by(timeline.c.position)
        with self._database.reading() as connection:
            lines = connection.execute(query).all()
        begun = item["action"] not in {"retry", "resend"}
        state, note = "", ""
        for line in lines:
            if line.kind in _RETRIED and row["replay_id"] in line.text:
                begun, state = True, ""
            elif begun or line.kind == "job.succeeded.v1":
                if line.kind == "delivery.failed.v1" and line.state == "Failed":
                    state, note = FAILED, line.text
                elif line.kind in _ENDS:
                    state, note = _ENDS[line.kind]
                    note = note or (line.text if state == FAILED else "")
        return state, note

    def _note(self, row: sa.RowMapping, item: dict[str, Any], state: str, note: str, now: datetime) -> None:
        with effect("replay.settle"), self._database.transaction() as connection:
            self._set(connection, row, item, {"state": state, "note": note, "ended": now.isoformat()})

    @staticmethod
    def _set(connection: sa.Connection, row: sa.RowMapping, item: dict[str, Any], values: dict[str, Any]) -> None:
        table = replay_items
        here = sa.and_(table.c.replay_id == row["replay_id"], table.c.number == item["number"])
        connection.execute(table.update().where(here).values(**values))

    # Ending ----------------------------------------------------------------------------------------------------

    def _objection(self, row: sa.RowMapping) -> str:
        """Say why the replay must not go on; empty when it may."""
        limits = Limits(**row["limits"])
        counts = self._counts(row)
        failed = counts.get(FAILED, 0)
        ended = failed + counts.get(DONE, 0)
        if ended >= _FEW and failed * 100 > limits.stop_above_percent * ended:
            return f"{failed} of {ended} items failed; more than {limits.stop_above_percent:g} %"
        if limits.budget_minutes is not None and self._minutes_used(row) >= limits.budget_minutes:
            return f"the budget of {limits.budget_minutes:g} job minutes is used up"
        return ""

    def _minutes_used(self, row: sa.RowMapping) -> float:
        table = replay_items
        here = sa.and_(table.c.replay_id == row["replay_id"], table.c.minutes > 0, table.c.ended.is_not(None))
        query = sa.select(table.c.ordered, table.c.ended).where(here, table.c.ordered.is_not(None))
        with self._database.reading() as connection:
            pairs = connection.execute(query).all()
        spent = [datetime.fromisoformat(one.ended) - datetime.fromisoformat(one.ordered) for one in pairs]
        return sum((one.total_seconds() for one in spent), 0.0) / 60

    def _end(self, row: sa.RowMapping, state: str, reason: str) -> None:
        here = sa.and_(replays.c.replay_id == row["replay_id"], replays.c.state == RUNNING)
        with effect("replay.state"), self._database.transaction() as connection:
            if connection.execute(replays.update().where(here).values(state=state)).rowcount:
                end(connection, row["replay_id"], state, now=self._clock.now(), reason=reason)
        log.info("replay.ended", replay=row["replay_id"], state=state, reason=reason)


def body_of(event: Event) -> str:
    """Write the event that a plan's item publishes, for its `body`."""
    record = encode(event)
    return json.dumps({"event_id": record.headers["ce_id"], "event": json.loads(record.body)}, sort_keys=True)
