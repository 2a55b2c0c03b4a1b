"""result.registered -> delivery.requested: one delivery per destination, each with a state of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from clarion import events
from clarion.model import derive_delivery_id

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.events import Event

SOURCE = "streams"


class Route:
    """Requests the delivery of a registered result set."""

    kinds: ClassVar = (events.ResultRegistered,)

    def handle(self, event: Event) -> Iterable[Event]:
        """Give one delivery.requested per destination."""
        if not isinstance(event, events.ResultRegistered):
            return []
        return [
            events.DeliveryRequested(
                subject=derive_delivery_id(event.subject, destination, event.set_digest),
                sequence=1,
                time=event.time,
                source=SOURCE,
                job_id=event.subject,
                destination=destination,
                result_set=event.result_set,
                instances=event.instances,
            )
            for destination in event.destinations
        ]
