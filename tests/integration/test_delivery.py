"""Delivery against real peers that refuse, lose, lie or take only implicit VR."""

from __future__ import annotations

import subprocess
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydicom import Dataset, dcmread
from support.dcmtk import ENVIRONMENT, tool
from support.delivering import INSTANCES, Rig, data_set, peer
from support.processes import wait_for_port
from support.world import free_port, pause

from clarion.dicom import split_part10
from clarion.events import JobSuperseded
from clarion.testing.suites import MOMENT
from gateway import tables
from gateway.requests import SupersededJobs

pytestmark = pytest.mark.usefixtures("each_database")


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
    rig = Rig(tmp_path, free_port(), max_retries=0, outage_h=0)
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
    rig = Rig(tmp_path, free_port(), max_retries=1, outage_h=0)
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
