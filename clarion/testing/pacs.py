"""A small PACS on loopback: Storage, Verification, Storage Commitment, study root C-FIND. For tests and the demo.

It keeps data sets as files under a folder, synced before it answers, and reports storage commitment on an association
of its own, as most archives do. `python -m clarion.testing.pacs FOLDER PORT AE` serves until it is told to stop.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydicom import Dataset
from pynetdicom import AE, _config, build_role, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made from a table at import
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

from clarion.dicom import part10, read_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_config.UNRESTRICTED_STORAGE_SERVICE = True
_config.LOG_HANDLER_LEVEL = "none"

_SUCCESS, _PENDING, _CANNOT_UNDERSTAND = 0x0000, 0xFF00, 0xC000
_COMMITTED, _FAILURES = 1, 2
_NO_SUCH_INSTANCE = 0x0112
_TRIES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One instance the PACS keeps, and how often it came."""

    sop_instance_uid: str
    sop_class_uid: str
    study_uid: str
    series_uid: str
    digest: str
    times: int


class Pacs:
    """The PACS; `callers` maps a calling AE title to the address where it takes storage commitment reports."""

    def __init__(
        self, folder: Path, *, ae_title: str, port: int = 0, callers: Mapping[str, tuple[str, int]] | None = None
    ) -> None:
        self._folder = folder
        self._title = ae_title
        self._callers = dict(callers or {})
        self._lock = threading.Lock()
        self._reports: queue.Queue[tuple[str, Dataset] | None] = queue.Queue(1000)
        folder.mkdir(parents=True, exist_ok=True)
        ae = AE(ae_title=ae_title)
        ae.maximum_associations = 50
        for sop_class in (Verification, StorageCommitmentPushModel, StudyRootQueryRetrieveInformationModelFind):
            ae.add_supported_context(sop_class)
        handlers: list[Any] = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_C_ECHO, lambda _: _SUCCESS),
            (evt.EVT_C_FIND, self._find),
            (evt.EVT_N_ACTION, self._commit),
        ]
        server: Any = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
        self._server = server
        self._reporter = threading.Thread(target=self._report, name="pacs-reports", daemon=True)
        self._reporter.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.socket.getsockname()[1])

    def caller(self, ae_title: str, host: str, port: int) -> None:
        """Let it know where a calling AE title takes reports."""
        self._callers[ae_title] = (host, port)

    def stop(self) -> None:
        """Stop listening."""
        self._reports.put(None)
        self._server.shutdown()

    def contents(self) -> list[Kept]:
        """List what it keeps."""
        return read_contents(self._folder)

    def _store(self, event: evt.Event) -> int:
        request: Any = event.request
        data = request.DataSet.getvalue()
        syntax = str(event.context.transfer_syntax)
        header = read_header(data, syntax)
        if header.fault is not None:
            return _CANNOT_UNDERSTAND
        name = hashlib.sha256(header.sop_instance_uid.encode()).hexdigest()[:40]
        file = part10(
            data,
            sop_class_uid=header.sop_class_uid,
            sop_instance_uid=header.sop_instance_uid,
            transfer_syntax_uid=syntax,
        )
        with self._lock:
            _write_synced(self._folder / f"{name}.dcm", file)
            note = self._folder / f"{name}.json"
            times = json.loads(note.read_text())["times"] if note.exists() else 0
            kept = {
                "sop_instance_uid": header.sop_instance_uid,
                "sop_class_uid": header.sop_class_uid,
                "study_uid": header.study_uid,
                "series_uid": header.series_uid,
                "digest": hashlib.sha256(data).hexdigest(),
                "times": times + 1,
            }
            _write_synced(note, json.dumps(kept).encode())
        return _SUCCESS

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        query = event.identifier
        for kept in self.contents():
            if kept.study_uid == query.get("StudyInstanceUID") and kept.series_uid == query.get("SeriesInstanceUID"):
                found = Dataset()
                found.QueryRetrieveLevel = "IMAGE"
                found.SOPInstanceUID = kept.sop_instance_uid
                found.StudyInstanceUID, found.SeriesInstanceUID = kept.study_uid, kept.series_uid
                yield _PENDING, found
        yield _SUCCESS, None

    def _commit(self, event: evt.Event) -> tuple[int, None]:
        self._reports.put((str(event.assoc.requestor.ae_title).strip(), event.action_information))
        return _SUCCESS, None

    def _report(self) -> None:
        while (asked := self._reports.get()) is not None:
            caller, request = asked
            if caller in self._callers:
                self._send_report(caller, request)

    def _send_report(self, caller: str, request: Dataset) -> None:
        kept = {one.sop_instance_uid for one in self.contents()}
        report = Dataset()
        report.TransactionUID = request.TransactionUID
        report.ReferencedSOPSequence, report.FailedSOPSequence = [], []
        for item in request.ReferencedSOPSequence:
            if item.ReferencedSOPInstanceUID in kept:
                report.ReferencedSOPSequence.append(item)
            else:
                item.FailureReason = _NO_SUCH_INSTANCE
                report.FailedSOPSequence.append(item)
        kind = _FAILURES if report.FailedSOPSequence else _COMMITTED
        if kind == _COMMITTED:
            del report.FailedSOPSequence
        ae = AE(ae_title=self._title)
        ae.add_requested_context(StorageCommitmentPushModel)
        role = build_role(StorageCommitmentPushModel, scp_role=True)
        waiting = threading.Event()
        for _ in range(_TRIES):
            host, port = self._callers[caller]
            assoc = ae.associate(host, port, ae_title=caller, ext_neg=[role])
            if assoc.is_established:
                assoc.send_n_event_report(report, kind, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
                assoc.release()
                return
            waiting.wait(0.5)


def _write_synced(path: Path, data: bytes) -> None:
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_contents(folder: Path) -> list[Kept]:
    """List what a PACS keeps in its folder."""
    return [Kept(**json.loads(note.read_text())) for note in sorted(folder.glob("*.json"))]


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m clarion.testing.pacs", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("ae_title")
    parser.add_argument("--caller", nargs=3, metavar=("AE", "HOST", "PORT"), action="append", default=[])
    options = parser.parse_args()
    callers = {title: (host, int(port)) for title, host, port in options.caller}
    pacs = Pacs(options.folder, ae_title=options.ae_title, port=options.port, callers=callers)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    pacs.stop()


if __name__ == "__main__":
    main()
