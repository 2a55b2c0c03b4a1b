"""What the stages need from the world: a bus, an object store, a clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from clarion.events import Event
    from clarion.model import ObjectRef
    from clarion.plugins import StreamHandler


class EventBus(Protocol):
    """Carries events at least once, in order per subject.

    A handler's outgoing events are published before the incoming event counts as handled. A handler that raises a
    TransientError gets the same event again after `retry_after_s`, for an hour; a PermanentError makes a dead letter;
    anything else is tried a few times and then makes a dead letter.
    """

    def publish(self, events: Iterable[Event]) -> None:
        """Make the events durable; an event published before is passed over. Raises BusUnavailableError."""

    def subscribe(self, consumer: str, kinds: Iterable[type[Event]], handler: StreamHandler) -> None:
        """Let the handler see every event of the kinds, from the first one; its position is kept under `consumer`."""

    def step(self) -> bool:
        """Hand what is waiting to the handlers, a bounded number of events; tell whether there was any."""

    def close(self) -> None:
        """Leave; others take over at once what was subscribed here. The bus is not used afterwards."""


class ObjectStore(Protocol):
    """Keeps bytes under references of its own making."""

    def put(self, data: bytes) -> ObjectRef:
        """Keep the data, durable on return; the same data, the same reference. Raises StoreUnavailableError."""

    def read(self, ref: ObjectRef) -> bytes:
        """Give the bytes of the reference, as they were put.

        Raises MissingObjectError when they are not there or have changed, StoreUnavailableError when they cannot be
        read now.
        """

    def read_head(self, ref: ObjectRef, count: int) -> bytes:
        """Give up to `count` bytes from the beginning, not compared with the digest; errors as `read`."""


class ReceiptStore(ObjectStore, Protocol):
    """An object store whose receipts have bytes of their own, which can be put back, and removed."""

    def restore(self, ref: ObjectRef, data: bytes) -> None:
        """Put the bytes of a reference where its readers find them, durable on return. Raises StoreUnavailableError."""

    def remove(self, refs: Iterable[ObjectRef]) -> None:
        """Remove the bytes of receipts that nothing refers to any more; twice is harmless, also for what is shared.

        Raises StoreUnavailableError.
        """

    def is_whole(self, ref: ObjectRef) -> bool:
        """Tell whether an object can be read as it was; however large it is, little memory is taken."""


class Clock(Protocol):
    """The time: `now` for what is stored, `monotonic` for durations."""

    def now(self) -> datetime:
        """Give the present time, UTC, with microseconds."""

    def monotonic(self) -> float:
        """Give seconds since some fixed moment, never running backwards."""
