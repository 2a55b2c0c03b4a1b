"""The data sets of storage commitment (PS3.4 J.3), read without a library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clarion.elements import Walker
from clarion.errors import InvalidInstanceError
from clarion.model import is_uid
from gateway.encoding import encode

if TYPE_CHECKING:
    from collections.abc import Iterable

# A report of 10,000 instances is 2 MB.
MAX_DATA_SET_BYTES = 16 * 2**20

_TRANSACTION, _FAILED, _REFERENCED, _INSTANCE, _CLASS, _REASON = (
    0x00081195, 0x00081198, 0x00081199, 0x00081155, 0x00081150, 0x00081197,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A storage commitment result: which instances the peer keeps, and which it does not."""

    transaction_uid: str
    stored: tuple[str, ...]
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request for storage commitment: (SOP Class, SOP Instance) pairs."""

    transaction_uid: str
    instances: tuple[tuple[str, str], ...]


def read_request(data: bytes, transfer_syntax_uid: str) -> Asked | None:
    """Read a request (PS3.4 J.3.2.1); None when it is none."""
    walker = Walker(data, transfer_syntax_uid)
    transaction, instances = "", []
    try:
        for element in walker.elements():
            if element.tag == _TRANSACTION:
                transaction = walker.text(element)
            elif element.tag == _REFERENCED:
                for item in walker.items(element):
                    said = {one.tag: walker.text(one) for one in item}
                    instances.append((said.get(_CLASS, ""), said.get(_INSTANCE, "")))
    except InvalidInstanceError:
        return None
    whole = is_uid(transaction) and instances and all(is_uid(uid) for pair in instances for uid in pair)
    return Asked(transaction_uid=transaction, instances=tuple(instances)) if whole else None


def make_report(
    transaction_uid: str,
    stored: Iterable[tuple[str, str]],
    failed: Iterable[tuple[str, str, int]],
    transfer_syntax_uid: str,
) -> bytes:
    """Make a result (PS3.4 J.3.3.1): what is stored, and what is not with its reason."""
    elements: list[tuple[int, str, object]] = [(_TRANSACTION, "UI", transaction_uid)]
    lost = [
        [(_CLASS, "UI", sop_class), (_INSTANCE, "UI", instance), (_REASON, "US", reason)]
        for sop_class, instance, reason in failed
    ]
    kept = _references(stored)
    elements += [(_FAILED, "SQ", lost)] if lost else []
    elements += [(_REFERENCED, "SQ", kept)] if kept else []
    return encode(elements, transfer_syntax_uid)


def make_request(transaction_uid: str, instances: Iterable[tuple[str, str]], transfer_syntax_uid: str) -> bytes:
    """Make a request for (SOP Class, SOP Instance) pairs (PS3.4 J.3.2.1)."""
    items = _references(instances)
    return encode([(_TRANSACTION, "UI", transaction_uid), (_REFERENCED, "SQ", items)], transfer_syntax_uid)


def _references(instances: Iterable[tuple[str, str]]) -> list[list[tuple[int, str, str]]]:
    return [[(_CLASS, "UI", sop_class), (_INSTANCE, "UI", instance)] for sop_class, instance in instances]


def read_report(data: bytes, transfer_syntax_uid: str) -> Report | None:
    """Read a result; None when it is none."""
    walker = Walker(data, transfer_syntax_uid)
    transaction = ""
    stored: list[str] = []
    failed: list[str] = []
    try:
        for element in walker.elements():
            if element.tag == _TRANSACTION:
                transaction = walker.text(element)
            elif element.tag in {_FAILED, _REFERENCED}:
                uids = [walker.text(one) for item in walker.items(element) for one in item if one.tag == _INSTANCE]
                (failed if element.tag == _FAILED else stored).extend(uids)
    except InvalidInstanceError:
        return None
    return Report(transaction_uid=transaction, stored=tuple(stored), failed=tuple(failed)) if transaction else None
