"""Which presentation contexts we accept, and with which transfer syntax (PS3.8 9.3.3, PS3.4 B.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clarion.elements import EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from clarion.model import is_uid
from gateway.wire import pdu

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clarion.config import ScpConfig

VERIFICATION = "1.2.840.10008.1.1"
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"
STANDARD_ROOT = "1.2.840.10008."
STORAGE_ROOT = "1.2.840.10008.5.1.4.1.1."
# Storage SOP Classes outside that root (PS3.6 A): instructions, templates, palettes, protocols.
STORAGE = frozenset((
    "1.2.840.10008.5.1.4.34.1", "1.2.840.10008.5.1.4.34.7", "1.2.840.10008.5.1.4.34.10", "1.2.840.10008.5.1.4.38.1",
    "1.2.840.10008.5.1.4.39.1", "1.2.840.10008.5.1.4.43.1", "1.2.840.10008.5.1.4.44.1", "1.2.840.10008.5.1.4.45.1",
    "1.2.840.10008.5.1.1.27", "1.2.840.10008.5.1.1.29", "1.2.840.10008.5.1.1.30",
))  # fmt: skip
PLAIN = (EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE)


def is_storage(abstract_syntax: str) -> bool:
    """Tell whether it is a Storage SOP Class: one of the standard's, or a private one."""
    if abstract_syntax.startswith(STANDARD_ROOT):
        return abstract_syntax.startswith(STORAGE_ROOT) or abstract_syntax in STORAGE
    return is_uid(abstract_syntax)


def refusal_of(sop_class: str, *, accepts_private: bool) -> str:
    """Say why no instance of a class is stored; empty when it may be."""
    if not is_storage(sop_class):
        return "not a Storage SOP Class"
    if not accepts_private and not sop_class.startswith(STANDARD_ROOT):
        return "private SOP Classes are not accepted"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Negotiated:
    """What an association may carry: accepted contexts by id, the answer to each that was proposed, our roles."""

    contexts: Mapping[int, pdu.Context]
    results: tuple[tuple[int, int, str], ...]
    roles: Mapping[str, tuple[bool, bool]]


def negotiate(request: pdu.Request, config: ScpConfig) -> Negotiated:
    """Judge each proposed context: any storage class in the first transfer syntax proposed, which the sender prefers.

    A sender lists what it would rather send first, and nothing here decodes: there is nothing to prefer on our side.
    """
    contexts: dict[int, pdu.Context] = {}
    results = []
    for one in request.contexts:
        result, syntax = _judge(one, config)
        results.append((one.id, result, syntax))
        if result == pdu.ACCEPTED:
            contexts[one.id] = pdu.Context(id=one.id, abstract_syntax=one.abstract_syntax, transfer_syntaxes=(syntax,))
    # A peer that reports commitments plays the SCP although it asked for the association (PS3.4 J.3.3).
    asked = request.roles.get(STORAGE_COMMITMENT)
    accepted = any(one.abstract_syntax == STORAGE_COMMITMENT for one in contexts.values())
    roles = {STORAGE_COMMITMENT: asked} if asked is not None and accepted else {}
    return Negotiated(contexts=contexts, results=tuple(results), roles=roles)


def _judge(proposed: pdu.Context, config: ScpConfig) -> tuple[int, str]:
    syntaxes = [one for one in proposed.transfer_syntaxes if is_uid(one)]
    first = syntaxes[0] if syntaxes else IMPLICIT_LE
    if proposed.abstract_syntax in {VERIFICATION, STORAGE_COMMITMENT}:
        if proposed.abstract_syntax == VERIFICATION and not config.verification.enabled:
            return pdu.ABSTRACT_SYNTAX_NOT_SUPPORTED, first
        syntaxes = [one for one in syntaxes if one in PLAIN]
    elif not is_storage(proposed.abstract_syntax):
        return pdu.ABSTRACT_SYNTAX_NOT_SUPPORTED, first
    if not syntaxes:
        return pdu.TRANSFER_SYNTAXES_NOT_SUPPORTED, first
    return pdu.ACCEPTED, syntaxes[0]
