"""Contract suites: what must hold of every bus and every object store, ours and yours.

Subclass a suite in a test module and give it a fixture of the name that its tests ask for; pytest does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from clarion.adapters.memory import ManualClock
from clarion.errors import MissingObjectError, PermanentError, StoreUnavailableError, TransientError
from clarion.events import Event, JobStarted, JobSucceeded
from clarion.model import ObjectRef
from clarion.ports import Clock, EventBus

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.ports import ObjectStore

MakeBus = Callable[[Clock], EventBus]

MOMENT = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
_ROUNDS = 200


def started(subject: str, sequence: int) -> JobStarted:
    """Make an event to publish."""
    return JobStarted(subject=subject, sequence=sequence, time=MOMENT, source="suite", attempt=sequence)


@dataclass
class Recorder:
    """A handler that remembers what it saw, answers with `following`, and raises what `trouble` gives."""

    seen: list[Event] = field(default_factory=list)
    following: Callable[[Event], Iterable[Event]] = lambda _: ()
    trouble: Callable[[Event], Exception | None] = lambda _: None

    def handle(self, event: Event) -> Iterable[Event]:
        """Remember, then raise or answer."""
        error = self.trouble(event)
        if error is not None:
            raise error
        self.seen.append(event)
        return self.following(event)


class EventBusSuite:
    """Needs a fixture `make_bus`: a function from a Clock to a new EventBus; each call sees the same events."""

    def test_order_per_subject_and_every_event_once_in_quiet_times(self, make_bus: MakeBus) -> None:
        """Events of a subject come in the order of publishing."""
        bus, recorder = make_bus(ManualClock(MOMENT)), Recorder()
        bus.subscribe("suite", [JobStarted], recorder)
        published = [started(subject, number) for number in range(1, 30) for subject in ("a", "b")]
        bus.publish(published)
        drain(bus)
        for subject in ("a", "b"):
            wanted = [event for event in published if event.subject == subject]
            assert [event for event in recorder.seen if event.subject == subject] == wanted
        assert len(recorder.seen) == len(published)

    def test_said_twice_is_kept_once(self, make_bus: MakeBus) -> None:
        """An event published again is passed over."""
        bus, recorder = make_bus(ManualClock(MOMENT)), Recorder()
        bus.subscribe("suite", [JobStarted], recorder)
        bus.publish([started("a", 1)])
        bus.publish([started("a", 1), started("a", 2)])
        drain(bus)
        assert [event.sequence for event in recorder.seen] == [1, 2]

    def test_only_the_kinds_asked_for(self, make_bus: MakeBus) -> None:
        """A handler sees nothing it did not subscribe to."""
        bus, recorder = make_bus(ManualClock(MOMENT)), Recorder()
        bus.subscribe("suite", [JobSucceeded], recorder)
        bus.publish([started("a", 1)])
        drain(bus)
        assert recorder.seen == []

    def test_what_follows_is_published(self, make_bus: MakeBus) -> None:
        """A handler's answer reaches the handlers of its kind."""
        bus, second = make_bus(ManualClock(MOMENT)), Recorder()
        follow = JobSucceeded(subject="a", sequence=9, time=MOMENT, source="suite", attempt=1, results=0)
        bus.subscribe("first", [JobStarted], Recorder(following=lambda _: [follow]))
        bus.subscribe("second", [JobSucceeded], second)
        bus.publish([started("a", 1)])
        drain(bus)
        assert second.seen == [follow]

    def test_transient_error_pauses_and_the_same_event_comes_again(self, make_bus: MakeBus) -> None:
        """Nothing overtakes an event whose handler asked for time."""
        clock = ManualClock(MOMENT)
        bus, tries = make_bus(clock), []

        def trouble(event: Event) -> Exception | None:
            tries.append(event.sequence)
            return TransientError("later", retry_after_s=10) if len(tries) == 1 else None

        recorder = Recorder(trouble=trouble)
        bus.subscribe("suite", [JobStarted], recorder)
        bus.publish([started("a", 1), started("a", 2)])
        drain(bus)
        assert recorder.seen == []
        clock.advance(timedelta(seconds=11))
        drain(bus)
        assert [event.sequence for event in recorder.seen] == [1, 2]
        assert tries == [1, 1, 2]

    def test_patience_with_a_transient_error_ends(self, make_bus: MakeBus) -> None:
        """What asks for time again and again for more than an hour is set aside, and nobody waits for it any more."""
        clock = ManualClock(MOMENT)
        bus = make_bus(clock)
        recorder = Recorder(
            trouble=lambda event: StoreUnavailableError("bad sector", 60) if event.sequence == 1 else None
        )
        bus.subscribe("suite", [JobStarted], recorder)
        bus.publish([started("a", 1), started("a", 2)])
        for minute in range(70):
            drain(bus)
            if minute < 55:  # noqa: PLR2004  less than the hour
                assert recorder.seen == []
            clock.advance(timedelta(seconds=61))
        assert [event.sequence for event in recorder.seen] == [2]

    def test_permanent_error_sets_the_event_aside_and_goes_on(self, make_bus: MakeBus) -> None:
        """A poison record does not stop the others."""
        bus = make_bus(ManualClock(MOMENT))
        recorder = Recorder(trouble=lambda event: PermanentError("no") if event.sequence == 1 else None)
        bus.subscribe("suite", [JobStarted], recorder)
        bus.publish([started("a", 1), started("a", 2)])
        drain(bus)
        assert [event.sequence for event in recorder.seen] == [2]

    def test_unforeseen_error_is_tried_again_then_set_aside(self, make_bus: MakeBus) -> None:
        """A handler that breaks is given a few tries, a bounded number."""
        clock = ManualClock(MOMENT)
        bus, tries = make_bus(clock), []

        def trouble(event: Event) -> Exception | None:
            if event.sequence != 1:
                return None
            tries.append(1)
            return ZeroDivisionError("broken")

        recorder = Recorder(trouble=trouble)
        bus.subscribe("suite", [JobStarted], recorder)
        bus.publish([started("a", 1), started("a", 2)])
        for _ in range(20):
            drain(bus)
            clock.advance(timedelta(seconds=5))
        assert [event.sequence for event in recorder.seen] == [2]
        assert 1 < len(tries) <= 10  # noqa: PLR2004  a few

    def test_positions_are_per_consumer(self, make_bus: MakeBus) -> None:
        """Two consumers each see everything."""
        bus, one, other = make_bus(ManualClock(MOMENT)), Recorder(), Recorder()
        bus.subscribe("one", [JobStarted], one)
        bus.subscribe("other", [JobStarted], other)
        bus.publish([started("a", 1)])
        drain(bus)
        assert one.seen == other.seen == [started("a", 1)]


def drain(bus: EventBus) -> None:
    """Step a bus until nothing moves."""
    for _ in range(_ROUNDS):
        if not bus.step():
            return
    raise AssertionError("the bus never came to rest")


class ObjectStoreSuite:
    """Needs a fixture `store`: an empty ObjectStore."""

    def test_what_is_put_can_be_read(self, store: ObjectStore) -> None:
        """The bytes come back as they were."""
        for data in (b"", b"a", bytes(range(256)) * 5000):
            ref = store.put(data)
            assert store.read(ref) == data
            assert ref.size_bytes == len(data)

    def test_the_beginning_can_be_read_alone(self, store: ObjectStore) -> None:
        """Of a large object its header is wanted, and no more."""
        ref = store.put(bytes(range(256)) * 5000)
        assert store.read_head(ref, 300) == (bytes(range(256)) * 2)[:300]
        assert store.read_head(store.put(b"short"), 300) == b"short"

    def test_twice_is_harmless(self, store: ObjectStore) -> None:
        """The same bytes have the same reference."""
        assert store.put(b"same") == store.put(b"same")

    def test_different_bytes_never_share_a_reference(self, store: ObjectStore) -> None:
        """A reference names one content."""
        assert store.put(b"one").location != store.put(b"two").location

    def test_unknown_reference(self, store: ObjectStore) -> None:
        """What is not there is said to be missing, not empty."""
        missing = ObjectRef(location="file:00", digest="00" * 32, size_bytes=1)
        try:
            store.read(missing)
        except MissingObjectError:
            return
        raise AssertionError("an unknown reference was read")
