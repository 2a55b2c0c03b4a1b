"""The Storage and Verification SCP on pynetdicom, and the receiving side of storage commitment reports.

pynetdicom's types end in this module: it checks the association, hands bytes to `Intake` and answers with its status.
A faster data path replaces this module alone.
"""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from pydicom import Dataset
from pynetdicom import AE, _config, evt
from pynetdicom.pdu import A_ABORT_RQ, A_RELEASE_RQ
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification  # type: ignore[attr-defined]  # made from a table at import
from pynetdicom.transport import ThreadedAssociationServer

from clarion.crashpoints import effect, reach
from clarion.dicom import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from clarion.elements import EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from clarion.errors import ResourceBusyError, StoreUnavailableError
from gateway.access import NO_SPACE, NOT_READY, OUR_FAULT, TOO_MANY, AccessList, Admission, Rejection
from gateway.intake import PROCESSING_FAILURE, SUCCESS, Answer, Arrival
from gateway.transport import Guard

if TYPE_CHECKING:
    from clarion.config import ScpConfig
    from gateway.intake import Intake
    from gateway.space import Space

log = structlog.get_logger()

# Any storage SOP Class and any transfer syntax: the library's process-wide switch, set by the one module that serves.
_config.UNRESTRICTED_STORAGE_SERVICE = True
_config.LOG_HANDLER_LEVEL = "none"

_NOT_AUTHORISED = 0x0124
_CLASS_NOT_SUPPORTED = 0x0122
_STANDARD_ROOT = "1.2.840.10008."
_MAX_COMMENT = 64
# A connection must ask for an association by then, and a PDU that has begun must be whole.
_STALL_S = 30.0
# Connections beyond the associations allowed: those that are being refused, or say nothing.
_SPARE_CONNECTIONS = 32
_ENDINGS: dict[type, str] = {A_ABORT_RQ: "aborted", A_RELEASE_RQ: "released"}
_NOT_STORAGE = frozenset((Verification, StorageCommitmentPushModel))


# Of many associations at once none is turned away by the kernel.
ThreadedAssociationServer.request_queue_size = 128


@dataclass(slots=True)
class _Association:
    """What we keep of one association while it lasts."""

    id: str
    calling: str
    called: str
    address: str
    admission: Admission
    studies: dict[str, list[int]] = field(default_factory=dict)

    def count(self, answer: Answer) -> None:
        counts = self.studies.setdefault(answer.study_uid, [0, 0])
        counts[0 if answer.status == SUCCESS else 1] += 1


@dataclass(slots=True)
class _Connection:
    """What we keep of one connection while it lasts.

    `answered` once its association was accepted or rejected; `ending` how the peer said that it ends.
    """

    guard: Guard
    address: str
    since: float
    answered: bool = False
    ending: str = ""


class Scp:
    """Listens for associations until it is drained."""

    def __init__(self, config: ScpConfig, *, access: AccessList, intake: Intake, space: Space) -> None:
        self._config = config
        self._access = access
        self._intake = intake
        self._space = space
        self._lock = threading.Lock()
        self._open: dict[object, _Association] = {}
        self._connections: dict[Any, _Connection] = {}
        self._max_bytes = int(config.max_instance_gb * 1e9)
        self._draining = False
        self.refusals: dict[str, int] = {}
        """How many associations were rejected, by the check that failed."""
        self.last_refusal = ""
        self._ae = self._entity()
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, self._connected),
            (evt.EVT_REQUESTED, self._requested),
            (evt.EVT_C_ECHO, self._verified),
            (evt.EVT_C_STORE, self._stored),
            (evt.EVT_N_EVENT_REPORT, self._reported),
            (evt.EVT_PDU_RECV, self._received),
            (evt.EVT_PDU_SENT, _sent),
            (evt.EVT_RELEASED, lambda event: self._ended(event.assoc, "released")),
            (evt.EVT_ABORTED, lambda event: self._ended(event.assoc, "aborted")),
            (evt.EVT_CONN_CLOSE, lambda event: self._ended(event.assoc, "connection lost")),
        ]
        try:
            self._server = self._ae.start_server((config.host, config.port), block=False, evt_handlers=handlers)
        except OSError as error:
            raise ResourceBusyError(
                f"gateway.scp: cannot listen on {config.host}:{config.port}: {error.strerror}; is the port taken by "
                "another program, or below 1024 without permission?"
            ) from error

    @property
    def associations(self) -> int:
        """How many associations are open."""
        return len(self._open)

    @property
    def connections(self) -> int:
        """How many connections are open, with an association or without."""
        return len(self._connections)

    def sweep(self) -> None:
        """Forget connections whose thread died without a word, as the library's does of what it cannot parse."""
        with self._lock:
            long_ago = time.monotonic() - 2 * _STALL_S
            dead = [
                assoc
                for assoc, one in self._connections.items()
                if not assoc.dul.is_alive() and (assoc.dul.ident is not None or one.since < long_ago)
            ]
        for assoc in dead:
            connection = self._connections.get(assoc)
            if connection is not None:
                connection.guard.cut()
            self._ended(assoc, "connection lost")

    def drain(self, deadline_s: float) -> None:
        """Accept no more, let open associations end until the deadline, abort the rest."""
        self._draining = True
        end = time.monotonic() + deadline_s
        ended = threading.Event()
        while self._open and time.monotonic() < end:
            ended.wait(0.05)
        self._ae.shutdown()

    def _entity(self) -> AE:
        ae = AE()
        ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        ae.maximum_pdu_size = self._config.max_pdu
        ae.acse_timeout = _STALL_S
        # The limit is checked by us, in the order of the specification.
        ae.maximum_associations = 10_000
        if self._config.verification.enabled:
            ae.add_supported_context(Verification, [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE])
        ae.add_supported_context(StorageCommitmentPushModel, [EXPLICIT_LE, IMPLICIT_LE], scu_role=True, scp_role=True)
        return ae

    def _connected(self, event: evt.Event) -> None:
        """Bound the connection before a byte of it is read; cut it when there are too many that say nothing."""
        guard = Guard(event.assoc.dul.socket, stall_s=_STALL_S, max_bytes=self._max_bytes)
        address = str(event.assoc.requestor.address)
        with self._lock:
            self._connections[event.assoc] = _Connection(guard, address, time.monotonic())
            crowded = len(self._connections) > self._config.max_associations + _SPARE_CONNECTIONS
        if crowded:
            log.warning("connection.cut", reason="too-many-connections", address=address)
            guard.cut()

    def _requested(self, event: evt.Event) -> None:
        assoc = event.assoc
        request: Any = assoc.requestor.primitive
        calling, called = str(request.calling_ae_title).strip(), str(request.called_ae_title).strip()
        address = str(assoc.requestor.address)
        storage = any(
            context.abstract_syntax not in _NOT_STORAGE for context in request.presentation_context_definition_list
        )
        try:
            checked = self._check(calling, called, address, storage=storage)
        except Exception:  # the library would go on and accept: whatever we got wrong, nobody comes in by it
            log.exception("association.failed", address=address)
            checked = OUR_FAULT
        if isinstance(checked, Rejection):
            self._reject(assoc, checked, calling_ae=calling, called_ae=called, address=address)
            return
        opened = _Association(uuid.uuid4().hex, calling, called, address, checked)
        with self._lock:
            self._open[assoc] = opened
            self._answered(assoc)
        log.info("association.requested", association=opened.id, calling_ae=calling, called_ae=called, address=address)

    def _reject(self, assoc: Any, rejection: Rejection, **who: str) -> None:  # noqa: ANN401  the library's association
        with self._lock:
            self.refusals[rejection.check] = self.refusals.get(rejection.check, 0) + 1
            self.last_refusal = f"{rejection.check}: {who['calling_ae']} at {who['address']} to {who['called_ae']}"
            self._answered(assoc)
        log.warning("association.rejected", check=rejection.check, **who)
        assoc.acse.send_reject(rejection.result, rejection.source, rejection.reason)
        assoc.kill()

    def _answered(self, assoc: object) -> None:
        connection = self._connections.get(assoc)
        if connection is not None:
            connection.answered = True

    def _check(self, calling: str, called: str, address: str, *, storage: bool) -> Admission | Rejection:
        checked = self._access.check(calling, called, address)
        if isinstance(checked, Rejection):
            return checked
        if self._draining:
            return NOT_READY
        with self._lock:
            if len(self._open) >= self._config.max_associations:
                return TOO_MANY
        return NO_SPACE if storage and not self._space.available() else checked

    def _verified(self, _event: evt.Event) -> int:
        return SUCCESS

    def _stored(self, event: evt.Event) -> int | Dataset:
        association = self._open.get(event.assoc)
        connection = self._connections.get(event.assoc)
        if connection is not None:
            connection.guard.reset()
        request: Any = event.request
        sop_class_uid = str(request.AffectedSOPClassUID)
        if association is None or not association.admission.may_store:
            return self._refuse(association, _NOT_AUTHORISED, "not a source of instances")
        if not self._config.accept_private_sop_classes and not sop_class_uid.startswith(_STANDARD_ROOT):
            return self._refuse(association, _CLASS_NOT_SUPPORTED, "private SOP Classes are not accepted")
        answer = self._intake.receive(
            Arrival(
                data=request.DataSet.getvalue() if request.DataSet is not None else b"",
                sop_class_uid=sop_class_uid,
                sop_instance_uid=str(request.AffectedSOPInstanceUID),
                transfer_syntax_uid=str(event.context.transfer_syntax),
                calling_ae=association.calling,
                called_ae=association.called,
                association=association.id,
            )
        )
        association.count(answer)
        if answer.status == SUCCESS:
            reach("before:scp.respond")
            return SUCCESS
        return _status(answer.status, answer.comment)

    def _refuse(self, association: _Association | None, status: int, reason: str) -> Dataset:
        log.warning("instance.refused", reason=reason, association=association.id if association else "")
        return _status(status, reason)

    def _reported(self, event: evt.Event) -> tuple[int, Dataset | None]:
        """Take a storage commitment result; success only after it is journalled."""
        association = self._open.get(event.assoc)
        if association is None or not association.admission.may_report:
            return _NOT_AUTHORISED, None
        try:
            report = event.event_information
            stored = [str(item.ReferencedSOPInstanceUID) for item in report.get("ReferencedSOPSequence", [])]
            failed = [str(item.ReferencedSOPInstanceUID) for item in report.get("FailedSOPSequence", [])]
            transaction = str(report.TransactionUID)
        except AttributeError:
            return PROCESSING_FAILURE, None
        try:
            self._intake.commitment_reported(association.calling, transaction, stored, failed)
        except StoreUnavailableError:
            return PROCESSING_FAILURE, None
        return SUCCESS, None

    def _received(self, event: evt.Event) -> None:
        """Note how the peer ends the association: its connection may be gone before the library has looked."""
        ending = _ENDINGS.get(type(event.pdu))
        connection = self._connections.get(event.assoc) if ending is not None else None
        if connection is not None and ending is not None:
            connection.ending = ending

    def _ended(self, assoc: object, reason: str) -> None:
        with self._lock:
            association = self._open.pop(assoc, None)
            connection = self._connections.pop(assoc, None)
        if association is None:
            if connection is not None and not connection.answered:
                log.info("connection.ended", reason="no association was asked for", address=connection.address)
            return
        reason = connection.ending if connection is not None and connection.ending else reason
        log.info("association.ended", association=association.id, reason=reason)
        with effect("scp.associationended"):
            self._intake.association_ended(
                association.id,
                reason,
                calling_ae=association.calling,
                called_ae=association.called,
                studies={study: (counts[0], counts[1]) for study, counts in association.studies.items()},
            )


def _status(status: int, comment: str) -> Dataset:
    ds = Dataset()
    ds.Status = status
    ds.ErrorComment = comment[:_MAX_COMMENT]
    return ds


def _sent(_event: evt.Event) -> None:
    reach("after:scp.respond")
