"""Cuts a multipart body (RFC 2046 5.1) into its parts as the bytes come; never more of it is held than one boundary.

Nothing is believed: header fields of a part are bounded, and a body that ends before its last boundary is cut.
"""

from __future__ import annotations

import re
from email.message import Message
from email.utils import collapse_rfc2231_value
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_HEADER_BYTES = 16 * 1024
_MOST_PASSED_OVER = 64 * 2**10
_MOST_PADDING = 256
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")


class MultipartError(Exception):
    """A body that is not what RFC 2046 says; the text names why, without what the peer sent."""


class Parts(Protocol):
    """What takes the parts, one after another. Any of its methods may raise MultipartError."""

    def begin_part(self, headers: Mapping[str, str]) -> None:
        """A part begins; names of header fields are in lower case."""

    def take(self, piece: memoryview) -> None:
        """Take some of it; the view is gone afterwards."""

    def end_part(self) -> None:
        """The part is complete."""


def parameters_of(content_type: str) -> tuple[str, dict[str, str]]:
    """Read a Content-Type (RFC 2045 5.1): its type in lower case, and its parameters."""
    message = Message()
    message["Content-Type"] = content_type
    pairs = message.get_params(failobj=[])
    # A value may come in a character set of its own (RFC 2231): then it has three parts.
    return (pairs[0][0].lower() if pairs else ""), {
        name.lower(): collapse_rfc2231_value(value) for name, value in pairs[1:]
    }


class Multipart:
    """One body. `feed` it, then `close` it; either raises MultipartError, and then nothing more may be fed."""

    def __init__(self, boundary: str, parts: Parts) -> None:
        if _BOUNDARY.fullmatch(boundary) is None:
            raise MultipartError("the boundary is missing, too long, or has characters that it may not have")
        self._delimiter = b"\r\n--" + boundary.encode()
        self._parts = parts
        # As if a line had ended before the body: its first boundary then looks like the others.
        self._buffer = bytearray(b"\r\n")
        self._step = self._preamble
        self._ended = False
        # Of what stands before the first boundary and behind the last.
        self._passed_over = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        if self._ended:
            self._pass_over(len(data))
            return  # an epilogue says nothing
        self._buffer += data
        while not self._ended and self._step():
            continue

    def close(self) -> None:
        """The body has ended."""
        if not self._ended:
            raise MultipartError("the body ends before its last boundary")

    def _preamble(self) -> bool:
        at = self._buffer.find(self._delimiter)
        if at < 0:
            self._pass_over(max(0, len(self._buffer) - len(self._delimiter) + 1))
            del self._buffer[: -len(self._delimiter) + 1]
            return False
        del self._buffer[: at + len(self._delimiter)]
        self._step = self._boundary
        return True

    def _pass_over(self, count: int) -> None:
        self._passed_over += count
        if self._passed_over > _MOST_PASSED_OVER:
            raise MultipartError("more than 64 KiB before the first boundary or behind the last")

    def _boundary(self) -> bool:
        """Behind a boundary: the end, or padding and the end of the line."""
        if self._buffer[:2] == b"--":
            self._ended = True
            return False
        at = self._buffer.find(b"\r\n")
        if at < 0 and len(self._buffer) <= _MOST_PADDING:
            return False
        if at < 0 or self._buffer[:at].strip(b" \t"):
            raise MultipartError("a boundary that is followed by something else than the end of its line")
        # The line's end stays: without header fields an empty line follows at once.
        del self._buffer[:at]
        self._step = self._headers
        return True

    def _headers(self) -> bool:
        at = self._buffer.find(b"\r\n\r\n")
        if at < 0 and len(self._buffer) <= _MOST_HEADER_BYTES:
            return False
        if at < 0 or at > _MOST_HEADER_BYTES:
            raise MultipartError("the header fields of a part are longer than 16 KiB")
        headers = {}
        for line in bytes(self._buffer[:at]).decode("latin-1").split("\r\n"):
            name, colon, value = line.partition(":")
            if colon:
                headers[name.strip().lower()] = value.strip()
        del self._buffer[: at + 4]
        self._parts.begin_part(headers)
        self._step = self._body
        return True

    def _body(self) -> bool:
        at = self._buffer.find(self._delimiter)
        size = at if at >= 0 else len(self._buffer) - len(self._delimiter) + 1
        if size > 0:
            with memoryview(self._buffer)[:size] as piece:
                self._parts.take(piece)
            del self._buffer[:size]
        if at < 0:
            return False
        del self._buffer[: len(self._delimiter)]
        self._parts.end_part()
        self._step = self._boundary
        return True
