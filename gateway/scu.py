"""Our side of an association to a destination: store, ask for storage commitment, query.

Every wait has a deadline. A peer that cannot be reached or stops answering raises PeerUnavailableError; one that
refuses the association for good raises PeerRefusedError.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from clarion.elements import EXPLICIT_LE, IMPLICIT_LE, Walker
from clarion.errors import InvalidInstanceError, PeerRefusedError, PeerUnavailableError
from gateway.commitments import Report, make_report, make_request, read_report
from gateway.encoding import encode
from gateway.statuses import CLASS_NOT_SUPPORTED
from gateway.wire import commands, pdu
from gateway.wire.acceptance import STORAGE_COMMITMENT, VERIFICATION
from gateway.wire.dialogue import Dialogue, DialogueError, Message
from gateway.wire.secure import Renewed, requestor_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from clarion.model import Destination, TlsFiles

STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
_COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"
_PLAIN = (EXPLICIT_LE, IMPLICIT_LE)
_PERMANENT = 0x01
_SUCCESS = 0x0000
_UNRECOGNISED_OPERATION = 0x0211
_PROCESSING_FAILURE = 0x0110
_PENDING = frozenset((0xFF00, 0xFF01))
_SOP_INSTANCE = 0x00080018
# What a peer says unasked on an idle association has to be whole within so long.
_UNASKED_S = 1.0
# The answers to a query may take so many times the deadline of one, and are no more than this.
_LONGEST_QUERY = 10
_MOST_FOUND = 100_000
# PS3.8 9.3.4, as people look for it.
_SAID = {
    (1, 1, 2): "application context not supported",
    (1, 1, 3): "our AE title, or our address, is not known to the peer",
    (1, 1, 7): "the peer does not have this AE title",
    (1, 2, 2): "protocol version not supported",
    (2, 3, 1): "temporary congestion",
    (2, 3, 2): "too many associations",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Deadlines of an association, in seconds."""

    connect_s: float
    dimse_s: float


class Requestor:
    """An open association to a destination; use it in a `with` block, by one thread."""

    def __init__(
        self,
        destination: Destination,
        *,
        own_ae: str,
        classes: Iterable[tuple[str, str]] = (),
        timeouts: Timeouts,
        on_report: Callable[[Report], None] | None = None,
        reports: bool = False,
    ) -> None:
        """Associate; with `reports` as the SCP of storage commitment that reports a result, and for nothing else.

        No more `classes` than one association can propose (`gateway.proposals`).
        """
        self._name = destination.name
        self._on_report = on_report
        self._reported = False
        self.comment = ""
        self._message = 0
        self._dimse_s = timeouts.dimse_s
        proposed: list[tuple[str, tuple[str, ...]]] = [(one, (syntax,)) for one, syntax in sorted(set(classes))]
        others = (STORAGE_COMMITMENT,) if reports else (VERIFICATION, STORAGE_COMMITMENT, STUDY_ROOT_FIND)
        proposed += [(one, _PLAIN) for one in others]
        self._contexts = [
            pdu.Context(id=2 * index + 1, abstract_syntax=abstract, transfer_syntaxes=syntaxes)
            for index, (abstract, syntaxes) in enumerate(proposed)
        ]
        roles = {STORAGE_COMMITMENT: (False, True)} if reports else None
        request = pdu.request(destination.ae_title, own_ae, self._contexts, roles=roles)
        try:
            self._dialogue = Dialogue(
                (destination.host, destination.port),
                request,
                connect_s=timeouts.connect_s,
                progress_s=timeouts.dimse_s,
                max_pdu=destination.max_pdu,
                tls=_context_of(destination.tls).context() if destination.tls is not None else None,
            )
        except DialogueError as error:
            raise _refusal(destination, error) from error
        self._accepted = {
            (one.abstract_syntax, syntax): one.id
            for one in self._contexts
            if (syntax := self._dialogue.accepted.syntaxes.get(one.id, ""))
        }

    def __enter__(self) -> Self:
        """Use the association."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Release it, or abort it after an error: whoever no longer answers would not answer a release either."""
        if kind is None:
            self.release()
        else:
            self.abort()

    def release(self) -> None:
        """Release the association, waiting for the peer's answer."""
        self._dialogue.release()

    def abort(self) -> None:
        """Abort the association."""
        self._dialogue.abort()

    def is_there(self) -> bool:
        """Hear what the peer said unasked, and answer it; tell whether the association still stands."""
        try:
            while self._dialogue.waits(0):
                message = self._dialogue.hear(_UNASKED_S)
                if message.field & commands.RESPONSE:
                    return False  # to nothing that was asked
                self._serve(message)
        except DialogueError:
            return False
        return True

    def accepts(self, sop_class: str, syntax: str) -> bool:
        """Tell whether the peer takes the class in the syntax."""
        return (sop_class, syntax) in self._accepted

    @property
    def commits(self) -> bool:
        """Whether the peer offers storage commitment."""
        return self._plain_context(STORAGE_COMMITMENT) is not None

    @property
    def finds(self) -> bool:
        """Whether the peer offers the study root query."""
        return self._plain_context(STUDY_ROOT_FIND) is not None

    def echo(self) -> int:
        """Send a C-ECHO-RQ; give the status."""
        context, _ = self._need(VERIFICATION)
        answer = self._ask(context, commands.C_ECHO_RQ, [(commands.AFFECTED_CLASS, commands.ui(VERIFICATION))])
        return self._status(answer)

    def store(self, data: bytes, *, sop_class: str, sop_instance: str, syntax: str) -> int:
        """Send a data set as it is; give the status, CLASS_NOT_SUPPORTED also where no context was accepted for it.

        Raises PeerUnavailableError when the peer does not answer.
        """
        if not data:
            raise InvalidInstanceError("empty-data-set")
        context = self._accepted.get((sop_class, syntax))
        if context is None:
            self.comment = "the peer does not take the class in this transfer syntax"
            return CLASS_NOT_SUPPORTED
        elements = [
            (commands.AFFECTED_CLASS, commands.ui(sop_class)),
            (commands.PRIORITY, commands.u16(commands.MEDIUM)),
            (commands.AFFECTED_INSTANCE, commands.ui(sop_instance)),
        ]
        return self._status(self._ask(context, commands.C_STORE_RQ, elements, data))

    def ask_commitment(self, transaction_uid: str, instances: Iterable[tuple[str, str]], wait_s: float) -> bool:
        """Ask the peer to commit to (SOP Class, SOP Instance) pairs (PS3.4 J.3.2); tell whether it agreed to answer.

        Waits a little for an answer on this association; most peers answer on one of their own.
        """
        context, syntax = self._need(STORAGE_COMMITMENT)
        elements = [
            (commands.REQUESTED_CLASS, commands.ui(STORAGE_COMMITMENT)),
            (commands.REQUESTED_INSTANCE, commands.ui(_COMMITMENT_INSTANCE)),
            (commands.ACTION_TYPE, commands.u16(1)),
        ]
        request = make_request(transaction_uid, instances, syntax)
        agreed = self._status(self._ask(context, commands.N_ACTION_RQ, elements, request)) == _SUCCESS
        if agreed:
            self._await_report(wait_s)
        return agreed

    def report_commitment(
        self, transaction_uid: str, stored: Iterable[tuple[str, str]], failed: Sequence[tuple[str, str, int]]
    ) -> int:
        """Report a result of storage commitment (PS3.4 J.3.3); give the status."""
        context, syntax = self._need(STORAGE_COMMITMENT)
        elements = [
            (commands.AFFECTED_CLASS, commands.ui(STORAGE_COMMITMENT)),
            (commands.AFFECTED_INSTANCE, commands.ui(_COMMITMENT_INSTANCE)),
            (commands.EVENT_TYPE, commands.u16(2 if failed else 1)),
        ]
        report = make_report(transaction_uid, stored, failed, syntax)
        return self._status(self._ask(context, commands.N_EVENT_REPORT_RQ, elements, report))

    def find(self, study_uid: str, series_uid: str) -> set[str]:
        """Ask which SOP Instance UIDs of a series the peer has."""
        context, syntax = self._need(STUDY_ROOT_FIND)
        elements = [
            (commands.AFFECTED_CLASS, commands.ui(STUDY_ROOT_FIND)),
            (commands.PRIORITY, commands.u16(commands.MEDIUM)),
        ]
        query = encode(
            [
                (_SOP_INSTANCE, "UI", ""),
                (0x00080052, "CS", "IMAGE"),
                (0x0020000D, "UI", study_uid),
                (0x0020000E, "UI", series_uid),
            ],
            syntax,
        )
        found: set[str] = set()
        end = time.monotonic() + _LONGEST_QUERY * self._dimse_s
        answer = self._ask(context, commands.C_FIND_RQ, elements, query)
        while (status := self._status(answer)) in _PENDING:
            found.add(_instance_in(answer.data, syntax))
            if len(found) > _MOST_FOUND or time.monotonic() > end:
                raise PeerUnavailableError(f"{self._name}: the answers to a query do not end")
            answer = self._hear()
        if status != _SUCCESS:
            # A query that failed proves nothing: neither presence nor absence.
            raise PeerUnavailableError(f"{self._name}: the query ended with 0x{status:04X}")
        return found

    # Messages --------------------------------------------------------------------------------------------------

    def _ask(self, context: int, field: int, elements: list[tuple[int, bytes]], data: bytes = b"") -> Message:
        """Send a request and give its response."""
        self._message = self._message % 0xFFFF + 1
        follows = commands.WITH_DATA_SET if data else commands.NO_DATA_SET
        known = [
            (commands.FIELD, commands.u16(field)),
            (commands.MESSAGE_ID, commands.u16(self._message)),
            (commands.DATA_SET_TYPE, commands.u16(follows)),
        ]
        try:
            self._dialogue.say(context, commands.make(sorted([*elements, *known])), data)
        except DialogueError as error:
            raise PeerUnavailableError(f"{self._name}: the association ended while sending: {error}") from error
        return self._hear()

    def _hear(self) -> Message:
        """Hear the response to the last request; requests of the peer are answered meanwhile."""
        end = time.monotonic() + self._dimse_s
        while time.monotonic() <= end:
            try:
                message = self._dialogue.hear()
                if not message.field & commands.RESPONSE:
                    self._serve(message)
                    continue
            except DialogueError as error:
                raise PeerUnavailableError(f"{self._name}: {error}") from error
            if commands.number(message.command, commands.RESPONDED_TO) == self._message:
                return message
        raise PeerUnavailableError(f"{self._name}: it says other things than the answer")

    def _status(self, message: Message) -> int:
        """Give the status of a response; what it says beside it is kept as `comment` (PS3.7 C, Error Comment)."""
        self.comment = message.command.get(commands.COMMENT, b"").decode("latin-1").strip(" \0")
        if message.status is None:
            raise PeerUnavailableError(f"{self._name}: an answer without a status")
        return message.status

    def _serve(self, message: Message) -> None:
        """Answer a request of the peer: a report of storage commitment, nothing else."""
        if commands.number(message.command, commands.MESSAGE_ID) is None:
            raise DialogueError("a request without a message id")
        status = _UNRECOGNISED_OPERATION
        if message.field == commands.N_EVENT_REPORT_RQ:
            report = read_report(message.data, self._dialogue.accepted.syntaxes.get(message.context, IMPLICIT_LE))
            status = _PROCESSING_FAILURE if report is None else _SUCCESS
            if report is not None and self._on_report is not None:
                self._on_report(report)
            self._reported = True
        self._dialogue.say(message.context, commands.respond(message.command, status))

    def _await_report(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._reported = False
        try:
            while not self._reported and self._dialogue.waits(max(0.0, end - time.monotonic())):
                message = self._dialogue.hear()
                if not message.field & commands.RESPONSE:
                    self._serve(message)
        except DialogueError as error:
            raise PeerUnavailableError(f"{self._name}: {error}") from error

    def _plain_context(self, sop_class: str) -> tuple[int, str] | None:
        return next(
            ((self._accepted[sop_class, one], one) for one in _PLAIN if (sop_class, one) in self._accepted), None
        )

    def _need(self, sop_class: str) -> tuple[int, str]:
        found = self._plain_context(sop_class)
        if found is None:
            raise PeerUnavailableError(f"{self._name}: the peer does not offer {sop_class}")
        return found


@functools.cache
def _context_of(files: TlsFiles) -> Renewed:
    """Give the context of a destination's files: made once, and again when they change. Raises ConfigError."""
    return Renewed(files, requestor_context)


def _instance_in(data: bytes, syntax: str) -> str:
    walker = Walker(data, syntax)
    try:
        return next((walker.text(one) for one in walker.elements() if one.tag == _SOP_INSTANCE), "")
    except InvalidInstanceError:
        return ""


def _refusal(destination: Destination, error: DialogueError) -> PeerRefusedError | PeerUnavailableError:
    name = destination.name
    if error.rejection is not None:
        result, source, reason = error.rejection
        said = f"result {result}, source {source}, reason {reason}"
        if (result, source, reason) in _SAID:
            said += f" ({_SAID[result, source, reason]})"
        if result == _PERMANENT:
            return PeerRefusedError(f"{name}: association rejected, {said}")
        return PeerUnavailableError(f"{name}: association rejected for now, {said}")
    place = f"{destination.ae_title} at {destination.host}:{destination.port}"
    return PeerUnavailableError(f"{name}: no association with {place} ({error}); is the peer running there?")
