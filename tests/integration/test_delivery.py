"""Delivery against real peers that refuse, lose, lie or take only implicit VR."""

from __future__ import annotations

import hashlib
import io
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made from a table at import
    CTImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
)
from support.dcmtk import ENVIRONMENT, tool
from support.postgres import url_in
from support.processes import wait_for_port
from support.world import free_port, pause

from clarion.adapters.database import Database
from clarion.adapters.embedded import EmbeddedBus
from clarion.adapters.memory import ManualClock, MemoryStore
from clarion.adapters.outbox import events_table
from clarion.config import GatewayConfig
from clarion.dicom import split_part10
from clarion.events import DeliveryRequested, JobSuperseded
from clarion.model import JobId, ObjectRef, ResultInstance, ResultSet, SeriesUid, SopInstanceUid, StudyUid
from clarion.testing.suites import MOMENT
from gateway import tables
from gateway.answers import CommitmentAnswers
from gateway.delivery import DeliveryStage
from gateway.outbound import Outbound
from gateway.requests import DeliveryRequests, SupersededJobs

pytestmark = pytest.mark.usefixtures("each_database")

EXPLICIT = str(ExplicitVRLittleEndian)
INSTANCES = 4


def data_set(number: int) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"1.2.3.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientName = "1.2", "1.2.3", "Test^Delivery"
    ds.Rows = ds.Columns = 2
    ds.BitsAllocated = 16
    ds.PixelData = bytes(range(8))
    ds["PixelData"].VR = "OW"
    return ds


def encoded(ds: Dataset) -> bytes:
    out = io.BytesIO()
    ds.file_meta = Dataset()
    dcmwrite(out, ds, implicit_vr=False, little_endian=True, enforce_file_format=False)
    return out.getvalue()


class Rig:
    def __init__(self, root: Path, port: int, **delivery: float) -> None:
        self.clock = ManualClock(MOMENT)
        self.store = MemoryStore()
        self.database = Database(url_in(root))
        self.database.create(tables.SCHEMA)
        bus = EmbeddedBus(self.database, self.clock)
        bus.subscribe("delivery", [DeliveryRequested], DeliveryRequests(self.database, self.store))
        bus.subscribe("delivery-superseded", [JobSuperseded], SupersededJobs(self.database))
        config = GatewayConfig.model_validate({
            "destinations": [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": port}],
            "delivery": {
                "max_retries": 2, "connect_timeout_s": 3, "dimse_timeout_s": 3, "failure_threshold": 1, **delivery,
            },
        })  # fmt: skip
        self.outbound = Outbound(self.database)
        self.stage = DeliveryStage(
            config=config,
            bus=bus,
            outbound=self.outbound,
            store=self.store,
            clock=self.clock,
            answers=CommitmentAnswers(self.database, config, self.clock),
        )
        self.bus = bus

    def request(self, *, missing: int | None = None) -> None:
        instances = []
        for number in range(INSTANCES):
            data = encoded(data_set(number))
            ref = self.store.put(data)
            if number == missing:
                ref = ObjectRef(location="memory:0", digest=hashlib.sha256(b"gone").hexdigest(), size_bytes=4)
            instances.append(ResultInstance(
                output="o", modality="CT", study_uid=StudyUid("1.2"), series_uid=SeriesUid("1.2.3"),
                sop_instance_uid=SopInstanceUid(f"1.2.3.{number}"), sop_class_uid=CTImageStorage,
                transfer_syntax_uid=EXPLICIT, object=ref,
            ))  # fmt: skip
        result_set = self.store.put(ResultSet(job_id=JobId("j"), instances=tuple(instances)).encode())
        event = DeliveryRequested(
            subject="d", sequence=1, time=MOMENT, source="t", job_id="j", destination="pacs",
            result_set=result_set, instances=INSTANCES,
        )  # fmt: skip
        self.bus.publish([event])

    def settle(self) -> Any:
        ends = {"verified", "unverified", "failed", "superseded"}
        for _ in range(2000):
            self.stage.step()
            if self.stage.idle():
                if self.row() is not None and self.row().state in ends:
                    return self.row()
                self.clock.advance(timedelta(seconds=2))
            pause(0.005)
        raise AssertionError(f"never settled: {self.row()}")

    def kinds(self) -> list[str]:
        with self.database.reading() as connection:
            query = sa.select(events_table.c.kind).where(events_table.c.subject == "d")
            return list(connection.execute(query.order_by(events_table.c.position)).scalars())

    def row(self) -> Any:
        with self.database.reading() as connection:
            return connection.execute(sa.select(tables.deliveries)).one_or_none()


@dataclass
class Peer:
    port: int
    stored: dict[str, int]


@contextmanager
def peer(
    store: Callable[[str, int], int] = lambda *_: 0, find: Callable[[str], int] = lambda _: 0xFF00
) -> Iterator[Peer]:
    """A PACS without storage commitment: `store` gives the status of the n-th arrival, `find` 0xFF00 or an error."""
    stored: dict[str, int] = {}

    def on_store(event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        stored[uid] = stored.get(uid, 0) + 1
        return store(uid, stored[uid])

    def on_find(_: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        for uid in list(stored):
            status = find(uid)
            if status != 0xFF00:
                yield status, None
                return
            answer = Dataset()
            answer.SOPInstanceUID = uid
            yield 0xFF00, answer

    ae = AE(ae_title="PACS")
    ae.add_supported_context(CTImageStorage, [EXPLICIT])
    ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    port = free_port()
    handlers = [(evt.EVT_C_STORE, on_store), (evt.EVT_C_FIND, on_find)]
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)  # type: ignore[arg-type]
    try:
        yield Peer(port, stored)
    finally:
        assert server is not None
        server.shutdown()


def test_verified_by_query(tmp_path: Path) -> None:
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request()
        assert (rig.settle().state, rig.row().reason) == ("verified", "query")
        assert set(pacs.stored.values()) == {1}


def test_a_query_that_fails_is_no_proof_of_loss(tmp_path: Path) -> None:
    """Bites: take the answers of a failed query for the whole truth, and everything is sent again."""
    with peer(find=lambda _: 0xA700) as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request()
        row = rig.settle()
        assert row.state == "unverified"
        assert "0xA700" in row.reason
        assert set(pacs.stored.values()) == {1}


def test_a_peer_that_indexes_late_is_asked_again_before_anything_is_sent_again(tmp_path: Path) -> None:
    """Bites: believe the first empty answer, and everything is sent four times and fails though it is stored."""
    asked: list[int] = []

    def find(_: str) -> int:
        asked.append(1)
        return 0x0000 if len(asked) < 4 else 0xFF00

    with peer(find=find) as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request()
        assert (rig.settle().state, rig.row().reason) == ("verified", "query")
        assert set(pacs.stored.values()) == {1}
        assert len(asked) >= 4


def test_no_peer_proves_the_delivery_of_another(tmp_path: Path) -> None:
    rig = Rig(tmp_path, free_port())
    rig.outbound.commitment_reported("1.2", "OTHER", now=MOMENT, stored=("1.2.3.0",), failed=())
    assert rig.outbound.commitment("1.2", "PACS") is None
    assert rig.outbound.commitment("1.2", "OTHER") == {"1.2.3.0"}


def test_results_of_an_older_revision_that_wait_are_not_sent(tmp_path: Path) -> None:
    """Bites: let a delivery live on when its job was superseded, and half a study's report goes out unmarked."""
    with peer(lambda *_: 0xA700) as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request()
        while rig.row() is None or rig.row().attempts < 1 or not rig.stage.idle():
            rig.stage.step()
            pause(0.005)
        superseded = JobSuperseded(subject="j", sequence=9, time=MOMENT, source="t", by="k")
        rig.bus.publish([superseded])
        assert rig.settle().state == "superseded"
        assert rig.kinds()[-1] == "delivery.superseded.v1"
        before = dict(pacs.stored)
        rig.clock.advance(timedelta(hours=2))
        rig.stage.step()
        assert pacs.stored == before


def test_superseded_while_it_is_being_sent_it_does_not_come_back(tmp_path: Path) -> None:
    """Bites: settle whatever the state has become meanwhile, and the old results go out after the new ones."""
    rig: Rig

    def supersede(*_: object) -> int:
        SupersededJobs(rig.database).handle(JobSuperseded(subject="j", sequence=9, time=MOMENT, source="t", by="k"))
        return 0xA700

    with peer(supersede) as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request()
        assert rig.settle().state == "superseded"
        rig.clock.advance(timedelta(hours=2))
        rig.stage.step()
        assert rig.row().state == "superseded"
        assert rig.kinds().count("delivery.superseded.v1") == 1


@pytest.mark.parametrize("state", ["waiting", "failed"])
def test_superseded_before_its_request_or_after_it_failed(state: str, tmp_path: Path) -> None:
    rig = Rig(tmp_path, free_port(), max_retries=0)
    superseded = JobSuperseded(subject="j", sequence=9, time=MOMENT, source="t", by="k")
    if state == "failed":
        rig.request()
        assert rig.settle().state == "failed"
        rig.bus.publish([superseded])
    else:
        rig.bus.publish([superseded])
        rig.stage.step()
        rig.request()
    while rig.row() is None or rig.row().state != "superseded":
        rig.stage.step()
        pause(0.005)
    assert rig.outbound.retry(["d"], rig.clock.now()) == ["d"], "a person may still want it"


def test_a_second_budget_asks_for_commitment_anew(tmp_path: Path) -> None:
    """Bites: count attempts from zero again, and the first budget's report judges the second's transaction."""
    rig = Rig(tmp_path, free_port(), max_retries=1)
    rig.request()
    assert rig.settle().attempts == 2
    rig.outbound.retry(["d"], rig.clock.now())
    assert (rig.row().attempts, rig.row().spent) == (2, 2)
    assert rig.settle().attempts == 4


def test_what_was_delivered_stays_delivered_when_its_job_is_superseded(tmp_path: Path) -> None:
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request()
        rig.settle()
        rig.bus.publish([JobSuperseded(subject="j", sequence=9, time=MOMENT, source="t", by="k")])
        rig.stage.step()
        assert rig.row().state == "verified"


def test_a_person_takes_a_failed_delivery_up_and_only_what_is_missing_is_sent(tmp_path: Path) -> None:
    """Redelivery at any time (registry specification 7.2)."""
    broken = True

    def status(uid: str, _: int) -> int:
        return 0xA700 if broken and uid == "1.2.3.2" else 0

    with peer(status) as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request()
        assert rig.settle().state == "failed"
        broken = False
        assert rig.outbound.retry(["d", "unknown"], rig.clock.now()) == ["d"]
        assert rig.settle().state == "verified"
        assert pacs.stored == {"1.2.3.0": 1, "1.2.3.1": 1, "1.2.3.2": 4, "1.2.3.3": 1}
        assert rig.outbound.retry(["d"], rig.clock.now()) == [], "what is verified is not sent again"


def test_nothing_more_is_sent_on_an_association_that_gave_no_answer(tmp_path: Path) -> None:
    """Bites: go on after a time-out, and a dead PACS costs the deadline once per instance."""

    def hang(uid: str, times: int) -> int:
        if times == 1 and uid == "1.2.3.0":
            gone.wait(20)
        return 0

    gone = threading.Event()
    with peer(hang) as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request()
        while rig.row() is None or rig.row().attempts < 1 or not rig.stage.idle():
            rig.stage.step()
            pause(0.005)
        gone.set()
        with rig.database.reading() as connection:
            rows = connection.execute(sa.select(tables.delivery_instances.c.status)).scalars()
            assert sorted(str(one) for one in rows) == ["-1", "None", "None", "None"]
        assert rig.settle().state == "verified"


@pytest.mark.parametrize(("status", "sent"), [(0xA900, 4), (0xA700, 3)])
def test_only_refusals_for_now_say_that_the_peer_is_down(status: int, sent: int, tmp_path: Path) -> None:
    """failure_threshold: after more than half refused for now the attempt is given up; for good, it goes on."""
    with peer(lambda *_: status) as pacs:
        rig = Rig(tmp_path, pacs.port, failure_threshold=0.5, max_retries=0)
        rig.request()
        assert rig.settle().state == "failed"
        assert len(pacs.stored) == sent


def test_what_the_peer_lost_is_sent_again_alone(tmp_path: Path) -> None:
    """It answers success for everything and keeps one of them only the second time."""
    arrivals: list[str] = []
    with peer(lambda uid, _: arrivals.append(uid) or 0) as pacs:  # type: ignore[func-returns-value]
        rig = Rig(tmp_path, pacs.port)
        rig.request()
        while len(arrivals) < INSTANCES:
            rig.stage.step()
            pause(0.005)
        while not rig.stage.idle():
            pause(0.005)
        del pacs.stored["1.2.3.2"]
        assert rig.settle().state == "verified"
    assert sorted(arrivals) == ["1.2.3.0", "1.2.3.1", "1.2.3.2", "1.2.3.2", "1.2.3.3"]


def test_one_permanent_refusal_does_not_keep_the_others_back(tmp_path: Path) -> None:
    """0xA900 for one, 0xA700 once for another: the second arrives, the first is not sent again, and is named."""

    def status(uid: str, times: int) -> int:
        if uid == "1.2.3.1":
            return 0xA900
        return 0xA700 if uid == "1.2.3.2" and times == 1 else 0

    with peer(status) as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request()
        row = rig.settle()
        assert row.state == "failed"
        assert "1 of 4" in row.reason
        assert "1.2.3.1" in row.reason
        assert "0xA900" in row.reason
        assert pacs.stored == {"1.2.3.0": 1, "1.2.3.1": 1, "1.2.3.2": 2, "1.2.3.3": 1}


def test_an_instance_that_cannot_be_sent_fails_by_name(tmp_path: Path) -> None:
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request(missing=2)
        row = rig.settle()
        assert row.state == "failed"
        assert "1.2.3.2: cannot be sent" in row.reason
        assert sorted(pacs.stored) == ["1.2.3.0", "1.2.3.1", "1.2.3.3"]


def test_transient_refusals_end_with_the_budget(tmp_path: Path) -> None:
    with peer(lambda *_: 0xA700) as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request()
        row = rig.settle()
        assert (row.state, row.attempts) == ("failed", 3)
        assert "0xA700 out of resources" in row.reason
        assert set(pacs.stored.values()) == {3}


def test_trouble_of_ours_ends_with_the_budget_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port)
        monkeypatch.setattr("gateway.delivery.Requestor.store", lambda *_, **__: 1 / 0)
        rig.request()
        row = rig.settle()
        assert (row.state, row.attempts) == ("failed", 3)
        assert "ZeroDivisionError" in row.reason


def test_a_peer_that_takes_only_implicit_vr_gets_the_same_data_sets(tmp_path: Path) -> None:
    """Bites: write preamble and file meta information before the data set, and storescp keeps garbage as a success."""
    port, received = free_port(), tmp_path / "received"
    received.mkdir()
    command = [tool("storescp"), "--fork", "+xi", "+B", "-od", str(received), "-aet", "PACS", str(port)]
    storescp = subprocess.Popen(command, env=ENVIRONMENT)
    try:
        wait_for_port(port, storescp)
        rig = Rig(tmp_path, port)
        rig.request()
        assert rig.settle().state == "unverified"
    finally:
        storescp.kill()
    files = [path for path in received.iterdir() if path.is_file()]
    assert len(files) == INSTANCES
    for path in files:
        ds = dcmread(path)
        assert ds.file_meta.TransferSyntaxUID.is_implicit_VR
        again = data_set(int(str(ds.SOPInstanceUID).rpartition(".")[2]))
        assert Dataset(ds) == again
        assert split_part10(path.read_bytes())[0][:4] == b"\x08\x00\x16\x00"
