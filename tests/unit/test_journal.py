"""The journal under faults: whatever is told success is read again, whatever else fails around it."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clarion.adapters.memory import ManualClock
from clarion.errors import StoreUnavailableError
from clarion.testing.suites import MOMENT
from gateway import journal
from gateway.journal import START, JournalWriter

THREADS, EACH = 12, 40


def append_from_threads(writer: JournalWriter) -> tuple[set[int], int]:
    """Append from many threads; give the numbers that were told success, and how many were not."""
    told: set[int] = set()
    refused = 0
    lock = threading.Lock()

    def work(first: int) -> None:
        nonlocal refused
        for number in range(first, first + EACH):
            try:
                writer.append("stored", {"number": number, "fill": "x" * (number % 300)})
            except StoreUnavailableError:
                with lock:
                    refused += 1
            else:
                with lock:
                    told.add(number)

    threads = [threading.Thread(target=work, args=(index * EACH,)) for index in range(THREADS)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    return told, refused


def numbers(folder: Path) -> list[int]:
    return [one.fields["number"] for one in journal.read(folder, START, 10**6) if one.kind == "stored"]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def short_writes(rng: random.Random) -> Callable[[int, Any], int]:
    """Some writes leave a part behind and find the disk full; the next one may succeed."""
    real = os.write

    def write(file: int, data: Any) -> int:
        if rng.random() < 0.1:
            real(file, bytes(data)[: rng.randrange(1, len(data))])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    return write


def lossy_syncs(rng: random.Random) -> Callable[[int], None]:
    """Some syncs fail, are reported once, and what was not synced is gone: what a kernel may do."""
    synced: dict[int, int] = {}

    def sync(file: int) -> None:
        inode = os.fstat(file).st_ino
        size = os.fstat(file).st_size
        if rng.random() < 0.1:
            os.ftruncate(file, synced.get(inode, 0))
            raise OSError(errno.EIO, "Input/output error")
        synced[inode] = size

    return sync


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fault", ["write", "sync"])
def test_nothing_told_success_is_lost(fault: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bites: mark the segment broken after its lock is let go, and both lose records."""
    writer = JournalWriter(tmp_path, ManualClock(MOMENT))
    before = descriptors()
    rng = random.Random(seed)
    if fault == "write":
        monkeypatch.setattr(journal.os, "write", short_writes(rng))
    else:
        monkeypatch.setattr(journal.os, "fdatasync", lossy_syncs(rng))
    told, refused = append_from_threads(writer)
    monkeypatch.undo()
    assert refused
    assert told
    assert told <= set(numbers(tmp_path))
    assert descriptors() <= before, "every abandoned segment is closed"


@pytest.mark.parametrize("seed", range(3))
def test_faults_do_not_spread(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One failed sync refuses those who waited for it and begins one segment; it does not run through the others."""
    writer = JournalWriter(tmp_path, ManualClock(MOMENT))
    real, left = os.fdatasync, [20 + seed]

    def fail_once(file: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, "Input/output error")
        real(file)

    monkeypatch.setattr(journal.os, "fdatasync", fail_once)
    told, refused = append_from_threads(writer)
    assert 1 <= refused <= THREADS
    assert len(list(tmp_path.glob("*.clj"))) == 2
    assert told <= set(numbers(tmp_path))


def test_a_folder_that_cannot_be_synced_once_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = JournalWriter(tmp_path, ManualClock(MOMENT))
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 200)
    writer.append("stored", {"number": 1, "fill": "x" * 100})
    before = descriptors()
    with monkeypatch.context() as patch:

        def fail(_: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(journal, "sync_folder", fail)
        for number in (2, 3):
            with pytest.raises(StoreUnavailableError):
                writer.append("stored", {"number": number, "fill": "x" * 100})
    writer.append("stored", {"number": 4, "fill": "x" * 100})
    assert numbers(tmp_path) == [1, 4]
    assert descriptors() == before


def test_rotation_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 2000)
    told, refused = append_from_threads(JournalWriter(tmp_path, ManualClock(MOMENT)))
    assert refused == 0
    assert set(numbers(tmp_path)) == told == set(range(THREADS * EACH))
    assert len(list(tmp_path.glob("*.clj"))) > 20


@pytest.mark.parametrize("window", [4 * journal.MAX_RECORD_BYTES, journal.MAX_RECORD_BYTES + 600])
@pytest.mark.parametrize("place", [0, 5, 40, 200])
def test_a_turned_bit_costs_one_record(
    place: int, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it lies, also with more behind it than is read at once; the gap is given as a record of its own."""
    monkeypatch.setattr(journal, "_READ_BYTES", window)
    writer = JournalWriter(tmp_path, ManualClock(MOMENT))
    for number in range(40):
        writer.append("stored", {"number": number, "fill": "x" * 60_000})
    writer.close()
    again = JournalWriter(tmp_path, ManualClock(MOMENT))
    again.append("stored", {"number": 40})
    path = tmp_path / "00000001.clj"
    data = bytearray(path.read_bytes())
    third = data.find(b'"number":3,') - 80
    data[data.find(b"CLJ1", third - 60) + place] ^= 4
    path.write_bytes(bytes(data))
    position, seen, damaged = START, [], 0
    while entries := list(journal.read(tmp_path, position, 7)):
        position = entries[-1].after
        seen += [one.fields["number"] for one in entries if one.kind == "stored"]
        damaged += sum(one.kind == journal.DAMAGED for one in entries)
    assert seen == [number for number in range(41) if number != 3]
    assert damaged == 1
