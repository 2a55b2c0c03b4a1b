"""What a C-STORE status means for a delivery (PS3.4 B.2.3, PS3.7 C; registry specification 7.2). A pure table."""

from __future__ import annotations

import enum

NO_ANSWER = -1
"""Stands for a time-out, an abort or a lost connection."""
UNSENDABLE = -2
"""Stands for an instance that we cannot send: missing, damaged, or in a transfer syntax that the peer refuses."""

CLASS_NOT_SUPPORTED = 0x0122


class Outcome(enum.StrEnum):
    """What to do about an instance after its status."""

    DONE = "done"
    AGAIN = "again"
    NEVER = "never"


_WARNINGS = {0xB000: "coercion of data elements", 0xB006: "elements discarded", 0xB007: "data set does not match class"}
_PERMANENT = frozenset((CLASS_NOT_SUPPORTED, 0x0124, UNSENDABLE))
_REFUSED, _MISMATCH, _CANNOT_UNDERSTAND = 0xA7, 0xA9, 0xC


def classify(status: int) -> Outcome:
    """Decide about an instance by the status it was answered with."""
    if status == 0 or status in _WARNINGS:
        return Outcome.DONE
    if status in _PERMANENT or status >> 8 == _MISMATCH or status >> 12 == _CANNOT_UNDERSTAND:
        return Outcome.NEVER
    return Outcome.AGAIN


def describe(status: int) -> str:
    """Say a status to a person."""
    if status == NO_ANSWER:
        return "no answer"
    if status == UNSENDABLE:
        return "cannot be sent"
    known = "success" if status == 0 else _WARNINGS.get(status, "")
    if not known and status >> 8 == _REFUSED:
        known = "out of resources"
    return f"0x{status:04X} {known}".strip()
