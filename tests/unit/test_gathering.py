"""Who is waited for before a sync, and who is not."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from support.world import pause

from gateway import gathering
from gateway.gathering import Gathering


@pytest.fixture(autouse=True)
def _long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_LONGEST_S", 20.0)


def at_once(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def synced(one: Gathering, seconds: float) -> None:
    one.begin(set())
    one.end()
    one._sync_s = seconds


def test_who_writes_alone_waits_for_nobody() -> None:
    one = Gathering()
    for _ in range(3):
        one.came()
        one.wait()
        synced(one, 40.0)
    assert one._complete is None


def test_who_wrote_lately_is_waited_for_and_lets_the_sync_begin() -> None:
    """Bites: a sync each in turn, for ever."""
    one = Gathering()
    again = threading.Event()

    def other() -> None:
        one.came()
        again.wait(20)
        one.came()

    beside = at_once(other)
    while not one._came:
        pause(0.001)
    synced(one, 40.0)
    one.came()
    leading = at_once(one.wait)
    pause(0.1)
    assert leading.is_alive(), "the other one was in the last sync"
    again.set()
    leading.join(10)
    assert not leading.is_alive(), "it has come: there is nobody else to wait for"
    beside.join(10)


def test_who_waits_for_what_is_being_written_is_not_waited_for() -> None:
    """Bites: it cannot come again before a sync that this one delays."""
    one = Gathering()
    blocked = 7
    one.came()
    one._came.add(blocked)
    one.begin({blocked})
    one.end()
    one._sync_s = 40.0
    one.came()
    one.wait()
    assert one._lately == (set(), {threading.get_ident()})


def test_who_has_stopped_is_waited_for_twice_and_not_for_long() -> None:
    one = Gathering()
    at_once(one.came).join(10)
    synced(one, 0.02)
    waits = []
    for _ in range(3):
        one.came()
        waits.append(bool((one._lately[0] | one._lately[1]) - one._came))
        one.wait()
        synced(one, 0.02)
    assert waits == [True, True, False]
