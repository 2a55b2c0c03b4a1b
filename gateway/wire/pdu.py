"""The PDUs of the DICOM upper layer (PS3.8 9.3), both directions: bytes to values and back.

Nothing is believed: every length is compared with the bytes that are left. What cannot be read raises PduError, which
says what an A-ABORT then tells the peer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clarion.dicom import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)
HEADER = struct.Struct(">BxI")
"""PDU type and length of what follows."""
PDV = struct.Struct(">IBB")
"""Length of what follows, presentation context id, message control header: bit 0 command, bit 1 last."""
COMMAND, LAST = 1, 2
MAX_LENGTH = 131072
"""The maximum length we announce: DCMTK's tools accept no more."""
MAX_ASSOCIATE_BYTES = 128 * 1024
SMALLEST_MAX_LENGTH = 16
TLS_HANDSHAKE = 22
"""Not ours: what a peer begins with that speaks TLS (RFC 8446 5.1)."""

# Provider reasons of an A-ABORT (PS3.8 9.3.8).
NOT_SPECIFIED, UNRECOGNISED_PDU, UNEXPECTED_PDU, UNEXPECTED_PARAMETER, INVALID_PARAMETER = 0, 1, 2, 5, 6

ACCEPTED, REFUSED_NO_REASON, ABSTRACT_SYNTAX_NOT_SUPPORTED, TRANSFER_SYNTAXES_NOT_SUPPORTED = 0, 2, 3, 4
"""Results of a presentation context (PS3.8 9.3.3.2)."""

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
_FIXED = 68
_MAX_CONTEXTS = 128
_ITEM = struct.Struct(">BxH")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_USER_NAME_AND_PASSCODE = 2


class PduError(Exception):
    """A PDU that PS3.8 does not allow; `reason` is the provider reason of the A-ABORT."""

    def __init__(self, reason: int, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A presentation context: proposed with its transfer syntaxes, or accepted with one."""

    id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UserIdentity:
    """What a requestor says of itself (PS3.7 D.3.3.7); `kind` 1 is a name, 2 a name and a passcode."""

    kind: int
    wants_answer: bool
    name: str
    secret: bytes = field(repr=False, default=b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An A-ASSOCIATE-RQ. `titles` are the bytes that an answer gives back as they are."""

    version: int
    called: str
    calling: str
    titles: bytes
    application_context: str
    contexts: tuple[Context, ...]
    max_length: int
    roles: Mapping[str, tuple[bool, bool]]
    identity: UserIdentity | None = None
    implementation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """An A-ASSOCIATE-AC: contexts by id with the transfer syntax taken, the peer's maximum length, roles it accepts."""

    syntaxes: Mapping[int, str]
    results: Mapping[int, int]
    max_length: int
    roles: Mapping[str, tuple[bool, bool]]


RELEASE_REQUEST = HEADER.pack(RELEASE_RQ, 4) + bytes(4)
RELEASE_RESPONSE = HEADER.pack(RELEASE_RP, 4) + bytes(4)


def abort(reason: int, source: int = 2) -> bytes:
    """Make an A-ABORT: source 0 is the user, 2 the provider."""
    return HEADER.pack(ABORT, 4) + bytes((0, 0, source, reason))


def reject(result: int, source: int, reason: int) -> bytes:
    """Make an A-ASSOCIATE-RJ."""
    return HEADER.pack(ASSOCIATE_RJ, 4) + bytes((0, result, source, reason))


def length_of_request(header: bytes | bytearray) -> int:
    """Give how many bytes of an A-ASSOCIATE-RQ follow its header. Raises PduError if it is none, or too long."""
    kind, length = HEADER.unpack_from(header)
    if kind != ASSOCIATE_RQ:
        known = ASSOCIATE_RQ <= kind <= ABORT
        said = "TLS on a port that speaks in the clear" if kind == TLS_HANDSHAKE else f"PDU type {kind} at first"
        raise PduError(UNEXPECTED_PDU if known else UNRECOGNISED_PDU, said)
    if length > MAX_ASSOCIATE_BYTES:
        raise PduError(INVALID_PARAMETER, "an association request of more than 128 KiB")
    return int(length)


def parse_request(body: bytes) -> Request:
    """Read an A-ASSOCIATE-RQ, what follows its header."""
    if len(body) < _FIXED:
        raise PduError(INVALID_PARAMETER, "an association request that is too short")
    contexts: list[Context] = []
    application, said = "", _UserInformation()
    for kind, start, end in _items(body, _FIXED, len(body)):
        if kind == 0x10:  # noqa: PLR2004  item types of PS3.8 9.3.2
            application = plain(body[start:end])
        elif kind == 0x20:  # noqa: PLR2004  as above
            contexts.append(_proposed(body, start, end))
        elif kind == 0x50:  # noqa: PLR2004  as above
            said.read(body, start, end)
    if not contexts or len(contexts) > _MAX_CONTEXTS or len({one.id for one in contexts}) != len(contexts):
        raise PduError(INVALID_PARAMETER, "no presentation contexts, too many, or one twice")
    return Request(
        version=_U16.unpack_from(body, 0)[0],
        called=plain(body[4:20]),
        calling=plain(body[20:36]),
        titles=body[4:_FIXED],
        application_context=application,
        contexts=tuple(contexts),
        max_length=said.max_length,
        roles=said.roles,
        identity=said.identity,
        implementation=said.implementation,
    )


def accept(
    request: Request,
    results: Iterable[tuple[int, int, str]],
    *,
    max_length: int = MAX_LENGTH,
    roles: Mapping[str, tuple[bool, bool]] | None = None,
    answers_identity: bool = False,
) -> bytes:
    """Make an A-ASSOCIATE-AC; `results` are context id, result and transfer syntax (PS3.8 9.3.3)."""
    items = _item(0x10, APPLICATION_CONTEXT.encode())
    for number, result, syntax in results:
        items += _item(0x21, bytes((number, 0, result, 0)) + _item(0x40, syntax.encode()))
    extra = b"".join(_role(uid, *wanted) for uid, wanted in (roles or {}).items())
    if answers_identity:
        extra += _item(0x59, _U16.pack(0))
    items += _item(0x50, _user_information(max_length, extra))
    body = b"\0\1\0\0" + request.titles + items
    return HEADER.pack(ASSOCIATE_AC, len(body)) + body


def request(
    called: str,
    calling: str,
    contexts: Iterable[Context],
    *,
    max_length: int = MAX_LENGTH,
    roles: Mapping[str, tuple[bool, bool]] | None = None,
) -> bytes:
    """Make an A-ASSOCIATE-RQ (PS3.8 9.3.2)."""
    items = _item(0x10, APPLICATION_CONTEXT.encode())
    for one in contexts:
        proposed = _item(0x30, one.abstract_syntax.encode())
        proposed += b"".join(_item(0x40, syntax.encode()) for syntax in one.transfer_syntaxes)
        items += _item(0x20, bytes((one.id, 0, 0, 0)) + proposed)
    extra = b"".join(_role(uid, *wanted) for uid, wanted in (roles or {}).items())
    items += _item(0x50, _user_information(max_length, extra))
    titles = called.encode("ascii").ljust(16) + calling.encode("ascii").ljust(16) + bytes(32)
    body = b"\0\1\0\0" + titles + items
    return HEADER.pack(ASSOCIATE_RQ, len(body)) + body


def parse_accept(body: bytes) -> Accepted:
    """Read an A-ASSOCIATE-AC, what follows its header."""
    if len(body) < _FIXED:
        raise PduError(INVALID_PARAMETER, "an association acceptance that is too short")
    syntaxes: dict[int, str] = {}
    results: dict[int, int] = {}
    said = _UserInformation()
    for kind, start, end in _items(body, _FIXED, len(body)):
        if kind == 0x21 and end - start >= 4:  # noqa: PLR2004  as above
            results[body[start]] = body[start + 2]
            for inner, first, last in _items(body, start + 4, end):
                if inner == 0x40 and body[start + 2] == ACCEPTED:  # noqa: PLR2004  as above
                    syntaxes[body[start]] = plain(body[first:last])
        elif kind == 0x50:  # noqa: PLR2004  as above
            said.read(body, start, end)
    return Accepted(syntaxes=syntaxes, results=results, max_length=said.max_length, roles=said.roles)


def p_data_head(context: int, control: int, size: int) -> bytes:
    """Make what stands before `size` bytes that are the one PDV of a P-DATA-TF."""
    return HEADER.pack(P_DATA, size + PDV.size) + PDV.pack(size + 2, context, control)


def p_data(context: int, control: int, payload: bytes, max_length: int = 0) -> bytes:
    """Make the P-DATA-TF PDUs of a whole command set or data set; `max_length` 0 is no limit."""
    step = max_length - PDV.size if max_length else len(payload)
    if len(payload) <= step:
        return p_data_head(context, control | LAST, len(payload)) + payload
    pieces = [payload[at : at + step] for at in range(0, len(payload), step)]
    return b"".join(
        p_data_head(context, control | (LAST if piece is pieces[-1] else 0), len(piece)) + piece for piece in pieces
    )


class _UserInformation:
    """The sub-items of User Information that are looked at (PS3.7 D.3.3)."""

    def __init__(self) -> None:
        self.max_length = 0
        self.roles: dict[str, tuple[bool, bool]] = {}
        self.identity: UserIdentity | None = None
        self.implementation = ""

    def read(self, body: bytes, start: int, end: int) -> None:
        for kind, first, last in _items(body, start, end):
            value = body[first:last]
            if kind == 0x51 and len(value) == _U32.size:  # noqa: PLR2004  as above
                self.max_length = _U32.unpack(value)[0]
            elif kind == 0x54:  # noqa: PLR2004  as above
                self._read_role(value)
            elif kind == 0x55:  # noqa: PLR2004  as above
                self.implementation = plain(value)
            elif kind == 0x58:  # noqa: PLR2004  as above
                self.identity = _identity(value)

    def _read_role(self, value: bytes) -> None:
        if len(value) < _U16.size:
            raise PduError(INVALID_PARAMETER, "a role selection that is cut")
        size = _U16.unpack_from(value)[0]
        if len(value) != size + 4:
            raise PduError(INVALID_PARAMETER, "a role selection of a wrong length")
        self.roles[plain(value[2 : 2 + size])] = (value[2 + size] == 1, value[3 + size] == 1)


def _identity(value: bytes) -> UserIdentity:
    if len(value) < 6:  # noqa: PLR2004  two bytes and two lengths
        raise PduError(INVALID_PARAMETER, "a user identity that is cut")
    size = _U16.unpack_from(value, 2)[0]
    if len(value) < size + 6:
        raise PduError(INVALID_PARAMETER, "a user identity that is cut")
    secret = value[6 + size :][: _U16.unpack_from(value, 4 + size)[0]]
    kind = value[0]
    readable = kind in {1, _USER_NAME_AND_PASSCODE}
    name = value[4 : 4 + size].decode("utf-8", "replace") if readable else ""
    return UserIdentity(kind=kind, wants_answer=value[1] == 1, name=name, secret=secret)


def _items(body: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Give type, start and end of the items between two places."""
    while start < end:
        if start + _ITEM.size > end:
            raise PduError(INVALID_PARAMETER, "an item that is cut")
        kind, size = _ITEM.unpack_from(body, start)
        start += _ITEM.size
        if start + size > end:
            raise PduError(INVALID_PARAMETER, "an item that is longer than what holds it")
        yield kind, start, start + size
        start += size


def _proposed(body: bytes, start: int, end: int) -> Context:
    if end - start < 4 or not body[start] & 1:  # noqa: PLR2004  the id and three reserved bytes
        raise PduError(INVALID_PARAMETER, "a presentation context without an odd id")
    abstract, syntaxes = "", []
    for kind, first, last in _items(body, start + 4, end):
        if kind == 0x30:  # noqa: PLR2004  as above
            abstract = plain(body[first:last])
        elif kind == 0x40:  # noqa: PLR2004  as above
            syntaxes.append(plain(body[first:last]))
    return Context(id=body[start], abstract_syntax=abstract, transfer_syntaxes=tuple(syntaxes))


def _user_information(max_length: int, extra: bytes) -> bytes:
    """Make the sub-items (PS3.7 D.3.3)."""
    length = _item(0x51, _U32.pack(max_length))
    implementation = _item(0x52, IMPLEMENTATION_CLASS_UID.encode())
    return length + implementation + _item(0x55, IMPLEMENTATION_VERSION_NAME.encode()) + extra


def _role(uid: str, scu: bool, scp: bool) -> bytes:  # noqa: FBT001  as PS3.7 D.3.3.4 lays them out
    return _item(0x54, _U16.pack(len(uid)) + uid.encode() + bytes((scu, scp)))


def _item(kind: int, body: bytes) -> bytes:
    return _ITEM.pack(kind, len(body)) + body


def plain(raw: bytes) -> str:
    """Give printable ASCII without padding; everything else becomes a question mark."""
    text = raw.strip(b" \0").decode("ascii", "replace")
    return text if text.isprintable() and text.isascii() else "".join(map(_plain_character, text))


def _plain_character(one: str) -> str:
    return one if one.isascii() and one.isprintable() else "?"
