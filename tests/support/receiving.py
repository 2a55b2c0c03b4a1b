"""A journal, an object store and a grouping owner without the wire: instances are written as a worker writes them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import sqlalchemy as sa
from support.postgres import url_in
from support.raw import CT, EXPLICIT, data_set

from clarion.adapters.database import Database
from clarion.adapters.memory import ManualClock
from clarion.adapters.objects import FileStore
from clarion.config import GatewayConfig
from clarion.digests import digest_of
from clarion.model import ObjectRef
from clarion.testing.suites import MOMENT
from console.schema import create_tables
from gateway import journal_writer, tables
from gateway.grouping import Grouping
from gateway.intake import COLLECTED_BYTES
from gateway.journal_writer import JournalWriter
from gateway.registry import load_registry
from gateway.retention import Policy

SIZE = 2000
PER_SEGMENT = 10
CONFIG = GatewayConfig.model_validate({
    "ae_titles": [
        {"ae_title": "B", "settings": {"pipeline-p": "p"}},
        {"ae_title": "OTHER", "settings": {"pipeline-q": "q"}},
    ]
})  # fmt: skip


class Receiving:
    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(journal_writer, "SEGMENT_BYTES", PER_SEGMENT * (SIZE + 900))
        self.root = root
        self.folder = root / "journal" / "w0"
        self.clock = ManualClock(MOMENT)
        self.writer = JournalWriter(self.folder, self.clock)
        self.wanted: dict[str, bytes] = {}
        self.policy = Policy()
        self.database = Database(url_in(root))
        create_tables(self.database)

    def receive(self, uid: str, size: int = SIZE, *, called_ae: str = "B", kind: str = "stored") -> bytes:
        """Write what a worker writes: a large data set in a file of its own, a small one in its record."""
        data = data_set(uid, size)
        fields = {
            "sop_class_uid": CT, "sop_instance_uid": uid, "transfer_syntax_uid": EXPLICIT, "calling_ae": "A",
            "called_ae": called_ae, "association": "a", "study_uid": "1.2.9", "series_uid": "1.2.9.1",
            **({"reason": "truncated"} if kind == "quarantined" else {}),
        }  # fmt: skip
        if size > COLLECTED_BYTES:
            file = self.store.receive()
            file.write(data)
            self.writer.append(kind, {**fields, "object": asdict(file.keep(digest_of(data)))})
            file.abandon()
        else:
            self.writer.append(kind, {**fields, "object": {"digest": digest_of(data)}}, data)
        self.wanted[uid] = data
        return data

    def owner(self) -> Grouping:
        return Grouping(
            journal_folder=self.root / "journal",
            database=Database(url_in(self.root)),
            store=self.store,
            clock=self.clock,
            registry=load_registry(CONFIG),
            policy=self.policy,
        )

    @property
    def store(self) -> FileStore:
        return FileStore(self.root / "objects")

    def settle(self) -> Grouping:
        owner = self.owner()
        for _ in range(1000):
            if not owner.step():
                return owner
        raise AssertionError("it never ended")

    def judge(self) -> None:
        """Everything that was acknowledged is there, byte for byte, under the reference that its row has."""
        with self.database.reading() as connection:
            rows = connection.execute(sa.select(tables.instances)).all()
        found = {one.sop_instance_uid: self.store.read(ObjectRef(**one.object)) for one in rows}
        assert found == self.wanted

    def freed(self) -> list[str]:
        return sorted(one.name for one in self.folder.glob("freed-*"))
