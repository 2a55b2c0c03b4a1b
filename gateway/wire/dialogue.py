"""An association as its requestor sees it, message by message: say a request, hear its response (PS3.7, PS3.8).

One thread uses it. What is said goes on as long as the peer keeps pace; a message that is heard has to be whole within
one deadline. A peer that drips or stops raises DialogueError, as does one that aborts, releases or says what it may
not.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.wire import commands, pdu, secure
from gateway.wire.pdu import PduError
from gateway.wire.sockets import prepare, send_parts, wait, waits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_LONGEST_PDU = 2**20
# What a response or a report may carry: 10,000 references are 2 MB.
_LONGEST_DATA_SET = 16 * 2**20
_RELEASE_S = 5.0
# So much is handed to the kernel in one call.
_AT_ONCE = 2**20


class DialogueError(Exception):
    """The association is over, or was never made; `rejection` is (result, source, reason) if it was rejected."""

    def __init__(self, reason: str, rejection: tuple[int, int, int] | None = None) -> None:
        super().__init__(reason)
        self.rejection = rejection


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What was heard: the context, the command set by element number, and the data set, if one came with it."""

    context: int
    command: Mapping[int, bytes]
    data: bytes

    @property
    def field(self) -> int:
        """The command field."""
        return commands.number(self.command, commands.FIELD) or 0

    @property
    def status(self) -> int | None:
        """The status of a response."""
        return commands.number(self.command, commands.STATUS)


class Dialogue:
    """An open association. Raises DialogueError where none can be made."""

    def __init__(
        self,
        address: tuple[str, int],
        request: bytes,
        *,
        connect_s: float,
        progress_s: float,
        max_pdu: int = pdu.MAX_LENGTH,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._socket = _connect(address, connect_s, tls)
        self._buffer = bytearray()
        self._patience_s = connect_s
        self._end = time.monotonic() + connect_s
        try:
            prepare(self._socket, receive_s=connect_s, send_s=connect_s)
            self._send(request)
            self.accepted = self._negotiated()
            prepare(self._socket, receive_s=progress_s, send_s=progress_s)
            self._patience_s = progress_s
        except BaseException:  # whatever it was, the descriptor is not left open
            self._socket.close()
            raise
        self._max_length = min(self.accepted.max_length or pdu.MAX_LENGTH, max_pdu)

    def _negotiated(self) -> pdu.Accepted:
        kind, body = self._read_pdu()
        if kind == pdu.ASSOCIATE_RJ and len(body) == 4:  # noqa: PLR2004  a reserved byte and three numbers
            raise DialogueError("rejected", (body[1], body[2], body[3]))
        if kind == pdu.ABORT:
            raise DialogueError("the peer aborted the association request; does it speak TLS on this port?")
        if kind != pdu.ASSOCIATE_AC:
            raise DialogueError(f"PDU type {kind} in answer to an association request")
        try:
            accepted = pdu.parse_accept(body)
        except PduError as error:
            raise DialogueError(str(error)) from error
        if 0 < accepted.max_length < pdu.SMALLEST_MAX_LENGTH:
            raise DialogueError("the peer announces a maximum length that no PDV fits into")
        return accepted

    # Saying ----------------------------------------------------------------------------------------------------

    def say(self, context: int, command: bytes, data: bytes | memoryview = b"") -> None:
        """Say a message: the data set in pieces of the peer's size, everything small in one call to the kernel."""
        parts: list[bytes | memoryview] = [pdu.p_data(context, pdu.COMMAND, command, self._max_length)]
        size, view, step = len(parts[0]), memoryview(data), self._max_length - pdu.PDV.size
        for at in range(0, len(view), step):
            piece = view[at : at + step]
            last = pdu.LAST if at + step >= len(view) else 0
            parts += [pdu.p_data_head(context, last, len(piece)), piece]
            size += len(piece)
            if size >= _AT_ONCE or len(parts) > 500:  # noqa: PLR2004  below the kernel's limit of 1,024
                self._send_parts(parts)
                parts, size = [], 0
        if parts:
            self._send_parts(parts)

    def _send_parts(self, parts: Iterable[bytes | memoryview]) -> None:
        try:
            send_parts(self._socket, parts, self._patience_s)
        except ssl.SSLError as error:
            raise DialogueError(_ended_tls(error)) from error
        except OSError as error:
            raise DialogueError("the peer takes nothing more") from error

    def _send(self, data: bytes) -> None:
        self._send_parts((data,))

    # Hearing ---------------------------------------------------------------------------------------------------

    def waits(self, seconds: float) -> bool:
        """Tell whether something comes within some seconds."""
        return bool(self._buffer) or waits(self._socket, seconds)

    def hear(self, within_s: float | None = None) -> Message:
        """Hear the next message; the whole of it within the deadline, or a shorter one."""
        if within_s is None:
            self._end = time.monotonic() + self._patience_s
            return self._hear()
        with self._patient(within_s):
            return self._hear()

    @contextlib.contextmanager
    def _patient(self, seconds: float) -> Iterator[None]:
        """Hear within so long in the block."""
        self._end = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            wait(self._socket, socket.SO_RCVTIMEO, seconds)
        yield
        with contextlib.suppress(OSError):
            wait(self._socket, socket.SO_RCVTIMEO, self._patience_s)

    def _hear(self) -> Message:
        command, data, context, done = bytearray(), bytearray(), 0, False
        expects_data = False
        while not done:
            kind, body = self._read_pdu()
            if kind != pdu.P_DATA:
                self._over(kind)
            for context, control, piece in _pdvs(body):  # noqa: B007  of the last one
                target = command if control & pdu.COMMAND else data
                target += piece
                if len(command) > commands.MAX_COMMAND_BYTES or len(data) > _LONGEST_DATA_SET:
                    raise DialogueError("a message that is too long")
                if control & pdu.LAST and control & pdu.COMMAND:
                    expects_data = self._expects_data(command)
                    done = not expects_data
                elif control & pdu.LAST:
                    done = True
        return Message(context=context, command=_parsed(command), data=bytes(data) if expects_data else b"")

    def _expects_data(self, command: bytearray) -> bool:
        return commands.number(_parsed(command), commands.DATA_SET_TYPE) != commands.NO_DATA_SET

    def _over(self, kind: int) -> None:
        if kind == pdu.RELEASE_RQ:
            with contextlib.suppress(DialogueError):
                self._send(pdu.RELEASE_RESPONSE)
        said = {pdu.ABORT: "the association was aborted", pdu.RELEASE_RQ: "the peer released the association"}
        raise DialogueError(said.get(kind, f"PDU type {kind} on an established association"))

    def _read_pdu(self) -> tuple[int, bytes]:
        kind, length = pdu.HEADER.unpack(self._exactly(pdu.HEADER.size))
        if length > _LONGEST_PDU:
            raise DialogueError("a PDU longer than announced")
        return kind, self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            try:
                more = self._socket.recv(max(65536, count - len(self._buffer)))
                # Peers with Nagle on answer in pieces, each of which waits for this.
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            except ssl.SSLError as error:
                raise DialogueError(_ended_tls(error)) from error
            except OSError as error:
                raise DialogueError("no answer before the deadline, or the connection was lost") from error
            if not more:
                raise DialogueError("the connection was closed")
            self._buffer += more
            if len(self._buffer) < count and time.monotonic() > self._end:
                raise DialogueError("what came was not whole before the deadline")
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    # The end ---------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Release the association, and close; what the peer still says is heard and dropped."""
        try:
            self._send(pdu.RELEASE_REQUEST)
            with self._patient(min(self._patience_s, _RELEASE_S)):
                while self._read_pdu()[0] not in {pdu.RELEASE_RP, pdu.ABORT} and time.monotonic() < self._end:
                    continue
        except DialogueError:
            return
        finally:
            self._socket.close()

    def abort(self) -> None:
        """Abort the association, and close."""
        with contextlib.suppress(OSError):
            wait(self._socket, socket.SO_SNDTIMEO, 1)
            self._socket.send(pdu.abort(0, source=0))
        self._socket.close()


def _connect(address: tuple[str, int], seconds: float, tls: ssl.SSLContext | None) -> socket.socket:
    """Open the connection, and TLS on it if a context is given."""
    try:
        connection = socket.create_connection(address, seconds)
    except OSError as error:
        raise DialogueError(error.strerror or str(error)) from error
    if tls is None:
        return connection
    try:
        return secure.connect(connection, tls, address[0], seconds)
    except (OSError, ValueError) as error:
        connection.close()
        raise DialogueError(f"no TLS: {secure.reason_of(error)}") from error


def _ended_tls(error: ssl.SSLError) -> str:
    return f"the peer ended TLS ({secure.reason_of(error)}); does it want another certificate of ours?"


def _parsed(command: bytearray) -> dict[int, bytes]:
    try:
        return commands.parse(bytes(command))
    except PduError as error:
        raise DialogueError(str(error)) from error


def _pdvs(body: bytes) -> list[tuple[int, int, bytes]]:
    """Give context, control header and bytes of each PDV of a P-DATA-TF."""
    found, at = [], 0
    while at < len(body):
        if at + pdu.PDV.size > len(body):
            raise DialogueError("a PDV that is cut by its PDU")
        length, context, control = pdu.PDV.unpack_from(body, at)
        if length < 2 or at + 4 + length > len(body):  # noqa: PLR2004  context and control header
            raise DialogueError("a PDV longer than its PDU")
        found.append((context, control, body[at + pdu.PDV.size : at + 4 + length]))
        at += 4 + length
    return found
