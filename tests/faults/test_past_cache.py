"""Records that are written past the page cache, several at once: read as any, none acknowledged before those before."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.threads import run_beside
from support.world import pause

from clarion import crashpoints
from clarion.adapters.memory import ManualClock
from clarion.adapters.objects import FileStore, segment_path
from clarion.digests import digest_of
from clarion.errors import StoreUnavailableError
from clarion.model import ObjectRef
from clarion.testing.suites import MOMENT
from gateway import journal, segments
from gateway.blocks import BLOCK_BYTES, BlockBuffer
from gateway.journal_writer import JournalWriter
from gateway.recents import recents_path
from gateway.segments import FREED, Segment

LARGEST = 300_000
THREADS, EACH = 6, 25


def data_of(number: int) -> bytes:
    """Every third is small: through the cache, beside the others."""
    size = 1 + number * 37 % 900 if number % 3 == 0 else 64 * 2**10 + number * 7919 % (LARGEST - 64 * 2**10)
    return random.Random(number).randbytes(size)


def append(writer: JournalWriter, number: int, buffer: BlockBuffer) -> None:
    data = data_of(number)
    buffer.data[: len(data)] = data
    fields = {"number": number, "object": {"digest": digest_of(data)}}
    writer.append("stored", fields, buffer.data[: len(data)], buffer)


def append_from_threads(writer: JournalWriter) -> tuple[set[int], int]:
    """Append from several threads; give the numbers that were told success, and how many were not."""
    told: set[int] = set()
    refused: list[int] = []

    def work(index: int) -> None:
        buffer = BlockBuffer(LARGEST)
        for number in range(index * EACH, (index + 1) * EACH):
            try:
                append(writer, number, buffer)
            except StoreUnavailableError:
                refused.append(number)
            else:
                told.add(number)

    run_beside(work, THREADS)
    return told, len(refused)


def stored(folder: Path) -> list[journal.Entry]:
    """Read the log; every data set in it is what it was."""
    store = FileStore(folder.parent.parent / "objects")
    entries = list(journal.read(folder, journal.START, 10**6))
    assert {one.kind for one in entries} <= {"stored"}, "damage where nothing was damaged"
    for one in entries:
        data = data_of(one.fields["number"])
        assert store.read(ObjectRef(**one.fields["object"])) == data
        assert data.startswith(one.head)
        assert len(one.head) >= min(len(data), journal.HEAD_BYTES // 3)
    return entries


def ready(folder: Path, count: int, size: int = segments.SEGMENT_BYTES) -> None:
    """Make files to be written over, full of what an older use left."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{FREED}{number}").write_bytes(b"old rest" * (size // 8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "journal" / "w0"
    ready(folder, 1)
    return folder


@pytest.fixture(params=["over an older use", "in a new file"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a log, with a file to be written over or without."""
    folder = tmp_path / "journal" / "w0"
    ready(folder, 1 if request.param == "over an older use" else 0)
    return folder


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is written past the cache."""
    sizes: list[int] = []
    real = os.pwrite

    def pwrite(file: int, data: Any, offset: int) -> int:
        assert not offset % BLOCK_BYTES
        sizes.append(len(data))
        return real(file, data, offset)

    monkeypatch.setattr(segments.os, "pwrite", pwrite)
    return sizes


def test_what_several_wrote_at_once_is_read_as_any(either: Path, written: list[int]) -> None:
    """Bites: do not say what is left out before a record, and reading finds damage there."""
    folder = either
    writer = JournalWriter(folder, ManualClock(MOMENT))
    told, refused = append_from_threads(writer)
    assert not refused
    large = [one for one in stored(folder) if one.fields["object"]["size_bytes"] >= 64 * 2**10]
    assert len(written) == len(large) > THREADS * EACH // 2
    assert all(one.begin % BLOCK_BYTES == 0 for one in large)
    assert len([one for one in large if one.since != one.begin]) > 5, "none follows a small one"
    writer.close()
    writer = JournalWriter(folder, ManualClock(MOMENT))
    assert {one.fields["number"] for one in stored(folder)} == told
    writer.close()


def test_what_was_just_written_does_not_come_from_the_disk(
    either: Path, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bites: read the segment; between the writes of what comes meanwhile that delays every answer."""
    writer = JournalWriter(either, ManualClock(MOMENT))
    numbers = [number for number in range(120) if number % 3]
    for number in numbers:
        append(writer, number, BlockBuffer(LARGEST))
    read: list[str] = []
    real = os.pread

    def pread(file: int, size: int, offset: int) -> bytes:
        name = Path(f"/proc/self/fd/{file}").readlink().name
        read.append(name)
        return real(file, size, offset)

    monkeypatch.setattr(journal.os, "pread", pread)
    found = [one.fields["number"] for one in journal.read(either, journal.START, 1000)]
    monkeypatch.undo()
    assert found == numbers
    assert len(written) == len(numbers)
    assert len([name for name in read if name != "recent"]) < 8, "the beginning of the segment, and the first ones"
    recents_path(either).unlink()
    assert [one.fields["number"] for one in stored(either)] == numbers
    writer.close()


def written_over(folder: Path, count: int) -> tuple[Segment, list[int]]:
    """Give a segment with so many records of blocks, none of them synced, and where each ends."""
    segment = Segment(folder, 1, folder / f"{FREED}0", lambda *_: None)
    record = BlockBuffer(LARGEST).frame(b"h" * BLOCK_BYTES, 70_000)
    ends = [segment.reserve(len(record)) for _ in range(count)]
    for end in ends:
        segment.write_blocks(record, end)
    return segment, ends


def test_a_large_record_syncs_beside_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by an open file of its own. Bites: by the same, and the kernel tells one of them alone what failed."""
    segment, ends = written_over(folder, 3)
    may_end = threading.Event()
    going: list[int] = []
    second = threading.Event()

    def fdatasync(file: int) -> None:
        going.append(file)
        if len(going) == 2:
            second.set()
        may_end.wait(10)

    monkeypatch.setattr(segments.os, "fdatasync", fdatasync)
    threads = [threading.Thread(target=segment.sync, args=(end,), kwargs={"of_blocks": True}) for end in ends]
    for one in threads:
        one.start()
    assert second.wait(10), "the second waits for the first"
    pause(0.1)
    assert len(going) == len(set(going)) == 2, "two at most, and not by one open file"
    may_end.set()
    for one in threads:
        one.join(10)
        assert not one.is_alive()
    assert segment.synced == ends[-1]
    segment.retire()


def test_of_two_syncs_the_one_that_failed_counts_for_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Segment(folder, 1, folder / f"{FREED}0", lambda *_: None)
    buffer = BlockBuffer(LARGEST)
    record = buffer.frame(b"h" * BLOCK_BYTES, 70_000)
    first = segment.reserve(len(record))
    segment.write_blocks(record, first)
    begun, may_fail = threading.Event(), threading.Event()

    def fdatasync(_: int) -> None:
        if not begun.is_set():
            begun.set()
            may_fail.wait(10)
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(segments.os, "fdatasync", fdatasync)
    outcomes: dict[str, str] = {}

    def sync(name: str, end: int) -> None:
        try:
            segment.sync(end, of_blocks=True)
            outcomes[name] = "synced"
        except OSError as error:
            outcomes[name] = str(error)

    failing = threading.Thread(target=sync, args=("failing", first))
    failing.start()
    assert begun.wait(10)
    may_fail.set()
    failing.join(10)
    after = segment.reserve(len(record))
    with pytest.raises(OSError, match="given up"):
        segment.sync(after, of_blocks=True)
    assert outcomes == {"failing": "[Errno 5] the segment was given up"}
    assert segment.synced == 0
    segment.write_blocks(record, after)
    segment.retire()


def test_what_one_sync_lost_the_other_does_not_acknowledge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails one flush and drops what was in it may carry out the next. Bites: publish the other's mark."""
    segment, ends = written_over(folder, 2)
    both, failed = threading.Barrier(2), threading.Event()

    def fdatasync(_: int) -> None:
        if both.wait(10) == 0:
            raise OSError(errno.EIO, "Input/output error")
        failed.wait(10)

    monkeypatch.setattr(segments.os, "fdatasync", fdatasync)
    told: list[str] = []

    def sync(end: int) -> None:
        try:
            segment.sync(end, of_blocks=True)
            told.append("synced")
        except OSError:
            told.append("given up")

    threads = [threading.Thread(target=sync, args=(end,)) for end in ends]
    for one in threads:
        one.start()
    while not segment.broken:
        pause(0.01)
    failed.set()
    for one in threads:
        one.join(10)
    assert told == ["given up", "given up"]
    assert segment.synced == 0
    segment.retire()


def test_where_nothing_can_be_allocated_it_goes_through_the_cache(
    tmp_path: Path, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "journal" / "w0"
    writer = JournalWriter(folder, ManualClock(MOMENT))

    def allocate(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(segments.os, "posix_fallocate", allocate)
    large = [number for number in range(60) if number % 3]
    for number in large:
        append(writer, number, BlockBuffer(LARGEST))
    size = segment_path(folder, 1).stat().st_size
    assert sum(written) < 2**20, "only what the first record laid is written over"
    monkeypatch.undo()
    append(writer, 61, BlockBuffer(LARGEST))
    assert segment_path(folder, 1).stat().st_size > size + 2**22, "it is not tried again"
    assert [one.fields["number"] for one in stored(folder)] == [*large, 61]
    writer.close()


def test_a_new_file_holds_little_more_than_what_is_in_it(tmp_path: Path) -> None:
    """Bites: allocate a whole segment for the first record."""
    folder = tmp_path / "journal" / "w0"
    writer = JournalWriter(folder, ManualClock(MOMENT))
    for number in range(60):
        append(writer, number, BlockBuffer(LARGEST))
    writer.close()
    held = segment_path(folder, 1).stat()
    assert stored(folder)[-1].after.offset <= held.st_size
    assert held.st_blocks * 512 <= stored(folder)[-1].after.offset + 2**23 + 2**19


def faulty(rng: random.Random, real: Callable[..., int]) -> Callable[..., int]:
    def pwrite(file: int, data: memoryview, offset: int) -> int:
        kind = rng.random()
        if kind < 0.1:
            real(file, data[: len(data) // 2 // BLOCK_BYTES * BLOCK_BYTES], offset)
            raise OSError(errno.EIO, "Input/output error")
        if kind < 0.3:
            return real(file, data[:BLOCK_BYTES], offset)
        return real(file, data, offset)

    return pwrite


@pytest.mark.parametrize("seed", range(5))
def test_nothing_told_success_is_lost_when_writes_fail(
    seed: int, either: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F05. Bites: sync up to the last that was reserved, whether or not those before it are written."""
    folder = either
    ready(folder, 20, 2**20)
    writer = JournalWriter(folder, ManualClock(MOMENT))
    monkeypatch.setattr(segments.os, "pwrite", faulty(random.Random(seed), os.pwrite))
    told, refused = append_from_threads(writer)
    monkeypatch.undo()
    assert len(told) + refused == THREADS * EACH
    assert refused < 20, "each is written anew, through the cache; it fails when another one fails beside that as well"
    assert len(journal.segments(folder)) > 1, "no segment was given up"
    assert {one.fields["number"] for one in stored(folder)} >= told
    writer.close()


def test_a_disk_that_wants_other_blocks_is_asked_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        asked.append(offset)
        raise OSError(errno.EINVAL, "Invalid argument")

    ready(folder, 3)
    writer = JournalWriter(folder, ManualClock(MOMENT))
    monkeypatch.setattr(segments.os, "pwrite", pwrite)
    for number in range(12):
        append(writer, number, BlockBuffer(LARGEST))
    assert len(asked) == 1
    assert [one.fields["number"] for one in stored(folder)] == list(range(12))
    writer.close()


def test_no_success_before_what_lies_before_is_written(folder: Path) -> None:
    """Bites: a sync counts up to its own record."""
    synced: list[int] = []
    segment = Segment(folder, 1, folder / f"{FREED}0", lambda _, offset: synced.append(offset))
    buffer = BlockBuffer(LARGEST)
    first = segment.write([b"x" * 100])
    record = buffer.frame(b"h" * BLOCK_BYTES, 70_000)
    end = segment.reserve(len(record))
    after = segment.write([b"y" * 100])
    waiting = threading.Thread(target=segment.sync, args=(after,))
    waiting.start()
    segment.sync(first)
    pause(0.2)
    assert waiting.is_alive()
    assert synced == [first]
    segment.write_blocks(record, end)
    segment.sync(end)
    waiting.join(10)
    assert not waiting.is_alive()
    assert segment.synced >= after
    segment.retire()


def test_a_sync_under_way_does_not_take_in_what_failed_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bites: look only at what is being written, and what has just failed counts as written."""
    segment = Segment(folder, 1, folder / f"{FREED}0", lambda *_: None)
    buffer = BlockBuffer(LARGEST)
    before = segment.write([b"x" * 100])
    record = buffer.frame(b"h" * BLOCK_BYTES, 70_000)
    end = segment.reserve(len(record))
    file = segment._wait_or_lead(before)
    assert isinstance(file, int), "it is to lead the sync"

    def pwrite(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(segments.os, "pwrite", pwrite)
    with pytest.raises(OSError, match="Input"):
        segment.write_blocks(record, end)
    segment._lead(file)
    assert segment.synced == 0
    with pytest.raises(OSError, match="given up"):
        segment.sync(before)
    segment.retire()


def test_a_sync_under_way_is_waited_for_when_another_write_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be theirs. Bites: have them write once more what is committed in a moment, and an event comes twice."""
    segment = Segment(folder, 1, folder / f"{FREED}0", lambda *_: None)
    first = segment.write([b"x" * 100])
    going, may_end, real = threading.Event(), threading.Event(), os.fdatasync

    def fdatasync(file: int) -> None:
        going.set()
        may_end.wait(10)
        real(file)

    monkeypatch.setattr(segments.os, "fdatasync", fdatasync)
    outcomes: list[str] = []

    def sync() -> None:
        try:
            segment.sync(first)
            outcomes.append("synced")
        except OSError as error:
            outcomes.append(str(error))

    leading = threading.Thread(target=sync)
    leading.start()
    assert going.wait(10)
    following = threading.Thread(target=sync)
    following.start()
    monkeypatch.setattr(segments.os, "pwritev", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input")))
    with pytest.raises(OSError, match="Input"):
        segment.write([b"y" * 100])
    pause(0.1)
    may_end.set()
    for one in (leading, following):
        one.join(10)
        assert not one.is_alive()
    assert outcomes == ["synced", "synced"]
    segment.retire()


@pytest.mark.parametrize("torn", ["head", "data", "all"])
@pytest.mark.parametrize("number", [1, 4])
def test_what_a_power_cut_left_half_written_is_passed_over(torn: str, number: int, either: Path) -> None:
    """It was not acknowledged, and what was written beside it is there. Bites: take the hole for damage."""
    folder = either
    writer = JournalWriter(folder, ManualClock(MOMENT))
    buffer = BlockBuffer(LARGEST)
    for one in range(8):
        append(writer, one, buffer)
    entries = stored(folder)
    writer.close()
    victim = entries[number]
    assert victim.begin % BLOCK_BYTES == 0
    data_at = victim.after.offset - len(data_of(number)) // BLOCK_BYTES * BLOCK_BYTES - BLOCK_BYTES
    begin = victim.begin if torn in {"head", "all"} else data_at
    end = victim.begin + BLOCK_BYTES if torn == "head" else victim.after.offset
    with segment_path(folder, victim.after.segment).open("r+b") as file:
        file.seek(begin)
        file.write(b"\xee" * (end - begin))
    # As it was when the victim was being written.
    place = journal.Position(victim.after.segment, victim.since)
    journal.committed_path(folder).write_bytes(journal.pack_end(place).to_bytes(8, "little").ljust(4096, b"\0"))
    writer = JournalWriter(folder, ManualClock(MOMENT))
    append(writer, 9, buffer)
    assert [one.fields["number"] for one in stored(folder)] == [*(one for one in range(8) if one != number), 9]
    writer.close()


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("point", ["journal.writeblocks#7", "journal.allocate#2"])
def test_killed_while_writing(side: str, point: str, tmp_path: Path) -> None:
    """Bites: acknowledge before the blocks are written."""
    folder = tmp_path / "journal" / "w0"
    ready(folder, 1 if "write" in point else 0)
    told = folder / "told"
    pid = os.fork()
    if pid == 0:
        writer = JournalWriter(folder, ManualClock(MOMENT))
        crashpoints.arm(f"{side}:{point}")
        buffer = BlockBuffer(LARGEST)
        for number in range(90):
            append(writer, number, buffer)
            with told.open("a") as file:
                file.write(f"{number}\n")
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the point was not reached"
    acknowledged = [int(line) for line in told.read_text().split()]
    JournalWriter(folder, ManualClock(MOMENT)).close()
    found = [one.fields["number"] for one in stored(folder)]
    assert found[: len(acknowledged)] == acknowledged
    assert len(found) <= len(acknowledged) + 1
