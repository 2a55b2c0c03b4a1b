"""When the grouping owner works: at once after a rest, in a lull, and when it has waited long enough."""

from __future__ import annotations

from gateway.lull import LONGEST_S, Lull


class Journal:
    """A clock that waiting moves, and ends that move while `streams` says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.end = 0
        self.streams_until = 0.0

    def ends(self) -> int:
        self.end += self.now < self.streams_until
        return self.end

    def wait(self, seconds: float) -> None:
        self.now += seconds


def rested(journal: Journal) -> tuple[Lull, float]:
    """Give a lull that begins to wait now, and when it came to be there."""
    lull = Lull(journal.ends, lambda: journal.now, journal.wait)
    lull.all_taken()
    begun = journal.now
    for _ in range(1000):
        if lull.is_here():
            return lull, journal.now - begun
    raise AssertionError("it never came")


def test_what_comes_after_a_rest_is_taken_at_once() -> None:
    journal = Journal()
    lull = Lull(journal.ends, lambda: journal.now, journal.wait)
    assert lull.is_here()
    lull.all_taken()
    journal.now += 60
    before = journal.now
    assert lull.is_here()
    assert journal.now == before


def test_records_come_together_for_half_a_second() -> None:
    _, waited = rested(Journal())
    assert 0.5 <= waited <= 0.6


def test_while_instances_stream_in_the_owner_waits_for_the_lull_behind_them() -> None:
    journal = Journal()
    journal.streams_until = journal.now + 2.0
    _, waited = rested(journal)
    assert 2.0 <= waited <= 2.2


def test_a_stream_that_never_ends_is_worked_off() -> None:
    journal = Journal()
    journal.streams_until = journal.now + 3600
    lull, waited = rested(journal)
    assert LONGEST_S <= waited <= LONGEST_S + 0.1
    # As long as not all is taken it works on, whatever comes.
    assert lull.is_here()
    assert lull.is_here()
    lull.all_taken()
    assert not lull.is_here()
