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
    from collections.abc import Iterable

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
        # By consumer: its position in the table, and how far beyond it events were passed over that it does not want.
        self._passed: dict[str, tuple[int, int]] = {}
        self._last = -1
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
        try:
            last, starts = self._look()
            moved = [self._advance(one, starts.get(name, 0), last) for name, one in self._subscriptions.items()]
            self._keep_passed(last)
        except BaseException:  # whatever it was, the database may come back as it was, and give positions anew
            self._passed.clear()
            raise
        handlers = {name: one.handler for name, one in self._subscriptions.items()}
        return redrive(self._database, handlers, self._origin) or any(moved)

    def close(self) -> None:
        """Forget the subscriptions; their positions are kept."""
        self._subscriptions.clear()
        self._passed.clear()

    def _origin(self, letter: DeadLetter) -> Record | None:
        return outbox.find_record(self._database, letter.subject, letter.event_id)

    def _look(self) -> tuple[int, dict[str, int]]:
        """Give the end of the table, and how far each consumer has come by it."""
        with self._database.reading() as connection:
            last = connection.execute(sa.select(sa.func.max(events_table.c.position))).scalar() or 0
            return last, outbox.positions_of(connection, list(self._subscriptions))

    def _advance(self, hand: Handover, start: int, last: int) -> bool:
        """Hand over what waits for a consumer between `start` and `last`; tell whether there may be more."""
        kept, passed = self._passed.get(hand.consumer, (start, start))
        begin = passed if kept == start and passed <= last else start
        if begin >= last or hand.rests(ORIGIN, 0):
            return False
        with self._database.reading() as connection:
            rows = outbox.read_after(connection, begin, _BATCH, sorted(hand.kinds), until=last)
        handed = hand.hand_rows(rows, ORIGIN)
        stopped = handed < len(rows)
        position = int(str(rows[handed - 1].position)) if handed else begin
        if not stopped and len(rows) < _BATCH:
            position = last
        if handed:
            self._passed.pop(hand.consumer, None)
            outbox.keep_position(self._database, hand.consumer, position)
        else:
            self._passed[hand.consumer] = (start, position)
        return bool(rows) and not stopped

    def _keep_passed(self, last: int) -> None:
        """Keep how far events of other kinds were passed over when no more come, or many have: not at each look."""
        no_more, self._last = last == self._last, last
        due = {
            consumer: (kept, passed)
            for consumer, (kept, passed) in self._passed.items()
            if kept < passed <= last and (no_more or passed - kept >= _PASSED_OVER)
        }
        if due:
            outbox.move_positions(self._database, due)
            self._passed = {name: one for name, one in self._passed.items() if name not in due}


def read_lag(database: Database) -> list[ConsumerLag]:
    """Tell how far each consumer is behind."""
    with database.reading() as connection:
        last = connection.execute(sa.select(sa.func.max(events_table.c.position))).scalar() or 0
        rows = connection.execute(sa.select(outbox.consumers).order_by(outbox.consumers.c.consumer)).all()
    # Names with a colon are marks that the bus on Kafka keeps beside the handlers' positions.
    rows = [row for row in rows if ":" not in row.consumer]
    return [ConsumerLag(consumer=row.consumer, behind=max(0, last - row.position)) for row in rows]
