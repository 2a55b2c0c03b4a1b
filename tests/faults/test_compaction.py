"""Segments go back to their writer when little in them is wanted; what is wanted stays, whenever we are killed."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import sqlalchemy as sa
from support.raw import CT, EXPLICIT, data_set

from clarion import crashpoints
from clarion.adapters.database import Database
from clarion.adapters.memory import ManualClock
from clarion.adapters.objects import FileStore, segment_path
from clarion.config import GatewayConfig
from clarion.digests import digest_of
from clarion.errors import MissingObjectError
from clarion.model import ObjectRef
from clarion.testing.suites import MOMENT
from console.schema import create_tables
from gateway import journal, journal_writer, tables
from gateway.grouping import Grouping
from gateway.journal_writer import JournalWriter, recover
from gateway.registry import load_registry

SIZE = 2000
PER_SEGMENT = 10
CONFIG = GatewayConfig.model_validate({"ae_titles": [{"ae_title": "B", "settings": {"pipeline-p": "p"}}]})


class Rig:
    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(journal_writer, "SEGMENT_BYTES", PER_SEGMENT * (SIZE + 900))
        self.root = root
        self.folder = root / "journal" / "w0"
        self.clock = ManualClock(MOMENT)
        self.writer = JournalWriter(self.folder, self.clock)
        self.wanted: dict[str, bytes] = {}
        create_tables(Database(f"sqlite:///{root / 'clarion.db'}"))

    def receive(self, uid: str) -> None:
        data = data_set(uid, SIZE)
        fields = {
            "sop_class_uid": CT, "sop_instance_uid": uid, "transfer_syntax_uid": EXPLICIT, "calling_ae": "A",
            "called_ae": "B", "association": "a", "study_uid": "1.2.9", "series_uid": "1.2.9.1",
            "object": {"digest": digest_of(data)},
        }  # fmt: skip
        self.writer.append("stored", fields, data)
        self.wanted[uid] = data

    def owner(self) -> Grouping:
        return Grouping(
            journal_folder=self.root / "journal",
            database=Database(f"sqlite:///{self.root / 'clarion.db'}"),
            store=self.store,
            clock=self.clock,
            registry=load_registry(CONFIG),
        )

    @property
    def store(self) -> FileStore:
        return FileStore(self.root / "objects")

    def settle(self) -> Grouping:
        owner = self.owner()
        for _ in range(1000):
            if not owner.step():
                return owner
        raise AssertionError("it never ended")

    def judge(self) -> None:
        """Everything that was acknowledged is there, byte for byte, under the reference that its row has."""
        database = Database(f"sqlite:///{self.root / 'clarion.db'}")
        with database.reading() as connection:
            rows = connection.execute(sa.select(tables.instances)).all()
        found = {one.sop_instance_uid: self.store.read(ObjectRef(**one.object)) for one in rows}
        assert found == self.wanted

    def freed(self) -> list[str]:
        return sorted(one.name for one in self.folder.glob("freed-*"))


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


def resent(rig: Rig) -> None:
    """Instances that came once, then most of them again and again, with new ones between."""
    for number in range(PER_SEGMENT):
        rig.receive(f"1.2.{number}")
    for round_ in range(4):
        for number in range(PER_SEGMENT - 2):
            rig.receive(f"1.2.{number}")
        rig.receive(f"1.3.{round_}")


def test_segments_of_duplicates_are_freed_and_written_over(rig: Rig) -> None:
    """Bites: judge by the digest alone, and the segment of the first copies goes as well, with what lies only there."""
    resent(rig)
    before = journal.segments(rig.folder)
    owner = rig.settle()
    rig.judge()
    assert owner.facts()["segments_freed"] == len(rig.freed()) >= 2
    assert before[0] in journal.segments(rig.folder), "that of the first copies is wanted as it is"
    waiting = len(rig.freed())
    for number in range(3 * PER_SEGMENT):
        rig.receive(f"1.4.{number}")
    assert len(rig.freed()) < waiting, "none was written over"
    rig.settle()
    rig.judge()


def test_after_a_restart_positions_and_ends_are_what_they_were(rig: Rig) -> None:
    """Bites: number segments by those that are there, and the owner passes over new records as read already."""
    resent(rig)
    rig.settle()
    rig.writer.close()
    last = max(journal.segments(rig.folder))
    ends, _ = recover(rig.folder)
    assert min(ends) >= last, "nothing that was announced is read anew"
    rig.writer = JournalWriter(rig.folder, rig.clock)
    assert max(journal.segments(rig.folder)) > last
    rig.receive("1.5.1")
    rig.settle()
    rig.judge()


def test_a_duplicate_repairs_the_first_copy_that_can_no_longer_be_read(rig: Rig) -> None:
    """Bites: throw duplicates away unseen, and the last good copy of an instance goes with them."""
    resent(rig)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.compaction.Compactor.step", lambda _: False)
        rig.settle()
    with segment_path(rig.folder, 1).open("r+b") as file:
        for place in range(2000, file.seek(0, os.SEEK_END), 1000):
            file.seek(place)
            file.write(b"\xff\xff")
    with pytest.raises(MissingObjectError):
        rig.judge()
    rig.settle()
    for uid in ("1.2.8", "1.2.9"):
        del rig.wanted[uid]  # those never came again
    with Database(f"sqlite:///{rig.root / 'clarion.db'}").reading() as connection:
        rows = connection.execute(sa.select(tables.instances)).all()
    for row in [one for one in rows if one.sop_instance_uid in rig.wanted]:
        assert rig.store.read(ObjectRef(**row.object)) == rig.wanted[row.sop_instance_uid]


def test_a_segment_with_damage_in_it_is_left_alone(rig: Rig) -> None:
    resent(rig)
    owner = rig.owner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.compaction.Compactor.step", lambda _: False)
        for _ in range(100):
            if not owner.step():
                break
    victim = journal.segments(rig.folder)[2]
    with segment_path(rig.folder, victim).open("r+b") as file:
        file.seek(journal.FIRST_OFFSET + 200)
        file.write(b"\xff" * 8)
    rig.settle()
    assert victim in journal.segments(rig.folder)


@pytest.mark.parametrize("point", ["store.write", "store.sync", "store.publish", "segment.free"])
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("time", [1, 2])
def test_killed_at_each_step_nothing_is_lost_and_it_goes_on(rig: Rig, point: str, side: str, time: int) -> None:
    """Bites: free the file before the copies are synced, and what was wanted of it is gone."""
    resent(rig)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.compaction.Compactor.step", lambda _: False)
        rig.settle()
    rig.writer.close()
    pid = os.fork()
    if pid == 0:
        crashpoints.arm(f"{side}:{point}#{time}")
        rig.settle()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the point was not reached"
    rig.judge()
    rig.writer = JournalWriter(rig.folder, rig.clock)
    rig.receive("1.6.1")
    rig.settle()
    rig.judge()


def test_objects_in_quarantine_are_wanted(rig: Rig) -> None:
    data = data_set("1.2.1", SIZE)
    for _ in range(3 * PER_SEGMENT):
        fields = {
            "sop_class_uid": CT, "sop_instance_uid": "1.2.1", "transfer_syntax_uid": EXPLICIT, "calling_ae": "A",
            "called_ae": "B", "association": "a", "study_uid": "1.2.9", "reason": "truncated",
            "object": {"digest": digest_of(data)},
        }  # fmt: skip
        rig.writer.append("quarantined", fields, data)
    rig.settle()
    assert len(rig.freed()) >= 1
    database = Database(f"sqlite:///{rig.root / 'clarion.db'}")
    with database.reading() as connection:
        described = connection.execute(sa.select(tables.quarantine.c.object)).scalar_one()
    assert rig.store.read(ObjectRef(**described)) == data
    assert asdict(ObjectRef(**described)) == described
