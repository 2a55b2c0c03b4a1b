"""Event <-> record: CloudEvents attribute names as headers, the event's own fields as a JSON body, subject as key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from clarion import events
from clarion.errors import InvalidEventError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clarion.events import Event

_KINDS = {kind.kind: kind for kind in events.ALL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What lies on a bus: key, headers, body."""

    key: str
    headers: Mapping[str, str]
    body: bytes


_ADAPTERS: dict[str, TypeAdapter[Any]] = {}


def _adapter(kind: type[Event]) -> TypeAdapter[Any]:
    """Make a type's adapter when it is first needed; making all of them at once would slow every start."""
    if kind.kind not in _ADAPTERS:
        _ADAPTERS[kind.kind] = TypeAdapter(kind)
    return _ADAPTERS[kind.kind]


def encode(event: Event) -> Record:
    """Write an event as a record."""
    headers = {
        "ce_specversion": "1.0",
        "ce_id": event.event_id,
        "ce_type": event.kind,
        "ce_source": event.source,
        "ce_time": event.time.isoformat(),
        "content-type": "application/json",
    }
    return Record(key=event.subject, headers=headers, body=_adapter(type(event)).dump_json(event))


def is_known(kind: str) -> bool:
    """Tell whether this version reads events of the type."""
    return kind in _KINDS


def decode(record: Record) -> Event:
    """Read a record; unknown fields are passed over. Raises InvalidEventError."""
    kind = _KINDS.get(record.headers.get("ce_type", ""))
    if kind is None:
        raise InvalidEventError(f"unknown event type {record.headers.get('ce_type')!r}")
    try:
        event: Event = _adapter(kind).validate_json(record.body)
    except ValidationError as error:
        raise InvalidEventError(f"{kind.kind}: {error.error_count()} fields cannot be read") from error
    if event.subject != record.key or event.event_id != record.headers.get("ce_id"):
        raise InvalidEventError(f"{kind.kind}: key or id contradicts the body")
    return event


def json_schema(kind: type[Event]) -> dict[str, Any]:
    """Give the JSON Schema of an event type's body."""
    schema = _adapter(kind).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": kind.kind, **schema}
