"""Who is let in and what is answered, on the wire: the table of the registry specification, 4.1 and 4.2."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from pynetdicom import AE
from pynetdicom.association import Association
from structlog.testing import capture_logs
from support.processes import clarion
from support.raw import CONTEXTS, Raw, data_set
from support.scp import CT, EXPLICIT, Serving, serving
from support.world import make_series, pause, uid_of

from clarion.dicom import split_part10
from gateway.association_log import AssociationLog
from gateway.association_log import read as read_log
from gateway.wire import pdu

VERIFICATION = "1.2.840.10008.1.1"
MEASURED_ANEW_S = 0.1
PRIVATE = "1.2.826.0.1.3680043.9.1.1"


def associate(at: Serving, *classes: str, calling: str = "A", called: str = "B") -> Association:
    ae = AE(ae_title=calling)
    for one in classes or (CT,):
        ae.add_requested_context(one, EXPLICIT)
    return ae.associate("127.0.0.1", at.port, ae_title=called)


def rejected(at: Serving, *, calling: str = "A", called: str = "B") -> tuple[int, ...]:
    """Give result, source and reason. By PDUs: pynetdicom misses an answer when the end comes right behind it."""
    with Raw(at.port) as peer:
        peer.say(pdu.request(called, calling, CONTEXTS))
        kind, body = peer.hear()
    assert kind == pdu.ASSOCIATE_RJ
    return tuple(body[1:])


@pytest.fixture
def instance(tmp_path: Path) -> tuple[bytes, str]:
    path = make_series(tmp_path / "series")[0]
    return split_part10(path.read_bytes())[0], uid_of(path)


def store(at: Serving, instance: tuple[bytes, str], **who: str) -> int:
    with at.requestor(**who) as scu:
        return scu.store(instance[0], sop_class=CT, sop_instance=instance[1], syntax=EXPLICIT)


@pytest.mark.parametrize(
    ("calling", "called", "host", "answer", "check"),
    [
        ("STRANGER", "B", "127.0.0.1", (1, 1, 3), "calling-ae"),
        ("A", "B", "192.0.2.0/24", (1, 1, 3), "calling-address"),
        ("A", "NOBODY", "127.0.0.1", (1, 1, 7), "called-ae"),
        ("A", "B", "no-such-host.invalid", (2, 3, 1), "calling-host-unresolved"),
    ],
)
def test_who_is_rejected_and_how(
    calling: str, called: str, host: str, answer: tuple[int, int, int], check: str, tmp_path: Path
) -> None:
    """Bites: check the AE title alone, and the address on the second row lets a spoofer in."""
    with serving(tmp_path, sources=[{"ae_title": "A", "host": host}]) as at, capture_logs() as logs:
        assert rejected(at, calling=calling, called=called) == answer
        assert at.board.refusals == {check: 1}
        assert calling in at.board.last_refusal
    said = [one for one in logs if one["event"] == "association.rejected"]
    assert [(one["check"], one["calling_ae"], one["called_ae"], one["address"]) for one in said] == [
        (check, calling, called, "127.0.0.1")
    ]


def test_of_a_migration_not_every_study_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told of once with all of its instances, the older ones while it goes on.

    Bites: remember them all, and a year's archive on one association is a worker's memory.
    """
    monkeypatch.setattr("gateway.association.MOST_STUDIES", 2)
    with serving(tmp_path) as at:
        with at.requestor() as scu:
            for number in (1, 1, 2, 3, 2, 4):
                uid = f"1.2.{number}"
                assert scu.store(data_set(uid, study=uid), sop_class=CT, sop_instance=uid, syntax=EXPLICIT) == 0
        ended: list[dict[str, object]] = []
        for _ in range(500):
            ended = [fields for kind, fields in at.journalled() if kind == "ended"]
            if len(ended) == 4:
                break
            pause(0.01)
    assert [(one["study_uid"], one["stored"], one["reason"]) for one in ended] == [
        ("1.2.1", 2, "other studies came"),
        ("1.2.3", 1, "other studies came"),
        ("1.2.2", 2, "released"),
        ("1.2.4", 1, "released"),
    ]


def test_disk_short_is_transient_and_recovers_by_itself(instance: tuple[bytes, str], tmp_path: Path) -> None:
    """Storage is rejected 2/3/1, verification is not; when there is room again, nobody has to do anything."""
    free = [0]
    intake = {"watermark_percent": 100, "reserve_gb": 0.001}
    with serving(tmp_path, measure=lambda _: (free[0], 10**12), intake=intake) as at:
        assert rejected(at) == (2, 3, 1)
        with associate_closing(at, VERIFICATION) as verifying:
            assert verifying.send_c_echo().Status == 0
        free[0] = 10**9
        pause(MEASURED_ANEW_S)
        assert store(at, instance) == 0x0000


def test_disk_that_fills_during_an_association_is_a700(
    instance: tuple[bytes, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the patience is over, and then at once: the second is not kept waiting as well."""
    monkeypatch.setattr("gateway.space.PATIENCE_S", 0.5)
    free = [10**9]
    intake = {"watermark_percent": 100, "reserve_gb": 0.001}
    with (
        serving(tmp_path, measure=lambda _: (free[0], 10**12), intake=intake) as at,
        capture_logs() as logs,
        at.requestor() as scu,
    ):
        free[0] = 10**6
        pause(MEASURED_ANEW_S)
        for _ in range(2):
            assert scu.store(instance[0], sop_class=CT, sop_instance=instance[1], syntax=EXPLICIT) == 0xA700
        free[0] = 10**9
        pause(MEASURED_ANEW_S)
        assert scu.store(instance[0], sop_class=CT, sop_instance=instance[1], syntax=EXPLICIT) == 0x0000
    assert [one["reason"] for one in logs if one["event"] == "instance.refused"] == ["disk space low"] * 2


def test_a_sender_is_slowed_before_it_is_refused(instance: tuple[bytes, str], tmp_path: Path) -> None:
    """Room that comes back within the patience costs nobody anything. Bites: refuse at once, and this is 0xA700."""
    free = [10**9]
    intake = {"watermark_percent": 100, "reserve_gb": 0.001}
    with serving(tmp_path, measure=lambda _: (free[0], 10**12), intake=intake) as at, at.requestor() as scu:
        free[0] = 10**6
        pause(MEASURED_ANEW_S)
        threading.Timer(0.5, lambda: free.__setitem__(0, 10**9)).start()
        assert scu.store(instance[0], sop_class=CT, sop_instance=instance[1], syntax=EXPLICIT) == 0x0000


class associate_closing:  # noqa: N801  reads as the context manager it is
    def __init__(self, at: Serving, *classes: str) -> None:
        self._association = associate(at, *classes)

    def __enter__(self) -> Association:
        assert self._association.is_established
        return self._association

    def __exit__(self, *_: object) -> None:
        self._association.release()


def test_verification_switched_off_refuses_that_context_alone(instance: tuple[bytes, str], tmp_path: Path) -> None:
    """Clara rejected the whole association; here the storage context beside it is accepted."""
    with (
        serving(tmp_path, scp={"verification": {"enabled": False}}) as at,
        associate_closing(at, VERIFICATION, CT) as association,
    ):
        assert [one.abstract_syntax for one in association.accepted_contexts] == [CT]
        assert [(one.abstract_syntax, one.result) for one in association.rejected_contexts] == [(VERIFICATION, 3)]


@pytest.mark.parametrize(("accepted", "status"), [(True, 0xA900), (False, 0x0122)])
def test_private_sop_classes_as_configured(
    accepted: bool,  # noqa: FBT001
    status: int,
    instance: tuple[bytes, str],
    tmp_path: Path,
) -> None:
    """0xA900: it was looked at, and the data set says CT."""
    with (
        serving(tmp_path, scp={"accept_private_sop_classes": accepted}) as at,
        at.requestor(sop_class=PRIVATE) as scu,
    ):
        assert scu.store(instance[0], sop_class=PRIVATE, sop_instance=instance[1], syntax=EXPLICIT) == status


def test_sources_left_open_let_anybody_store(instance: tuple[bytes, str], tmp_path: Path) -> None:
    with serving(tmp_path, scp={"reject_unknown_sources": False}, sources=[]) as at:
        assert store(at, instance, calling="ANYBODY") == 0x0000
        assert rejected(at, called="NOBODY") == (1, 1, 7)


def test_nothing_is_stored_by_a_mere_destination_or_under_our_own_name(
    instance: tuple[bytes, str], tmp_path: Path
) -> None:
    """0x0124: a PACS may report commitments here; what it sent would be grouped by nobody."""
    destinations = [{"name": "p", "ae_title": "A", "host": "127.0.0.1", "port": 104}]
    with serving(tmp_path, destinations=destinations) as at, capture_logs() as logs:
        assert store(at, instance, called="CLARION") == 0x0124
        assert store(at, instance) == 0x0000
    assert [one["reason"] for one in logs if one["event"] == "instance.refused"] == ["not a source of instances"]


def test_a_missing_patient_id_is_stored(tmp_path: Path) -> None:
    """It may be empty in most IODs; refusing it would lose the image."""
    from pydicom import dcmread

    path = make_series(tmp_path / "series")[0]
    ds = dcmread(path)
    del ds.PatientID
    ds.save_as(path)
    with serving(tmp_path) as at:
        assert store(at, (split_part10(path.read_bytes())[0], uid_of(path))) == 0x0000


def test_what_was_acknowledged_before_an_abort_is_kept(instance: tuple[bytes, str], tmp_path: Path) -> None:
    with serving(tmp_path) as at:
        scu = at.requestor()
        assert scu.store(instance[0], sop_class=CT, sop_instance=instance[1], syntax=EXPLICIT) == 0x0000
        scu.__exit__(RuntimeError, None, None)
        until_journalled(at, "ended")
        kinds = [(kind, fields.get("reason")) for kind, fields in at.journalled()]
        assert kinds == [("stored", None), ("ended", "aborted")]


def until_journalled(at: Serving, kind: str) -> None:
    for _ in range(1000):
        if any(one == kind for one, _ in at.journalled()):
            return
        pause(0.01)
    raise AssertionError(f"no record {kind}: {at.journalled()}")


def test_while_draining_new_associations_are_told_to_come_back(tmp_path: Path) -> None:
    with serving(tmp_path) as at, associate_closing(at, VERIFICATION) as held:
        draining = threading.Thread(target=at.stage.drain)
        draining.start()
        for _ in range(1000):
            if at.board.draining:
                break
            pause(0.005)
        assert rejected(at) == (2, 3, 1)
        assert held.send_c_echo().Status == 0, "an association in progress may end in its own time"
        held.release()
        draining.join(15)
        assert not draining.is_alive()


def test_an_unforeseen_error_while_checking_lets_nobody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bites: the library swallows what a handler raises and accepts; every C-STORE then got a permanent 0x0124."""
    with serving(tmp_path) as at:
        monkeypatch.setattr(at.guard._admitting._access, "check", lambda *_: 1 / 0)
        assert rejected(at) == (2, 3, 1)
        assert at.board.refusals == {"internal-error": 1}


def test_the_association_log_has_every_end_and_every_refusal_with_its_reason(
    instance: tuple[bytes, str], tmp_path: Path
) -> None:
    """Bites: leave the guard's refusals out, and nobody finds out why a device cannot send."""
    with serving(tmp_path) as at:
        with at.requestor() as scu:
            assert scu.store(instance[0], sop_class=CT, sop_instance=instance[1], syntax=EXPLICIT) == 0x0000
            assert scu.store(instance[0][:-10], sop_class=CT, sop_instance=instance[1], syntax=EXPLICIT) == 0xC000
        rejected(at, calling="STRANGER")
        until_journalled(at, "ended")
        until_logged(tmp_path, 2)
        assert at.board.peers == {
            "A": {"associations": 1, "stored": 1, "refused": 1, "bytes": 2 * len(instance[0]) - 10}
        }  # fmt: skip
    lines = {one["kind"]: one for one in read_log(tmp_path, lambda _: True, 10)}
    ended, refused = lines["ended"], lines["rejected"]
    assert (ended["calling_ae"], ended["called_ae"], ended["address"], ended["tls"]) == ("A", "B", "127.0.0.1", False)
    assert (ended["stored"], ended["refused"], ended["reason"]) == (1, {"0xC000": 1}, "released")
    assert (refused["check"], refused["calling_ae"]) == ("calling-ae", "STRANGER")


def until_logged(data: Path, count: int) -> None:
    for _ in range(500):
        if len(read_log(data, lambda _: True, 10)) >= count:
            return
        pause(0.01)
    raise AssertionError(read_log(data, lambda _: True, 10))


def test_the_association_log_as_a_person_asks_for_it(instance: tuple[bytes, str], tmp_path: Path) -> None:
    config = tmp_path / "clarion.yaml"
    config.write_text("data: .\n")
    with serving(tmp_path) as at:
        store(at, instance)
        rejected(at, calling="STRANGER")
        until_logged(tmp_path, 2)
    shown = clarion("association", "list", "-c", config)
    assert shown.returncode == 0
    assert "STRANGER" in shown.stdout
    assert "rejected: calling-ae" in shown.stdout
    assert "1 stored, 0.0 MB in" in shown.stdout
    only = json.loads(clarion("association", "list", "-c", config, "--rejected", "--json").stdout)
    assert [one["check"] for one in only] == ["calling-ae"]
    by_title = json.loads(clarion("association", "list", "-c", config, "--calling", "A", "--json").stdout)
    assert [one["stored"] for one in by_title] == [1]
    assert "no association" in clarion("association", "list", "-c", config, "--calling", "NOBODY").stderr


def test_the_association_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "associations"
    folder.mkdir()
    for day in range(1, 29):
        for month in (8, 9):
            (folder / f"2026-{month:02d}-{day:02d}.jsonl").write_text("{}\n")
    monkeypatch.setattr("gateway.association_log._MOST_BYTES_A_DAY", 300)
    written = AssociationLog(tmp_path)
    for number in range(20):
        written.write("rejected", check="x", address="1" * 500, number=number)
    files = sorted(folder.iterdir())
    assert len(files) == 31
    assert files[-1].stat().st_size < 900
