"""F16: peers that vanish without a word, in a network namespace whose link goes down: their places are freed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.dcmtk import need
from support.scp import serving
from support.world import pause

PEERS = 20
IDLE_S = 3.0
NAMESPACE, OURS, THEIRS = "clarion-half-open", "10.211.7.1", "10.211.7.2"
# Opens associations from within the namespace, says how many, and waits to be killed.
PEER = """
import socket, sys
from gateway.wire import pdu
context = pdu.Context(id=1, abstract_syntax="1.2.840.10008.1.1", transfer_syntaxes=("1.2.840.10008.1.2",))
held = []
for _ in range(int(sys.argv[3])):
    peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
    peer.sendall(pdu.request("B", "A", (context,)))
    assert peer.recv(1) == bytes([pdu.ASSOCIATE_AC])
    held.append(peer)
print("open", flush=True)
sys.stdin.read()
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def namespace() -> Iterator[str]:
    if os.geteuid() != 0:
        if os.environ.get("CI") == "true":
            pytest.fail("a network namespace needs root")
        pytest.skip("a network namespace needs root")
    need(Path("/usr/sbin/ip"), "iproute2")
    subprocess.run(["ip", "netns", "del", NAMESPACE], check=False, capture_output=True)
    ip("netns", "add", NAMESPACE)
    try:
        ip("link", "add", "clho0", "type", "veth", "peer", "name", "clho1", "netns", NAMESPACE)
        ip("addr", "add", f"{OURS}/24", "dev", "clho0")
        ip("link", "set", "clho0", "up")
        ip("-n", NAMESPACE, "addr", "add", f"{THEIRS}/24", "dev", "clho1")
        ip("-n", NAMESPACE, "link", "set", "clho1", "up")
        yield NAMESPACE
    finally:
        ip("netns", "del", NAMESPACE)


def test_places_of_peers_that_vanished_are_freed(namespace: str, tmp_path: Path) -> None:
    """Bites: wait for the peer's end alone, and twenty of twenty-five places are gone until a restart."""
    scp = {"host": OURS, "idle_timeout_s": IDLE_S}
    with serving(tmp_path, scp=scp, sources=[{"ae_title": "A", "host": THEIRS}]) as at:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-c", PEER, OURS, str(at.port), str(PEERS)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peers:
            assert peers.stdout is not None
            assert peers.stdout.readline() == b"open\n"
            assert at.board.associations == PEERS
            ip("-n", namespace, "link", "set", "clho1", "down")
            peers.kill()
        end = time.monotonic() + IDLE_S + 15
        while at.board.associations and time.monotonic() < end:
            pause(0.1)
        assert at.board.associations == 0
        ip("-n", namespace, "link", "set", "clho1", "up")
        command[-1] = "1"
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peers:
            assert peers.stdout is not None
            assert peers.stdout.readline() == b"open\n"
            peers.kill()
