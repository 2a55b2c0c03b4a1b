"""F07: a bit turns in the store. It is found, it is never handed out, and a second copy repairs it."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import sqlalchemy as sa
from support.delivering import Rig, peer
from support.processes import clarion
from support.receiving import Receiving

from clarion.adapters.database import Database
from clarion.adapters.objects import FileStore, segment_path
from clarion.errors import MissingObjectError, StoreUnavailableError
from clarion.model import ObjectRef
from gateway import scrubbing, tables
from gateway.scrubbing import referred, repair, scrub

OBJECTS = 200


def turn_a_bit(store: FileStore, ref: ObjectRef, journal: Path, rng: random.Random) -> None:
    kind, _, place = ref.location.partition(":")
    if kind == "segment":
        log, number, offset = place.split("/")
        path, start = segment_path(journal / log, int(number)), int(offset)
    else:
        path, start = store._path(ref.digest), 0
    at = start + rng.randrange(ref.size_bytes)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


@pytest.fixture
def received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Receiving:
    rig = Receiving(tmp_path, monkeypatch)
    for number in range(OBJECTS):
        rig.receive(f"1.2.{number}")
    rig.settle()
    return rig


def test_every_turned_bit_is_found_and_nothing_of_it_is_read(received: Receiving) -> None:
    """200 of 200, and no more. Bites: compare sizes instead of digests, and none is found."""
    rng, store = random.Random(7), received.store
    database = Database(f"sqlite:///{received.root / 'clarion.db'}")
    with database.reading() as connection:
        refs = {
            row.sop_instance_uid: ObjectRef(**row.object) for row in connection.execute(sa.select(tables.instances))
        }
    assert scrub(referred(database), store) == []
    victims = rng.sample(sorted(refs), 100)
    for uid in victims:
        turn_a_bit(store, refs[uid], received.root / "journal", rng)
    found = [one.object.name for one in scrub(referred(database), store)]
    assert sorted(found) == sorted(victims)
    for uid in set(refs) - set(victims):
        turn_a_bit(store, refs[uid], received.root / "journal", rng)
    assert len(scrub(referred(database), store)) == OBJECTS
    for ref in refs.values():
        with pytest.raises(MissingObjectError):
            store.read(ref)


def test_where_the_disk_cannot_be_read_a_second_copy_is(received: Receiving, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO at one instance. Bites: let the error of the first place out, and the copy beside it is never looked at."""
    database, store = Database(f"sqlite:///{received.root / 'clarion.db'}"), received.store
    ones = [one for one in referred(database) if one.what == "instance"]
    data, bad = store.read(ones[0].ref), ones[0].ref
    reading = os.pread

    def failing(file: int, count: int, offset: int) -> bytes:
        if (count, offset) == (bad.size_bytes, int(bad.location.rsplit("/", 1)[1])):
            raise OSError(errno.EIO, "Input/output error")
        return reading(file, count, offset)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(StoreUnavailableError):
        store.read(bad)
    damaged = scrub(referred(database), store)
    assert [one.object.name for one in damaged] == [ones[0].name], "and the rest was looked at"
    store.put(data)
    assert store.read(bad) == data
    assert scrub(referred(database), store) == []


def test_a_copy_that_the_disk_cannot_read_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path / "objects")
    ref = store.put(b"12345678")
    before = store._path(ref.digest).stat().st_ino
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", _cannot)
        assert store.put(b"12345678") == ref
    assert store._path(ref.digest).stat().st_ino != before
    assert store.read(ref) == b"12345678"


def _cannot(_: Path) -> bytes:
    raise OSError(errno.EIO, "Input/output error")


def test_the_check_reads_page_by_page(received: Receiving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, whatever the length of a page. Bites: begin a page at its last row, or by half of a key."""
    database = Database(f"sqlite:///{received.root / 'clarion.db'}")
    whole = list(referred(database))
    assert len(whole) >= OBJECTS
    for rows in (1, 7, len(whole)):
        monkeypatch.setattr(scrubbing, "_ROWS", rows)
        assert list(referred(database)) == whole


def test_what_is_damaged_is_never_forwarded(tmp_path: Path) -> None:
    rng, store = random.Random(7), FileStore(tmp_path / "objects")
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port, store=store, max_retries=0)
        rig.request(count=OBJECTS)
        rig.bus.step()
        with rig.database.reading() as connection:
            rows = connection.execute(sa.select(tables.delivery_instances.c.described)).scalars().all()
        for described in rows:
            turn_a_bit(store, ObjectRef(**described["object"]), tmp_path / "journal", rng)
        row = rig.settle()
        assert row.state == "failed"
        assert f"{OBJECTS} of {OBJECTS} instances" in row.reason
        assert "cannot be sent" in row.reason
        assert pacs.stored == {}


def test_a_study_that_is_sent_again_repairs_what_was_damaged(received: Receiving) -> None:
    rng = random.Random(7)
    database = Database(f"sqlite:///{received.root / 'clarion.db'}")
    with database.reading() as connection:
        refs = [ObjectRef(**row) for row in connection.execute(sa.select(tables.instances.c.object)).scalars()]
    for ref in refs[:20]:
        turn_a_bit(received.store, ref, received.root / "journal", rng)
    damaged = scrub(referred(database), received.store)
    assert [one.repaired for one in repair(damaged, received.root / "journal", received.store)] == [False] * 20
    for one in damaged[:15]:
        received.receive(one.object.name)
    again = repair(damaged, received.root / "journal", received.store)
    assert [one.repaired for one in again] == [True] * 15 + [False] * 5
    assert len(scrub(referred(database), received.store)) == 5


def test_as_a_person_checks_the_store(received: Receiving) -> None:
    config = received.root / "clarion.yaml"
    config.write_text("data: .\n")
    (received.root / "run").mkdir(exist_ok=True)
    good = clarion("store", "check", "-c", config)
    assert (good.returncode, good.stdout) == (0, f"{OBJECTS} objects, 0 damaged, 0 repaired\n")
    with segment_path(received.folder, 1).open("r+b") as file:
        file.seek(1500)
        file.write(b"\xff\xfe\xfd")
    bad = clarion("store", "check", "-c", config, "--json")
    assert bad.returncode == 1
    (one,) = json.loads(bad.stdout)["damaged"]
    assert (one["what"], one["name"], one["study_uid"]) == ("instance", "1.2.0", "1.2.9")
    received.receive("1.2.0")
    mended = clarion("store", "check", "-c", config, "--repair")
    assert mended.returncode == 0
    assert f"{OBJECTS} objects, 0 damaged, 1 repaired" in mended.stdout
