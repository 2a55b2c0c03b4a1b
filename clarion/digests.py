"""Digests of data sets and objects: BLAKE3, the algorithm being part of the value so that it can change.

A digest is an instance's identity: a weak one would let a crafted collision be acknowledged as a duplicate.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

from blake3 import blake3

if TYPE_CHECKING:
    from typing_extensions import Buffer

_ALGORITHM = "blake3"


class Hasher(Protocol):
    """Takes bytes piece by piece."""

    def update(self, data: Buffer, /) -> object:
        """Take some bytes."""

    def hexdigest(self) -> str:
        """Give the hexadecimal digest of what was taken."""


def start() -> Hasher:
    """Begin a digest; `finish` makes its value."""
    return blake3()


def finish(hasher: Hasher) -> str:
    """Give the value of a digest begun with `start`."""
    return f"{_ALGORITHM}:{hasher.hexdigest()}"


def digest_of(data: Buffer) -> str:
    """Digest some bytes: `blake3:` and 64 hexadecimal digits."""
    return f"{_ALGORITHM}:{blake3(data).hexdigest()}"


def agrees(data: Buffer, digest: str) -> bool:
    """Tell whether the bytes have the digest; one without an algorithm's name is SHA-256."""
    algorithm, _, value = digest.rpartition(":")
    if algorithm == _ALGORITHM:
        return blake3(data).hexdigest() == value
    return algorithm in {"", "sha256"} and hashlib.sha256(data).hexdigest() == value


def file_name(digest: str) -> str:
    """Give the hexadecimal part: what a file is named by."""
    return digest.rpartition(":")[2]
