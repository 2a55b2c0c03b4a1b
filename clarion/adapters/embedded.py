"""The embedded bus: the table `events` is the bus; a consumer moves on after what its handler gave is committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.adapters import outbox
from clarion.adapters.deadletters import redrive
from clarion.adapters.handover import Handover
from clarion.adapters.outbox import ORIGIN, events_table
from clarion.patience import PATIENCE_S, TRIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from clarion.adapters.database import Database
    from clarion.adapters.deadletters import DeadLetter
    from clarion.codec import Record
    from clarion.events import Event
    from clarion.plugins import StreamHandler
    from clarion.ports import Clock

_BATCH = 200
_PASSED_OVER = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerLag:
    """How far a consumer is behind the end of the table, in events of any kind."""

    consumer: str
    behind: int


class EmbeddedBus:
    """The EventBus over the `events` table. One thread at a time; several processes at once."""

    def __init__(self, database: Database, clock: Clock, *, tries: int = TRIES, patience_s: float = PATIENCE_S) -> None:
        self._database = database
        self._clock = clock
        self._tries = tries
        self._patience_s = patience_s
        self._subscriptions: dict[str, Handover] = {}
        # How far events that a consumer does not want were passed over, beyond what the table says.
        self._passed: dict[str, int] = {}
        database.create(outbox.SCHEMA)

    def publish(self, events: Iterable[Event]) -> None:
        """Make the events durable."""
        outbox.publish(self._database, events)

    def subscribe(self, consumer: str, kinds: Iterable[type[Event]], handler: StreamHandler) -> None:
        """Let the handler see every event of the kinds, from the first one."""
        names = frozenset(kind.kind for kind in kinds)
        self._subscriptions[consumer] = Handover(
            self._database, self._clock, consumer, names, handler, self._tries, self._patience_s
        )

    def step(self) -> bool:
        """Hand a batch of what is waiting to each handler."""
        moved = [self._advance(name, one) for name, one in self._subscriptions.items()]
        handlers = {name: one.handler for name, one in self._subscriptions.items()}
        return redrive(self._database, handlers, self._origin) or any(moved)

    def close(self) -> None:
        """Forget the subscriptions; their positions are kept."""
        self._subscriptions.clear()

    def _origin(self, letter: DeadLetter) -> Record | None:
        return outbox.find_record(self._database, letter.event_id)

    def _advance(self, consumer: str, hand: Handover) -> bool:
        if hand.rests(ORIGIN, 0):
            return False
        start, rows, last = self._waiting(consumer, sorted(hand.kinds))
        handed = hand.hand_rows(rows, ORIGIN)
        stopped = handed < len(rows)
        position = int(str(rows[handed - 1].position)) if handed else start
        if not stopped and len(rows) < _BATCH:
            position = max(position, last)
        if handed or not self._passes_over(consumer, start, position):
            self._passed.pop(consumer, None)
            if position > start:
                outbox.keep_position(self._database, consumer, position)
        return bool(rows) and not stopped

    def _passes_over(self, consumer: str, start: int, position: int) -> bool:
        """Tell whether a position is only remembered: events of other kinds come, and a commit for each would be dear.

        When no more come, or many have, it is kept.
        """
        before = self._passed.get(consumer, start)
        self._passed[consumer] = position
        return before < position < start + _PASSED_OVER

    def _waiting(self, consumer: str, kinds: list[str]) -> tuple[int, Sequence[sa.Row[tuple[object, ...]]], int]:
        start = outbox.position_of(self._database, consumer)
        with self._database.reading() as connection:
            last = connection.execute(sa.select(sa.func.max(events_table.c.position))).scalar() or 0
            rows = outbox.read_after(connection, start, _BATCH, kinds)
        return start, rows, last


def read_lag(database: Database) -> list[ConsumerLag]:
    """Tell how far each consumer is behind."""
    with database.reading() as connection:
        last = connection.execute(sa.select(sa.func.max(events_table.c.position))).scalar() or 0
        rows = connection.execute(sa.select(outbox.consumers).order_by(outbox.consumers.c.consumer)).all()
    # Names with a colon are marks that the bus on Kafka keeps beside the handlers' positions.
    rows = [row for row in rows if ":" not in row.consumer]
    return [ConsumerLag(consumer=row.consumer, behind=max(0, last - row.position)) for row in rows]
