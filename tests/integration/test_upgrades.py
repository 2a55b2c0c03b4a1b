"""What tables of older versions held is there, and means the same, after an upgrade."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from support.postgres import url_in

from clarion import events
from clarion.adapters import outbox
from clarion.adapters.database import Database
from clarion.adapters.memory import ManualClock, MemoryStore
from clarion.codec import decode, encode
from clarion.model import ObjectRef
from clarion.testing.suites import MOMENT
from console.schema import create_tables
from gateway import groups, tables
from gateway.jobs import GroupJobs
from gateway.queries import list_studies
from gateway.removal import Remover
from gateway.removal_plan import plan
from gateway.retention import Policy

if TYPE_CHECKING:
    from pathlib import Path

    from clarion.adapters.schema import Schema

pytestmark = pytest.mark.usefixtures("each_database")
SAID = [
    events.GroupDiscarded(
        subject="g", sequence=one, time=MOMENT, source="gateway", revision=1, reason="no", studies=("1",)
    )
    for one in (1, 2, 3)
]


def at_version(folder: Path, schema: Schema, version: str) -> Schema:
    """Give a stage's schema as it was at a version: without the later migrations."""
    older = folder / f"{schema.stage}-{version}"
    older.mkdir()
    for path in schema.folder.glob("m*.py"):
        if path.name[1:5] <= version:
            shutil.copy(path, older)
    return replace(schema, folder=older, head=version)


def empty(folder: Path) -> Database:
    """Give a database without a table: one on a server comes with all of them."""
    database = Database(url_in(folder))
    if not database.is_sqlite:
        with database.transaction() as connection:
            connection.execute(sa.schema.DropSchema("public", cascade=True))
            connection.execute(sa.schema.CreateSchema("public"))
    return database


def insert(connection: sa.Connection, table: str, row: dict[str, Any]) -> None:
    """Insert a row into a table as it was, whatever the code says of it today."""
    connection.execute(sa.table(table, *map(sa.column, row)).insert().values(**row))


def test_events_have_their_sequences_and_positions_go_on(tmp_path: Path) -> None:
    """Bites: an event that is said twice; a position given a second time, which its readers have passed."""
    database = empty(tmp_path)
    database.create(at_version(tmp_path, outbox.SCHEMA, "0001"))
    with database.transaction() as connection:
        for event in SAID:
            record = encode(event)
            row = {"event_id": event.event_id, "kind": event.kind, "subject": event.subject, "time": "then",
                   "headers": json.dumps(record.headers), "body": record.body}  # fmt: skip
            insert(connection, "events", row)
        connection.execute(outbox.events_table.delete().where(outbox.events_table.c.position == 3))
    create_tables(database)
    position, sequence = outbox.events_table.c.position, outbox.events_table.c.sequence
    with database.transaction() as connection:
        assert connection.execute(sa.select(position, sequence).order_by(position)).all() == [(1, 1), (2, 2)]
        assert outbox.record_events(connection, SAID) == 1
        assert connection.execute(sa.select(sa.func.max(position))).scalar_one() > 3
    found = [outbox.find_record(database, one.subject, one.event_id) for one in SAID]
    assert [decode(one) for one in found if one is not None] == SAID


def test_groups_keep_their_members_and_studies(tmp_path: Path) -> None:
    database = empty(tmp_path)
    database.create(at_version(tmp_path, tables.SCHEMA, "0001"))
    group = {"group_id": "g", "called_ae": "AE", "rule": "r", "key": "k", "epoch": 0, "state": groups.OPEN,
             "revision": 1, "sequence": 3, "opened": "then", "last_received": "then", "check_at": "then",
             "reason": ""}  # fmt: skip
    with database.transaction() as connection:
        insert(connection, "groups", group)
        for uid, study in (("1.1", "1"), ("1.2", "1"), ("2.1", "2")):
            row = {"group_id": "g", "sop_instance_uid": uid, "digest": f"d{uid}", "study_uid": study}
            insert(connection, "group_members", row)
    create_tables(database)
    member = tables.members.c
    with database.reading() as connection:
        assert groups.studies_of(connection, "g") == ("1", "2")
        found = connection.execute(sa.select(member.sop_instance_uid, member.digest).order_by(member.digest)).all()
    assert found == [("1.1", "d1.1"), ("1.2", "d1.2"), ("2.1", "d2.1")]


def test_a_group_that_an_older_version_closed_has_its_retention(tmp_path: Path) -> None:
    """Bites: a column without a default; what its revision triggered, taken for nothing before the event was read."""
    database = empty(tmp_path)
    database.create(at_version(tmp_path, tables.SCHEMA, "0004"))
    then = (MOMENT - timedelta(days=30)).isoformat()
    rows = {
        "groups": {"group_id": "g", "called_ae": "AE", "rule": "r", "key": "k", "epoch": 0, "state": groups.CLOSED,
                   "revision": 1, "sequence": 3, "opened": then, "last_received": then, "closed": then,
                   "check_at": then, "reason": "quiet"},
        "group_revisions": {"group_id": "g", "revision": 1, "manifest": "{}", "manifest_digest": "d", "instances": 1,
                            "closed": then},
        "group_members": {"group_id": "g", "sop_instance_uid": "1.1", "digest": "d"},
        "group_studies": {"group_id": "g", "study_uid": "1"},
        "studies": {"study_uid": "1", "sequence": 1, "first_received": then, "last_received": then},
        "instances": {"sop_instance_uid": "1.1", "digest": "d", "study_uid": "1", "series_uid": "1.0",
                      "sop_class_uid": "1.2", "transfer_syntax_uid": "1.2", "calling_ae": "A", "called_ae": "AE",
                      "received": then, "object": json.dumps({"location": "file:d", "digest": "d", "size_bytes": 5}),
                      "attributes": "{}", "state": "grouped", "reason": "", "conflicted": False},
    }  # fmt: skip
    with database.transaction() as connection:
        for table, row in rows.items():
            insert(connection, table, row)
    create_tables(database)

    def look() -> int:
        remover = Remover(database, MemoryStore(), ManualClock(MOMENT), Policy())
        while remover.step(MOMENT):
            pass
        return list_studies(database)[0].removed

    assert look() == 0
    (held,) = plan(database, Policy(), MOMENT).held
    assert (held.instances, held.size_bytes) == (1, 5)
    closed = events.GroupClosed(
        subject="g", sequence=2, time=MOMENT, source="gateway", rule="r", called_ae="AE", revision=1, instances=1,
        manifest=ObjectRef(location="m", digest="m", size_bytes=1), reason="", triggers=(), studies=("1",),
    )  # fmt: skip
    GroupJobs(database).handle(closed)
    with database.transaction() as connection:
        connection.execute(tables.groups.update().values(check_at=then))
    assert look() == 1
