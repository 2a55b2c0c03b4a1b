"""One association as its acceptor: contexts are negotiated, messages answered, the end is noted.

Each runs in a thread of its own, with a blocking socket. What a peer does wrong ends its association with an A-ABORT
and concerns nobody else.
"""

from __future__ import annotations

import ssl
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import structlog

from clarion.crashpoints import effect, reach
from clarion.errors import StoreUnavailableError
from gateway.association_log import ENDED
from gateway.commitments import MAX_DATA_SET_BYTES, read_report, read_request
from gateway.intake import CANNOT_UNDERSTAND, PROCESSING_FAILURE, SUCCESS, Answer, Arrival, Reception
from gateway.statuses import CLASS_NOT_SUPPORTED
from gateway.wire import commands, pdu
from gateway.wire.acceptance import STORAGE_COMMITMENT, is_storage, negotiate, refusal_of
from gateway.wire.commands import number, uid
from gateway.wire.pdu import PduError
from gateway.wire.sockets import close_gently, look_s, prepare, stop_reading
from gateway.wire.stream import StalledError, Stream

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from clarion.config import ScpConfig
    from gateway.access import Admission
    from gateway.association_log import AssociationLog
    from gateway.board import Slot
    from gateway.intake import Intake
    from gateway.wire.pdu import Request
    from gateway.wire.stream import Deadlines

log = structlog.get_logger()

_NOT_AUTHORISED = 0x0124
_UNRECOGNISED_OPERATION = 0x0211
_RESOURCE_LIMITATION = 0x0213
# A request is one record of the journal.
MOST_INSTANCES = 7000
MOST_STUDIES = 1000
"""So many of the studies that came on an association are remembered, the latest ones."""
LINGER_S = 2


class _Message(Protocol):
    """What a data set is for."""

    def write(self, piece: memoryview) -> None:
        """Take a piece."""

    def finish(self) -> Answer:
        """Give the answer."""

    def abandon(self) -> None:
        """The data set will not be completed."""


@dataclass(frozen=True, slots=True)
class Discarded:
    """A data set that is read and dropped; the answer was known before it came."""

    answer: Answer

    def write(self, piece: memoryview) -> None:
        """Drop a piece."""

    def finish(self) -> Answer:
        """Give the answer."""
        return self.answer

    def abandon(self) -> None:
        """Nothing was kept."""


class Collected:
    """A small data set that is decoded: a report of storage commitment."""

    def __init__(self, judge: Callable[[bytes], Answer]) -> None:
        self._data = bytearray()
        self._judge = judge

    def write(self, piece: memoryview) -> None:
        """Take a piece."""
        self._data += piece
        if len(self._data) > MAX_DATA_SET_BYTES:
            raise PduError(pdu.NOT_SPECIFIED, "a message of too many bytes")

    def finish(self) -> Answer:
        """Judge it."""
        return self._judge(bytes(self._data))

    def abandon(self) -> None:
        """Nothing was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What the associations of a worker have in common."""

    config: ScpConfig
    intake: Intake
    deadlines: Deadlines
    slot: Slot
    written: AssociationLog


class Association:
    """Serves one peer until one of the two ends it. `stop` may be called by any thread."""

    def __init__(
        self,
        connection: socket.socket,
        request: Request,
        admission: Admission,
        address: str,
        shared: Shared,
    ) -> None:
        self._written = shared.written
        self.id = uuid.uuid4().hex
        self._connection = connection
        self._request = request
        self._admission = admission
        self._address = address
        self._config = shared.config
        self._intake = shared.intake
        self._deadlines = shared.deadlines
        self._slot = shared.slot
        self._max_bytes = int(shared.config.max_instance_gb * 1e9)
        self._negotiated = negotiate(request, shared.config)
        self._commands = commands.Reader()
        self._command: Mapping[int, bytes] = {}
        self._field = self._context = 0
        self._message: _Message | None = None
        self._size = 0
        self._stopped = ""
        self._studies: dict[str, list[int]] = {}
        self._begun = time.monotonic()
        self._statuses: Counter[int] = Counter()
        self._bytes = 0

    def run(self) -> None:
        """Accept the association and serve it to its end; closes the connection. Never raises."""
        who = {"calling_ae": self._request.calling, "called_ae": self._request.called, "address": self._address}
        log.info("association.requested", association=self.id, **who)
        reason = "failed"
        try:
            reason = self._serve()
        except OSError:
            reason = "connection lost"
        except Exception:  # the boundary to the wire: this peer's association is lost, nobody else's
            log.exception("association.failed", association=self.id)
            self._say(pdu.abort(pdu.NOT_SPECIFIED))
        finally:
            self._finish(reason)

    def _finish(self, reason: str) -> None:
        """Let go of everything, whatever of it fails; the slot is free when the thread has nothing left to do."""
        try:
            self._forget_message()
            self._ended(reason)
        except Exception:  # as above: the slot must not be lost
            log.exception("association.failed", association=self.id)
        finally:
            close_gently(self._connection, LINGER_S)
            self._slot.end()

    def stop(self, reason: str) -> None:
        """Have the association aborted, because we end."""
        self._stopped = reason
        stop_reading(self._connection)

    def _serve(self) -> str:
        receive_s = look_s(self._connection, self._deadlines.look_s)
        prepare(self._connection, receive_s=receive_s, send_s=self._deadlines.stall_s)
        self._connection.sendall(
            pdu.accept(
                self._request,
                self._negotiated.results,
                max_length=self._config.max_pdu,
                roles=self._negotiated.roles,
                answers_identity=self._request.identity is not None and self._request.identity.wants_answer,
            )
        )
        stream = Stream(
            self._connection,
            self,
            self._deadlines,
            max_length=self._config.max_pdu,
            stopping=lambda: bool(self._stopped),
        )
        try:
            ending = stream.run()
        except PduError as error:
            log.warning("association.aborted", association=self.id, reason=str(error), address=self._address)
            self._say(pdu.abort(error.reason))
            return "aborted by us"
        except StalledError as error:
            log.warning("association.cut", association=self.id, reason=str(error), address=self._address)
            self._say(pdu.abort(pdu.NOT_SPECIFIED))
            return str(error)
        if self._stopped:
            self._say(pdu.abort(pdu.NOT_SPECIFIED))
            return self._stopped
        if ending == "released":
            self._say(pdu.RELEASE_RESPONSE)
        return ending

    def _say(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except OSError:
            return

    def _ended(self, reason: str) -> None:
        log.info("association.ended", association=self.id, reason=reason)
        stored = self._statuses[SUCCESS]
        refused = self._statuses.total() - stored
        self._slot.peers.add(self._request.calling, (1, stored, refused, self._bytes))
        self._written.write(
            ENDED,
            association=self.id,
            calling_ae=self._request.calling,
            called_ae=self._request.called,
            address=self._address,
            tls=isinstance(self._connection, ssl.SSLSocket),
            implementation=self._request.implementation,
            seconds=round(time.monotonic() - self._begun, 3),
            reason=reason,
            stored=stored,
            refused={f"0x{status:04X}": count for status, count in self._statuses.items() if status != SUCCESS},
            bytes=self._bytes,
        )
        self._tell_studies(reason, list(self._studies))

    def _leave_study(self, study_uid: str) -> None:
        """Of a migration that never ends not every study is remembered: this one has not come for very long."""
        self._tell_studies("other studies came", [study_uid])
        del self._studies[study_uid]

    def _tell_studies(self, reason: str, studies: list[str]) -> None:
        with effect("scp.associationended"):
            self._intake.association_ended(
                self.id,
                reason,
                calling_ae=self._request.calling,
                called_ae=self._request.called,
                studies={one: (self._studies[one][0], self._studies[one][1]) for one in studies},
            )

    # Messages --------------------------------------------------------------------------------------------------

    def begin(self, context: int, command: bytes) -> bool:
        """Take a command set; tell whether a data set follows."""
        if context not in self._negotiated.contexts:
            raise PduError(pdu.INVALID_PARAMETER, "a message on a context that was not accepted")
        self._context, self._command, self._size = context, self._commands.parse(command), 0
        field = self._field = number(self._command, commands.FIELD) or 0
        if field == commands.C_CANCEL_RQ:
            return False
        follows = number(self._command, commands.DATA_SET_TYPE) != commands.NO_DATA_SET
        if field & commands.RESPONSE:
            self._message = Discarded(Answer(status=SUCCESS)) if follows else None
            return follows
        if number(self._command, commands.MESSAGE_ID) is None:
            raise PduError(pdu.INVALID_PARAMETER, "a request without a message id")
        if follows:
            self._message = self._message_of(field)
        else:
            self._answer_without_data(field)
        return follows

    def take_data(self, piece: memoryview) -> None:
        """Take a piece of a data set."""
        self._count(len(piece))
        if self._message is not None:
            self._message.write(piece)

    def room(self) -> memoryview | None:
        """Give where the next piece of the data set is to lie, if it can be received there."""
        return self._message.room() if isinstance(self._message, Reception) else None

    def placed(self, count: int) -> None:
        """So much of the data set has been received into the last `room`."""
        self._count(count)
        if isinstance(self._message, Reception):
            self._message.placed(count)

    def _count(self, count: int) -> None:
        self._size += count
        if self._size > self._max_bytes:
            raise PduError(pdu.NOT_SPECIFIED, "a data set above gateway.scp.max_instance_gb")

    def end_data(self) -> None:
        """Answer the message whose data set is complete."""
        message, self._message = self._message, None
        if message is None or self._field & commands.RESPONSE:
            return
        self._answer(message.finish())

    def _answer_without_data(self, field: int) -> None:
        if field == commands.C_ECHO_RQ:
            self._answer(Answer(status=SUCCESS))
        elif field == commands.C_STORE_RQ:
            self._answer(Answer(status=CANNOT_UNDERSTAND, comment="no data set"))
        else:
            self._answer(Answer(status=_UNRECOGNISED_OPERATION))

    def _answer(self, answer: Answer) -> None:
        if self._field == commands.C_STORE_RQ:
            counts = self._studies.pop(answer.study_uid, [0, 0])
            counts[0 if answer.status == SUCCESS else 1] += 1
            self._studies[answer.study_uid] = counts
            if len(self._studies) > MOST_STUDIES:
                self._leave_study(next(iter(self._studies)))
            self._slot.answered(self._size, success=answer.status == SUCCESS)
            self._statuses[answer.status] += 1
            self._bytes += self._size
        if self._field == commands.C_STORE_RQ and answer.status == SUCCESS:
            reach("before:scp.respond")
            self._send(commands.stored(self._command))
            reach("after:scp.respond")
        else:
            self._send(commands.respond(self._command, answer.status, answer.comment))

    def _send(self, command: bytes) -> None:
        self._connection.sendall(pdu.p_data(self._context, pdu.COMMAND, command, self._request.max_length))

    def _forget_message(self) -> None:
        """Let go of a data set that will not be completed: nothing of it was acknowledged."""
        if self._message is not None:
            self._message.abandon()
            if self._size:
                log.info("instance.notcompleted", association=self.id, bytes=self._size)
        self._message = None

    def _message_of(self, field: int) -> _Message:
        if field == commands.C_STORE_RQ:
            return self._store_message()
        if field == commands.N_EVENT_REPORT_RQ and self._abstract_syntax == STORAGE_COMMITMENT:
            return Collected(self._reported) if self._admission.may_report else self._refused(_NOT_AUTHORISED, "")
        if field == commands.N_ACTION_RQ and self._abstract_syntax == STORAGE_COMMITMENT:
            return Collected(self._asked) if self._admission.may_store else self._refused(_NOT_AUTHORISED, "")
        return Discarded(Answer(status=_UNRECOGNISED_OPERATION))

    @property
    def _abstract_syntax(self) -> str:
        return self._negotiated.contexts[self._context].abstract_syntax

    def _store_message(self) -> _Message:
        sop_class_uid = uid(self._command, commands.AFFECTED_CLASS)
        sop_instance_uid = uid(self._command, commands.AFFECTED_INSTANCE)
        if not sop_class_uid or not sop_instance_uid:
            return Discarded(Answer(status=CANNOT_UNDERSTAND, comment="the request names no SOP Class or Instance"))
        if not self._admission.may_store:
            return self._refused(_NOT_AUTHORISED, "not a source of instances")
        if not is_storage(self._abstract_syntax):
            return self._refused(CLASS_NOT_SUPPORTED, "not on a context of a Storage SOP Class")
        refusal = refusal_of(sop_class_uid, accepts_private=self._config.accept_private_sop_classes)
        if refusal:
            return self._refused(CLASS_NOT_SUPPORTED, refusal)
        return self._intake.begin(
            Arrival(
                sop_class_uid=sop_class_uid,
                sop_instance_uid=sop_instance_uid,
                transfer_syntax_uid=self._negotiated.contexts[self._context].transfer_syntaxes[0],
                calling_ae=self._request.calling,
                called_ae=self._request.called,
                association=self.id,
            )
        )

    def _refused(self, status: int, reason: str) -> Discarded:
        log.warning("instance.refused", reason=reason, association=self.id)
        return Discarded(Answer(status=status, comment=reason))

    def _asked(self, data: bytes) -> Answer:
        """Take a request for storage commitment; its result is told later, on an association of ours."""
        asked = read_request(data, self._negotiated.contexts[self._context].transfer_syntaxes[0])
        if asked is None:
            return Answer(status=PROCESSING_FAILURE, comment="no transaction, or no instances")
        if len(asked.instances) > MOST_INSTANCES:
            return Answer(status=_RESOURCE_LIMITATION, comment=f"more than {MOST_INSTANCES} instances at once")
        try:
            self._intake.commitment_asked(self._request.calling, asked.transaction_uid, asked.instances)
        except StoreUnavailableError:
            return Answer(status=_RESOURCE_LIMITATION)
        return Answer(status=SUCCESS)

    def _reported(self, data: bytes) -> Answer:
        """Take a storage commitment result; success only after it is journalled."""
        report = read_report(data, self._negotiated.contexts[self._context].transfer_syntaxes[0])
        if report is None:
            return Answer(status=PROCESSING_FAILURE)
        try:
            self._intake.commitment_reported(
                self._request.calling, report.transaction_uid, list(report.stored), list(report.failed)
            )
        except StoreUnavailableError:
            return Answer(status=PROCESSING_FAILURE)
        return Answer(status=SUCCESS)
