"""Which topic an event goes to: few, named after what the event's subject is. Nothing of a vendor's is named here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.events import Event

TOPICS = ("studies", "groups", "jobs", "deliveries", "replays")

_BY_KIND = {
    "instance": "studies",
    "association": "studies",
    "group": "groups",
    "job": "jobs",
    "result.registered": "jobs",
    "result.blocked": "jobs",
    "delivery": "deliveries",
    "result.delivered": "deliveries",
    "result.verified": "deliveries",
    "replay": "replays",
}


def family_of(kind: str) -> str:
    """Give the topic's name, without prefix, of an event type as `group.closed.v1`; a subject has one topic."""
    first, _, rest = kind.partition(".")
    return _BY_KIND.get(first) or _BY_KIND[f"{first}.{rest.partition('.')[0]}"]


def topic_of(kind: str, prefix: str) -> str:
    """Give the topic of an event type as `group.closed.v1`."""
    return f"{prefix}.{family_of(kind)}"


def topics_of(kinds: Iterable[type[Event]], prefix: str) -> tuple[str, ...]:
    """Give the topics that carry some event types."""
    return tuple(sorted({topic_of(kind.kind, prefix) for kind in kinds}))
