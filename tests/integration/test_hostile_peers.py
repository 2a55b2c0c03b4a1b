"""Peers that stop, claim too much or never speak: every one is cut off within its deadline, and costs nobody else."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.scp import CT, EXPLICIT, Serving, serving
from support.world import free_port, until

from clarion.errors import PeerUnavailableError
from clarion.model import Destination
from clarion.testing.pacs import Pacs
from console import intake as intake_module
from gateway.scu import Requestor, Timeouts


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """The real SCP with a short deadline, room for four associations, and data sets of up to 3 MB."""
    monkeypatch.setattr(intake_module, "STALL_S", 1.0)
    with serving(tmp_path, scp={"max_associations": 4, "max_instance_gb": 0.003}) as at:
        at.guard.max_pending = 8
        yield at


def is_cut(connection: socket.socket) -> bool:
    """Tell whether the other side has ended the connection, orderly or not."""
    connection.settimeout(0.01)
    try:
        return connection.recv(1000) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("said", [b"", b"\x01\x00\x00", struct.pack(">BBL", 1, 0, 4_000_000_000) + bytes(100)])
def test_half_a_pdu_does_not_hold_a_thread(listening: Serving, said: bytes) -> None:
    """Bites: leave the library's own reading in place and the threads stay for ever."""
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", listening.port), 5))
            connection.sendall(said)
            if not said:
                connection.close()
        until(lambda: threading.active_count() <= before, "the threads have gone")
    with listening.requestor() as peer:
        assert peer.echo() == 0


def test_drip_feeding_is_a_stall(listening: Serving) -> None:
    with socket.create_connection(("127.0.0.1", listening.port), 5) as connection:
        connection.sendall(struct.pack(">BBL", 1, 0, 10_000))
        begun = time.monotonic()
        while not is_cut(connection) and time.monotonic() < begun + 20:
            try:
                connection.sendall(b"\0")
            except OSError:
                return
        assert time.monotonic() < begun + 20, "a byte now and then kept the connection"


def test_silent_connections_leave_room_for_those_who_speak(listening: Serving) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", listening.port), 5)) for _ in range(30)]
        until(lambda: sum(is_cut(one) for one in silent) >= 22, "the surplus is cut")
        silent[0].close()
    until(lambda: listening.board.pending == 0, "closed connections are forgotten")
    with listening.requestor() as peer:
        assert peer.echo() == 0


def test_a_data_set_beyond_the_limit_is_cut_and_the_next_is_taken(listening: Serving) -> None:
    element = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 8_000_000) + bytes(8_000_000)
    with pytest.raises(PeerUnavailableError), listening.requestor() as peer:
        peer.store(element, sop_class=CT, sop_instance="1.2.3", syntax=EXPLICIT)
    with listening.requestor() as peer:
        for _ in range(3):
            # The limit is per data set, not per association.
            small = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 2_000_000) + bytes(2_000_000)
            assert peer.store(small, sop_class=CT, sop_instance="1.2.3", syntax=EXPLICIT) == 0xC000


def associate_request(calling: str = "A") -> bytes:
    """An A-ASSOCIATE-RQ for CT image storage, as pynetdicom encodes it."""
    from pynetdicom import build_context
    from pynetdicom.pdu import A_ASSOCIATE_RQ
    from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification

    request = A_ASSOCIATE()
    request.application_context_name = "1.2.840.10008.3.1.1.1"
    request.calling_ae_title, request.called_ae_title = calling, "B"
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received, implementation.implementation_class_uid = 16382, "1.2.3"
    request.user_information = [length, implementation]
    context = build_context(CT, EXPLICIT)
    context.context_id = 1
    request.presentation_context_definition_list = [context]
    return A_ASSOCIATE_RQ(request).encode()


# A command set without Command Field (0000,0100): only a group length and a message id.
NAMELESS = struct.pack("<HHLLHHLH", 0, 0, 4, 10, 0, 0x0110, 2, 7)
P_DATA_NAMELESS = struct.pack(">BBLLBB", 4, 0, len(NAMELESS) + 6, len(NAMELESS) + 2, 1, 3) + NAMELESS


def is_forgotten(listening: Serving) -> bool:
    return listening.board.pending == listening.board.associations == 0


# The library's threads do die, that is what is tested.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("calling", "then"),
    [
        ("A", P_DATA_NAMELESS),
        ("STRANGER", b""),
        ("STRANGER", associate_request("STRANGER")),
        ("A", associate_request()),
    ],
    ids=["a command without a name", "a stranger", "a stranger who asks twice", "one who asks twice"],
)
def test_no_connection_is_remembered_after_its_thread_died(listening: Serving, calling: str, then: bytes) -> None:
    """Bites: without `sweep` the library's thread dies without a word, and after four of these nobody is let in."""
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", listening.port), 5) as connection:
            connection.sendall(associate_request(calling) + (then if calling != "A" else b""))
            if calling == "A":
                connection.settimeout(5)
                assert connection.recv(1000)[:1] == b"\x02"
                connection.sendall(then)
            until(lambda one=connection: is_cut(one), "cut")  # type: ignore[misc]
        until(lambda: is_forgotten(listening), "forgotten")
    with listening.requestor() as peer:
        assert peer.echo() == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_random_bytes_on_the_port_leave_nothing_behind(listening: Serving) -> None:
    """150 connections that begin like an association and go on at random; afterwards all slots are free."""
    rng, before = random.Random(4), threading.active_count()
    whole = associate_request()
    for _ in range(150):
        bent = bytearray(whole + P_DATA_NAMELESS)
        for _ in range(rng.randint(1, 6)):
            bent[rng.randrange(6 if rng.random() < 0.7 else 0, len(bent))] = rng.randrange(256)
        with socket.create_connection(("127.0.0.1", listening.port), 5) as connection:
            connection.sendall(bytes(bent[: rng.randint(1, len(bent))]))

    until(lambda: is_forgotten(listening), "all forgotten", 60)
    until(lambda: threading.active_count() <= before, "the threads have gone", 60)
    with listening.requestor() as peer:
        assert peer.echo() == 0


@contextmanager
def stalling_proxy(target: int, mode: str) -> Iterator[int]:
    """Pass everything on until the first P-DATA of the client; then stop: `noread`, read a little now and then
    (`slow`), read all and answer with `half` a PDU, or be `gone`."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(20)
    ends: list[socket.socket] = [server]
    stop = threading.Event()

    def serve() -> None:
        client, _ = server.accept()
        if mode == "noread":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        upstream = socket.create_connection(("127.0.0.1", target), 5)
        ends.extend((client, upstream))
        upstream.sendall(client.recv(65536))
        client.sendall(upstream.recv(65536))
        client.recv(10)
        if mode == "half":
            client.sendall(struct.pack(">BBL", 4, 0, 1000) + b"abc")
            while not stop.is_set() and client.recv(65536):
                pass
        if mode == "gone":
            client.close()
        while mode == "slow" and not stop.wait(0.1) and client.recv(262144):
            pass
        stop.wait(60)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        stop.set()
        for one in ends:
            one.close()
        thread.join(5)


@pytest.mark.parametrize("mode", ["noread", "half", "slow"])
def test_a_destination_that_stops_is_given_up_within_its_deadline(mode: str, tmp_path: Path) -> None:
    """Bites: without the guard the sender's thread hangs for ever, and the destination is never served again.

    A slow one that goes on taking bytes is waited for; it is cut when we no longer want to.
    """
    port = free_port()
    pacs = Pacs(tmp_path / "pacs", ae_title="PACS", port=port, callers={})
    with stalling_proxy(port, mode) as through:
        peer = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=through)
        raised: list[BaseException] = []

        def send() -> None:
            data = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 30_000_000) + bytes(30_000_000)
            timeouts = Timeouts(connect_s=2, dimse_s=2)
            try:
                with Requestor(peer, own_ae="A", classes=[(CT, EXPLICIT)], timeouts=timeouts) as scu:
                    scu.store(data, sop_class=CT, sop_instance="1.2.3", syntax=EXPLICIT)
            except PeerUnavailableError as error:
                raised.append(error)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        thread.join(6 if mode == "slow" else 30)
        assert thread.is_alive() == (mode == "slow")
        assert len(raised) == (mode != "slow")
    pacs.stop()


@pytest.mark.timeout(60)
def test_a_destination_that_dies_is_noticed_at_once(tmp_path: Path) -> None:
    """Bites: wait for an answer alone, and the sender sits out its deadline of ten minutes."""
    port = free_port()
    pacs = Pacs(tmp_path / "pacs", ae_title="PACS", port=port, callers={})
    small = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 2_000) + bytes(2_000)
    with stalling_proxy(port, "gone") as through:
        peer = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=through)
        timeouts = Timeouts(connect_s=2, dimse_s=600)
        with (
            pytest.raises(PeerUnavailableError),
            Requestor(peer, own_ae="A", classes=[(CT, EXPLICIT)], timeouts=timeouts) as scu,
        ):
            scu.store(small, sop_class=CT, sop_instance="1.2.3", syntax=EXPLICIT)
    pacs.stop()
