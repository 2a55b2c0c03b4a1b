"""Replays in the database: plans that never change, and how far each has come; every change with its event.

States of a replay: planned -> running <-> paused -> finished; cancelled by a person; stopped by itself, from where a
person may resume it. Of an item: skipped, or planned -> ordered -> done | failed; cancelled.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from clarion import events
from clarion.adapters.database import lock
from clarion.adapters.outbox import record_events
from clarion.crashpoints import effect
from clarion.errors import PermanentError
from clarion.model import derive
from streams.tables import replay_items, replays

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from clarion.adapters.database import Database

SOURCE = "streams"
MODES = ("redeliver", "failed", "rerun", "decide", "send")
DRAFT, PLANNED, RUNNING, PAUSED, FINISHED, CANCELLED, STOPPED = (
    "draft", "planned", "running", "paused", "finished", "cancelled", "stopped",
)  # fmt: skip
ORDERED, DONE, FAILED, SKIPPED = "ordered", "done", "failed", "skipped"
SKIP = "skip"
_MAY = {
    "run": ((PLANNED,), RUNNING),
    "pause": ((RUNNING,), PAUSED),
    "resume": ((PAUSED, STOPPED), RUNNING),
    "cancel": ((PLANNED, RUNNING, PAUSED, STOPPED), CANCELLED),
}
_BATCH = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How fast and how far: orders per minute, items under way at once, job minutes, per cent of failures."""

    per_minute: int = 60
    in_flight: int = 4
    budget_minutes: float | None = None
    stop_above_percent: float = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One line of a plan: what is done to which work, or why nothing is.

    `action` is `request` (a job that never was), `retry` (a failed one), `rerun` (a new attempt class), `send`
    (a delivery that never was), `resend` (a known one), `decide` (a difference) or `skip`. `target` is the id of the
    job or delivery whose end is the item's; `body` what is published, `source_event` what that follows from.
    """

    action: str
    study_uid: str
    group_id: str
    revision: int
    reason: str
    pipeline_id: str = ""
    job_id: str = ""
    target: str = ""
    destination: str = ""
    minutes: float = 0.0
    body: str = ""
    source_event: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a plan is for: the rest of it follows from this and the state of the world when it was made."""

    mode: str
    reason: str
    planned_by: str
    created: str
    window_start: str
    selection: Mapping[str, Any]
    destinations: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A replay as it stands; `counts` of its items by state."""

    replay_id: str
    mode: str
    reason: str
    planned_by: str
    run_by: str
    created: str
    started: str | None
    finished: str | None
    window_start: str
    selection: Mapping[str, Any]
    destinations: tuple[str, ...]
    limits: Limits
    digest: str
    state: str
    note: str
    records_read: int
    counts: Mapping[str, int]
    minutes: float

    @property
    def items(self) -> int:
        """How many items there are to do, or were."""
        return sum(count for state, count in self.counts.items() if state != SKIPPED)


def id_of(header: Header) -> str:
    """Give the id of a replay that is planned with this header."""
    return derive("replay", header.created, json.dumps(_header_of(header), sort_keys=True))


def save_plan(database: Database, header: Header, items: Iterable[Item]) -> str:
    """Keep a plan as it is made, in short transactions; gives its id. Until it is whole nobody can run it."""
    replay_id = id_of(header)
    row = {**_header_of(header), "replay_id": replay_id, "digest": "", "state": DRAFT, "note": "", "run_by": ""}
    with effect("replay.plan"), database.transaction() as connection:
        connection.execute(replays.insert().values(**row, sequence=1, records_read=0))
    digest, count, skipped = _digest_of(header), 0, 0
    coming = iter(items)
    while batch := list(islice(coming, _BATCH)):
        rows = []
        for number, item in enumerate(batch, count + 1):
            # All of them text and numbers: `asdict` would copy each deeply, a quarter of the time that a plan takes.
            values = {name: getattr(item, name) for name in Item.__dataclass_fields__}
            digest.update(_canonical(number, values))
            state = SKIPPED if item.action in {SKIP, "decide"} else PLANNED
            rows.append({**values, "replay_id": replay_id, "number": number, "state": state, "note": ""})
            skipped += state == SKIPPED
        with effect("replay.plan"), database.transaction() as connection:
            connection.execute(replay_items.insert(), rows)
        count += len(rows)
    event = events.ReplayPlanned(
        subject=replay_id,
        sequence=1,
        time=datetime.fromisoformat(header.created),
        source=SOURCE,
        mode=header.mode,
        by=header.planned_by,
        plan_digest=digest.hexdigest(),
        items=count - skipped,
        skipped=skipped,
    )
    with effect("replay.plan"), database.transaction() as connection:
        here = replays.c.replay_id == replay_id
        connection.execute(replays.update().where(here).values(digest=digest.hexdigest(), state=PLANNED))
        record_events(connection, [event])
    return replay_id


def _header_of(header: Header) -> dict[str, Any]:
    row = asdict(header)
    return {**row, "destinations": list(header.destinations)}


def _digest_of(header: Header) -> Any:  # noqa: ANN401  a hash object has no public type
    return hashlib.sha256(json.dumps(_header_of(header), sort_keys=True).encode())


def _canonical(number: int, item: Mapping[str, Any]) -> bytes:
    return f"\n{number} {json.dumps(item, sort_keys=True)}".encode()


def find_replay(database: Database, replay_id: str) -> Replay:
    """Give a replay by its id or the beginning of it. Raises PermanentError when there is none, or several."""
    found = list_replays(database, 2, begins=replay_id)
    if len(found) != 1:
        many = "several begin so; write more of it" if found else "`clarion replay list` shows those there are"
        raise PermanentError(f"no replay {replay_id!r}; {many}")
    return found[0]


def list_replays(
    database: Database, limit: int = 100, *, begins: str = "", states: Sequence[str] | None = None
) -> list[Replay]:
    """List replays, the latest first; whose id begins so, in some states, or all."""
    query = sa.select(replays).where(replays.c.state != DRAFT).order_by(replays.c.created.desc()).limit(limit)
    if begins:
        query = query.where(replays.c.replay_id.startswith(begins, autoescape=True))
    if states is not None:
        query = query.where(replays.c.state.in_(states))
    with database.reading() as connection:
        rows = connection.execute(query).mappings().all()
        return [_replay(connection, row) for row in rows]


def _replay(connection: sa.Connection, row: sa.RowMapping) -> Replay:
    table = replay_items
    here = table.c.replay_id == row["replay_id"]
    counted = sa.select(table.c.state, sa.func.count(), sa.func.sum(table.c.minutes)).where(here)
    found = connection.execute(counted.group_by(table.c.state)).all()
    names = [name for name in Replay.__dataclass_fields__ if name not in {"limits", "counts", "minutes"}]
    return Replay(
        **{**{name: row[name] for name in names}, "destinations": tuple(row["destinations"])},
        limits=Limits(**row["limits"]),
        counts={state: count for state, count, _ in found},
        minutes=sum(minutes for state, _, minutes in found if state != SKIPPED),
    )


def read_items(
    database: Database, replay_id: str, *, states: Sequence[str] | None = None, after: int = 0, limit: int = 200
) -> list[dict[str, Any]]:
    """List a replay's items behind a number, in order: those in some states, or all."""
    table = replay_items
    query = sa.select(table).where(table.c.replay_id == replay_id, table.c.number > after)
    if states is not None:
        query = query.where(table.c.state.in_(states))
    with database.reading() as connection:
        return [dict(row) for row in connection.execute(query.order_by(table.c.number).limit(limit)).mappings()]


def count_reasons(database: Database, replay_id: str) -> list[tuple[str, str, int]]:
    """Count a plan's items by action and reason, the most frequent first."""
    table, count = replay_items, sa.func.count()
    query = (
        sa.select(table.c.action, table.c.reason, count)
        .where(table.c.replay_id == replay_id)
        .group_by(table.c.action, table.c.reason)
        .order_by(count.desc(), table.c.action, table.c.reason)
    )
    with database.reading() as connection:
        return [(row[0], row[1], row[2]) for row in connection.execute(query)]


def is_as_planned(database: Database, replay: Replay) -> bool:
    """Tell whether the plan is still what its digest was made of."""
    header = Header(**{name: getattr(replay, name) for name in Header.__dataclass_fields__})
    digest, after = _digest_of(header), 0
    names = Item.__dataclass_fields__
    while rows := read_items(database, replay.replay_id, after=after, limit=_BATCH):
        for row in rows:
            digest.update(_canonical(row["number"], {name: row[name] for name in names}))
        after = int(rows[-1]["number"])
    return bool(digest.hexdigest() == replay.digest)


def command(database: Database, replay: Replay, verb: str, *, by: str, now: datetime) -> str:
    """Do what a person says: `run`, `pause`, `resume`, `cancel`; gives the new state.

    Raises PermanentError when it cannot be done from the state it is in, or when the plan is not what it was.
    """
    before, after = _MAY[verb]
    if verb in {"run", "resume"} and not is_as_planned(database, replay):
        raise PermanentError(f"replay {replay.replay_id}: the plan is no longer what its digest says; plan again")
    with effect("replay.state"), database.transaction() as connection:
        here = sa.and_(replays.c.replay_id == replay.replay_id, replays.c.state.in_(before))
        values: dict[str, Any] = {"state": after, "note": ""}
        if verb == "run":
            values |= {"run_by": by, "started": now.isoformat()}
        if connection.execute(replays.update().where(here).values(**values)).rowcount == 0:
            state = connection.execute(
                sa.select(replays.c.state).where(replays.c.replay_id == replay.replay_id)
            ).scalar_one()
            raise PermanentError(f"replay {replay.replay_id} is {state}; {verb} needs it to be {' or '.join(before)}")
        if verb == "cancel":
            left = sa.and_(replay_items.c.replay_id == replay.replay_id, replay_items.c.state == PLANNED)
            connection.execute(replay_items.update().where(left).values(state=CANCELLED))
            end(connection, replay.replay_id, CANCELLED, now=now, reason=f"by {by}")
    return after


def end(connection: sa.Connection, replay_id: str, state: str, *, now: datetime, reason: str) -> None:
    """Bring a replay to its end, or to a stop, and say so, within the caller's transaction."""
    here = replays.c.replay_id == replay_id
    lock(connection, "replay", replay_id)
    counted = sa.select(replay_items.c.state, sa.func.count()).where(replay_items.c.replay_id == replay_id)
    counts: dict[str, int] = {row[0]: row[1] for row in connection.execute(counted.group_by(replay_items.c.state))}
    connection.execute(
        replays.update()
        .where(here)
        .values(state=state, note=reason, finished=now.isoformat(), sequence=replays.c.sequence + 1)
    )
    row = connection.execute(sa.select(replays.c.sequence, replays.c.digest).where(here)).one()
    event = events.ReplayFinished(
        subject=replay_id,
        sequence=row.sequence,
        time=now,
        source=SOURCE,
        state=state,
        plan_digest=row.digest,
        done=counts.get(DONE, 0),
        failed=counts.get(FAILED, 0),
        left=counts.get(PLANNED, 0) + counts.get(ORDERED, 0) + counts.get(CANCELLED, 0),
        reason=reason,
    )
    record_events(connection, [event])
