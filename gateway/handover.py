"""What goes with a connection from the guard to a worker, and what a worker tells the guard about it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gateway.access import Admission
from gateway.wire import pdu

_HEAD = struct.Struct("<QQBB")
_NUMBER = struct.Struct("<Q")
_MAY_STORE, _MAY_REPORT, _SECURE, _CROWDED = 1, 2, 4, 8
MOST_BYTES = pdu.MAX_ASSOCIATE_BYTES + 1024
# What the worker says is short: who was rejected, and why.
MOST_SAID_BYTES = 1024
_OPENED = b"+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A connection: its number, who it is, and what it asked for.

    Without an admission it speaks TLS: its request is still to come. `secured`: how many before it, to the same worker,
    speak TLS. `crowded`: its address has its share already.
    """

    number: int
    secured: int = 0
    address: str
    admission: Admission | None = None
    request: bytes = b""
    crowded: bool = False

    def encode(self) -> bytes:
        """Write it as a message."""
        address = self.address.encode()
        flags = _CROWDED * self.crowded
        if self.admission is None:
            flags |= _SECURE
        else:
            flags |= _MAY_STORE * self.admission.may_store | _MAY_REPORT * self.admission.may_report
        return _HEAD.pack(self.number, self.secured, flags, len(address)) + address + self.request

    @classmethod
    def decode(cls, data: bytes) -> Handover:
        """Read what `encode` wrote."""
        number, secured, flags, size = _HEAD.unpack_from(data)
        end = _HEAD.size + size
        admission = Admission(may_store=bool(flags & _MAY_STORE), may_report=bool(flags & _MAY_REPORT))
        return cls(
            number=number,
            secured=secured,
            address=data[_HEAD.size : end].decode(),
            admission=None if flags & _SECURE else admission,
            request=data[end:],
            crowded=bool(flags & _CROWDED),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What became of a connection: it has ended, or was rejected by a `check`, or, `opened`, has said who it is."""

    number: int
    opened: bool = False
    check: str = ""
    said: str = ""

    def encode(self) -> bytes:
        """Write it as a message."""
        text = f"{self.check}\n{self.said}".encode()[:MOST_SAID_BYTES] if self.check else b""
        return _NUMBER.pack(self.number) + (_OPENED if self.opened else text)

    @classmethod
    def decode(cls, data: bytes) -> Told:
        """Read what `encode` wrote."""
        number, text = _NUMBER.unpack_from(data)[0], data[_NUMBER.size :]
        if text == _OPENED:
            return cls(number=number, opened=True)
        check, _, said = text.decode("utf-8", "replace").partition("\n")
        return cls(number=number, check=check, said=said)
