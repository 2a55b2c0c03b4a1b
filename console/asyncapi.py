"""The AsyncAPI 3 document of what Clarion says on Kafka, made from `clarion.events`; `docs/asyncapi.json` is a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clarion.adapters.topics import TOPICS, family_of
from clarion.codec import json_schema
from clarion.events import ALL

if TYPE_CHECKING:
    from clarion.events import Event

_KEYS = {
    "studies": "the Study Instance UID, or `unknown`",
    "groups": "the group id",
    "jobs": "the job id",
    "deliveries": "the delivery id",
    "replays": "the replay id",
}
_HEADERS = {
    "type": "object",
    "required": ["ce_specversion", "ce_id", "ce_type", "ce_source", "ce_time", "content-type", "traceparent"],
    "properties": {
        "ce_specversion": {"type": "string", "const": "1.0"},
        "ce_id": {"type": "string", "format": "uuid", "description": "derived from type, subject and sequence"},
        "ce_type": {"type": "string"},
        "ce_source": {"type": "string", "description": "the stage that says it"},
        "ce_time": {"type": "string", "format": "date-time"},
        "content-type": {"type": "string", "const": "application/json"},
        "traceparent": {"type": "string", "pattern": "^00-[0-9a-f]{32}-[0-9a-f]{16}-01$"},
    },
}


def make_document(prefix: str = "clarion") -> dict[str, Any]:
    """Give the document; `prefix` is `bus.kafka.prefix`."""
    channels: dict[str, Any] = {}
    for name in TOPICS:
        kinds = [kind for kind in ALL if family_of(kind.kind) == name]
        channels[name] = {
            "address": f"{prefix}.{name}",
            "description": f"The record's key is {_KEYS[name]}; order is kept per key. At least once.",
            "messages": {kind.kind: {"$ref": f"#/components/messages/{kind.kind}"} for kind in kinds},
            "bindings": {"kafka": {"topic": f"{prefix}.{name}"}},
        }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Clarion's events",
            "version": "1",
            "description": "CloudEvents 1.0 in binary mode. A new field has a default; anything else is a new type. "
            "No pixel data, no patient name, no patient id.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": {
            name: {"action": "send", "channel": {"$ref": f"#/channels/{name}"}, "summary": f"What became of {name}"}
            for name in TOPICS
        },
        "components": {"messages": {kind.kind: _message(kind, _KEYS[family_of(kind.kind)]) for kind in ALL}},
    }


def _message(kind: type[Event], key: str) -> dict[str, Any]:
    return {
        "name": kind.kind,
        "title": kind.__name__,
        "summary": " ".join((kind.__doc__ or "").split()),
        "contentType": "application/json",
        "headers": {**_HEADERS, "properties": {**_HEADERS["properties"], "ce_type": {"const": kind.kind}}},  # type: ignore[dict-item]
        "payload": {
            "schemaFormat": "application/schema+json;version=draft-2020-12",
            "schema": json_schema(kind),
        },
        "bindings": {"kafka": {"key": {"type": "string", "description": key}}},
    }
