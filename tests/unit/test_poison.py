"""Records, rules and objects that cannot be borne: each is set aside with its reason, and the next one is taken."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from support.postgres import url_in

from clarion.adapters.database import Database
from clarion.adapters.embedded import EmbeddedBus
from clarion.adapters.memory import ManualClock, MemoryStore
from clarion.adapters.outbox import events_table
from clarion.errors import StoreUnavailableError, TransientError
from clarion.model import Action, Decision, Group, Instance, ObjectRef, Trigger
from clarion.testing.suites import MOMENT
from gateway import groups, tables
from gateway.grouping import Grouping
from gateway.journal_writer import JournalWriter
from gateway.queries import list_blocked_groups, list_studies
from gateway.registry import CalledEntity

pytestmark = pytest.mark.usefixtures("each_database")


class GoodRule:
    def group_of(self, _instance: Instance) -> Any:
        return "k"

    def is_complete(self, group: Group, now: datetime) -> Any:
        due = group.last_received + timedelta(seconds=5)
        return Decision(action=Action.CLOSE) if now > due else Decision(action=Action.WAIT, again=due)

    def triggers(self, _group: Group) -> Any:
        return [Trigger(pipeline_id="p", name="n")]


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    value += b" " * (len(value) % 2)
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value


class Rig:
    def __init__(self, root: Path, rule: Any) -> None:
        self.clock = ManualClock(MOMENT)
        self.store = MemoryStore()
        self.writer = JournalWriter(root / "journal" / "w0", self.clock)
        self.database = Database(url_in(root))
        EmbeddedBus(self.database, self.clock)
        entity = CalledEntity(ae_title="B", rule_name="r", rule=rule, overwrite_same_instance=False)
        self.grouping = Grouping(
            journal_folder=root / "journal",
            database=self.database,
            store=self.store,
            clock=self.clock,
            registry={"B": entity},
        )

    def receive(self, number: int, data: bytes = b"", *, ref: ObjectRef | None = None) -> ObjectRef:
        kept = ref or self.store.put(data + element(0x00200013, b"IS", str(number).encode()))
        self.writer.append("stored", {
            "sop_class_uid": "1.2", "sop_instance_uid": f"1.2.{number}", "transfer_syntax_uid": "1.2.840.10008.1.2.1",
            "calling_ae": "A", "called_ae": "B", "association": "x", "study_uid": "1.9", "series_uid": "1.9.1",
            "object": asdict(kept),
        })  # fmt: skip
        return kept

    def settle(self) -> None:
        for _ in range(50):
            try:
                if not self.grouping.step():
                    return
            except TransientError:
                self.clock.advance(timedelta(seconds=1))
        raise AssertionError("grouping never came to rest")

    def reasons(self) -> list[str]:
        with self.database.reading() as connection:
            return sorted(row.reason for row in connection.execute(sa.select(tables.quarantine)))

    def grouped(self) -> set[str]:
        with self.database.reading() as connection:
            return set(connection.execute(sa.select(tables.members.c.sop_instance_uid)).scalars())

    def kinds(self) -> list[str]:
        with self.database.reading() as connection:
            query = sa.select(events_table.c.kind).order_by(events_table.c.position)
            return list(connection.execute(query).scalars())


@pytest.mark.parametrize(
    "charset", [b"undefined", b"idna", b"utf_7", b"unicode_escape", b"\\\\ISO 2022 IR 87", b"\xff"]
)
def test_any_character_set_can_be_borne(charset: bytes, tmp_path: Path) -> None:
    """Bites: hand the value to Python's codecs and the whole grouping stands still."""

    class ByPatient(GoodRule):
        def group_of(self, instance: Instance) -> Any:
            return instance.value("0010,0020") or "none"

    rig = Rig(tmp_path, ByPatient())
    rig.receive(1, element(0x00080005, b"CS", charset) + element(0x00100020, b"LO", b"+2AA-\\ud800\x1b$B\xff"))
    rig.receive(2)
    rig.settle()
    assert rig.grouped() == {"1.2.1", "1.2.2"}


def test_a_missing_object_is_set_aside(tmp_path: Path) -> None:
    rig = Rig(tmp_path, GoodRule())
    rig.receive(1, ref=ObjectRef(location="memory:0", digest="0" * 64, size_bytes=1))
    rig.receive(2)
    rig.settle()
    assert rig.reasons() == ["object-missing"]
    assert rig.grouped() == {"1.2.2"}
    assert "instance.quarantined.v1" in rig.kinds()


def test_an_object_that_stays_unreadable_is_set_aside_one_that_recovers_is_taken(tmp_path: Path) -> None:
    rig = Rig(tmp_path, GoodRule())
    bad, slow = rig.receive(1), rig.receive(2)
    rig.receive(3)
    failures, read = {slow.digest: 2, bad.digest: 1000}, rig.store.read

    def unreliable(ref: ObjectRef) -> bytes:
        failures[ref.digest] = failures.get(ref.digest, 0) - 1
        if failures[ref.digest] >= 0:
            raise StoreUnavailableError("bad sector")
        return read(ref)

    rig.store.read = unreliable  # type: ignore[method-assign]
    rig.settle()
    assert rig.reasons() == ["object-unreadable"]
    assert rig.grouped() == {"1.2.2", "1.2.3"}


def test_damage_in_the_journal_is_shown(tmp_path: Path) -> None:
    rig = Rig(tmp_path, GoodRule())
    for number in range(1, 4):
        rig.receive(number)
    path = tmp_path / "journal" / "w0" / "00000001.seg"
    data = bytearray(path.read_bytes())
    data[data.find(b'"1.2.2"') + 2] ^= 1
    path.write_bytes(bytes(data))
    rig.settle()
    assert rig.reasons() == ["journal-damaged"]
    assert rig.grouped() == {"1.2.1", "1.2.3"}


def test_a_text_that_the_database_refuses_stops_nobody(tmp_path: Path) -> None:
    """PostgreSQL takes no NUL: the record is set aside with its place alone, and the next is grouped."""
    rig = Rig(tmp_path, GoodRule())
    rig.writer.append("quarantined", {
        "sop_class_uid": "1.2", "sop_instance_uid": "1.2.3\0004", "transfer_syntax_uid": "1.2", "calling_ae": "A\0B",
        "called_ae": "B", "association": "x", "study_uid": "1.9", "reason": "sop-instance-mismatch", "object": None,
    })  # fmt: skip
    rig.receive(2)
    rig.settle()
    assert rig.reasons() in (["sop-instance-mismatch"], ["grouping-failed"])
    assert rig.grouped() == {"1.2.2"}


@pytest.mark.parametrize("fields", [{}, {"object": {"digest": "blake3:00"}}])
def test_a_record_nobody_foresaw_is_set_aside(fields: dict[str, Any], tmp_path: Path) -> None:
    """Bites: keep all that it says, and what cannot be kept stops everything behind it."""
    rig = Rig(tmp_path, GoodRule())
    rig.writer.append("stored", {"sop_instance_uid": "1.2.9", **fields})
    rig.receive(2)
    rig.settle()
    assert rig.reasons() == ["grouping-failed"]
    assert rig.grouped() == {"1.2.2"}


# Later than any time that UTC has.
NEVER = datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))


def _raises(*_: object) -> Any:
    raise RuntimeError("DOE^JANE")


@pytest.mark.parametrize("answer", [_raises, lambda _: ("a", "b"), lambda _: "", lambda _: "\ud800", lambda _: 7])
def test_a_rule_that_gives_no_key_concerns_its_instance(
    answer: Callable[[Instance], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Rule(GoodRule):
        def group_of(self, instance: Instance) -> Any:
            return answer(instance) if instance.sop_instance_uid == "1.2.1" else "k"

    rig = Rig(tmp_path, Rule())
    rig.receive(1)
    rig.receive(2)
    rig.settle()
    assert rig.reasons() == ["rule-failed"]
    assert rig.grouped() == {"1.2.2"}
    assert "DOE^JANE" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("complete", "triggers"),
    [
        (_raises, None),
        (lambda *_: None, None),
        (lambda *_: Decision(action=Action.WAIT, again=datetime(2026, 1, 1)), None),  # noqa: DTZ001  the fault
        (
            lambda *_: Decision(action=Action.WAIT, again=datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))),
            None,
        ),
        (lambda *_: Decision(action=Action.CLOSE), _raises),
        (lambda *_: Decision(action=Action.CLOSE), lambda _: ["p"]),
        (lambda *_: Decision(action=Action.CLOSE), lambda _: None),
        (lambda *_: Decision(action=Action.CLOSE), lambda _: [Trigger(pipeline_id="p", name=object())]),  # type: ignore[arg-type]
        (lambda *_: Decision(action=Action.CLOSE), lambda _: [Trigger(pipeline_id="p", name="")]),
        (lambda *_: Decision(action=Action.CLOSE), lambda _: [Trigger(pipeline_id="p", name="n", priority="soon")]),
    ],
)
def test_a_rule_that_cannot_decide_leaves_its_group_open(complete: Any, triggers: Any, tmp_path: Path) -> None:
    class Rule(GoodRule):
        broken = True

        def group_of(self, instance: Instance) -> Any:
            return str(instance.sop_instance_uid)

        def is_complete(self, group: Group, now: datetime) -> Any:
            bad = self.broken and group.key == "1.2.1"
            return complete(group, now) if bad else super().is_complete(group, now)

        def triggers(self, group: Group) -> Any:
            bad = triggers is not None and self.broken and group.key == "1.2.1"
            return triggers(group) if bad else super().triggers(group)

    rule = Rule()
    rig = Rig(tmp_path, rule)
    rig.receive(1)
    rig.receive(2)
    rig.clock.advance(timedelta(seconds=30))
    rig.settle()
    assert rig.kinds().count("group.closed.v1") == 1, "the healthy one"
    assert rig.kinds().count("group.blocked.v1") == 1, "said once"
    assert [one.reason for one in list_blocked_groups(rig.database)] == ["rule-failed"]
    for _ in range(3):
        rig.clock.advance(timedelta(seconds=90))
        rig.settle()
    assert rig.kinds().count("group.blocked.v1") == 1, "not every minute"
    rule.broken = False
    rig.clock.advance(timedelta(seconds=90))
    rig.settle()
    assert rig.kinds().count("group.closed.v1") == 2, "the other one, once its rule answers"


@pytest.mark.parametrize("trouble", ["failed", "removed"])
def test_a_group_whose_rule_never_answers_is_given_up_in_the_end(trouble: str, tmp_path: Path) -> None:
    """I5: nothing waits for ever; its instances are kept."""

    class Rule(GoodRule):
        is_complete = _raises

    rig = Rig(tmp_path, Rule())
    rig.receive(1)
    rig.settle()
    if trouble == "removed":
        rig.grouping._registry.clear()
    rig.clock.advance(timedelta(days=6))
    rig.settle()
    assert rig.kinds()[-1] == "group.blocked.v1"
    rig.clock.advance(timedelta(days=2))
    rig.settle()
    assert rig.kinds()[-1] == "group.discarded.v1"
    assert rig.grouped() == {"1.2.1"}
    assert list_blocked_groups(rig.database) == []


def test_what_grouping_cannot_follow_keeps_no_other_group_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bites: without the savepoint around a group's closing, grouping repeats the same transaction for ever."""

    class Rule(GoodRule):
        def group_of(self, instance: Instance) -> Any:
            return str(instance.sop_instance_uid)

    rig = Rig(tmp_path, Rule())
    rig.receive(1)
    rig.receive(2)
    rig.settle()
    whole = groups.manifest_of

    def failing(connection: sa.Connection, row: sa.RowMapping) -> Any:
        return _raises() if row["key"] == "1.2.1" else whole(connection, row)

    monkeypatch.setattr(groups, "manifest_of", failing)
    rig.clock.advance(timedelta(seconds=30))
    rig.settle()
    assert [one.reason for one in list_blocked_groups(rig.database)] == ["grouping-failed"]
    assert rig.kinds().count("group.closed.v1") == 1


def test_an_instance_that_was_ignored_and_is_wanted_later_is_grouped(tmp_path: Path) -> None:
    """Received = grouped + ignored + quarantined also holds after the rule changed its mind."""

    class Rule(GoodRule):
        takes = False

        def group_of(self, _instance: Instance) -> Any:
            return "k" if self.takes else None

    rule = Rule()
    rig = Rig(tmp_path, rule)
    ref = rig.receive(1)
    rig.settle()
    assert rig.kinds() == ["instance.ignored.v1"]
    rule.takes = True
    rig.receive(1, ref=ref)
    rig.settle()
    assert rig.kinds() == ["instance.ignored.v1", "instance.stored.v1", "group.opened.v1"]
    counts = list_studies(rig.database)[0]
    assert (counts.received, counts.grouped, counts.ignored) == (1, 1, 0)


def test_an_ignored_sop_class_is_counted_and_said_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path, GoodRule())
    fields = {"sop_class_uid": "1.2", "sop_instance_uid": "1.2.1", "transfer_syntax_uid": "1.2.840.10008.1.2.1",
              "calling_ae": "A", "called_ae": "B", "association": "x", "study_uid": "1.9",
              "reason": "sop-class-ignored"}  # fmt: skip
    for _ in range(3):
        rig.writer.append("ignored", fields)
    rig.settle()
    assert rig.kinds() == ["instance.ignored.v1"]
    counts = list_studies(rig.database)[0]
    assert (counts.received, counts.grouped, counts.ignored) == (1, 0, 1)


def test_objects_are_read_before_the_database_is_locked(tmp_path: Path) -> None:
    """Bites: read within the transaction, and everybody waits for the disk under one object."""
    rig = Rig(tmp_path, GoodRule())
    rig.receive(1)
    read, locked = rig.store.read, []

    def watching(ref: ObjectRef) -> bytes:
        other = sqlite3.connect(tmp_path / "clarion.db", timeout=0)
        try:
            other.execute("BEGIN IMMEDIATE")
            locked.append(False)
        except sqlite3.OperationalError:
            locked.append(True)
        other.close()
        return read(ref)

    rig.store.read = watching  # type: ignore[method-assign]
    rig.settle()
    assert locked == [False]
