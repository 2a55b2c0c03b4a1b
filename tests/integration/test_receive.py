"""Receiving from DCMTK into a running Clarion: statuses, refusals, conflicts, and real data without loss."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydicom import dcmread
from support.data import real
from support.dcmtk import ENVIRONMENT, run, storescu, tool
from support.system import System, describe, running
from support.world import make_series, uid_of

from clarion.dicom import split_part10
from clarion.digests import digest_of
from clarion.errors import InvalidInstanceError
from clarion.model import ObjectRef
from gateway import tables


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    titles = [
        {"ae_title": "CHEST", "settings": {"pipeline-chest": "chest-ct", "timeout": 600}},
        {
            "ae_title": "IGNORING",
            "settings": {"pipeline-chest": "chest-ct"},
            "ignored_sop_classes": ["1.2.840.10008.5.1.4.1.1.2"],
        },
    ]
    with running(describe(tmp_path_factory.mktemp("receive"), ae_titles=titles, scp=_scp())) as system:
        yield system


def _scp() -> dict[str, object]:
    from support.world import free_port

    return {"port": free_port(), "max_associations": 3}


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    return make_series(tmp_path / "series")


def identities(system: System) -> set[tuple[str, str]]:
    with system.database.reading() as connection:
        return {(row.sop_instance_uid, row.digest) for row in connection.execute(sa.select(tables.instances))}


def quarantined(system: System) -> list[str]:
    with system.database.reading() as connection:
        return list(connection.execute(sa.select(tables.quarantine.c.reason)).scalars())


def kept_aside(system: System) -> set[str]:
    with system.database.reading() as connection:
        objects = list(connection.execute(sa.select(tables.quarantine.c.object)).scalars())
    return {described["digest"] for described in objects if described is not None}


def test_echo(system: System) -> None:
    assert run("echoscu", "-aet", "SENDER", "-aec", "CHEST", "127.0.0.1", str(system.scp)).returncode == 0


@pytest.mark.parametrize(
    ("calling", "called", "said"),
    [("STRANGER", "CHEST", "Calling AE Title Not Recognized"), ("SENDER", "NOBODY", "Called AE Title Not Recognized")],
)
def test_strangers_are_rejected_for_good(system: System, calling: str, called: str, said: str) -> None:
    done = run("echoscu", "-v", "-aet", calling, "-aec", called, "127.0.0.1", str(system.scp))
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "Rejected Permanent" in text
    assert said in text
    system.wait_for(lambda: f"called_ae={called}" in system.log(), "a log line that names the check")


def test_limit_of_associations_is_transient(system: System) -> None:
    """The fourth association of three is told to try again."""
    from pynetdicom import AE

    ae = AE(ae_title="SENDER")
    ae.add_requested_context("1.2.840.10008.1.1")
    held = [ae.associate("127.0.0.1", system.scp, ae_title="CHEST") for _ in range(3)]
    try:
        assert all(one.is_established for one in held)
        refused = ae.associate("127.0.0.1", system.scp, ae_title="CHEST")
        primitive = refused.acceptor.primitive
        assert refused.is_rejected
        assert primitive is not None
        assert (primitive.result, primitive.result_source, primitive.diagnostic) == (2, 3, 2)
    finally:
        for one in held:
            one.release()
    system.wait_for(lambda: _free(system), "the slots free again")


def _free(system: System) -> bool:
    return run("echoscu", "-aet", "SENDER", "-aec", "CHEST", "127.0.0.1", str(system.scp)).returncode == 0


def test_duplicates_are_success_and_no_event(system: System, series: list[Path]) -> None:
    """F18, small: sent four times over four associations at once."""
    command = [tool("storescu"), "-aet", "SENDER", "-aec", "CHEST", "127.0.0.1", str(system.scp), *map(str, series)]
    senders = [subprocess.Popen(command, env=ENVIRONMENT) for _ in range(3)]
    assert [one.wait(60) for one in senders] == [0, 0, 0]
    sent = storescu(series, system.scp)
    assert len(sent) == len(series)
    system.wait_for(lambda: sent <= identities(system), "all grouped")
    study = str(dcmread(series[0]).StudyInstanceUID)
    counts = system.view(study).counts
    assert (counts.received, counts.grouped, counts.conflicted) == (len(series), len(series), 0)


def test_same_uid_with_other_content_keeps_both(system: System, series: list[Path], tmp_path: Path) -> None:
    """F19: flagged, nothing overwritten."""
    first = storescu(series[:1], system.scp)
    ds = dcmread(series[0])
    ds.SeriesDescription = "another"
    changed = tmp_path / "changed.dcm"
    ds.save_as(changed)
    second = storescu([changed], system.scp)
    system.wait_for(lambda: first | second <= identities(system), "both kept")
    assert system.view(str(ds.StudyInstanceUID)).counts.conflicted == 2
    _check_bytes(system)


def test_ignored_class_is_answered_success(system: System, series: list[Path]) -> None:
    assert len(storescu(series[:1], system.scp, called="IGNORING")) == 1

    def noted() -> bool:
        with system.database.reading() as connection:
            return bool(connection.execute(sa.select(tables.ignored)).all())

    system.wait_for(noted, "noted as ignored")


@pytest.mark.parametrize(
    ("keyword", "reason"), [("StudyInstanceUID", "missing-study-uid"), ("SeriesInstanceUID", "missing-series-uid")]
)
def test_missing_uids_are_refused_and_kept(
    system: System, series: list[Path], tmp_path: Path, keyword: str, reason: str
) -> None:
    ds = dcmread(series[0])
    delattr(ds, keyword)
    bad = tmp_path / "bad.dcm"
    ds.save_as(bad)
    assert storescu([bad], system.scp) == set()
    system.wait_for(lambda: reason in quarantined(system), "in quarantine with the reason")


def test_contradicting_sop_class_is_a900(system: System, series: list[Path]) -> None:
    from clarion.model import Destination
    from gateway.scu import Requestor, Timeouts

    data, syntax = split_part10(series[0].read_bytes())
    mr = "1.2.840.10008.5.1.4.1.1.4"
    peer = Destination(name="c", ae_title="CHEST", host="127.0.0.1", port=system.scp)
    with Requestor(peer, own_ae="SENDER", classes=[(mr, syntax)], timeouts=Timeouts(connect_s=30, dimse_s=30)) as scu:
        assert scu.store(data, sop_class=mr, sop_instance=uid_of(series[0]), syntax=syntax) == 0xA900
        assert scu.store(data[:-10], sop_class=mr, sop_instance="1.2.4", syntax=syntax) == 0xC000
    system.wait_for(lambda: {"sop-class-mismatch", "truncated"} <= set(quarantined(system)), "set aside")


def test_empty_data_set_is_refused(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pynetdicom import AE, _config

    from clarion.dicom import part10

    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)
    ct, syntax = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"
    path = tmp_path / "empty.dcm"
    path.write_bytes(part10(b"", sop_class_uid=ct, sop_instance_uid="1.2.3", transfer_syntax_uid=syntax))
    ae = AE(ae_title="SENDER")
    ae.add_requested_context(ct, syntax)
    association = ae.associate("127.0.0.1", system.scp, ae_title="CHEST")
    try:
        assert association.send_c_store(path).Status == 0xC000
    finally:
        association.release()
    system.wait_for(lambda: "empty-data-set" in quarantined(system), "set aside")


def test_not_dicom_on_the_port_harms_nobody(system: System) -> None:
    for noise in (b"GET / HTTP/1.0\r\n\r\n", b"\0" * 100, bytes(range(256)) * 40, b""):
        with socket.create_connection(("127.0.0.1", system.scp), timeout=5) as wire:
            wire.sendall(noise)
    assert _free(system)


@pytest.mark.parametrize("folder", ["transfer-syntaxes", "charset", "malformed", "enhanced-mr", "us-multiframe"])
def test_real_data_is_received_without_loss(system: System, folder: str) -> None:
    """Every file is sent and answered: stored, or set aside with a reason. What was acknowledged is kept byte for byte.

    Bites: an SCP that aborts, hangs or answers 0x0110 to any of them fails here.
    """
    files = [path for path in sorted(real(folder).rglob("*")) if path.is_file() and path.stat().st_size]
    answers = {path: _send_as_it_is(path, system.scp) for path in files}
    statuses = [status for status, _ in answers.values()]
    assert set(statuses) <= {0x0000, 0xC000, 0xA900}
    acknowledged = {identity for status, identity in answers.values() if status == 0x0000}
    assert acknowledged
    system.wait_for(lambda: acknowledged <= identities(system), "everything acknowledged is grouped", 60)
    refused = {digest for status, (_, digest) in answers.values() if status != 0}
    system.wait_for(lambda: refused <= kept_aside(system), "the rest is set aside")
    _check_bytes(system)
    assert _free(system)


def _send_as_it_is(path: Path, port: int) -> tuple[int, tuple[str, str]]:
    """Send the bytes as they are, with our own requestor, since DCMTK rewrites what it parses.

    What is no Part 10 file, or names no usable UIDs, is sent under substitutes: the SCP has to say what is wrong.
    """
    from clarion.dicom import read_header
    from clarion.model import Destination, is_uid
    from gateway.scu import Requestor, Timeouts

    try:
        data, syntax = split_part10(path.read_bytes())
    except InvalidInstanceError:
        data, syntax = path.read_bytes(), "1.2.840.10008.1.2.1"
    header = read_header(data, syntax)
    sop_class = header.sop_class_uid if is_uid(header.sop_class_uid) else "1.2.840.10008.5.1.4.1.1.2"
    instance = header.sop_instance_uid if is_uid(header.sop_instance_uid) else "1.2.3.4.5.6.7.8"
    syntax = syntax if is_uid(syntax) else "1.2.840.10008.1.2.1"
    peer = Destination(name="c", ae_title="CHEST", host="127.0.0.1", port=port)
    timeouts = Timeouts(connect_s=5, dimse_s=20)
    with Requestor(peer, own_ae="SENDER", classes=[(sop_class, syntax)], timeouts=timeouts) as scu:
        status = scu.store(data, sop_class=sop_class, sop_instance=instance, syntax=syntax)
    return status, (instance, digest_of(data))


def _check_bytes(system: System) -> None:
    with system.database.reading() as connection:
        rows = connection.execute(sa.select(tables.instances)).all()
    for row in rows:
        assert digest_of(system.store.read(ObjectRef(**row.object))) == row.digest


def test_no_patient_data_in_the_log(system: System, tmp_path: Path) -> None:
    """F38, small: a canary in every text a C-STORE can carry, in failures too."""
    series = make_series(tmp_path / "series")
    ds = dcmread(series[0])
    for keyword in (
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "StudyDescription",
        "AccessionNumber",
        "OtherPatientNames",
    ):
        setattr(ds, keyword, "19991231" if keyword.endswith("Date") else "CANARY")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5.6"
    good = tmp_path / "canary.dcm"
    ds.save_as(good)
    del ds.StudyInstanceUID
    bad = tmp_path / "canary-bad.dcm"
    ds.save_as(bad)
    assert len(storescu([good], system.scp)) == 1
    storescu([bad], system.scp)
    system.wait_for(
        lambda: ("1.2.3.4.5.6", digest_of(split_part10(good.read_bytes())[0])) in identities(system),
        "kept",
    )
    assert not re.search("CANARY|19991231", system.log())
    with system.database.reading() as connection:
        from clarion.adapters.outbox import events_table

        assert not any(b"CANARY" in row.body for row in connection.execute(sa.select(events_table)))
