"""The beginnings of the last records: found whole, of this use of the segment, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway import recents
from gateway.recents import SLOT_BYTES, SLOTS, RecentReader, RecentWriter, recents_path

KEY, OTHER = bytes(32), b"k" * 32
FRONT, DATA = b"head and body", bytes(range(256)) * 200
PLACE = (5, 4096)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = RecentWriter(tmp_path)
    writer.put(KEY, PLACE, FRONT, 10, memoryview(DATA))
    writer.close()
    return tmp_path


def find(folder: Path, key: bytes, sequence: int, offset: int) -> bytes | None:
    reader = RecentReader(folder)
    found = reader.find(key, sequence, offset)
    reader.close()
    return found


def test_what_was_put_is_found_with_what_it_leaves_out(folder: Path) -> None:
    found = find(folder, KEY, *PLACE)
    assert found is not None
    assert found.startswith(FRONT + bytes(10) + DATA[:7000])
    assert len(found) <= SLOT_BYTES


@pytest.mark.parametrize(
    ("key", "sequence", "offset"), [(OTHER, *PLACE), (KEY, 5 + SLOTS, 4096), (KEY, 5, 8192), (KEY, 6, 4096)]
)
def test_another_record_is_not_found(key: bytes, sequence: int, offset: int, folder: Path) -> None:
    """Bites: look at the slot alone, and an older use of the segment passes for this one."""
    assert find(folder, key, sequence, offset) is None


def test_a_writer_begins_with_none(folder: Path) -> None:
    """Bites: keep them, and after a power cut a record is believed that never came to the disk."""
    reader = RecentReader(folder)
    RecentWriter(folder).close()
    assert reader.find(KEY, *PLACE) is None
    reader.close()


def test_the_last_one_of_a_slot_is_there(tmp_path: Path) -> None:
    folder, writer = tmp_path, RecentWriter(tmp_path)
    writer.put(KEY, PLACE, FRONT, 10, memoryview(DATA))
    writer.put(KEY, (5 + SLOTS, 77), b"new", 0, memoryview(b"data"))
    assert find(folder, KEY, *PLACE) is None
    assert find(folder, KEY, 5 + SLOTS, 77) == b"newdata"
    writer.close()


@pytest.mark.parametrize("at", [0, 8, 30, 60, 4000])
def test_one_that_is_being_overwritten_is_not_found(at: int, folder: Path) -> None:
    """Bites: leave out the seal."""
    with recents_path(folder).open("r+b") as file:
        file.seek(5 * SLOT_BYTES + at)
        before = file.read(1)
        file.seek(5 * SLOT_BYTES + at)
        file.write(bytes([before[0] ^ 1]))
    assert find(folder, KEY, *PLACE) is None


@pytest.mark.parametrize("length", [2**32 - 1, SLOT_BYTES])
def test_a_length_that_is_wrong_finds_nothing(length: int, folder: Path) -> None:
    with recents_path(folder).open("r+b") as file:
        file.seek(5 * SLOT_BYTES + 8)
        file.write(recents._SAID.pack(*PLACE, length, length, length))
    assert find(folder, KEY, *PLACE) is None


def test_without_a_file_nothing_is_found(tmp_path: Path) -> None:
    assert find(tmp_path, KEY, *PLACE) is None


def test_a_front_that_is_too_long_is_left_to_the_segment(tmp_path: Path) -> None:
    writer = RecentWriter(tmp_path)
    writer.put(KEY, PLACE, bytes(SLOT_BYTES), 0, memoryview(DATA))
    assert find(tmp_path, KEY, *PLACE) is None
    writer.close()


def test_a_ring_that_cannot_be_had_hurts_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bites: let its errors through, and a bad sector in what nobody needs stops grouping."""
    recents_path(tmp_path).mkdir()
    writer = RecentWriter(tmp_path)
    writer.put(KEY, PLACE, FRONT, 0, memoryview(DATA))
    writer.close()
    recents_path(tmp_path).rmdir()
    writer = RecentWriter(tmp_path)
    writer.put(KEY, PLACE, FRONT, 0, memoryview(DATA))
    reader = RecentReader(tmp_path)

    def pread(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", pread)
    assert reader.find(KEY, *PLACE) is None
    monkeypatch.undo()
    assert reader.find(KEY, *PLACE) is not None
    reader.close()
    writer.close()


def test_a_disk_that_is_full_hurts_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwritev(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", pwritev)
    writer = RecentWriter(folder)
    writer.put(KEY, (6, 0), FRONT, 0, memoryview(DATA))
    monkeypatch.undo()
    assert find(folder, KEY, 6, 0) is None
    writer.close()
