"""What becomes of one data set that arrives: kept and journalled, set aside with a reason, or refused.

This is the seam between the wire and everything else: whatever carries the bytes begins a `Reception`, writes the
pieces as they come, and answers with the status that `finish` gives. It depends on the local disk alone. A success is
given only after the data set and its journal record are synced. Any number of association threads at once.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

import structlog

from clarion import digests
from clarion.errors import InvalidInstanceError, StoreUnavailableError
from clarion.layouts import Layouts
from clarion.model import UNKNOWN_STUDY, is_uid
from gateway.blocks import BlockBuffer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clarion.adapters.objects import FileStore, IncomingFile
    from clarion.scanning import Scan
    from gateway.journal_writer import JournalWriter
    from gateway.space import Space

log = structlog.get_logger()

# PS3.4 B.2.3, PS3.7 C.
SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH_SOP_CLASS = 0xA900
CANNOT_UNDERSTAND = 0xC000

# Up to this a data set lies in the journal's segment, with its record, and one sync makes both durable; what is larger
# has a file of its own, so that memory does not grow with it. A CT slice is half as large; a segment holds 64.
COLLECTED_BYTES = 2**20
# So much is digested at a time: pieces as they come are a quarter dearer, and all of it at the end has left the cache.
_DIGESTED_BYTES = 256 * 2**10
# How often a large data set that is being written asks for room.
_LOOK_FOR_ROOM_BYTES = 16 * 2**20
# So many data sets are in a process's memory at most; when they are in use, others go to files.
_MOST_BUFFERS = 64


class Arrival(NamedTuple):
    """What a request says of the data set that follows, and who sends it; `study_uid` if it has to be of that."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae: str
    called_ae: str
    association: str
    study_uid: str = ""


class Answer(NamedTuple):
    """The status to answer, an Error Comment without patient data, and the study if it is known."""

    status: int
    comment: str = ""
    study_uid: str = UNKNOWN_STUDY


class Intake:
    """Receives data sets into the journal and, the large ones, into the object store."""

    def __init__(
        self,
        *,
        store: FileStore,
        journal: JournalWriter,
        space: Space,
        ignored_classes: Mapping[str, frozenset[str]],
    ) -> None:
        self.store = store
        self.journal = journal
        self.space = space
        self.layouts = Layouts()
        self._ignored = ignored_classes
        # Buffers of data sets that are being collected, to be used again: their pages are there already.
        self._spare: list[BlockBuffer] = []
        self._made = 0
        self._lending = threading.Lock()

    def lend(self) -> BlockBuffer | None:
        """Give a buffer for a data set of up to COLLECTED_BYTES; None when enough are in use: it goes to a file."""
        with self._lending:
            if self._spare:
                return self._spare.pop()
            if self._made >= _MOST_BUFFERS:
                return None
            self._made += 1
        try:
            return BlockBuffer(COLLECTED_BYTES)
        except OSError:
            with self._lending:
                self._made -= 1
            return None

    def give_back(self, buffer: BlockBuffer) -> None:
        """Take a buffer back."""
        with self._lending:
            self._spare.append(buffer)

    def begin(self, arrival: Arrival) -> Reception:
        """Begin to receive a data set."""
        ignored = arrival.sop_class_uid in self._ignored.get(arrival.called_ae, frozenset())
        return Reception(self, arrival, ignored=ignored)

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
                self.journal.append("ended", fields)
            except StoreUnavailableError as error:
                log.warning("association.endnotjournalled", association=association, reason=str(error))

    def commitment_reported(self, peer: str, transaction_uid: str, stored: list[str], failed: list[str]) -> None:
        """Journal a storage commitment result (PS3.4 J.3.3). Raises StoreUnavailableError."""
        fields = {"peer": peer, "transaction_uid": transaction_uid, "stored": stored, "failed": failed}
        self.journal.append("commitment", fields)

    def commitment_asked(self, peer: str, transaction_uid: str, instances: Sequence[tuple[str, str]]) -> None:
        """Journal a request for storage commitment (PS3.4 J.3.2). Raises StoreUnavailableError."""
        fields = {"peer": peer, "transaction_uid": transaction_uid, "instances": instances}
        self.journal.append("commitment-asked", fields)


class Reception:
    """One data set being received. End it with `finish` or `abandon`; the latter may always follow."""

    def __init__(self, intake: Intake, arrival: Arrival, *, ignored: bool) -> None:
        self._intake = intake
        self._arrival = arrival
        self._ignored = ignored
        self._digest = digests.start()
        self._buffer = intake.lend()
        self._file: IncomingFile | None = None
        self._looked = self._kept = 0
        # How much of what is in the buffer has been digested.
        self._digested = 0
        # Once it is known that the data set cannot be kept, the rest of it is read and dropped.
        self._refused: Answer | None = None
        self.size = 0

    def room(self) -> memoryview | None:
        """Give where the next piece can be put by whoever has it; None while it cannot. `placed` is to follow."""
        if self._refused is not None or self._buffer is None or self.size >= COLLECTED_BYTES:
            return None
        return self._buffer.data[self.size :]

    def placed(self, count: int) -> None:
        """So much has been put into the last `room`."""
        self.size += count
        self._kept = self.size
        if self.size - self._digested >= _DIGESTED_BYTES:
            self._digest_to(self.size // _DIGESTED_BYTES * _DIGESTED_BYTES)

    def _digest_to(self, end: int) -> None:
        if self._buffer is not None and end > self._digested:
            self._digest.update(self._buffer.data[self._digested : end])
            self._digested = end

    def write(self, piece: bytes | memoryview) -> None:
        """Take the next piece; it may be overwritten afterwards. Never raises: `finish` says what went wrong."""
        self.size += len(piece)
        if self._refused is not None:
            return
        try:
            if self._buffer is not None and self.size <= COLLECTED_BYTES:
                self._buffer.data[self.size - len(piece) : self.size] = piece
                self._kept = self.size
                return
            self._digest_to(self._kept)
            self._digest.update(piece)
            if self._file is not None:
                self._write_file(self._file, piece)
            elif not self._ignored:
                self._spill(piece)
        except StoreUnavailableError as error:
            self._refuse(str(error))
        except Exception as error:  # noqa: BLE001  the boundary to the wire: the sender is told, and may send again
            self._fail(error)

    def finish(self) -> Answer:
        """Make the data set durable, or set it aside; give what to tell the sender."""
        try:
            if self._refused is None:
                return self._finish()
        except StoreUnavailableError as error:
            self._refuse(str(error))
        except Exception as error:  # noqa: BLE001  as above
            self._fail(error)
        finally:
            self.abandon()
        return self._refused or Answer(status=PROCESSING_FAILURE)

    def abandon(self) -> None:
        """Let go of what was not kept."""
        if self._buffer is not None:
            self._intake.give_back(self._buffer)
            self._buffer = None
        if self._file is not None:
            self._file.abandon()
            self._file = None

    def _spill(self, piece: bytes | memoryview) -> None:
        """Go on in a file: the data set is large."""
        self._file = self._intake.store.receive()
        before = self.size - len(piece)
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            try:
                self._write_file(self._file, buffer.data[:before])
            finally:
                self._intake.give_back(buffer)
        self._write_file(self._file, piece)

    @property
    def _collected(self) -> memoryview:
        """What lies in memory: all of a small data set, the beginning of an ignored one."""
        return memoryview(b"") if self._buffer is None else self._buffer.data[: self._kept]

    def _write_file(self, file: IncomingFile, piece: bytes | memoryview) -> None:
        file.write(piece)
        self._intake.space.spend(len(piece))
        if file.size - self._looked > _LOOK_FOR_ROOM_BYTES:
            self._looked = file.size
            if not self._intake.space.wait_for(0):
                self._refuse("disk space low")

    def _finish(self) -> Answer:
        size = len(self._collected)
        if self._file is None:
            with self._intake.space.holding(size) as room:
                if room or self._intake.space.wait_for(0):
                    with self._collected as data:
                        return self._judge(self._intake.layouts.scan(data, self._arrival.transfer_syntax_uid))
        elif self._intake.space.wait_for(0):
            with self._file.view() as view:
                seen = self._intake.layouts.scan(view, self._arrival.transfer_syntax_uid)
            return self._judge(seen)
        self._refuse("disk space low")
        return self._refused or Answer(status=OUT_OF_RESOURCES)

    def _judge(self, seen: Scan) -> Answer:
        study_uid = seen.study_uid if is_uid(seen.study_uid) else UNKNOWN_STUDY
        described: dict[str, object] = {**self._described(), "study_uid": study_uid}
        if self._ignored:
            self._intake.journal.append("ignored", {**described, "reason": "sop-class-ignored"})
            return Answer(status=SUCCESS, study_uid=study_uid)
        refusal = _refusal(self._arrival, seen, self.size)
        if refusal is not None:
            status, reason = refusal
            log.warning("instance.quarantined", reason=reason.reason, association=self._arrival.association)
            self._keep("quarantined", {**described, "reason": reason.reason})
            return Answer(status=status, comment=reason.reason, study_uid=study_uid)
        described["series_uid"] = seen.series_uid
        self._keep("stored", described if seen.checked else {**described, "unchecked": True})
        return Answer(status=SUCCESS, study_uid=study_uid)

    def _described(self) -> dict[str, object]:
        arrival = self._arrival
        return {
            "sop_class_uid": arrival.sop_class_uid,
            "sop_instance_uid": arrival.sop_instance_uid,
            "transfer_syntax_uid": arrival.transfer_syntax_uid,
            "calling_ae": arrival.calling_ae,
            "called_ae": arrival.called_ae,
            "association": arrival.association,
        }

    def _keep(self, kind: str, fields: dict[str, object]) -> None:
        """Make the data set and its record durable: in one, or the file before the record."""
        self._digest_to(self._kept)
        digest = digests.finish(self._digest)
        if self._file is not None:
            ref = self._file.keep(digest)
            self._intake.journal.append(kind, {**fields, "object": asdict(ref)})
        elif self.size:
            self._intake.journal.append(kind, {**fields, "object": {"digest": digest}}, self._collected, self._buffer)
        else:
            self._intake.journal.append(kind, {**fields, "object": None})

    def _refuse(self, reason: str) -> None:
        log.error("instance.refused", reason=reason, association=self._arrival.association)
        comment = "disk space low" if reason == "disk space low" else "storage unavailable"
        self._refused = Answer(status=OUT_OF_RESOURCES, comment=comment)
        self.abandon()

    def _fail(self, error: Exception) -> None:
        log_id = uuid.uuid4().hex[:12]
        log.error("instance.failed", log_id=log_id, association=self._arrival.association, exc_info=error)
        self._refused = Answer(status=PROCESSING_FAILURE, comment=f"internal error, log id {log_id}")
        self.abandon()


def _refusal(arrival: Arrival, seen: Scan, size: int) -> tuple[int, InvalidInstanceError] | None:
    """Find what is wrong with a data set: the status and the reason, or None."""
    if size == 0:
        return CANNOT_UNDERSTAND, InvalidInstanceError("empty-data-set")
    if seen.fault is not None:
        return CANNOT_UNDERSTAND, seen.fault
    for name in ("study_uid", "series_uid", "sop_instance_uid"):
        value = getattr(seen, name)
        if not value:
            return CANNOT_UNDERSTAND, InvalidInstanceError(f"missing-{name.replace('_', '-')}")
        if not is_uid(value):
            return CANNOT_UNDERSTAND, InvalidInstanceError(f"invalid-{name.replace('_', '-')}")
    if seen.sop_class_uid != arrival.sop_class_uid:
        return DOES_NOT_MATCH_SOP_CLASS, InvalidInstanceError("sop-class-mismatch")
    if arrival.study_uid and seen.study_uid != arrival.study_uid:
        return DOES_NOT_MATCH_SOP_CLASS, InvalidInstanceError("study-mismatch")
    if seen.sop_instance_uid != arrival.sop_instance_uid:
        return DOES_NOT_MATCH_SOP_CLASS, InvalidInstanceError("sop-instance-mismatch")
    return None
