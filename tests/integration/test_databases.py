"""What a server with many writers could do wrong and SQLite cannot; and what either must do the same."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from support import postgres
from support.postgres import url_in

from clarion.adapters import outbox
from clarion.adapters.database import Database, insert_many
from clarion.adapters.memory import ManualClock
from clarion.errors import BusUnavailableError, ConfigError
from clarion.events import JobRequested
from clarion.model import ObjectRef
from clarion.testing.suites import MOMENT, started
from console.schema import create_tables
from gateway import tables
from orchestrator import ledger
from orchestrator.requests import JobRequests
from streams import tables as streams_tables

pytestmark = pytest.mark.usefixtures("each_database")
METADATA = {"bus": outbox.tables, "gateway": tables.metadata, "orchestrator": ledger.metadata,
            "streams": streams_tables.metadata}  # fmt: skip


def described(database: Database) -> dict[str, Any]:
    """All that the database itself says of its tables."""
    with database.reading() as connection:
        found = sa.inspect(connection)
        return {
            name: {
                "columns": {  # by name: a column that came later is the last
                    one["name"]: {**one, "type": repr(one["type"]), "comment": None} for one in found.get_columns(name)
                },
                "key": found.get_pk_constraint(name)["constrained_columns"],
                "foreign": sorted(
                    (one["constrained_columns"], one["referred_table"]) for one in found.get_foreign_keys(name)
                ),
                "unique": sorted(tuple(one["column_names"]) for one in found.get_unique_constraints(name)),
                "indexes": sorted((one["name"], tuple(one["column_names"])) for one in found.get_indexes(name)),
            }
            for name in found.get_table_names()
            if not name.endswith("_version")
        }  # fmt: skip


def test_migrations_make_what_the_code_reads(tmp_path: Path) -> None:
    """Bites: a column that is only in the code, or only in a migration."""
    migrated, made = tmp_path / "migrated", tmp_path / "made"
    for folder in (migrated, made):
        folder.mkdir()
    one, other = Database(url_in(migrated)), Database(url_in(made))
    create_tables(one)
    with other.transaction() as connection:
        for metadata in METADATA.values():
            metadata.drop_all(connection)
            metadata.create_all(connection)
    assert described(one) == described(other)


def test_newer_tables_are_refused_and_told(tmp_path: Path) -> None:
    database = Database(url_in(tmp_path))
    create_tables(database)
    create_tables(database)
    with database.transaction() as connection:
        connection.execute(sa.text("UPDATE gateway_version SET version_num = '0999'"))
    with pytest.raises(ConfigError, match="'gateway' has tables of version 0999"):
        create_tables(database)


def test_tables_of_a_development_version_are_refused_and_told(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'old.db'}")
    with database.transaction() as connection:
        connection.execute(sa.text("CREATE TABLE schema_versions (stage TEXT)"))
    with pytest.raises(ConfigError, match="development version"):
        create_tables(database)


def test_positions_follow_the_order_of_commits(tmp_path: Path) -> None:
    """Writers that overlap hide no event from a reader that remembers the last position it saw.

    Bites: without the lock in `record_events`, PostgreSQL gives out positions before they can be read.
    """
    url = url_in(tmp_path)
    create_tables(Database(url))
    writers, each = 4, 60

    def write(number: int) -> None:
        database = Database(url)
        for count in range(1, each + 1):
            with database.transaction() as connection:
                outbox.record_events(connection, [started(f"s{number}", count)])
        database.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    reader, position, seen = Database(url), 0, []
    while True:
        ended = not any(thread.is_alive() for thread in threads)
        with reader.reading() as connection:
            rows = outbox.read_after(connection, position, 7)
        for row in rows:
            position = int(str(row.position))
            seen.append(str(row.event_id))
        if ended and not rows:
            break
    assert len(seen) == len(set(seen)) == writers * each


def test_revisions_of_a_group_that_come_side_by_side_leave_one_job(tmp_path: Path) -> None:
    """Two processes enter two revisions at the same time; the older one is superseded whoever is first.

    Bites: without the lock by group each sees only its own row.
    """
    url = url_in(tmp_path)
    create_tables(Database(url))
    ref = ObjectRef(location="l", digest="d", size_bytes=1)
    rounds, barrier = 15, threading.Barrier(2)

    def enter(revision: int) -> None:
        database = Database(url)
        handler = JobRequests(database)
        for group in range(rounds):
            event = JobRequested(
                subject=f"{group}-{revision}", sequence=1, time=MOMENT, source="t", name="n", pipeline_id="p",
                definition=ref, group_id=f"g{group}", revision=revision, manifest=ref, priority="normal",
                destinations=(), studies=("1",),
            )  # fmt: skip
            barrier.wait(30)
            handler.handle(event)
        database.close()

    threads = [threading.Thread(target=enter, args=(revision,)) for revision in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    with Database(url).reading() as connection:
        rows = connection.execute(sa.select(ledger.jobs.c.job_id, ledger.jobs.c.state)).all()
    assert sorted(tuple(row) for row in rows) == sorted(
        (f"{group}-{revision}", "superseded" if revision == 1 else "requested")
        for group in range(rounds)
        for revision in (1, 2)
    )


def test_two_engines_never_begin_the_same_attempt(tmp_path: Path) -> None:
    url = url_in(tmp_path)
    create_tables(Database(url))
    ref = ObjectRef(location="l", digest="d", size_bytes=1)
    database = Database(url)
    for number in range(10):
        JobRequests(database).handle(
            JobRequested(
                subject=f"j{number}", sequence=1, time=MOMENT, source="t", name="n", pipeline_id="p", definition=ref,
                group_id=f"g{number}", revision=1, manifest=ref, priority="normal", destinations=(), studies=("1",),
            )
        )  # fmt: skip
    begun: list[str] = []

    def work() -> None:
        mine = ledger.Ledger(Database(url), ManualClock(MOMENT))
        done: list[str] = []
        while (job := mine.next_job(done)) is not None:
            done.append(job.job_id)
            if job.state == ledger.REQUESTED and mine.start(job, ["a"]) is not None:
                begun.append(job.job_id)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(begun) == sorted(f"j{number}" for number in range(10))


def test_a_server_that_is_away_is_told_and_comes_back() -> None:
    """Every operation fails as something that may pass, and the same object works again afterwards."""
    server = postgres.start_server()
    if server.process is None:
        pytest.skip("CLARION_TEST_DATABASE names a server that is not ours to kill")
    try:
        database = Database(server.database("away"))
        outbox.publish(database, [started("a", 1)])
        server.kill()
        for _ in range(3):
            with pytest.raises(BusUnavailableError):
                outbox.publish(database, [started("a", 2)])
            with pytest.raises(BusUnavailableError):
                outbox.position_of(database, "nobody")
        server.start()
        outbox.publish(database, [started("a", 1), started("a", 2)])
        with database.reading() as connection:
            assert [row.subject for row in outbox.read_after(connection, 0, 9)] == ["a", "a"]
    finally:
        server.stop()


def test_rows_inserted_in_bulk_are_what_one_by_one_are(tmp_path: Path) -> None:
    """Bites: what the driver takes, but no type has looked at; half a character, which JSON can only escape."""
    database = Database(url_in(tmp_path))
    create_tables(database)
    row = {
        "sop_instance_uid": "1", "digest": "d", "study_uid": "1.2", "series_uid": "1.2.3", "sop_class_uid": "1",
        "transfer_syntax_uid": "1", "calling_ae": "A%s", "called_ae": "B", "received": "2026", "conflicted": True,
        "object": {"digest": "d", "size_bytes": 2**40}, "attributes": {"00100010": "Müller ☃"},
        "state": "grouped", "reason": "",
    }  # fmt: skip
    half = {**row, "sop_instance_uid": "2", "attributes": {"00100010": "\ud83d"}} if database.is_sqlite else row
    table = tables.instances
    with database.transaction() as connection:
        assert insert_many(connection, table, [row, {**row, "digest": "e"}], new_only=True) == 2
        assert insert_many(connection, table, [row, {**half, "digest": "f"}], new_only=True) == 1
        connection.execute(table.insert().values({**row, "digest": "g"}))
        assert insert_many(connection, table, []) == 0
    with database.reading() as connection:
        found = [dict(one) for one in connection.execute(sa.select(table).order_by(table.c.digest)).mappings()]
    assert found == [row, {**row, "digest": "e"}, {**half, "digest": "f"}, {**row, "digest": "g"}]


def test_a_column_that_is_not_named_in_bulk_is_refused(tmp_path: Path) -> None:
    database = Database(url_in(tmp_path))
    create_tables(database)
    with database.transaction() as connection, pytest.raises(TypeError, match="name each column"):
        insert_many(connection, tables.instances, [{"sop_instance_uid": "1", "digest": "d"}])
