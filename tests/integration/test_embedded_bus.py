"""How far a consumer has come on the embedded bus: remembered between looks, kept seldom, and never put back."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from support.postgres import url_in

from clarion.adapters import embedded, outbox
from clarion.adapters.database import Database
from clarion.adapters.embedded import EmbeddedBus, read_lag
from clarion.adapters.memory import ManualClock
from clarion.errors import TransientError
from clarion.events import JobStarted, JobSucceeded
from clarion.testing.suites import MOMENT, started

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from clarion.events import Event

pytestmark = pytest.mark.usefixtures("each_database")


class Handler:
    """Counts what it is handed; asks for time as often as it is told to."""

    def __init__(self, pauses: int = 0) -> None:
        self.pauses = pauses
        self.seen: list[Event] = []

    def handle(self, event: Event) -> Iterable[Event]:
        self.seen.append(event)
        if self.pauses:
            self.pauses -= 1
            raise TransientError("later")
        return ()


def ended(number: int) -> JobSucceeded:
    return JobSucceeded(subject="ended", sequence=number, time=MOMENT, source="test", attempt=1, results=0)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(url_in(tmp_path))


def test_after_a_pause_nothing_is_handed_again(database: Database) -> None:
    """Bites: what was passed over before the pause is kept after what was handled, and the event comes again."""
    clock, handler = ManualClock(MOMENT), Handler(pauses=1)
    bus = EmbeddedBus(database, clock)
    bus.subscribe("c", [JobSucceeded], handler)
    bus.publish([started("a", number) for number in range(1, 20)])
    bus.step()
    bus.publish([ended(1)])
    for _ in range(5):
        bus.step()
        clock.advance(timedelta(minutes=1))
    assert len(handler.seen) == 2, "once in vain, and once more"
    assert [one.behind for one in read_lag(database)] == [0]


def test_events_of_other_kinds_are_read_past_once_and_kept_when_no_more_come(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, handler = EmbeddedBus(database, ManualClock(MOMENT)), Handler()
    bus.subscribe("c", [JobSucceeded], handler)
    asked: list[int] = []
    read = outbox.read_after

    def noted(connection: sa.Connection, position: int, *given: Any, **named: Any) -> Any:
        asked.append(position)
        return read(connection, position, *given, **named)

    monkeypatch.setattr(outbox, "read_after", noted)
    for number in range(1, 4):
        bus.publish([started("a", number)])
        bus.step()
    assert len(asked) == len(set(asked)) == 3, "each stretch is read once"
    assert outbox.position_of(database, "c") == 0
    bus.step()
    assert [one.behind for one in read_lag(database)] == [0]
    assert len(asked) == 3, "nothing new, nothing read"
    written: list[object] = []
    monkeypatch.setattr(outbox, "move_positions", lambda _, moves: written.append(moves))
    bus.step()
    assert written == [], "nothing new, nothing written"


def test_two_of_a_name_do_not_put_each_other_back(database: Database) -> None:
    """Bites: keep what was passed over without looking at where the other has come to."""
    one, other = EmbeddedBus(database, ManualClock(MOMENT)), EmbeddedBus(database, ManualClock(MOMENT))
    seen = Handler()
    one.subscribe("c", [JobSucceeded], Handler())
    other.subscribe("c", [JobSucceeded], seen)
    one.publish([started("a", 1)])
    one.step()
    other.publish([ended(1)])
    other.step()
    kept = outbox.position_of(database, "c")
    outbox.move_positions(database, {"c": (0, 1)})  # as the first would, had it looked before
    assert outbox.position_of(database, "c") == kept
    assert len(seen.seen) == 1


def test_a_table_that_goes_back_under_us_is_read_anew(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bites: trust what was passed over before the database was restored, and skip what has those positions now."""
    table, handler = outbox.events_table, Handler()
    bus = EmbeddedBus(database, ManualClock(MOMENT))
    bus.subscribe("c", [JobStarted], handler)
    bus.publish([ended(number) for number in range(1, 6)])
    bus.step()
    with monkeypatch.context() as patch:
        patch.setattr(embedded.EmbeddedBus, "_look", lambda _: (_ for _ in ()).throw(ConnectionError()))
        with pytest.raises(ConnectionError):
            bus.step()
    with database.transaction() as connection:
        last = connection.execute(sa.select(sa.func.max(table.c.position))).scalar_one()
        connection.execute(table.delete())
        outbox.record_events(connection, [started("a", 1)])
        connection.execute(table.update().values(position=last))
    bus.step()
    assert len(handler.seen) == 1
