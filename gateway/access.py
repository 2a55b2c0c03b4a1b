"""The access list: calling AE title and address, called AE title. Closed unless the configuration opens it."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clarion.errors import PeerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.config import GatewayConfig, Source
    from gateway.wire.pdu import UserIdentity

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """An A-ASSOCIATE-RJ: result, source and reason of PS3.8 9.3.4, and the check that failed."""

    check: str
    result: int
    source: int
    reason: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What a peer may do on its association: send instances, report storage commitment.

    `known`: it is in a list, and not let in because everybody is.
    """

    may_store: bool
    may_report: bool
    known: bool = True


CALLING_UNKNOWN = Rejection(check="calling-ae", result=1, source=1, reason=3)
CALLED_UNKNOWN = Rejection(check="called-ae", result=1, source=1, reason=7)
TOO_MANY = Rejection(check="association-limit", result=2, source=3, reason=2)
NO_SPACE = Rejection(check="disk-space", result=2, source=3, reason=1)
CALLING_ELSEWHERE = Rejection(check="calling-address", result=1, source=1, reason=3)
"""The AE title is known, its address is not one of those that it may come from."""
CALLING_USER = Rejection(check="calling-user", result=1, source=1, reason=1)
"""The AE title and its address are known, the user identity is not the one that they must come with."""
UNRESOLVED = Rejection(check="calling-host-unresolved", result=2, source=3, reason=1)
NOT_READY = Rejection(check="not-ready", result=2, source=3, reason=1)
OUR_FAULT = Rejection(check="internal-error", result=2, source=3, reason=1)

REJECTIONS = (
    CALLING_UNKNOWN, CALLED_UNKNOWN, TOO_MANY, NO_SPACE, CALLING_ELSEWHERE, UNRESOLVED, NOT_READY, OUR_FAULT,
    CALLING_USER,
)  # fmt: skip


def _plain(address: str) -> _Address:
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


def matches(hosts: str, address: str) -> bool:
    """Tell whether an address is one of a comma-separated list of addresses, networks and host names.

    Raises PeerUnavailableError when that depends on a host name that cannot be resolved now.
    """
    peer = _plain(address)
    unresolved = ""
    for host in hosts.split(","):
        try:
            if _matches_one(host.strip(), peer):
                return True
        except (OSError, UnicodeError):
            unresolved = host.strip()
    if unresolved:
        raise PeerUnavailableError(f"host name {unresolved!r} cannot be resolved")
    return False


def _matches_one(host: str, peer: _Address) -> bool:
    try:
        network = ipaddress.ip_network(host, strict=False)
    except ValueError:
        return any(_plain(str(info[4][0])) == peer for info in socket.getaddrinfo(host, None))
    return peer in network


class AccessList:
    """Who may associate with whom, from the configuration."""

    def __init__(self, config: GatewayConfig) -> None:
        self._sources = [(source.ae_title, source.host) for source in config.sources]
        self._users = {(one.ae_title, one.host): one for one in config.sources if one.user is not None}
        self._peers = [(one.ae_title, one.host) for one in config.destinations if one.ae_title and one.host]
        self._called = {one.ae_title for one in config.ae_titles}
        self._own = config.scu.ae_title
        self._open = not config.scp.reject_unknown_sources
        self._named = {title for title, host in (*self._sources, *self._peers) if not _is_numeric(host)}

    def may_wait(self, calling: str) -> bool:
        """Tell whether `check` asks for the addresses of a host name, and may wait for them."""
        return calling in self._named

    def check(
        self, calling: str, called: str, address: str, identity: UserIdentity | None = None
    ) -> Admission | Rejection:
        """Check an association request, once: names may resolve otherwise a moment later.

        A source may send to a configured called AE title, a destination may report to us under the name we send by;
        a peer may be both.
        """
        listed = _listed(self._sources, calling, address)
        if listed and not self._is_user(calling, address, identity):
            return CALLING_USER
        source = self._open or listed
        destination = _listed(self._peers, calling, address)
        if source is None or (not source and destination is None):
            return UNRESOLVED
        if not source and not destination:
            known = any(title == calling for title, _ in (*self._sources, *self._peers))
            return CALLING_ELSEWHERE if known else CALLING_UNKNOWN
        if called not in self._called and not (destination and called == self._own):
            return CALLED_UNKNOWN
        # A destination's name that cannot be resolved now costs it its reports, never a source its instances.
        return Admission(
            may_store=bool(source) and called in self._called,
            may_report=bool(destination),
            known=bool(listed) or bool(destination),
        )

    def _is_user(self, calling: str, address: str, identity: UserIdentity | None) -> bool:
        """Tell whether one of the entries that a peer matches is satisfied with its user identity."""
        entries = [(title, host) for title, host in self._sources if _listed([(title, host)], calling, address)]
        return any(one not in self._users or _proves(identity, self._users[one]) for one in entries)


def _proves(identity: UserIdentity | None, source: Source) -> bool:
    """Tell whether an identity is the user that a source must come with (PS3.7 D.3.3.7)."""
    if identity is None or source.user is None:
        return False
    named = hmac.compare_digest(identity.name.encode(), source.user.encode())
    if source.passcode is None:
        return named
    secret = source.passcode.get_secret_value().encode()
    return hmac.compare_digest(identity.secret, secret) and named


def _is_numeric(hosts: str) -> bool:
    """Tell whether a list has addresses and networks only, no host name."""
    try:
        for host in hosts.split(","):
            ipaddress.ip_network(host.strip(), strict=False)
    except ValueError:
        return False
    return True


def _listed(entries: Iterable[tuple[str, str]], ae_title: str, address: str) -> bool | None:
    """Tell whether a peer is in a list; None when that depends on a name that cannot be resolved now."""
    unresolved = False
    for host in (host for title, host in entries if title == ae_title):
        try:
            if matches(host, address):
                return True
        except PeerUnavailableError:
            unresolved = True
    return None if unresolved else False
