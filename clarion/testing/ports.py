"""Ports of loopback for servers that are started a moment later."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from clarion.errors import ResourceBusyError

_LOWEST = 10_240
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 500

_given: set[int] = set()


def free_port() -> int:
    """Find a port that nobody listens on, and that no outgoing connection is given meanwhile.

    The system takes the local ports of connections from a range of its own; what is below stays free until it is used.
    """
    try:
        end = int(_RANGE.read_text().split()[0])
    except (OSError, ValueError):
        end = 32_768
    chooser = random.SystemRandom()
    for _ in range(_TRIES):
        port = chooser.randrange(_LOWEST, max(end, _LOWEST + 1))
        if port not in _given and _is_free(port):
            _given.add(port)
            return port
    raise ResourceBusyError("no free port on 127.0.0.1")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
