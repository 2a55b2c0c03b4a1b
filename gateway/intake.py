"""What becomes of one data set that arrived: kept and journalled, set aside with a reason, or refused.

This is the seam between the wire and everything else: whatever carries the bytes calls `receive` and answers with
the status it gives. It depends on the local disk alone. A success is given only after the data set and its journal
record are synced. Called by any number of association threads at once.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import structlog

from clarion.dicom import read_header
from clarion.errors import InvalidInstanceError, StoreUnavailableError
from clarion.model import UNKNOWN_STUDY, is_uid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from clarion.dicom import Header
    from clarion.model import ObjectRef
    from clarion.ports import ObjectStore
    from gateway.journal import JournalWriter
    from gateway.space import Space

log = structlog.get_logger()

# PS3.4 B.2.3, PS3.7 C.
SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH_SOP_CLASS = 0xA900
CANNOT_UNDERSTAND = 0xC000


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A data set as the wire gave it: what the C-STORE-RQ said of it, who sent it, and its bytes."""

    data: bytes
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae: str
    called_ae: str
    association: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The status to answer, an Error Comment without patient data, and the study if it is known."""

    status: int
    comment: str = ""
    study_uid: str = UNKNOWN_STUDY


class Intake:
    """Receives data sets into the object store and the journal."""

    def __init__(
        self,
        *,
        store: ObjectStore,
        journal: JournalWriter,
        space: Space,
        ignored_classes: Mapping[str, frozenset[str]],
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._journal = journal
        self._space = space
        self._ignored = ignored_classes
        self._wake = wake

    def receive(self, arrival: Arrival) -> Answer:
        """Take one data set; the answer says what to tell the sender."""
        try:
            with self._space.holding(len(arrival.data)) as room:
                answer = self._receive(arrival) if room else self._no_room(arrival)
        except StoreUnavailableError as error:
            log.error("instance.refused", reason=str(error), association=arrival.association)  # noqa: TRY400  no trace
            answer = Answer(status=OUT_OF_RESOURCES, comment="storage unavailable")
        except Exception:  # the boundary to the wire: the sender is told a failure and may send again
            log_id = uuid.uuid4().hex[:12]
            log.exception("instance.failed", log_id=log_id, association=arrival.association)
            answer = Answer(status=PROCESSING_FAILURE, comment=f"internal error, log id {log_id}")
        self._wake()
        return answer

    def association_ended(
        self, association: str, reason: str, *, calling_ae: str, called_ae: str, studies: Mapping[str, tuple[int, int]]
    ) -> None:
        """Journal the end of an association: per study how many instances were stored and refused."""
        for study_uid, (stored, refused) in studies.items():
            fields = {
                "association": association,
                "reason": reason,
                "calling_ae": calling_ae,
                "called_ae": called_ae,
                "study_uid": study_uid,
                "stored": stored,
                "refused": refused,
            }
            try:
                self._journal.append("ended", fields)
            except StoreUnavailableError as error:
                log.warning("association.endnotjournalled", association=association, reason=str(error))
        self._wake()

    def commitment_reported(self, peer: str, transaction_uid: str, stored: list[str], failed: list[str]) -> None:
        """Journal a storage commitment result (PS3.4 J.3.3). Raises StoreUnavailableError."""
        fields = {"peer": peer, "transaction_uid": transaction_uid, "stored": stored, "failed": failed}
        self._journal.append("commitment", fields)
        self._wake()

    def _receive(self, arrival: Arrival) -> Answer:
        header = read_header(arrival.data, arrival.transfer_syntax_uid)
        study_uid = header.study_uid if is_uid(header.study_uid) else UNKNOWN_STUDY
        if arrival.sop_class_uid in self._ignored.get(arrival.called_ae, frozenset()):
            fields = {"study_uid": study_uid, "reason": "sop-class-ignored"}
            self._journal.append("ignored", {**_described(arrival), **fields})
            return Answer(status=SUCCESS, study_uid=study_uid)
        refusal = _refusal(arrival, header)
        if refusal is not None:
            status, reason = refusal
            self._quarantine(arrival, study_uid, reason)
            return Answer(status=status, comment=reason.reason, study_uid=study_uid)
        ref = self._store.put(arrival.data)
        self._journal.append(
            "stored",
            {**_described(arrival), "study_uid": study_uid, "series_uid": header.series_uid, "object": asdict(ref)},
        )
        return Answer(status=SUCCESS, study_uid=study_uid)

    def _no_room(self, arrival: Arrival) -> Answer:
        log.warning("instance.refused", reason="disk space low", association=arrival.association)
        return Answer(status=OUT_OF_RESOURCES, comment="disk space low")

    def _quarantine(self, arrival: Arrival, study_uid: str, reason: InvalidInstanceError) -> None:
        ref: ObjectRef | None = None
        if arrival.data:
            ref = self._store.put(arrival.data)
        log.warning("instance.quarantined", reason=reason.reason, association=arrival.association)
        fields = {"study_uid": study_uid, "reason": reason.reason, "object": asdict(ref) if ref else None}
        self._journal.append("quarantined", {**_described(arrival), **fields})


def _described(arrival: Arrival) -> dict[str, str]:
    return {
        "sop_class_uid": arrival.sop_class_uid,
        "sop_instance_uid": arrival.sop_instance_uid,
        "transfer_syntax_uid": arrival.transfer_syntax_uid,
        "calling_ae": arrival.calling_ae,
        "called_ae": arrival.called_ae,
        "association": arrival.association,
    }


def _refusal(arrival: Arrival, header: Header) -> tuple[int, InvalidInstanceError] | None:
    """Find what is wrong with a data set: the status and the reason, or None."""
    if not arrival.data:
        return CANNOT_UNDERSTAND, InvalidInstanceError("empty-data-set")
    if header.fault is not None:
        return CANNOT_UNDERSTAND, header.fault
    for name in ("study_uid", "series_uid", "sop_instance_uid"):
        value = getattr(header, name)
        if not value:
            return CANNOT_UNDERSTAND, InvalidInstanceError(f"missing-{name.replace('_', '-')}")
        if not is_uid(value):
            return CANNOT_UNDERSTAND, InvalidInstanceError(f"invalid-{name.replace('_', '-')}")
    if header.sop_class_uid != arrival.sop_class_uid:
        return DOES_NOT_MATCH_SOP_CLASS, InvalidInstanceError("sop-class-mismatch")
    if header.sop_instance_uid != arrival.sop_instance_uid:
        return DOES_NOT_MATCH_SOP_CLASS, InvalidInstanceError("sop-instance-mismatch")
    return None
