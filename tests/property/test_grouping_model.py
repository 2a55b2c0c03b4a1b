"""F20: grouping against a model, under reordering, duplication, conflicts, splitting over associations and restarts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clarion.adapters.database import Database
from clarion.adapters.embedded import EmbeddedBus
from clarion.adapters.memory import ManualClock, MemoryStore
from clarion.adapters.outbox import events_table
from clarion.codec import Record, decode
from clarion.config import GatewayConfig
from clarion.events import GroupClosed
from clarion.model import Manifest
from gateway import tables
from gateway.grouping import Grouping
from gateway.journal_writer import JournalWriter
from gateway.registry import load_registry

START = datetime(2026, 11, 23, tzinfo=UTC)
TIMEOUT_S = 5


@dataclass(frozen=True)
class Arrival:
    """One instance: study, number within it, content, the association it comes by and whether that ends with it,
    seconds since the arrival before, and a restart after it."""

    study: int
    number: int
    content: str
    association: str
    ends: bool
    gap_s: float
    restart: bool


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        study=st.integers(1, 3),
        number=st.integers(1, 4),
        content=st.sampled_from("aab"),
        association=st.sampled_from("xyz"),
        ends=st.booleans(),
        gap_s=st.sampled_from([0.0, 0.1, 1.0, 4.9, 5.0, 5.1, 30.0]),
        restart=st.booleans(),
    ),
    max_size=25,
)


class Model:
    """What must come out, in the fewest words: a key is quiet for longer than the timeout, then it closes."""

    def __init__(self) -> None:
        self.first: dict[tuple[int, int], str] = {}
        self.open: dict[int, tuple[float, set[tuple[int, str]]]] = {}
        self.members: dict[int, set[tuple[int, str]]] = {}
        self.closed: list[tuple[int, int, frozenset[tuple[int, str]]]] = []
        self.conflicts: set[tuple[int, int]] = set()

    def arrive(self, now: float, one: Arrival) -> None:
        self.close_before(now)
        uid = (one.study, one.number)
        kept = self.first.setdefault(uid, one.content)
        if kept != one.content:
            self.conflicts.add(uid)
        members = self.members.setdefault(one.study, set())
        known = (one.number, kept) in members
        members.add((one.number, kept))
        if one.study in self.open or not known:
            self.open[one.study] = (now, members)

    def close_before(self, now: float) -> None:
        due = [study for study, (last, _) in self.open.items() if now > last + TIMEOUT_S]
        for study in sorted(due, key=lambda one: self.open[one][0]):
            _, members = self.open.pop(study)
            revision = 1 + sum(other == study for other, _, _ in self.closed)
            self.closed.append((study, revision, frozenset(members)))


class Rig:
    """A real journal, database and grouping owner under a manual clock."""

    def __init__(self, root: Path) -> None:
        self.clock = ManualClock(START)
        self.store = MemoryStore()
        self.root = root
        self.writer = JournalWriter(root / "journal" / "w0", self.clock)
        self.database = Database(f"sqlite:///{root / 'clarion.db'}")
        EmbeddedBus(self.database, self.clock)
        self.grouping = self.make()

    def make(self) -> Grouping:
        config = GatewayConfig.model_validate({"ae_titles": [{"ae_title": "B", "settings": {"pipeline-x": "x"}}]})
        return Grouping(
            journal_folder=self.root / "journal",
            database=self.database,
            store=self.store,
            clock=self.clock,
            registry=load_registry(config),
        )

    def receive(self, one: Arrival) -> None:
        data = data_set(one)
        fields = {
            "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2", "sop_instance_uid": f"1.{one.study}.{one.number}",
            "transfer_syntax_uid": "1.2.840.10008.1.2.1", "calling_ae": "A", "called_ae": "B",
            "association": one.association, "study_uid": f"1.{one.study}", "series_uid": f"1.{one.study}.0",
            "object": asdict(self.store.put(data)),
        }  # fmt: skip
        self.writer.append("stored", fields)
        if one.ends:
            ended = {"association": one.association, "reason": "released", "calling_ae": "A", "called_ae": "B",
                     "study_uid": f"1.{one.study}", "stored": 1, "refused": 0}  # fmt: skip
            self.writer.append("ended", ended)

    def settle(self) -> None:
        for _ in range(1000):
            if not self.grouping.step():
                return
        raise AssertionError("grouping never came to rest")

    def events(self) -> list[Any]:
        with self.database.reading() as connection:
            rows = connection.execute(sa.select(events_table).order_by(events_table.c.position)).all()
        import json

        return [decode(Record(key=row.subject, headers=json.loads(row.headers), body=row.body)) for row in rows]


def data_set(one: Arrival) -> bytes:
    import struct

    def element(number: int, text: str) -> bytes:
        value = text.encode() + b"\0" * (len(text) % 2)
        return struct.pack("<HH2sH", 0x20, number, b"UI", len(value)) + value

    return element(0x0D, f"1.{one.study}") + element(0x0E, f"1.{one.study}.{one.number}.{ord(one.content)}")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ARRIVALS, st.booleans())
def test_same_groups_as_the_model(
    tmp_path_factory: pytest.TempPathFactory,
    arrivals: list[Arrival],
    late: bool,  # noqa: FBT001
) -> None:
    """`late`: the owner is down while everything arrives and reads the journal afterwards; nothing may differ.

    Bites: judge a group by the clock instead of the journal's time in Grouping.step and the late reader differs.
    """
    rig, model, now = Rig(tmp_path_factory.mktemp("grouping")), Model(), 0.0
    for one in arrivals:
        rig.clock.advance(timedelta(seconds=one.gap_s))
        now += one.gap_s
        if not late:
            rig.settle()
        model.arrive(now, one)
        rig.receive(one)
        if one.restart and not late:
            rig.settle()
            rig.grouping = rig.make()
    rig.clock.advance(timedelta(seconds=3600))
    rig.settle()
    model.close_before(now + 3600)
    closed = [event for event in rig.events() if isinstance(event, GroupClosed)]
    assert sorted(map(_described(rig), closed)) == sorted(
        (study, revision, sorted(number for number, _ in members)) for study, revision, members in model.closed
    )
    _check_accounts(rig, arrivals, model)


def _described(rig: Rig) -> Callable[[GroupClosed], tuple[int, int, list[int]]]:
    def describe(event: GroupClosed) -> tuple[int, int, list[int]]:
        entries = Manifest.decode(rig.store.read(event.manifest)).entries
        assert len(entries) == event.instances
        numbers = sorted(int(one.sop_instance_uid.split(".")[2]) for one in entries)
        return int(entries[0].study_uid.split(".")[1]), event.revision, numbers

    return describe


def _check_accounts(rig: Rig, arrivals: list[Arrival], model: Model) -> None:
    """Every identity is kept once, in one group, with one event; sequences are dense; conflicts are flagged."""
    with rig.database.reading() as connection:
        rows = connection.execute(sa.select(tables.instances)).all()
        members = connection.execute(sa.select(tables.members)).all()
    assert len(rows) == len({(one.study, one.number, one.content) for one in arrivals})
    assert len(members) == len({row.sop_instance_uid for row in rows})
    flagged = {row.sop_instance_uid for row in rows if row.conflicted}
    assert flagged == {f"1.{study}.{number}" for study, number in model.conflicts}
    sequences: dict[str, list[int]] = {}
    for event in rig.events():
        sequences.setdefault(event.subject, []).append(event.sequence)
    assert all(found == list(range(1, len(found) + 1)) for found in sequences.values())


def test_key_that_comes_back_after_a_day_is_a_new_group(tmp_path: Path) -> None:
    """The epoch of DESIGN 10."""
    rig = Rig(tmp_path)
    for number, gap in ((1, 0), (2, 23 * 3600), (3, 25 * 3600)):
        rig.clock.advance(timedelta(seconds=gap))
        rig.settle()
        rig.receive(Arrival(1, number, "a", "x", ends=False, gap_s=0, restart=False))
        rig.clock.advance(timedelta(seconds=60))
        rig.settle()
    with rig.database.reading() as connection:
        rows = connection.execute(sa.select(tables.groups).order_by(tables.groups.c.epoch)).all()
    assert [(row.epoch, row.revision) for row in rows] == [(0, 2), (1, 1)]


def test_rule_that_raises_costs_nothing_but_its_own_instance(tmp_path: Path) -> None:
    rig = Rig(tmp_path)

    class Broken:
        def group_of(self, instance: Any) -> str | None:
            if instance.sop_instance_uid == "1.1.1":
                raise ZeroDivisionError
            return "k"

        def is_complete(self, group: Any, now: Any) -> Any:
            raise ZeroDivisionError

        def triggers(self, group: Any) -> Any:
            raise ZeroDivisionError

    object.__setattr__(rig.grouping._registry["B"], "rule", Broken())
    rig.receive(Arrival(1, 1, "a", "x", ends=False, gap_s=0, restart=False))
    rig.receive(Arrival(1, 2, "a", "x", ends=False, gap_s=0, restart=False))
    rig.clock.advance(timedelta(seconds=60))
    rig.settle()
    with rig.database.reading() as connection:
        set_aside = connection.execute(sa.select(tables.quarantine.c.reason)).scalars().all()
        kept = connection.execute(sa.select(tables.groups.c.state, tables.groups.c.reason)).one()
    assert set_aside == ["rule-failed"]
    assert tuple(kept) == ("open", "rule-failed")
