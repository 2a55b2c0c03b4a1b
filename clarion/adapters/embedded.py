"""The embedded bus: the `events` table that every stage writes in the transaction that changes its state.

Writers are one at a time, so positions are committed in their order and a reader that remembers the last one misses
nothing. A consumer's position moves after its handler's outgoing events are committed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from clarion.codec import Record, decode, encode
from clarion.crashpoints import effect
from clarion.errors import describe
from clarion.patience import PATIENCE_S, TRIES, Patience, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from clarion.adapters.database import Database
    from clarion.events import Event
    from clarion.plugins import StreamHandler
    from clarion.ports import Clock

SCHEMA_VERSION = 1
_BATCH = 200

tables = sa.MetaData()
events_table = sa.Table(
    "events",
    tables,
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("event_id", sa.Text, nullable=False, unique=True),
    sa.Column("kind", sa.Text, nullable=False, index=True),
    sa.Column("subject", sa.Text, nullable=False, index=True),
    sa.Column("headers", sa.Text, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)
consumers = sa.Table(
    "consumers",
    tables,
    sa.Column("consumer", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
)
dead_letters = sa.Table(
    "dead_letters",
    tables,
    sa.Column("consumer", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("event_id", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("time", sa.Text, nullable=False),
)

log = structlog.get_logger()


def record_events(connection: sa.Connection, events: Iterable[Event]) -> None:
    """Write events within the caller's transaction; one that was written before is passed over."""
    rows = [
        {
            "event_id": record.headers["ce_id"],
            "kind": record.headers["ce_type"],
            "subject": record.key,
            "headers": json.dumps(dict(record.headers)),
            "body": record.body,
        }
        for record in map(encode, events)
    ]
    if rows:
        connection.execute(events_table.insert().prefix_with("OR IGNORE", dialect="sqlite"), rows)


@dataclass(slots=True)
class _Subscription:
    kinds: tuple[str, ...]
    handler: StreamHandler
    patience: Patience
    paused_until: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerLag:
    """How far a consumer is behind the end of the table, in events of any kind."""

    consumer: str
    behind: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An event that a consumer gave up, and why."""

    consumer: str
    kind: str
    subject: str
    error: str
    reason: str
    tries: int
    time: str


class EmbeddedBus:
    """The EventBus over the `events` table. One thread at a time; several processes at once."""

    def __init__(self, database: Database, clock: Clock, *, tries: int = TRIES, patience_s: float = PATIENCE_S) -> None:
        self._database = database
        self._clock = clock
        self._tries = tries
        self._patience_s = patience_s
        self._subscriptions: dict[str, _Subscription] = {}
        database.create("bus", tables, SCHEMA_VERSION)

    def publish(self, events: Iterable[Event]) -> None:
        """Make the events durable."""
        outgoing = list(events)
        if not outgoing:
            return
        with effect("bus.publish"), self._database.transaction() as connection:
            record_events(connection, outgoing)

    def subscribe(self, consumer: str, kinds: Iterable[type[Event]], handler: StreamHandler) -> None:
        """Let the handler see every event of the kinds, from the first one."""
        patience = Patience(self._tries, self._patience_s)
        self._subscriptions[consumer] = _Subscription(tuple(kind.kind for kind in kinds), handler, patience)

    def step(self) -> bool:
        """Hand a batch of what is waiting to each handler."""
        moved = [self._advance(name, one) for name, one in self._subscriptions.items()]
        return any(moved)

    def _advance(self, consumer: str, subscription: _Subscription) -> bool:
        if self._clock.monotonic() < subscription.paused_until:
            return False
        start, rows, last = self._waiting(consumer, subscription.kinds)
        position, stopped = start, False
        for row in rows:
            if not self._handle(consumer, subscription, row):
                stopped = True
                break
            position = row.position
        if not stopped and len(rows) < _BATCH:
            position = max(position, last)
        if position > start:
            self._keep_position(consumer, position)
        return bool(rows) and not stopped

    def _waiting(self, consumer: str, kinds: tuple[str, ...]) -> tuple[int, Sequence[sa.Row[tuple[object, ...]]], int]:
        with self._database.reading() as connection:
            start = connection.execute(
                sa.select(consumers.c.position).where(consumers.c.consumer == consumer)
            ).scalar_one_or_none()
            start = 0 if start is None else start
            last = connection.execute(sa.select(sa.func.max(events_table.c.position))).scalar() or 0
            rows = connection.execute(
                sa.select(events_table)
                .where(events_table.c.position > start, events_table.c.kind.in_(kinds))
                .order_by(events_table.c.position)
                .limit(_BATCH)
            ).all()
        return start, rows, last

    def _handle(self, consumer: str, subscription: _Subscription, row: sa.Row[tuple[object, ...]]) -> bool:
        """Handle one record; tell whether the position may pass it."""
        record = Record(key=str(row.subject), headers=json.loads(str(row.headers)), body=row.body)
        try:
            self.publish(subscription.handler.handle(decode(record)))
        except Exception as error:  # noqa: BLE001  the contract of EventBus; `Patience` tells the kinds apart
            pause_s = subscription.patience.pause_after(error, self._clock.monotonic())
            if pause_s is not None:
                log.warning("handler.paused", consumer=consumer, kind=row.kind, error=describe(error), pause_s=pause_s)
                subscription.paused_until = self._clock.monotonic() + pause_s
                return False
            self._bury(consumer, row, error, tries=subscription.patience.failed)
        subscription.patience.reset()
        return True

    def _bury(self, consumer: str, row: sa.Row[tuple[object, ...]], error: Exception, *, tries: int) -> None:
        log.error("handler.deadletter", consumer=consumer, kind=row.kind, error=type(error).__name__)
        letter = {
            "consumer": consumer,
            "position": row.position,
            "event_id": row.event_id,
            "kind": row.kind,
            "subject": row.subject,
            "error": type(error).__name__,
            "reason": reason_of(error),
            "tries": tries,
            "time": self._clock.now().isoformat(),
        }
        with effect("bus.deadletter"), self._database.transaction() as connection:
            connection.execute(dead_letters.insert().prefix_with("OR REPLACE", dialect="sqlite"), letter)

    def _keep_position(self, consumer: str, position: int) -> None:
        with effect("bus.position"), self._database.transaction() as connection:
            connection.execute(
                consumers.insert().prefix_with("OR REPLACE", dialect="sqlite"),
                {"consumer": consumer, "position": position},
            )


def read_lag(database: Database) -> list[ConsumerLag]:
    """Tell how far each consumer is behind."""
    with database.reading() as connection:
        last = connection.execute(sa.select(sa.func.max(events_table.c.position))).scalar() or 0
        rows = connection.execute(sa.select(consumers).order_by(consumers.c.consumer)).all()
    return [ConsumerLag(consumer=row.consumer, behind=max(0, last - row.position)) for row in rows]


def count_dead_letters(database: Database) -> int:
    """Count the dead letters."""
    with database.reading() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(dead_letters)).scalar_one())


def read_dead_letters(database: Database, limit: int = 500) -> list[DeadLetter]:
    """List the dead letters, newest first."""
    with database.reading() as connection:
        rows = connection.execute(sa.select(dead_letters).order_by(dead_letters.c.time.desc()).limit(limit)).all()
    return [
        DeadLetter(
            consumer=row.consumer,
            kind=row.kind,
            subject=row.subject,
            error=row.error,
            reason=row.reason,
            tries=row.tries,
            time=row.time,
        )
        for row in rows
    ]
