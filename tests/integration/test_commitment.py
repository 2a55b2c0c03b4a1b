"""Storage commitment as SCP (PS3.4 J.3): asked on one association, answered on another, by what is really stored."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel
from support.dcmtk import storescu
from support.raw import CT, EXPLICIT, Raw
from support.scp import serving
from support.system import System, describe, running
from support.world import free_port, make_series, pause, uid_of

from clarion.model import Destination, derive_uid
from gateway.commitments import make_report, make_request, read_report, read_request
from gateway.scu import Requestor, Timeouts
from gateway.wire import commands, pdu
from gateway.wire.acceptance import STORAGE_COMMITMENT

MR = "1.2.840.10008.5.1.4.1.1.4"
IMPLICIT = "1.2.840.10008.1.2"


@dataclass
class Modality:
    """A peer that listens for the results: pynetdicom's, as many a device has it."""

    port: int
    results: list[tuple[int, Any]] = field(default_factory=list)
    heard: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def modality() -> Iterator[Modality]:
    one = Modality(free_port())

    def report(event: evt.Event) -> tuple[int, None]:
        one.results.append((event.event_type, event.event_information))
        one.heard.set()
        return 0x0000, None

    ae = AE(ae_title="SENDER")
    ae.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
    server = ae.start_server(("127.0.0.1", one.port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, report)])
    yield one
    server.shutdown()


@pytest.fixture
def system(tmp_path: Path, modality: Modality) -> Iterator[System]:
    listed = [{"name": "modality", "ae_title": "SENDER", "host": "127.0.0.1", "port": modality.port}]
    titles = [{"ae_title": "CHEST", "settings": {"pipeline-chest": "chest-ct", "timeout": 600}}]
    with running(describe(tmp_path / "clarion", ae_titles=titles, destinations=listed)) as one:
        yield one


def ask(system: System, transaction: str, instances: list[tuple[str, str]]) -> bool:
    peer = Destination(name="us", ae_title="CHEST", host="127.0.0.1", port=system.scp)
    with Requestor(peer, own_ae="SENDER", timeouts=Timeouts(connect_s=30, dimse_s=30)) as scu:
        return scu.ask_commitment(transaction, instances, 0.0)


def test_what_is_stored_is_committed_to_and_what_is_not_is_named(
    system: System, modality: Modality, tmp_path: Path
) -> None:
    """Bites: answer from what was asked for instead of from what is stored."""
    files = make_series(tmp_path / "series")
    assert len(storescu(files, system.scp)) == len(files)
    stored = [(CT, uid_of(path)) for path in files]
    assert ask(system, derive_uid("t", 1), stored)
    assert modality.heard.wait(30)
    kind, report = modality.results[0]
    assert (kind, report.TransactionUID) == (1, derive_uid("t", 1))
    assert [(one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) for one in report.ReferencedSOPSequence] == stored
    assert "FailedSOPSequence" not in report
    modality.heard.clear()
    assert ask(system, derive_uid("t", 2), [stored[0], (CT, "1.2.3.4"), (MR, stored[1][1])])
    assert modality.heard.wait(30)
    kind, report = modality.results[1]
    assert kind == 2
    assert [one.ReferencedSOPInstanceUID for one in report.ReferencedSOPSequence] == [stored[0][1]]
    failed = [(one.ReferencedSOPInstanceUID, one.FailureReason) for one in report.FailedSOPSequence]
    assert failed == [("1.2.3.4", 0x0112), (stored[1][1], 0x0119)]


def test_what_may_not_be_asked(tmp_path: Path) -> None:
    context = pdu.Context(id=5, abstract_syntax=STORAGE_COMMITMENT, transfer_syntaxes=(IMPLICIT,))
    destinations = [{"name": "p", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}]
    whole = make_request("1.2.9", [(CT, "1.2.3")], IMPLICIT)
    with serving(tmp_path, destinations=destinations) as at:
        for calling, data, status in (
            ("PACS", whole, 0x0124),
            ("A", make_request("", [(CT, "1.2.3")], IMPLICIT), 0x0110),
            ("A", make_request("1.2.9", [], IMPLICIT), 0x0110),
            ("A", make_request("1.2.9", [(CT, "../x")], IMPLICIT), 0x0110),
            ("A", whole[:-3], 0x0110),
            ("A", make_request("1.2.9", [(CT, f"1.2.{one}") for one in range(7001)], IMPLICIT), 0x0213),
            ("A", whole, 0x0000),
        ):
            with Raw(at.port) as peer:
                peer.associate(calling=calling, contexts=(context,))
                command = commands.make([
                    (commands.REQUESTED_CLASS, commands.ui(STORAGE_COMMITMENT)),
                    (commands.FIELD, commands.u16(commands.N_ACTION_RQ)), (commands.MESSAGE_ID, commands.u16(3)),
                    (commands.DATA_SET_TYPE, commands.u16(0)), (commands.REQUESTED_INSTANCE, commands.ui("1.2.3")),
                    (commands.ACTION_TYPE, commands.u16(1)),
                ])  # fmt: skip
                peer.say(pdu.p_data(5, pdu.COMMAND, command), pdu.p_data(5, 0, data, pdu.MAX_LENGTH))
                assert peer.status() == status, (calling, status)
                assert peer.release() == pdu.RELEASE_RP
        pause(0.05)
        asked = [fields for kind, fields in at.journalled() if kind == "commitment-asked"]
        assert asked == [{"peer": "A", "transaction_uid": "1.2.9", "instances": [[CT, "1.2.3"]]}]


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_requests_and_reports_are_read_as_they_were_made(syntax: str) -> None:
    asked = read_request(make_request("1.2", [(CT, "1.3"), (MR, "1.4")], syntax), syntax)
    assert asked is not None
    assert (asked.transaction_uid, asked.instances) == ("1.2", ((CT, "1.3"), (MR, "1.4")))
    report = read_report(make_report("1.2", [(CT, "1.3")], [(MR, "1.4", 0x0112)], syntax), syntax)
    assert report is not None
    assert (report.transaction_uid, report.stored, report.failed) == ("1.2", ("1.3",), ("1.4",))
