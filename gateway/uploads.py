"""One STOW-RS request (PS3.18 10.5): its parts are Part 10 files, each received as by C-STORE, on the same intake path.

Synchronous, one thread at a time. The file meta information is cut off as it comes and says what the data set is; what
follows is what `Intake` keeps. An instance is durable when its part has ended; the client learns it with the response.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from clarion.crashpoints import effect
from clarion.dicom import read_file_meta
from clarion.errors import InvalidInstanceError
from clarion.model import is_uid
from gateway.intake import CANNOT_UNDERSTAND, SUCCESS, Answer, Arrival
from gateway.multipart import Multipart, MultipartError, parameters_of
from gateway.statuses import CLASS_NOT_SUPPORTED
from gateway.wire.acceptance import refusal_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clarion.config import ScpConfig
    from gateway.intake import Intake, Reception

log = structlog.get_logger()

MOST_INSTANCES = 10_000
_PREAMBLE = 132
# The group length, and where its value and what it counts begin (PS3.10 7.1).
_GROUP_LENGTH, _VALUE_AT, _COUNTED_FROM = b"\x02\x00\x00\x00UL\x04\x00", 140, 144
_MOST_META_BYTES = 64 * 1024
_SOP_CLASS, _SOP_INSTANCE, _SYNTAX = 0x00020002, 0x00020003, 0x00020010


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one part; the UIDs are empty when it could not be read so far."""

    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    answer: Answer

    @property
    def stored(self) -> bool:
        """Whether it is durable."""
        return self.answer.status == SUCCESS


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Who sends, and to whom: as on an association. With a `study_uid` every instance has to be of that study."""

    calling_ae: str
    called_ae: str
    study_uid: str = ""


class Upload:
    """One request. `feed` it, then `finish` it, or `abandon` it; MultipartError ends it."""

    def __init__(self, boundary: str, sender: Client, intake: Intake, config: ScpConfig) -> None:
        self.id = uuid.uuid4().hex
        self._sender = sender
        self._intake = intake
        self._config = config
        # A request that is cancelled is abandoned while a thread may still be at it.
        self._turn = threading.Lock()
        self._max_bytes = int(config.max_instance_gb * 1e9)
        self._body = Multipart(boundary, self)
        self.results: list[Result] = []
        self.size = 0
        self._head = bytearray()
        self._reception: Reception | None = None
        self._arrival: Arrival | None = None
        # Once it is known that a part cannot be taken, the rest is read and dropped, up to as much as a part may have.
        self._refused: Answer | None = None
        self._dropped = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        with self._turn:
            self.size += len(data)
            self._body.feed(data)

    def finish(self) -> list[Result]:
        """The body has ended: give what became of its parts, in order."""
        with self._turn:
            self._body.close()
            self._ended("released")
        return self.results

    def abandon(self, reason: str) -> None:
        """The request will not be completed; the client is told of nothing, and what is durable stays so."""
        with self._turn:
            if self._reception is not None:
                self._reception.abandon()
                self._reception = None
            self._ended(reason)

    def _ended(self, reason: str) -> None:
        studies: dict[str, tuple[int, int]] = {}
        for one in self.results:
            stored, refused = studies.get(one.answer.study_uid, (0, 0))
            studies[one.answer.study_uid] = (stored + one.stored, refused + (not one.stored))
        with effect("scp.associationended"):
            self._intake.association_ended(
                self.id,
                reason,
                calling_ae=self._sender.calling_ae,
                called_ae=self._sender.called_ae,
                studies=studies,
            )

    # Parts -----------------------------------------------------------------------------------------------------

    def begin_part(self, headers: Mapping[str, str]) -> None:
        """A part begins."""
        if len(self.results) >= MOST_INSTANCES:
            raise MultipartError(f"more than {MOST_INSTANCES} instances in one request")
        self._head.clear()
        self._arrival = self._refused = None
        self._dropped = 0
        kind, _ = parameters_of(headers.get("content-type", "application/dicom"))
        if kind != "application/dicom":
            self._refuse(CANNOT_UNDERSTAND, "a part that is no application/dicom")

    def take(self, piece: memoryview) -> None:
        """Take some of the part."""
        if self._refused is not None:
            self._dropped += len(piece)
            if self._dropped > self._max_bytes:
                raise MultipartError("a part that does not end, far above gateway.scp.max_instance_gb")
            return
        if self._reception is None:
            self._head += piece
            self._begin(complete=False)
            return
        self._write(piece)

    def end_part(self) -> None:
        """The part is complete."""
        if self._reception is None and self._refused is None:
            self._begin(complete=True)
        answer = self._refused
        if self._reception is not None:
            answer = self._reception.finish()
            self._reception = None
        self.results.append(
            Result(
                sop_class_uid=self._arrival.sop_class_uid if self._arrival is not None else "",
                sop_instance_uid=self._arrival.sop_instance_uid if self._arrival is not None else "",
                answer=answer or Answer(status=CANNOT_UNDERSTAND, comment="no DICOM file"),
            )
        )

    def _begin(self, *, complete: bool) -> None:
        """Begin to receive the data set, as soon as the file meta information is there."""
        end = _meta_end(self._head)
        if end is None and not complete and len(self._head) < _MOST_META_BYTES:
            return
        if end is not None and len(self._head) < end and not complete:
            return
        try:
            meta, end = read_file_meta(bytes(self._head[: end or len(self._head)]))
        except InvalidInstanceError as error:
            self._refuse(CANNOT_UNDERSTAND, error.reason)
            return
        sop_class, instance, syntax = (meta.get(one, "") for one in (_SOP_CLASS, _SOP_INSTANCE, _SYNTAX))
        if not (is_uid(sop_class) and is_uid(instance) and is_uid(syntax)):
            self._refuse(CANNOT_UNDERSTAND, "the file meta information lacks a UID")
            return
        self._arrival = Arrival(
            sop_class_uid=sop_class,
            sop_instance_uid=instance,
            transfer_syntax_uid=syntax,
            calling_ae=self._sender.calling_ae,
            called_ae=self._sender.called_ae,
            association=self.id,
            study_uid=self._sender.study_uid,
        )
        refusal = refusal_of(sop_class, accepts_private=self._config.accept_private_sop_classes)
        if refusal:
            self._refuse(CLASS_NOT_SUPPORTED, refusal)
            return
        self._reception = self._intake.begin(self._arrival)
        self._write(memoryview(bytes(self._head[end:])))
        self._head.clear()

    def _write(self, piece: memoryview) -> None:
        if self._reception is None:
            return
        if self._reception.size + len(piece) > self._max_bytes:
            self._reception.abandon()
            self._reception = None
            self._refuse(CANNOT_UNDERSTAND, "a data set above gateway.scp.max_instance_gb")
            return
        self._reception.write(piece)

    def _refuse(self, status: int, reason: str) -> None:
        log.warning("instance.refused", reason=reason, association=self.id)
        self._refused = Answer(status=status, comment=reason)


def _meta_end(head: bytearray) -> int | None:
    """Give where the file meta information ends, by its group length; None while that is not known."""
    if len(head) < _COUNTED_FROM or head[_PREAMBLE:_VALUE_AT] != _GROUP_LENGTH:
        return None
    end = _COUNTED_FROM + int.from_bytes(head[_VALUE_AT:_COUNTED_FROM], "little")
    return end if end <= _MOST_META_BYTES else None
