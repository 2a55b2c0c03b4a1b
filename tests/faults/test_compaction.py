"""Segments go back to their writer when little in them is wanted; what is wanted stays, whenever we are killed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import sqlalchemy as sa
from support.raw import CT, EXPLICIT, data_set
from support.receiving import PER_SEGMENT, SIZE, Receiving
from support.world import pause

from clarion import crashpoints
from clarion.adapters.database import Database
from clarion.adapters.objects import segment_path
from clarion.digests import digest_of
from clarion.errors import MissingObjectError
from clarion.model import ObjectRef
from gateway import journal, preparing, tables
from gateway.compaction import Compactor
from gateway.journal_writer import JournalWriter, recover
from gateway.segments import MOST_READY


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Receiving:
    return Receiving(tmp_path, monkeypatch)


def resent(rig: Receiving) -> None:
    """Instances that came once, then most of them again and again, with new ones between."""
    for number in range(PER_SEGMENT):
        rig.receive(f"1.2.{number}")
    for round_ in range(4):
        for number in range(PER_SEGMENT - 2):
            rig.receive(f"1.2.{number}")
        rig.receive(f"1.3.{round_}")


def test_segments_of_duplicates_are_freed_and_written_over(rig: Receiving) -> None:
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


def test_a_segment_of_which_all_is_wanted_is_not_read_again(rig: Receiving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bites: look at each segment once more, at each start; with a million instances stored that is minutes."""
    looked: list[int] = []
    look = Compactor._look
    monkeypatch.setattr(Compactor, "_look", lambda one, *given: looked.append(given[1]) or look(one, *given))
    for number in range(5 * PER_SEGMENT):
        rig.receive(f"1.2.{number}")
    rig.receive("1.2.0")
    rig.settle()
    assert looked == []
    resent(rig)
    rig.settle()
    assert looked
    table = tables.segment_waste
    with Database(f"sqlite:///{rig.root / 'clarion.db'}").reading() as connection:
        left = set(connection.execute(sa.select(table.c.segment)).scalars())
    assert left <= set(journal.segments(rig.folder)), "what is freed is not counted any more"


def test_after_a_restart_positions_and_ends_are_what_they_were(rig: Receiving) -> None:
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


def test_a_duplicate_repairs_the_first_copy_that_can_no_longer_be_read(rig: Receiving) -> None:
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


def test_a_segment_with_damage_in_it_is_left_alone(rig: Receiving) -> None:
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


@pytest.mark.parametrize("point", ["store.write", "store.sync", "store.publish", "segment.free", "segment.forget"])
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("time", [1, 2])
def test_killed_at_each_step_nothing_is_lost_and_it_goes_on(rig: Receiving, point: str, side: str, time: int) -> None:
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


def test_objects_in_quarantine_are_wanted(rig: Receiving) -> None:
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


# Written beforehand ---------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "SEGMENT_BYTES", 8 * 4096)
    monkeypatch.setattr(preparing, "_STEP_BYTES", 4096)
    monkeypatch.setattr(preparing, "IDLE_S", 0.05)
    monkeypatch.setattr(preparing, "_LOOK_S", 0.01)


def until(condition: Callable[[], bool]) -> bool:
    for _ in range(500):
        if condition():
            return True
        pause(0.01)
    return False


@pytest.mark.usefixtures("small")
def test_a_busy_log_has_segments_ready_and_uses_them(rig: Receiving) -> None:
    """They are taken, written over and read as any. Bites: read on into what was there before."""
    for number in range(2 * PER_SEGMENT):
        rig.receive(f"1.2.{number}")
    preparer = preparing.Preparer(rig.writer, lambda _: True)
    try:
        assert until(lambda: len(rig.freed()) == MOST_READY)
        assert not (rig.folder / "preparing").exists()
    finally:
        preparer.stop()
    for number in range(3 * PER_SEGMENT):
        rig.receive(f"1.3.{number}")
    assert len(rig.freed()) < MOST_READY
    rig.settle()
    rig.judge()
    rig.writer.close()
    rig.writer = JournalWriter(rig.folder, rig.clock)
    assert rig.writer.filled > 0
    rig.receive("1.4.1")
    rig.settle()
    rig.judge()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("why", ["not filled", "no room", "busy"])
def test_none_is_written_where_it_would_be_in_the_way(why: str, rig: Receiving) -> None:
    for number in range(2 if why == "not filled" else 2 * PER_SEGMENT):
        rig.receive(f"1.2.{number}")
    asked = threading.Event()

    def room(_: int) -> bool:
        asked.set()
        return why != "no room"

    with pytest.MonkeyPatch.context() as patch:
        if why == "busy":
            patch.setattr(rig.writer, "idle_s", lambda: 0.0)
        preparer = preparing.Preparer(rig.writer, room)
        asked.wait(0.2 if why != "no room" else 10)
        preparer.stop()
    assert asked.is_set() == (why == "no room")
    assert rig.freed() == []
    assert not (rig.folder / "preparing").exists()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("point", ["segment.zeros", "segment.zerossynced", "segment.prepare"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_killed_while_preparing_the_log_goes_on(rig: Receiving, side: str, point: str) -> None:
    for number in range(2 * PER_SEGMENT):
        rig.receive(f"1.2.{number}")
    rig.writer.close()
    pid = os.fork()
    if pid == 0:
        crashpoints.arm(f"{side}:{point}#2")
        preparing.Preparer(JournalWriter(rig.folder, rig.clock), lambda _: True)._thread.join(30)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the point was not reached"
    (rig.folder / "preparing").write_bytes(bytes(5000))
    rig.writer = JournalWriter(rig.folder, rig.clock)
    preparer = preparing.Preparer(rig.writer, lambda _: True)
    assert until(lambda: len(rig.freed()) == MOST_READY)
    preparer.stop()
    assert {one.stat().st_size for one in rig.folder.glob("freed-*")} == {8 * 4096}
    rig.receive("1.3.1")
    rig.settle()
    rig.judge()
