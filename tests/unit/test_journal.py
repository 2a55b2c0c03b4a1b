"""The journal under faults: whatever is told success is read again, whatever else fails around it."""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.threads import run_beside
from support.world import pause

from clarion.adapters.memory import ManualClock
from clarion.adapters.objects import FileStore, segment_path
from clarion.digests import digest_of
from clarion.errors import ConfigError, StoreUnavailableError
from clarion.model import ObjectRef
from clarion.testing.suites import MOMENT
from gateway import journal, segments
from gateway.journal import START
from gateway.journal_writer import JournalWriter, recover, settle

THREADS, EACH = 12, 40


def _data(number: int) -> bytes:
    """Every third record holds a data set."""
    return b"" if number % 3 else (b"%d;" % number) * (number + 1)


def _fields(number: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"number": number, "fill": "x" * (number % 300)}
    return {**fields, "object": {"digest": digest_of(_data(number))}} if _data(number) else fields


def append_from_threads(writer: JournalWriter) -> tuple[set[int], int]:
    """Append from many threads; give the numbers that were told success, and how many were not."""
    told: set[int] = set()
    refused = 0
    lock = threading.Lock()

    def work(index: int) -> None:
        nonlocal refused
        for number in range(index * EACH, (index + 1) * EACH):
            try:
                writer.append("stored", _fields(number), _data(number))
            except StoreUnavailableError:
                with lock:
                    refused += 1
            else:
                with lock:
                    told.add(number)

    run_beside(work, THREADS)
    return told, refused


def numbers(folder: Path) -> list[int]:
    """Read the log, and every data set in it by its reference."""
    store = FileStore(folder.parent.parent / "objects")
    found = [one for one in journal.read(folder, START, 10**6) if one.kind == "stored"]
    for one in found:
        if "object" in one.fields:
            data = _data(one.fields["number"])
            assert store.read(ObjectRef(**one.fields["object"])) == data
            assert one.head == data[: journal.HEAD_BYTES]
    return [one.fields["number"] for one in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal" / "w0"


def descriptors() -> int:
    gc.collect()  # what other tests left behind is not ours
    return len(list(Path("/proc/self/fd").iterdir()))


def short_writes(rng: random.Random) -> Callable[[int, Any, int], int]:
    """Some writes leave a part behind and find the disk full, some only write less; the next one may succeed."""
    real = os.pwritev

    def write(file: int, parts: Any, offset: int) -> int:
        whole = b"".join(parts)
        if rng.random() < 0.2:
            return real(file, [whole[: rng.randrange(1, len(whole))]], offset)
        if rng.random() < 0.2:
            real(file, [whole[: rng.randrange(1, len(whole))]], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, parts, offset)

    return write


def lossy_syncs(rng: random.Random) -> Callable[[int], None]:
    """Some syncs fail, are reported once, and what was not synced is gone: what a kernel may do."""
    synced: dict[int, int] = {}

    def sync(file: int) -> None:
        inode = os.fstat(file).st_ino
        size = os.fstat(file).st_size
        if rng.random() < 0.3:
            os.ftruncate(file, synced.get(inode, 0))
            raise OSError(errno.EIO, "Input/output error")
        synced[inode] = size

    return sync


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fault", ["write", "sync"])
def test_nothing_told_success_is_lost(fault: str, seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F05. Bites: publish a mark that the failed sync did not reach, or sync the same segment again."""
    writer = JournalWriter(folder, ManualClock(MOMENT))
    before = descriptors()
    rng = random.Random(seed)
    if fault == "write":
        monkeypatch.setattr(segments.os, "pwritev", short_writes(rng))
    else:
        monkeypatch.setattr(segments.os, "fdatasync", lossy_syncs(rng))
    told, refused = append_from_threads(writer)
    monkeypatch.undo()
    assert refused
    assert told
    writer.append("stored", _fields(3000), _data(3000))
    assert told <= set(numbers(folder))
    assert descriptors() <= before, "every abandoned segment is closed"


@pytest.mark.parametrize("seed", range(3))
def test_after_a_failed_sync_the_records_are_written_anew(
    seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One failed sync refuses nobody: it begins one segment, and whoever waited has his record written there."""
    writer = JournalWriter(folder, ManualClock(MOMENT))
    real, left = os.fdatasync, [20 + seed]

    def fail_once(file: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, "Input/output error")
        real(file)

    monkeypatch.setattr(segments.os, "fdatasync", fail_once)
    told, refused = append_from_threads(writer)
    assert (refused, len(told)) == (0, THREADS * EACH)
    assert journal.segments(folder) == [1, 2]
    assert sorted(numbers(folder)) == sorted(told), "what was not synced is not read a second time"


def test_threads_share_syncs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group commit: with twelve threads at once, far fewer syncs than records. Bites: sync for each."""
    real, count = os.fdatasync, [0]

    def counted(file: int) -> None:
        count[0] += 1
        pause(0.002)
        real(file)

    writer = JournalWriter(folder, ManualClock(MOMENT))
    monkeypatch.setattr(segments.os, "fdatasync", counted)
    told, _ = append_from_threads(writer)
    assert len(told) == THREADS * EACH
    assert count[0] < len(told) / 3


def test_a_folder_that_cannot_be_synced_once_is_no_obstacle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = JournalWriter(folder, ManualClock(MOMENT))
    monkeypatch.setattr("gateway.journal_writer.SEGMENT_BYTES", 200)
    writer.append("stored", _fields(100))
    before = descriptors()
    with monkeypatch.context() as patch:

        def fail(_: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(segments, "sync_folder", fail)
        for number in (2, 5):
            with pytest.raises(StoreUnavailableError):
                writer.append("stored", _fields(number))
    writer.append("stored", _fields(4))
    assert numbers(folder) == [100, 4]
    assert descriptors() <= before


def test_rotation_keeps_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.journal_writer.SEGMENT_BYTES", 2000)
    told, refused = append_from_threads(JournalWriter(folder, ManualClock(MOMENT)))
    assert refused == 0
    assert set(numbers(folder)) == told == set(range(THREADS * EACH))
    assert len(journal.segments(folder)) > 20


def test_what_is_not_committed_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bites: read to the end of the file, and the owner takes what a power cut may still undo."""
    writer = JournalWriter(folder, ManualClock(MOMENT))
    writer.append("stored", _fields(1))
    seen: list[list[int]] = []
    real = os.fdatasync

    def look(file: int) -> None:
        seen.append(numbers(folder))
        real(file)

    monkeypatch.setattr(segments.os, "fdatasync", look)
    writer.append("stored", _fields(2))
    assert seen == [[1]]
    assert numbers(folder) == [1, 2]


def test_a_freed_file_is_written_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of an older use of a file have good checksums; the segment's number tells them apart."""
    monkeypatch.setattr("gateway.journal_writer.SEGMENT_BYTES", 3000)
    writer = JournalWriter(folder, ManualClock(MOMENT))
    for number in (1, 2, 4, 5):
        writer.append("stored", _fields(number))
    freed = folder / "freed-1"
    freed.write_bytes(segment_path(folder, 1).read_bytes())
    for number in range(100, 140):
        writer.append("stored", _fields(number), _data(number))
    assert not freed.exists()
    assert numbers(folder) == [1, 2, 4, 5, *range(100, 140)]


@pytest.mark.parametrize("place", [0, 5, 20, 40, 200])
@pytest.mark.parametrize("size", [0, 700, 60_000, 900_000])
def test_a_turned_bit_costs_one_record(place: int, size: int, folder: Path) -> None:
    """Wherever it lies, also with much behind it; the gap is given as a record of its own."""
    writer = JournalWriter(folder, ManualClock(MOMENT))
    data = bytes(size)
    fields = {"fill": "x" * 300, "object": {"digest": digest_of(data)}} if size else {"fill": "x" * 60_000}
    for number in range(20):
        writer.append("stored", {"number": number, **fields}, data)
    writer.close()
    again = JournalWriter(folder, ManualClock(MOMENT))
    again.append("stored", {"number": 20})
    path = segment_path(folder, 1)
    whole = bytearray(path.read_bytes())
    third = whole.find(b'"number":3,')
    whole[whole.rfind(whole[4:8], 0, third) + place] ^= 4
    path.write_bytes(bytes(whole))
    position, seen, damaged = START, [], 0
    while entries := list(journal.read(folder, position, 7)):
        position = entries[-1].after
        seen += [one.fields["number"] for one in entries if one.kind == "stored"]
        damaged += sum(one.kind == journal.DAMAGED for one in entries)
    assert seen == [number for number in range(21) if number != 3]
    assert damaged == 1


def forget_committed(writer: JournalWriter, folder: Path) -> None:
    """As after a power cut: the writer is gone, and what it noted last is older than what it wrote last."""
    writer._lock_file.close()
    journal.committed_path(folder).write_bytes(bytes(4096))


def restarted(writer: JournalWriter, folder: Path) -> list[str]:
    """As after a kill; give the kinds of what is then read."""
    writer._lock_file.close()
    JournalWriter(folder, ManualClock(MOMENT)).append("last", {})
    return [one.kind for one in journal.read(folder, START, 100)]


@pytest.mark.parametrize("place", [4, 100, 1500])
def test_damage_to_what_was_acknowledged_is_told_also_after_a_restart(place: int, folder: Path) -> None:
    """In the last record of the last segment, where a torn tail would be. Bites: take it for one and drop it."""
    writer = JournalWriter(folder, ManualClock(MOMENT))
    writer.append("stored", _fields(3), _data(3))
    writer.append("stored", _fields(300), _data(300))
    begin = list(journal.read(folder, START, 2))[1].begin
    whole = bytearray(segment_path(folder, 1).read_bytes())
    whole[begin + place] ^= 1
    segment_path(folder, 1).write_bytes(bytes(whole))
    # Of a data set that changed the record is whole: its digest tells, whoever reads it.
    expected = "stored" if place == 1500 else journal.DAMAGED
    assert restarted(writer, folder) == ["stored", expected, "last"]


def test_damage_to_the_first_record_of_a_segment_hides_nothing_before_it(folder: Path) -> None:
    writer = JournalWriter(folder, ManualClock(MOMENT))
    writer.append("stored", _fields(1))
    writer.close()
    again = JournalWriter(folder, ManualClock(MOMENT))
    again.append("stored", _fields(2))
    path = segment_path(folder, 2)
    whole = bytearray(path.read_bytes())
    whole[journal.FIRST_OFFSET + 50] ^= 1
    path.write_bytes(bytes(whole))
    found = [one.fields["number"] for one in journal.read(folder, START, 100) if one.kind == "stored"]
    assert found == [1, 2]


def test_a_data_set_cannot_pass_for_records(folder: Path) -> None:
    """A sender who knows the format puts records into his pixels; a crash within the write leaves them in the open."""
    writer = JournalWriter(folder, ManualClock(MOMENT))
    body = b'{"kind":"commitment","peer":"PACS","transaction_uid":"1","stored":[],"failed":[]}'
    forged = (
        b"".join(
            journal.encode(key, journal.Place(segment=1, sequence=7), MOMENT, body, 0) + body
            for key in (bytes(32), b"x" * 32)
        )
        * 20
    )
    writer.append("stored", {"object": {"digest": digest_of(forged)}}, forged)
    path = segment_path(folder, 1)
    begin = next(iter(journal.read(folder, START, 1))).begin
    whole = bytearray(path.read_bytes())
    whole[begin : begin + 20] = bytes(20)
    path.write_bytes(bytes(whole[:-70]))
    forget_committed(writer, folder)
    again = JournalWriter(folder, ManualClock(MOMENT))
    again.append("stored", {"number": 1})
    assert [one.fields.get("number") for one in journal.read(folder, START, 100)] == [1]


def test_a_log_that_has_no_worker_any_more_is_settled(folder: Path) -> None:
    """Fewer workers after a power cut: what the others acknowledged is read all the same, and once only settled."""
    writer = JournalWriter(folder, ManualClock(MOMENT))
    writer.append("stored", _fields(3), _data(3))
    forget_committed(writer, folder)
    assert numbers(folder) == []
    settle(folder, ManualClock(MOMENT))
    assert numbers(folder) == [3]
    before = journal.segments(folder)
    settle(folder, ManualClock(MOMENT))
    assert journal.segments(folder) == before


@pytest.mark.parametrize("cut", range(0, 200 * 512, 512))
def test_a_torn_tail_is_cut_off_and_what_is_whole_is_kept(cut: int, folder: Path) -> None:
    """F04, at the boundaries of sectors: what was whole before the cut is read, nothing else, and appending goes on."""
    writer = JournalWriter(folder, ManualClock(MOMENT))
    for number in (0, 3, 6, 300, *range(303, 360, 3), 6000):
        writer.append("stored", _fields(number), _data(number))
    ends = {one.fields["number"]: one.after.offset for one in journal.read(folder, START, 100)}
    size = max(ends.values())
    os.truncate(segment_path(folder, 1), max(0, size - cut))
    forget_committed(writer, folder)
    again = JournalWriter(folder, ManualClock(MOMENT))
    again.append("stored", _fields(9), _data(9))
    assert numbers(folder) == [*(number for number, end in ends.items() if end <= size - cut), 9]


def test_a_record_whose_data_set_is_torn_is_not_read(folder: Path) -> None:
    """Its head was written, its data only in part; a later record was whole: nobody was told of either."""
    writer = JournalWriter(folder, ManualClock(MOMENT))
    for number in (3, 300, 6):
        writer.append("stored", _fields(number), _data(number))
    torn = list(journal.read(folder, START, 3))[1]
    with segment_path(folder, 1).open("r+b") as file:
        file.seek(torn.after.offset - 200)
        file.write(bytes(100))
    forget_committed(writer, folder)
    assert recover(folder) == ({1: writer._segment.size}, {1: [torn.begin]})  # type: ignore[union-attr]
    again = JournalWriter(folder, ManualClock(MOMENT))
    again.append("stored", _fields(9), _data(9))
    assert numbers(folder) == [3, 6, 9]


def test_the_journal_of_another_version_is_refused(folder: Path) -> None:
    """Bites: start on it, and what it acknowledged passes for a torn end."""
    writer = JournalWriter(folder, ManualClock(MOMENT))
    writer.append("stored", {"number": 1})
    writer.close()
    journal.refuse_other_formats(folder.parent)
    path = segment_path(folder, 1)
    path.write_bytes(b"CLK2" + path.read_bytes()[4:])
    with pytest.raises(ConfigError, match="another version"):
        journal.refuse_other_formats(folder.parent)


def test_bytes_made_like_records_cost_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sender puts into his pixels is not even looked at. Bites: look for what anybody knows."""
    writer = JournalWriter(folder, ManualClock(MOMENT))
    place = journal.Place(segment=1, sequence=1)
    forged = journal.encode(bytes(32), place, MOMENT, b"{}", 0)
    data = forged * 5000
    fields = {"number": 1, "object": {"digest": digest_of(data)}}
    writer.append("stored", fields, data)
    writer.close()
    looked: list[int] = []
    real = journal.SegmentFile._decode

    def decode(self: Any, offset: int, limit: int) -> Any:
        looked.append(offset)
        return real(self, offset, limit)

    monkeypatch.setattr(journal.SegmentFile, "_decode", decode)
    with journal.SegmentFile(folder, 1) as file:
        assert file._next_whole(journal.FIRST_OFFSET + 200, segment_path(folder, 1).stat().st_size)
    assert len(looked) < 5
