"""Give a data set other UIDs, byte by byte: as another patient's visit would have sent it. Nothing is decoded."""

from __future__ import annotations

import struct
import uuid

from clarion.elements import EXPLICIT_BE, IMPLICIT_LE, Walker
from clarion.model import NAMESPACE

_RENAMED = frozenset((0x00080018, 0x0020000D, 0x0020000E))


def rename(data: bytes, transfer_syntax_uid: str, salt: str) -> tuple[bytes, str]:
    """Replace Study, Series and SOP Instance UID by ones derived from them and `salt`; give the data set and the last.

    References within sequences stay as they are. Raises InvalidInstanceError, also for a deflated data set.
    """
    order = ">" if transfer_syntax_uid == EXPLICIT_BE else "<"
    parts, taken, instance = [], 0, ""
    walker = Walker(data, transfer_syntax_uid)
    for element in walker.elements():
        if element.tag > max(_RENAMED):
            break
        if element.tag not in _RENAMED or element.undefined:
            continue
        uid = derived(walker.text(element), salt)
        if element.tag == min(_RENAMED):
            instance = uid
        value = uid.encode() + b"\0" * (len(uid) % 2)
        wide = transfer_syntax_uid == IMPLICIT_LE
        length = struct.pack(order + ("I" if wide else "H"), len(value))
        parts += [data[taken : element.start - len(length)], length, value]
        taken = element.end
    return b"".join([*parts, data[taken:]]), instance


def derived(uid: str, salt: str) -> str:
    """Derive a UID from another (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(NAMESPACE, f'{salt}/{uid}').int}"
