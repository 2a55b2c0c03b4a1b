"""Handing one record to a handler, the same on every bus: published, paused, or set aside with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from clarion.adapters import outbox
from clarion.adapters.deadletters import Place, bury
from clarion.codec import decode, is_known
from clarion.errors import describe
from clarion.patience import PATIENCE_S, TRIES, Patience

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sqlalchemy as sa

    from clarion.adapters.database import Database
    from clarion.codec import Record
    from clarion.plugins import StreamHandler
    from clarion.ports import Clock

log = structlog.get_logger()


@dataclass(slots=True)
class Handover:
    """A handler with its name, what it wants to see, and how patient each place of its records is."""

    database: Database
    clock: Clock
    consumer: str
    kinds: frozenset[str]
    handler: StreamHandler
    tries: int = TRIES
    patience_s: float = PATIENCE_S
    _patience: dict[tuple[str, int], Patience] = field(default_factory=dict)

    def rests(self, origin: str, partition: int) -> bool:
        """Tell whether the place rests since its handler asked for time."""
        return self._of(origin, partition).paused_until > self.clock.monotonic()

    def hand(self, record: Record, place: Place) -> bool:
        """Hand a record over; tell whether the position may pass it. What the handler gave is durable then.

        Lets BusUnavailableError pass only when not even a dead letter can be written.
        """
        kind = record.headers.get("ce_type", "")
        if kind not in self.kinds and is_known(kind):
            return True
        patience = self._of(place.origin, place.partition)
        try:
            outbox.publish(self.database, self.handler.handle(decode(record)), cause=record.key)
        except Exception as error:  # noqa: BLE001  the contract of EventBus; `Patience` tells the kinds apart
            pause_s = patience.pause_after(error, self.clock.monotonic())
            if pause_s is not None:
                log.warning("handler.paused", consumer=self.consumer, kind=kind, error=describe(error), pause_s=pause_s)
                return False
            now = self.clock.now()
            bury(self.database, self.consumer, place, record, error=error, tries=patience.failed, now=now)
        patience.reset()
        return True

    def hand_rows(self, rows: Sequence[sa.Row[tuple[object, ...]]], origin: str) -> int:
        """Hand rows of the table of events over in order, up to one that has to wait; gives how many were handed."""
        for count, row in enumerate(rows):
            place = Place(origin=origin, partition=0, position=int(str(row.position)))
            if not self.hand(outbox.record_of(row), place):
                return count
        return len(rows)

    def _of(self, origin: str, partition: int) -> Patience:
        key = (origin, partition)
        if key not in self._patience:
            self._patience[key] = Patience(self.tries, self.patience_s)
        return self._patience[key]
