"""Our side of an association to a destination, on pynetdicom: store, ask for storage commitment, query.

pynetdicom's types end in this module. Every wait has a deadline. A peer that cannot be reached or stops answering
raises PeerUnavailableError; one that refuses the association for good raises PeerRefusedError.
"""

from __future__ import annotations

import contextlib
import io
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydicom import Dataset
from pydicom.uid import UID
from pynetdicom import AE, _config, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made from a table at import
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

from clarion.dicom import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from clarion.elements import EXPLICIT_LE, IMPLICIT_LE
from clarion.errors import InvalidInstanceError, PeerRefusedError, PeerUnavailableError
from gateway.transport import Guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pynetdicom.association import Association

    from clarion.model import Destination

_config.LOG_HANDLER_LEVEL = "none"

_PERMANENT = 0x01
_SUCCESS = 0x0000
_PROCESSING_FAILURE = 0x0110
_MEDIUM = 0x0000
_PENDING = frozenset((0xFF00, 0xFF01))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Deadlines of an association, in seconds."""

    connect_s: float
    dimse_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A storage commitment result: which instances the peer keeps, and which it does not."""

    transaction_uid: str
    stored: tuple[str, ...]
    failed: tuple[str, ...]


class _Checkpoint(threading.Event):
    """Holds an association's reactor: `clear` returns only when the reactor really stands at `wait`.

    The library raises a flag before its reactor waits and lowers it after; a sender that looks at the flag alone may
    meet a reactor that is just leaving, which then takes the response away from the sender.
    """

    def __init__(self, assoc: Association) -> None:
        super().__init__()
        self._assoc = assoc
        self._standing = threading.Event()
        self.set()

    def clear(self) -> None:
        self._standing.clear()
        super().clear()
        while not self._standing.wait(0.05):
            if not self._assoc.is_alive():
                return

    def wait(self, timeout: float | None = None) -> bool:
        if self.is_set():
            return True
        self._standing.set()
        return super().wait(timeout)


class Requestor:
    """An open association to a destination; use it in a `with` block."""

    def __init__(
        self,
        destination: Destination,
        *,
        own_ae: str,
        classes: Iterable[tuple[str, str]] = (),
        timeouts: Timeouts,
        on_report: Callable[[Report], None] | None = None,
    ) -> None:
        self._name = destination.name
        self._place = f"{destination.ae_title} at {destination.host}:{destination.port}"
        self._reported = threading.Event()
        self._on_report = on_report
        ae = AE(ae_title=own_ae)
        ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        ae.connection_timeout = timeouts.connect_s
        ae.acse_timeout = timeouts.connect_s
        ae.dimse_timeout = timeouts.dimse_s
        ae.network_timeout = timeouts.dimse_s
        for sop_class, syntax in sorted(set(classes)):
            ae.add_requested_context(sop_class, syntax)
        ae.add_requested_context(Verification, [EXPLICIT_LE, IMPLICIT_LE])
        ae.add_requested_context(StorageCommitmentPushModel, [EXPLICIT_LE, IMPLICIT_LE])
        ae.add_requested_context(StudyRootQueryRetrieveInformationModelFind, [EXPLICIT_LE, IMPLICIT_LE])
        self._stall_s = timeouts.dimse_s
        self._guarded: Guard | None = None
        handlers: list[Any] = [(evt.EVT_CONN_OPEN, self._guard), (evt.EVT_N_EVENT_REPORT, self._report)]
        self._assoc = ae.associate(
            destination.host, destination.port, ae_title=destination.ae_title, evt_handlers=handlers
        )
        if not self._assoc.is_established:
            self._raise_refusal()
        self._assoc._reactor_checkpoint = _Checkpoint(self._assoc)  # noqa: SLF001  see _Checkpoint

    def __enter__(self) -> Self:
        """Use the association."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Release it, or abort it after an error: whoever no longer answers would not answer a release either."""
        if not self._assoc.is_established:
            return
        # The library first sends what it still has to send; a peer that takes it slowly is cut off.
        watch = threading.Timer(self._stall_s, self._cut)
        watch.start()
        try:
            if kind is None:
                self._assoc.release()
            else:
                self._assoc.abort()
        finally:
            watch.cancel()

    def accepts(self, sop_class: str, syntax: str) -> bool:
        """Tell whether the peer takes the class in the syntax."""
        return any(
            context.abstract_syntax == sop_class and syntax in context.transfer_syntax
            for context in self._assoc.accepted_contexts
        )

    @property
    def commits(self) -> bool:
        """Whether the peer offers storage commitment."""
        return self._accepts_class(StorageCommitmentPushModel)

    @property
    def finds(self) -> bool:
        """Whether the peer offers the study root query."""
        return self._accepts_class(StudyRootQueryRetrieveInformationModelFind)

    def echo(self) -> int:
        """Send a C-ECHO-RQ; give the status."""
        return self._status(self._assoc.send_c_echo())

    def store(self, data: bytes, *, sop_class: str, sop_instance: str, syntax: str) -> int:
        """Send a data set as it is; give the status. Raises PeerUnavailableError when the peer does not answer."""
        if not data:
            raise InvalidInstanceError("empty-data-set")
        request = C_STORE()
        request.MessageID = 1
        request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = UID(sop_class), UID(sop_instance)
        request.Priority = _MEDIUM
        request.DataSet = io.BytesIO(data)
        assoc = self._assoc
        assoc._reactor_checkpoint.clear()  # noqa: SLF001  the library stores only what it can parse; see _Checkpoint
        try:
            assoc.dimse.send_msg(request, self._context(sop_class, syntax))
            answer = self._answer()
        except (RuntimeError, ValueError, OSError) as error:
            raise PeerUnavailableError(f"{self._name}: the association ended while sending") from error
        finally:
            assoc._reactor_checkpoint.set()  # noqa: SLF001  as above
        if not isinstance(answer, C_STORE) or answer.Status is None:
            raise PeerUnavailableError(f"{self._name}: no answer before the deadline, or the association was aborted")
        return int(answer.Status)

    def _answer(self) -> object:
        """Wait for the answer; None when there is none. The deadline begins anew as long as the peer takes bytes."""
        sent = -1
        while self._guarded is not None and sent != self._guarded.sent:
            sent = self._guarded.sent
            # An association that ended puts None here: whoever waits must not sit out the deadline then.
            with contextlib.suppress(queue.Empty):
                return self._assoc.dimse.msg_queue.get(timeout=self._stall_s)[1]
        return None

    def _context(self, sop_class: str, syntax: str) -> int:
        for context in self._assoc.accepted_contexts:
            if context.abstract_syntax == sop_class and syntax in context.transfer_syntax and context.context_id:
                return context.context_id
        raise PeerUnavailableError(f"{self._name}: the peer does not take the class in this transfer syntax")

    def ask_commitment(self, transaction_uid: str, instances: Iterable[tuple[str, str]], wait_s: float) -> bool:
        """Ask the peer to commit to (SOP Class, SOP Instance) pairs (PS3.4 J.3.2); tell whether it agreed to answer.

        Waits a little for an answer on this association; most peers answer on one of their own.
        """
        request = Dataset()
        request.TransactionUID = transaction_uid
        request.ReferencedSOPSequence = [_reference(sop_class, sop_instance) for sop_class, sop_instance in instances]
        try:
            answer, _ = self._assoc.send_n_action(
                request, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise PeerUnavailableError(f"{self._name}: the association ended while asking for commitment") from error
        agreed = self._status(answer) == _SUCCESS
        if agreed:
            self._reported.wait(wait_s)
        return agreed

    def find(self, study_uid: str, series_uid: str) -> set[str]:
        """Ask which SOP Instance UIDs of a series the peer has."""
        query = Dataset()
        query.QueryRetrieveLevel = "IMAGE"
        query.StudyInstanceUID = study_uid
        query.SeriesInstanceUID = series_uid
        query.SOPInstanceUID = ""
        found: set[str] = set()
        try:
            for status, identifier in self._assoc.send_c_find(query, StudyRootQueryRetrieveInformationModelFind):
                code = self._status(status)
                if code in _PENDING and identifier is not None:
                    found.add(str(identifier.get("SOPInstanceUID", "")))
                elif code != _SUCCESS:
                    # A query that failed proves nothing: neither presence nor absence.
                    raise PeerUnavailableError(f"{self._name}: the query ended with 0x{code:04X}")
        except (RuntimeError, ValueError, OSError) as error:
            raise PeerUnavailableError(f"{self._name}: the association ended during a query") from error
        return found

    def _accepts_class(self, sop_class: str) -> bool:
        return any(context.abstract_syntax == sop_class for context in self._assoc.accepted_contexts)

    def _status(self, answer: Dataset) -> int:
        if "Status" not in answer:
            raise PeerUnavailableError(f"{self._name}: no answer before the deadline, or the association was aborted")
        return int(answer.Status)

    def _guard(self, event: evt.Event) -> None:
        self._guarded = Guard(event.assoc.dul.socket, stall_s=self._stall_s)

    def _cut(self) -> None:
        if self._guarded is not None:
            self._guarded.cut()

    def _report(self, event: evt.Event) -> tuple[int, None]:
        try:
            report = event.event_information
            result = Report(
                transaction_uid=str(report.TransactionUID),
                stored=_referenced(report, "ReferencedSOPSequence"),
                failed=_referenced(report, "FailedSOPSequence"),
            )
        except AttributeError:
            return _PROCESSING_FAILURE, None
        if self._on_report is not None:
            self._on_report(result)
        self._reported.set()
        return _SUCCESS, None

    def _raise_refusal(self) -> None:
        primitive = self._assoc.acceptor.primitive
        if self._assoc.is_rejected and primitive is not None:
            said = f"result {primitive.result}, source {primitive.result_source}, reason {primitive.diagnostic}"
            if primitive.result == _PERMANENT:
                raise PeerRefusedError(f"{self._name}: association rejected, {said}")
            raise PeerUnavailableError(f"{self._name}: association rejected for now, {said}")
        raise PeerUnavailableError(f"{self._name}: no association with {self._place}; is the peer running there?")


def _reference(sop_class: str, sop_instance: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class
    item.ReferencedSOPInstanceUID = sop_instance
    return item


def _referenced(report: Dataset, keyword: str) -> tuple[str, ...]:
    return tuple(str(item.ReferencedSOPInstanceUID) for item in report.get(keyword, []))
