"""What goes with a connection from the guard to a worker, and what a worker tells the guard about it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gateway.access import Admission
from gateway.wire import pdu

_HEAD = struct.Struct("<QBB")
_NUMBER = struct.Struct("<Q")
_MAY_STORE, _MAY_REPORT, _SECURE, _CROWDED = 1, 2, 4, 8
MOST_BYTES = pdu.MAX_ASSOCIATE_BYTES + 1024
# What the worker says is short: who was rejected, and why.
MOST_SAID_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A connection: its number, who it is, and what it asked for.

    Without an admission it speaks TLS: its request is still to come. `crowded`: its address has its share already.
    """

    number: int
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
        return _HEAD.pack(self.number, flags, len(address)) + address + self.request

    @classmethod
    def decode(cls, data: bytes) -> Handover:
        """Read what `encode` wrote."""
        number, flags, size = _HEAD.unpack_from(data)
        end = _HEAD.size + size
        admission = Admission(may_store=bool(flags & _MAY_STORE), may_report=bool(flags & _MAY_REPORT))
        return cls(
            number=number,
            address=data[_HEAD.size : end].decode(),
            admission=None if flags & _SECURE else admission,
            request=data[end:],
            crowded=bool(flags & _CROWDED),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What became of a connection: it has ended, or, with a `check`, was rejected by it."""

    number: int
    check: str = ""
    said: str = ""

    def encode(self) -> bytes:
        """Write it as a message."""
        text = f"{self.check}\n{self.said}".encode()[:MOST_SAID_BYTES] if self.check else b""
        return _NUMBER.pack(self.number) + text

    @classmethod
    def decode(cls, data: bytes) -> Told:
        """Read what `encode` wrote."""
        check, _, said = data[_NUMBER.size :].decode("utf-8", "replace").partition("\n")
        return cls(number=_NUMBER.unpack_from(data)[0], check=check, said=said)
