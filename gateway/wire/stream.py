"""The bytes of an established association, cut into command sets and pieces of data sets (PS3.8 9.3.5, Annex E).

One receive buffer per association, reused: a piece is a view of it and is gone when `take_data` returns. Positions
live in the parser, so a PDU may be cut anywhere. Nothing a peer can send makes it read more than was announced.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gateway.wire import pdu
from gateway.wire.commands import MAX_COMMAND_BYTES
from gateway.wire.pace import Pace
from gateway.wire.pdu import PduError
from gateway.wire.sockets import has_timed_out

if TYPE_CHECKING:
    from collections.abc import Callable

# 64 to 256 KiB is fastest; more falls out of the cache as soon as several associations are busy.
BUFFER_BYTES = 128 * 1024
# Peers that count the headers of PDV and PDU otherwise are borne.
_TOLERANCE = 12
# Such a PDV is received where it is to lie; and with it no more than what begins the next one. Where a data set had
# one, no more is received of what follows than a command set.
_LONG_BYTES = 32 * 1024
_NEXT = struct.Struct(f"{pdu.HEADER.format}{pdu.PDV.format[1:]}")
_NEXT_BYTES = _NEXT.size
_COMMAND_BYTES = 512
_OTHER_PDU = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """`stall_s`: for progress within a PDU or message. `idle_s`: between messages, with the association open."""

    stall_s: float
    idle_s: float

    @property
    def look_s(self) -> float:
        """How long nothing may come before the deadlines are looked at."""
        return max(0.1, min(self.stall_s / 3, 10.0))


class StalledError(Exception):
    """A deadline has passed; the argument says which."""


class Sink(Protocol):
    """What takes the messages. Any of its methods may raise PduError: the association is then aborted."""

    def begin(self, context: int, command: bytes) -> bool:
        """Take a whole command set; tell whether a data set follows."""

    def take_data(self, piece: memoryview) -> None:
        """Take a piece of the data set that follows the last command set."""

    def room(self) -> memoryview | None:
        """Give where the next piece of the data set is to lie, if it can be received there."""

    def placed(self, count: int) -> None:
        """So much of the data set has been received into the last `room`."""

    def end_data(self) -> None:
        """The data set is complete."""


class Stream:
    """Reads one association. `stopping` is asked whenever nothing comes."""

    def __init__(
        self,
        connection: socket.socket,
        sink: Sink,
        deadlines: Deadlines,
        *,
        max_length: int,
        stopping: Callable[[], bool],
    ) -> None:
        self._connection = connection
        self._max_length = max_length
        self._sink = sink
        self._deadlines = deadlines
        self._stopping = stopping
        self._scatters = not isinstance(connection, ssl.SSLSocket)
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        # What is left of the present PDU and of the present PDV, whose context and control header these are.
        self._pdu_left = self._pdv_left = 0
        self._context = self._control = 0
        self._inside = False
        # Whether the present PDV is long; whether one of this data set was, and of the last.
        self._long = self._had_long = self._expects_long = False
        self._command = bytearray()
        self._command_context = 0
        self._data_context = 0
        # Of what is unfinished.
        self._pace = Pace(deadlines.stall_s)

    def run(self) -> str:
        """Read until the association ends: `released`, `aborted` or `connection lost`.

        Raises PduError when we have to abort it, StalledError at a deadline.
        """
        while True:
            ending = self._consume()
            if ending:
                return ending
            if not self._fill():
                return "connection lost"

    def _consume(self) -> str:
        """Work off what is in the buffer; give how the association ended, if it did."""
        while True:
            if self._inside:
                if not self._take_pdv():
                    return ""
            elif self._pdu_left:
                if not self._open_pdv():
                    return ""
            elif self._end - self._start < pdu.HEADER.size:
                return ""
            else:
                kind, length = pdu.HEADER.unpack_from(self._buffer, self._start)
                if kind == pdu.P_DATA:
                    self._open_pdu(length)
                elif self._end - self._start < pdu.HEADER.size + self._check_other(kind, length):
                    return ""
                else:
                    self._start += pdu.HEADER.size + length
                    return "released" if kind == pdu.RELEASE_RQ else "aborted"

    def _open_pdu(self, length: int) -> None:
        if length > self._max_length + _TOLERANCE:
            raise PduError(pdu.INVALID_PARAMETER, "a PDU longer than announced")
        self._start += pdu.HEADER.size
        self._pdu_left = length
        if not self._data_context and not self._command_context:
            self._pace.end()

    def _check_other(self, kind: int, length: int) -> int:
        """Check a PDU that carries no data; gives its length. Only the end of the association may come here."""
        if not pdu.ASSOCIATE_RQ <= kind <= pdu.ABORT:
            raise PduError(pdu.UNRECOGNISED_PDU, f"PDU type {kind}")
        if kind not in {pdu.RELEASE_RQ, pdu.ABORT}:
            raise PduError(pdu.UNEXPECTED_PDU, f"PDU type {kind} on an established association")
        if length != _OTHER_PDU:
            raise PduError(pdu.INVALID_PARAMETER, "a release or abort of a wrong length")
        return length

    def _open_pdv(self) -> bool:
        """Read the header of a PDV; tell whether it was there."""
        if self._pdu_left < pdu.PDV.size:
            raise PduError(pdu.INVALID_PARAMETER, "a PDV that is cut by its PDU")
        if self._end - self._start < pdu.PDV.size:
            return False
        length, context, control = pdu.PDV.unpack_from(self._buffer, self._start)
        if length < 2 or length + 4 > self._pdu_left:  # noqa: PLR2004  context and control are counted, the length not
            raise PduError(pdu.INVALID_PARAMETER, "a PDV longer than its PDU, or without a header")
        self._start += pdu.PDV.size
        self._pdu_left -= length + 4
        self._pdv_left = length - 2
        self._check_order(context, control)
        self._context, self._control, self._inside = context, control, True
        if not control & pdu.COMMAND:
            self._long = self._pdv_left >= _LONG_BYTES
            self._had_long |= self._long
            self._expects_long &= self._long
        return True

    def _check_order(self, context: int, control: int) -> None:
        """Messages are not interleaved: a command set, then its data set, on one context."""
        if control & pdu.COMMAND:
            if self._data_context or (self._command_context and context != self._command_context):
                raise PduError(pdu.UNEXPECTED_PARAMETER, "a command set within another message")
            self._command_context = context
        elif not self._data_context or context != self._data_context:
            raise PduError(pdu.UNEXPECTED_PARAMETER, "a data set without a command set, or on another context")

    def _take_pdv(self) -> bool:
        """Take what is there of the present PDV; tell whether it is finished."""
        take = min(self._pdv_left, self._end - self._start)
        if take:
            piece = self._view[self._start : self._start + take]
            self._start += take
            self._pdv_left -= take
            if self._control & pdu.COMMAND:
                self._command += piece
                if len(self._command) > MAX_COMMAND_BYTES:
                    raise PduError(pdu.INVALID_PARAMETER, "a command set of more than 64 KiB")
            else:
                self._sink.take_data(piece)
        if self._pdv_left:
            return False
        self._inside = False
        if self._control & pdu.LAST:
            self._end_part()
        return True

    def _end_part(self) -> None:
        if self._control & pdu.COMMAND:
            command, self._command = bytes(self._command), bytearray()
            self._command_context = 0
            self._data_context = self._context if self._sink.begin(self._context, command) else 0
        else:
            self._data_context = 0
            self._expects_long, self._had_long = self._had_long, False
            self._sink.end_data()

    def _fill(self) -> bool:
        """Receive more; tell whether the peer has not closed."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:
            # A cut header moves to the front; it is never more than a few bytes.
            rest = bytes(self._view[self._start : self._end])
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        unfinished = self._pdu_left or self._inside or self._end or self._data_context or self._command_context
        if unfinished:
            self._pace.begin()
        count = self._receive(self._deadlines.stall_s if unfinished else self._deadlines.idle_s)
        while True:
            if unfinished and self._pace.is_slow(count):
                raise StalledError("stalled")
            if count <= 0 or not self._goes_on():
                return count > 0
            count = self._receive(self._deadlines.stall_s)

    def _goes_on(self) -> bool:
        """Open a PDV of which only the header is there, where it goes on with the data set and is long like the last.

        Nearly all of a large data set comes so; whatever is otherwise is looked at from the beginning.
        """
        if self._pdv_left or self._end != _NEXT_BYTES or not self._long or self._start or self._pdu_left:
            return False
        if not self._inside or self._control & (pdu.COMMAND | pdu.LAST):
            return False
        kind, length, pdv_length, context, control = _NEXT.unpack_from(self._buffer)
        if kind != pdu.P_DATA or length > self._max_length or pdv_length != length - 4:
            return False
        if context != self._data_context or control & pdu.COMMAND or pdv_length - 2 < _LONG_BYTES:
            return False
        self._end, self._pdv_left, self._control = 0, pdv_length - 2, control
        return True

    def _receive(self, patience_s: float) -> int:
        since = time.monotonic()
        while not self._stopping():
            try:
                count = self._receive_once()
            except OSError as error:
                if not has_timed_out(error):
                    return 0
                if time.monotonic() - since >= patience_s:
                    raise StalledError("stalled" if patience_s == self._deadlines.stall_s else "idle") from None
            else:
                # The kernel clears it again and again; without it a sender with Nagle on waits 40 ms per instance.
                self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                return count
        return 0

    def _receive_once(self) -> int:
        room = self._room()
        if room is None:
            most = self._end + _COMMAND_BYTES if self._expects_long and not self._had_long else BUFFER_BYTES
            count = self._connection.recv_into(self._view[self._end : most])
            self._end += count
            return count
        count = self._connection.recvmsg_into([room, self._view[:_NEXT_BYTES]])[0]
        placed = min(count, len(room))
        self._pdv_left -= placed
        self._end = count - placed
        if placed:
            self._sink.placed(placed)
        return count

    def _room(self) -> memoryview | None:
        """Give where the rest of the present PDV can be received, past the buffer."""
        if self._end or not self._inside or not self._long or self._control & pdu.COMMAND or not self._scatters:
            return None
        room = self._sink.room()
        return room[: self._pdv_left] if room else None
