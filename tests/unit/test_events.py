"""Events on the wire: documents that follow the code, records that are read for ever (F35), one trace."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from clarion.codec import Record, decode, encode, json_schema
from clarion.errors import InvalidEventError
from clarion.events import ALL, Event
from console.asyncapi import make_document

ROOT = Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.json"))
REMEDY = "run `python tests/tools/write_schemas.py`, and see what changed: a field without a default is a new version"


def record_of(path: Path) -> Record:
    described = json.loads(path.read_text())
    return Record(key=described["key"], headers=described["headers"], body=described["body"].encode())


def test_every_type_has_a_golden_record() -> None:
    assert {path.stem for path in GOLDEN} >= {kind.kind for kind in ALL}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_records_are_read_for_ever(path: Path) -> None:
    """Bites: rename a field, or give a new one no default, and what lies on the topics cannot be read any more."""
    record = record_of(path)
    event = decode(record)
    said = json.loads(encode(event).body)
    assert said.items() >= json.loads(record.body).items()
    assert encode(event).headers.items() >= record.headers.items()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_newer_release_may_add_fields(path: Path) -> None:
    record = record_of(path)
    newer = json.dumps({**json.loads(record.body), "added_later": {"deep": [1]}}).encode()
    assert decode(Record(key=record.key, headers=record.headers, body=newer)) == decode(record)


def test_a_version_nobody_knows_is_refused_by_name() -> None:
    record = record_of(GOLDEN[0])
    with pytest.raises(InvalidEventError, match=r"unknown event type 'x\.happened\.v9'"):
        decode(Record(key=record.key, headers={**record.headers, "ce_type": "x.happened.v9"}, body=record.body))


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.kind)
def test_schemas_follow_the_code(kind: type[Event]) -> None:
    path = ROOT / "docs" / "schemas" / f"{kind.kind}.json"
    assert path.exists(), REMEDY
    assert json.loads(path.read_text()) == json.loads(json.dumps(json_schema(kind))), REMEDY


def test_asyncapi_follows_the_code_and_describes_what_is_said() -> None:
    document = json.loads((ROOT / "docs" / "asyncapi.json").read_text())
    assert document == json.loads(json.dumps(make_document())), REMEDY
    named = {name for channel in document["channels"].values() for name in channel["messages"]}
    assert named == {kind.kind for kind in ALL}
    for path in GOLDEN:
        record, message = record_of(path), document["components"]["messages"][path.stem]
        jsonschema.validate(json.loads(record.body), message["payload"]["schema"])
        headers = {**record.headers, "traceparent": f"00-{'0a' * 16}-{'0b' * 8}-01"}
        jsonschema.validate(headers, message["headers"])
