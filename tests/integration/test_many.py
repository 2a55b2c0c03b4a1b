"""F18 and F19: the same instance again and again, and other content under its UID, from four senders at once.

Intake, store, journal and grouping are the real ones; only the wire is left out, which has tests of its own.
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from support.postgres import url_in

from clarion.adapters.database import Database
from clarion.adapters.embedded import EmbeddedBus
from clarion.adapters.memory import ManualClock
from clarion.adapters.objects import FileStore
from clarion.adapters.outbox import events_table
from clarion.config import GatewayConfig
from clarion.digests import digest_of
from clarion.model import Manifest, ObjectRef
from clarion.testing.suites import MOMENT
from gateway import tables
from gateway.grouping import Grouping
from gateway.intake import Arrival, Intake
from gateway.journal_writer import JournalWriter
from gateway.queries import list_studies
from gateway.registry import load_registry
from gateway.space import Space

CT, EXPLICIT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"
SENDERS = 4


def data_set(study: int, number: int, content: str = "") -> bytes:
    def element(tag: int, vr: bytes, text: str) -> bytes:
        value = text.encode() + (b"\0" if vr == b"UI" else b" ") * (len(text) % 2)
        return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value

    uid = f"1.9.{study}.{number}"
    return b"".join((
        element(0x00080016, b"UI", CT), element(0x00080018, b"UI", uid), element(0x0008103E, b"LO", content),
        element(0x00100020, b"LO", "P1"), element(0x0020000D, b"UI", f"1.9.{study}"),
        element(0x0020000E, b"UI", f"1.9.{study}.0"),
    ))  # fmt: skip


@dataclass
class Rig:
    root: Path
    settings: dict[str, str]
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.clock = ManualClock(MOMENT)
        self.store = FileStore(self.root / "objects")
        self.database = Database(url_in(self.root))
        EmbeddedBus(self.database, self.clock)
        titles = [{"ae_title": "B", "settings": self.settings, "overwrite_same_instance": self.overwrite}]
        config = GatewayConfig.model_validate({
            "ae_titles": titles, "intake": {"watermark_percent": 100, "reserve_gb": 0},
        })  # fmt: skip
        self.intake = Intake(
            store=self.store,
            journal=JournalWriter(self.root / "journal" / "w0", self.clock),
            space=Space(self.root, config.intake),
            ignored_classes={},
        )
        self.grouping = Grouping(
            journal_folder=self.root / "journal",
            database=self.database,
            store=self.store,
            clock=self.clock,
            registry=load_registry(config),
        )

    def receive(self, data: bytes, uid: str) -> int:
        reception = self.intake.begin(Arrival(
            sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, calling_ae="A", called_ae="B",
            association="x",
        ))  # fmt: skip
        reception.write(data)
        return reception.finish().status

    def settle(self) -> None:
        for _ in range(100_000):
            if not self.grouping.step():
                return
        raise AssertionError("grouping never came to rest")

    def kinds(self) -> dict[str, int]:
        with self.database.reading() as connection:
            rows = connection.execute(sa.select(events_table.c.kind, sa.func.count()).group_by(events_table.c.kind))
            return {row[0]: row[1] for row in rows}

    def manifests(self) -> list[Manifest]:
        with self.database.reading() as connection:
            rows = connection.execute(sa.select(tables.revisions).order_by(tables.revisions.c.closed)).all()
        return [Manifest.decode(self.store.read(ObjectRef(**row.manifest))) for row in rows]


def all_at_once(work: Callable[[int], None]) -> None:
    """Run the senders side by side; whatever one of them raises fails the test."""
    raised: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  looked at below
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(SENDERS)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(250)
        assert not one.is_alive()
    assert raised == []


def test_nine_thousand_duplicates_change_nothing(tmp_path: Path) -> None:
    """F18: 1,000 instances ten times. Bites: journal a duplicate as new and the events double."""
    rig = Rig(tmp_path, {"pipeline-x": "x"})
    sets = {f"1.9.1.{number}": data_set(1, number) for number in range(1, 1001)}

    def send(number: int) -> None:
        rng = random.Random(number)
        wanted = [uid for uid in sets for _ in range(10)][number::SENDERS]
        rng.shuffle(wanted)
        assert {rig.receive(sets[uid], uid) for uid in wanted} == {0x0000}

    all_at_once(send)
    rig.settle()
    assert rig.kinds() == {"instance.stored.v1": 1000, "group.opened.v1": 1}
    counts = list_studies(rig.database)[0]
    assert (counts.received, counts.grouped, counts.conflicted) == (1000, 1000, 0)
    with rig.database.reading() as connection:
        for row in connection.execute(sa.select(tables.instances)):
            assert rig.store.read(ObjectRef(**row.object)) == sets[row.sop_instance_uid]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_thousand_conflicts_are_all_flagged_and_nothing_is_lost(overwrite: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """F19. The group keeps the first, or with `overwrite_same_instance` the newest; both are kept."""
    count = 1000 if not overwrite else 200
    rig = Rig(tmp_path, {"pipeline-x": "x"}, overwrite=overwrite)
    for round_ in ("first", "second"):

        def send(number: int, content: str = round_) -> None:
            for one in range(1 + number, count + 1, SENDERS):
                assert rig.receive(data_set(1, one, content), f"1.9.1.{one}") == 0x0000

        all_at_once(send)
    rig.settle()
    assert rig.kinds()["instance.conflicted.v1"] == count
    assert rig.kinds()["instance.stored.v1"] == 2 * count
    with rig.database.reading() as connection:
        rows = connection.execute(sa.select(tables.instances)).all()
        assert all(row.conflicted for row in rows)
        assert len(rows) == 2 * count
        for row in rows:
            data = rig.store.read(ObjectRef(**row.object))
            assert digest_of(data) == row.digest
            assert b"first" in data or b"second" in data
    rig.clock.advance(timedelta(seconds=30))
    rig.settle()
    entries = rig.manifests()[-1].entries
    wanted = b"second" if overwrite else b"first"
    assert len(entries) == count
    assert all(wanted in rig.store.read(one.object) for one in entries)


@pytest.mark.parametrize(("group_by", "groups"), [("0020,000D", 5), ("0010,0020", 1)])
def test_five_studies_of_one_patient_and_three_pipelines(group_by: str, groups: int, tmp_path: Path) -> None:
    """Rule 2 of the specification: 15 jobs by study, 3 jobs by patient, each of those with five studies."""
    from clarion.codec import Record, decode
    from streams.match import Match, ResolvedPipeline

    settings = {"groupBy": group_by, "timeout": "60", **{f"pipeline-{one}": one for one in "abc"}}
    rig = Rig(tmp_path, settings)
    for study in range(1, 6):
        for number in (1, 2):
            assert rig.receive(data_set(study, number), f"1.9.{study}.{number}") == 0x0000
    rig.clock.advance(timedelta(seconds=61))
    rig.settle()
    ref = rig.store.put(b"definition")
    pipelines = tuple(ResolvedPipeline(id=one, definition=ref, destinations=()) for one in "abc")
    match = Match(Match.Config(pipelines=pipelines))
    with rig.database.reading() as connection:
        rows = connection.execute(sa.select(events_table).where(events_table.c.kind == "group.closed.v1")).all()
    import json

    closed = [decode(Record(key=row.subject, headers=json.loads(row.headers), body=row.body)) for row in rows]
    requested = [job for event in closed for job in match.handle(event)]
    assert len(closed) == groups
    assert len({job.subject for job in requested}) == len(requested) == 3 * groups
    assert {len(job.studies) for job in requested} == {5 // groups}  # type: ignore[attr-defined]


def test_a_late_revision_that_only_attaches_triggers_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path, {"pipeline-x": "x", "late": "attach"})
    for number in (1, 2):
        rig.receive(data_set(1, number), f"1.9.1.{number}")
        rig.clock.advance(timedelta(seconds=10))
        rig.settle()
    assert [len(one.entries) for one in rig.manifests()] == [1, 2]
    with rig.database.reading() as connection:
        rows = connection.execute(sa.select(events_table.c.body).where(events_table.c.kind == "group.closed.v1"))
        bodies = [row.body for row in rows]
    assert [b'"triggers":[]' in one for one in bodies] == [False, True]
