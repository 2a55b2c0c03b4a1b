"""Write what is generated from the events: docs/schemas, docs/asyncapi.json, and golden records of new types.

A golden record is never written again: it is what a released version has put on the topics (F35).
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clarion.codec import encode, json_schema
from clarion.events import ALL, Event, InstanceStatus
from clarion.model import ObjectRef, Trigger
from console.asyncapi import make_document

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
VALUES: dict[Any, Any] = {
    int: 7,
    str: "text",
    bool: True,
    datetime: datetime(2026, 11, 25, 6, 30, 15, 123456, tzinfo=UTC),
    ObjectRef: ObjectRef(location="file:ab/cd", digest="ab" * 32, size_bytes=1234),
    Trigger: Trigger(pipeline_id="chest-ct", name="chest"),
    InstanceStatus: InstanceStatus(sop_instance_uid="1.2.3", status=0),
}


def example(kind: type[Event]) -> Event:
    """Make an event of a type, every field with a value."""
    hints = typing.get_type_hints(kind)
    return kind(**{one.name: _value(hints[one.name]) for one in dataclasses.fields(kind)})


def _value(hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        return (_value(typing.get_args(hint)[0]),)
    if isinstance(hint, types.UnionType):
        return _value(typing.get_args(hint)[0])
    return VALUES[hint]


def main() -> None:
    schemas = ROOT / "docs" / "schemas"
    for kind in ALL:
        (schemas / f"{kind.kind}.json").write_text(json.dumps(json_schema(kind), indent=2) + "\n")
        golden = GOLDEN / f"{kind.kind}.json"
        if not golden.exists():
            record = encode(example(kind))
            described = {"key": record.key, "headers": dict(record.headers), "body": record.body.decode()}
            golden.write_text(json.dumps(described, indent=1) + "\n")
    (ROOT / "docs" / "asyncapi.json").write_text(json.dumps(make_document(), indent=1) + "\n")


if __name__ == "__main__":
    main()
