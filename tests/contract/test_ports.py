"""One suite per port, over every implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.postgres import url_in

from clarion.adapters.database import Database
from clarion.adapters.deadletters import State, count_dead_letters, mark, read_dead_letters
from clarion.adapters.embedded import EmbeddedBus, read_lag
from clarion.adapters.memory import ManualClock, MemoryBus, MemoryStore
from clarion.adapters.objects import FileStore
from clarion.digests import file_name
from clarion.errors import PermanentError
from clarion.events import JobStarted
from clarion.ports import Clock, EventBus
from clarion.testing.suites import MOMENT, EventBusSuite, MakeBus, ObjectStoreSuite, Recorder, drain, started


class TestMemoryBus(EventBusSuite):
    @pytest.fixture
    def make_bus(self) -> MakeBus:
        return MemoryBus


@pytest.mark.usefixtures("each_database")
class TestEmbeddedBus(EventBusSuite):
    @pytest.fixture
    def make_bus(self, tmp_path: Path) -> MakeBus:
        def make(clock: Clock) -> EventBus:
            return EmbeddedBus(Database(url_in(tmp_path)), clock)

        return make

    def test_position_survives_a_restart(self, make_bus: MakeBus) -> None:
        """Bites: keep the position in memory and the second recorder sees everything again."""
        first, second = Recorder(), Recorder()
        bus = make_bus(ManualClock(MOMENT))
        bus.subscribe("suite", [JobStarted], first)
        bus.publish([started("a", 1)])
        drain(bus)
        again = make_bus(ManualClock(MOMENT))
        again.subscribe("suite", [JobStarted], second)
        again.publish([started("a", 2)])
        drain(again)
        assert [event.sequence for event in first.seen] == [1]
        assert [event.sequence for event in second.seen] == [2]

    def test_dead_letters_and_lag_can_be_read(self, make_bus: MakeBus, tmp_path: Path) -> None:
        bus = make_bus(ManualClock(MOMENT))
        bus.subscribe("suite", [JobStarted], Recorder(trouble=lambda _: PermanentError("the reason")))
        bus.publish([started("a", 1)])
        drain(bus)
        database = Database(url_in(tmp_path))
        letters = read_dead_letters(database)
        assert [(one.consumer, one.error, one.reason) for one in letters] == [("suite", "PermanentError", "the reason")]
        assert [(one.consumer, one.behind) for one in read_lag(database)] == [("suite", 0)]

    def test_a_dead_letter_is_redriven_once_its_cause_is_mended(self, make_bus: MakeBus, tmp_path: Path) -> None:
        """One path for one and for many; what a handler gives is published; what is settled is not handled again."""
        broken = True
        recorder = Recorder(trouble=lambda _: PermanentError("a broken model") if broken else None)
        bus = make_bus(ManualClock(MOMENT))
        bus.subscribe("suite", [JobStarted], recorder)
        bus.publish([started("a", number) for number in range(1, 6)])
        drain(bus)
        database = Database(url_in(tmp_path))
        letters = read_dead_letters(database)
        assert len(letters) == count_dead_letters(database) == 5
        broken = False
        assert len(mark(database, [one.letter_id for one in letters[:4]], State.REDRIVE)) == 4
        drain(bus)
        assert len(recorder.seen) == 4
        assert mark(database, [letters[4].letter_id], State.DISCARDED) == [letters[4].letter_id]
        assert count_dead_letters(database) == 0
        drain(bus)
        assert len(recorder.seen) == 4
        assert {one.state for one in read_dead_letters(database, states=list(State))} == {"redriven", "discarded"}

    def test_a_letter_that_fails_again_and_again_is_quarantined(self, make_bus: MakeBus, tmp_path: Path) -> None:
        """F33: the loop guard at three; the new reason is kept each time."""
        reasons = iter(("first", "second", "third", "fourth"))
        recorder = Recorder(trouble=lambda _: PermanentError(next(reasons)))
        bus = make_bus(ManualClock(MOMENT))
        bus.subscribe("suite", [JobStarted], recorder)
        bus.publish([started("a", 1)])
        drain(bus)
        database = Database(url_in(tmp_path))
        seen = []
        for _ in range(3):
            (letter,) = read_dead_letters(database)
            mark(database, [letter.letter_id], State.REDRIVE)
            drain(bus)
            (letter,) = read_dead_letters(database)
            seen.append((letter.state, letter.redrives, letter.reason))
        assert seen == [("open", 1, "second"), ("open", 2, "third"), ("quarantined", 3, "fourth")]


class TestMemoryStore(ObjectStoreSuite):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()


class TestFileStore(ObjectStoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> FileStore:
        return FileStore(tmp_path / "objects")

    def test_a_crash_leaves_nothing_in_place(self, store: FileStore, tmp_path: Path) -> None:
        """Half-written bytes lie beside, never under a digest."""
        (tmp_path / "objects" / "incoming" / "half").write_bytes(b"half")
        ref = store.put(b"whole")
        names = [path.name for path in (tmp_path / "objects").rglob("*") if path.is_file()]
        assert sorted(names) == sorted(["half", file_name(ref.digest)])
