"""The ports in memory: for tests, simulations and one-process uses. The same contract suites run over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clarion.codec import decode, encode
from clarion.digests import digest_of
from clarion.errors import MissingObjectError
from clarion.model import ObjectRef
from clarion.patience import PATIENCE_S, TRIES, Patience, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime, timedelta

    from clarion.codec import Record
    from clarion.events import Event
    from clarion.plugins import StreamHandler
    from clarion.ports import Clock


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self, start: datetime) -> None:
        self._now = start
        self._elapsed_s = 0.0

    def now(self) -> datetime:
        """Give the time it was last moved to."""
        return self._now

    def monotonic(self) -> float:
        """Give the seconds it was moved by."""
        return self._elapsed_s

    def advance(self, step: timedelta) -> None:
        """Move it."""
        self._now += step
        self._elapsed_s += step.total_seconds()


class MemoryStore:
    """An object store in memory."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    def put(self, data: bytes) -> ObjectRef:
        """Keep the data."""
        digest = digest_of(data)
        self._objects[digest] = bytes(data)
        return ObjectRef(location=f"memory:{digest}", digest=digest, size_bytes=len(data))

    def read_head(self, ref: ObjectRef, count: int) -> bytes:
        """Give the beginning of an object."""
        return self.read(ref)[:count]

    def read(self, ref: ObjectRef) -> bytes:
        """Give an object's bytes."""
        if ref.digest not in self._objects:
            raise MissingObjectError(f"object {ref.digest[:16]} is not in the store")
        return self._objects[ref.digest]

    def restore(self, ref: ObjectRef, data: bytes) -> None:
        """Keep the bytes of a reference."""
        self._objects[ref.digest] = bytes(data)

    def remove(self, refs: Iterable[ObjectRef]) -> None:
        """Remove nothing: whatever is here is shared by its digest."""

    def is_whole(self, ref: ObjectRef) -> bool:
        """Tell whether the object is there."""
        return ref.digest in self._objects


@dataclass(slots=True)
class _Subscription:
    kinds: frozenset[str]
    handler: StreamHandler
    patience: Patience
    position: int = 0


class MemoryBus:
    """A bus in memory, in one process; `dead_letters` holds what handlers could not bear, with the reason."""

    def __init__(self, clock: Clock, *, tries: int = TRIES, patience_s: float = PATIENCE_S) -> None:
        self._clock = clock
        self._tries = tries
        self._patience_s = patience_s
        self._records: list[Record] = []
        self._seen: set[str] = set()
        self._subscriptions: dict[str, _Subscription] = {}
        self.dead_letters: list[tuple[str, Record, str]] = []

    def publish(self, events: Iterable[Event]) -> None:
        """Keep the events."""
        for record in map(encode, events):
            if record.headers["ce_id"] not in self._seen:
                self._seen.add(record.headers["ce_id"])
                self._records.append(record)

    def subscribe(self, consumer: str, kinds: Iterable[type[Event]], handler: StreamHandler) -> None:
        """Let the handler see the events of the kinds."""
        patience = Patience(self._tries, self._patience_s)
        self._subscriptions[consumer] = _Subscription(frozenset(kind.kind for kind in kinds), handler, patience)

    def step(self) -> bool:
        """Hand each handler what is waiting for it."""
        moved = [self._advance(name, one) for name, one in self._subscriptions.items()]
        return any(moved)

    def close(self) -> None:
        """Forget the subscriptions."""
        self._subscriptions.clear()

    def _advance(self, name: str, subscription: _Subscription) -> bool:
        moved = False
        patience = subscription.patience
        while subscription.position < len(self._records) and self._clock.monotonic() >= patience.paused_until:
            record = self._records[subscription.position]
            if record.headers["ce_type"] in subscription.kinds and not self._handle(name, subscription, record):
                return True
            subscription.position, moved = subscription.position + 1, True
        return moved

    def _handle(self, name: str, subscription: _Subscription, record: Record) -> bool:
        try:
            self.publish(subscription.handler.handle(decode(record)))
        except Exception as error:  # noqa: BLE001  the contract of EventBus; `Patience` tells the kinds apart
            if subscription.patience.pause_after(error, self._clock.monotonic()) is not None:
                return False
            self.dead_letters.append((name, record, reason_of(error)))
        subscription.patience.reset()
        return True
