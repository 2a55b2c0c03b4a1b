"""The evil peer (F11 to F15): whatever is said in whatever state, nobody else notices and nothing wrong is kept."""

from __future__ import annotations

import random
import resource
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from support.dcmtk import need
from support.processes import drain_traced, wait_for_port
from support.raw import CONTEXTS, Raw, associated, data_set, echo_request, store_request
from support.scp import Serving, serving
from support.system import describe
from support.world import free_port, pause, until

from clarion.service import read_heartbeats
from console import intake as intake_module
from console.checks import check_config
from gateway.wire import commands, pdu

SEQUENCES = 10_000
SENDERS = 8


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """The real guard and worker with a short deadline."""
    monkeypatch.setattr(intake_module, "STALL_S", 1.5)
    with serving(tmp_path, scp={"max_associations": 200, "max_instance_gb": 0.003}) as one:
        yield one


def forgotten(at: Serving) -> bool:
    return at.board.pending == at.board.associations == 0


# F14 ------------------------------------------------------------------------------------------------------------

STEPS: dict[str, Callable[[str], bytes]] = {
    "request": lambda _: pdu.request("B", "A", CONTEXTS),
    "stranger": lambda _: pdu.request("B", "STRANGER", CONTEXTS),
    "echo": lambda _: pdu.p_data(3, pdu.COMMAND, echo_request()),
    "store command": lambda uid: pdu.p_data(1, pdu.COMMAND, store_request(uid)),
    "half a command": lambda uid: _unfinished(1, pdu.COMMAND, store_request(uid)[:40]),
    "data set": lambda uid: pdu.p_data(1, 0, data_set(uid)),
    "half a data set": lambda uid: _unfinished(1, 0, data_set(uid)[:60]),
    "data set elsewhere": lambda uid: pdu.p_data(3, 0, data_set(uid)),
    "unknown context": lambda uid: pdu.p_data(99, pdu.COMMAND, store_request(uid)),
    "no data set": lambda uid: pdu.p_data(1, pdu.COMMAND, store_request(uid, follows=commands.NO_DATA_SET)),
    "cancel": lambda _: pdu.p_data(1, pdu.COMMAND, commands.make([
        (commands.FIELD, commands.u16(commands.C_CANCEL_RQ)), (commands.RESPONDED_TO, commands.u16(1)),
        (commands.DATA_SET_TYPE, commands.u16(commands.NO_DATA_SET)),
    ])),
    "find": lambda _: pdu.p_data(1, pdu.COMMAND, commands.make([
        (commands.FIELD, commands.u16(commands.C_FIND_RQ)), (commands.MESSAGE_ID, commands.u16(1)),
        (commands.DATA_SET_TYPE, commands.u16(commands.NO_DATA_SET)),
    ])),
    "empty P-DATA": lambda _: pdu.HEADER.pack(pdu.P_DATA, 0),
    "empty PDV": lambda _: pdu.HEADER.pack(pdu.P_DATA, 6) + pdu.PDV.pack(2, 1, 0),
    "PDV beyond its PDU": lambda _: pdu.HEADER.pack(pdu.P_DATA, 6) + pdu.PDV.pack(4000, 1, 0),
    "PDV of one byte": lambda _: pdu.HEADER.pack(pdu.P_DATA, 6) + pdu.PDV.pack(1, 1, 0),
    "too long": lambda _: pdu.HEADER.pack(pdu.P_DATA, pdu.MAX_LENGTH + 13),
    "gigabytes": lambda _: pdu.HEADER.pack(pdu.P_DATA, 0xFFFFFFFF),
    "accept": lambda _: pdu.HEADER.pack(pdu.ASSOCIATE_AC, 10) + bytes(10),
    "reject": lambda _: pdu.reject(1, 1, 1),
    "release": lambda _: pdu.RELEASE_REQUEST,
    "release response": lambda _: pdu.RELEASE_RESPONSE,
    "long release": lambda _: pdu.HEADER.pack(pdu.RELEASE_RQ, 400) + bytes(400),
    "abort": lambda _: pdu.abort(0),
    "unknown type": lambda _: pdu.HEADER.pack(0xAB, 4) + bytes(4),
    "http": lambda _: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}  # fmt: skip


def _unfinished(context: int, control: int, payload: bytes) -> bytes:
    return pdu.HEADER.pack(pdu.P_DATA, len(payload) + 6) + pdu.PDV.pack(len(payload) + 2, context, control) + payload


def _bend(data: bytes, rng: random.Random) -> bytes:
    bent = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(4):
            case 0 if bent:
                bent[rng.randrange(len(bent))] = rng.randrange(256)
            case 1 if bent:
                del bent[rng.randrange(len(bent)) :]
            case 2:
                bent[rng.randrange(len(bent) + 1) : 0] = rng.randbytes(rng.randint(1, 8))
            case _ if len(bent) >= 6:
                struct.pack_into(">I", bent, 2, rng.choice((0, 1, 3, 70, 131072, 131085, 2**31, 2**32 - 1)))
    return bytes(bent)


def _sequence(at: Serving, seed: int) -> None:
    """Say a few things, right ones and wrong ones, and leave, orderly or not; never wait for an answer too long."""
    rng = random.Random(seed)
    names = ["request"] if rng.random() < 0.8 else []
    names += rng.choices(sorted(STEPS), k=rng.randint(1, 5))
    with suppress(OSError), Raw(at.port, 5) as peer:
        for number, name in enumerate(names):
            data = STEPS[name](f"1.2.3.{seed}.{number}")
            bent = rng.random() < 0.3
            peer.say(_bend(data, rng) if bent else data)
            if name == "request" and number == 0:
                # Half a request has no answer before its deadline.
                peer.socket.settimeout(0.02 if bent else 5)
                with suppress(TimeoutError):
                    peer.hear()
        if rng.random() < 0.5:
            peer.socket.shutdown(socket.SHUT_WR)
            peer.socket.settimeout(5)
            while peer.socket.recv(65536):
                pass
        elif rng.random() < 0.5:
            peer.reset()


def test_whatever_is_said_in_whatever_state(at: Serving) -> None:
    """F14: 10,000 sequences. No unhandled exception, no stuck state, honest peers served, nothing wrong is kept."""
    with capture_logs() as logs, ThreadPoolExecutor(SENDERS) as pool:
        for done in range(0, SEQUENCES, 1000):
            list(pool.map(lambda seed: _sequence(at, seed), range(done, done + 1000)))
            with associated(at.port) as honest:
                assert honest.echo() == 0
                assert honest.store(f"1.9.{done}", data_set(f"1.9.{done}")) == 0
                assert honest.release() == pdu.RELEASE_RP
        until(lambda: forgotten(at), "every slot is free again")
        at.stage.step()
    unforeseen = [one for one in logs if one["event"] in {"association.failed", "instance.failed", "receiver.failed"}]
    assert unforeseen == []
    for kind, fields in at.journalled():
        if kind == "stored":
            uid = fields["sop_instance_uid"]
            assert at.read(fields) == data_set(uid), "what was kept is what one message said"
            assert (fields["calling_ae"], fields["called_ae"]) == ("A", "B"), "nothing is kept after a reject"
    assert {f"1.9.{done}" for done in range(0, SEQUENCES, 1000)} <= {
        fields["sop_instance_uid"] for kind, fields in at.journalled() if kind == "stored"
    }


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (pdu.HEADER.pack(pdu.P_DATA, pdu.MAX_LENGTH + 13), pdu.INVALID_PARAMETER),
        (STEPS["PDV beyond its PDU"](""), pdu.INVALID_PARAMETER),
        (STEPS["PDV of one byte"](""), pdu.INVALID_PARAMETER),
        (STEPS["data set"]("1.2"), pdu.UNEXPECTED_PARAMETER),
        (STEPS["store command"]("1.2") + STEPS["data set elsewhere"]("1.2"), pdu.UNEXPECTED_PARAMETER),
        (STEPS["store command"]("1.2") + STEPS["echo"](""), pdu.UNEXPECTED_PARAMETER),
        (STEPS["unknown type"](""), pdu.UNRECOGNISED_PDU),
        (STEPS["request"](""), pdu.UNEXPECTED_PDU),
        (STEPS["unknown context"]("1.2"), pdu.INVALID_PARAMETER),
        (pdu.p_data(1, pdu.COMMAND, bytes(70_000), 65536), pdu.INVALID_PARAMETER),
    ],
)
def test_what_is_wrong_is_aborted_with_its_reason(at: Serving, said: bytes, reason: int) -> None:
    """PS3.8 9.3.8, by the table of receive-performance 2.3."""
    with associated(at.port) as peer:
        peer.say(said)
        assert peer.hear() == (pdu.ABORT, bytes((0, 0, 2, reason)))
        assert peer.hear() == (0, b"")
    assert [kind for kind, _ in at.journalled() if kind == "stored"] == []


def test_all_that_the_standard_allows_is_understood(at: Serving) -> None:
    """Command and data set in one PDU, empty PDVs also as the last, odd pieces, several messages in one PDU, an echo
    between two stores, a second request before the first answer, a cancel."""
    one, two = data_set("1.2.1"), data_set("1.2.2", 5000)

    def pdv(context: int, control: int, payload: bytes) -> bytes:
        return pdu.PDV.pack(len(payload) + 2, context, control) + payload

    def whole(*pdvs: bytes) -> bytes:
        return pdu.HEADER.pack(pdu.P_DATA, sum(map(len, pdvs))) + b"".join(pdvs)

    command = store_request("1.2.1")
    with associated(at.port) as peer:
        peer.say(
            whole(pdv(1, 1, command[:11]), pdv(1, 3, command[11:]), pdv(1, 0, one[:7])),
            whole(pdv(1, 0, b""), pdv(1, 0, one[7:])),
            whole(pdv(1, 2, b""), pdv(3, 3, echo_request(9)), pdv(1, 3, store_request("1.2.2", message=2))),
            whole(pdv(1, 2, two)),
            STEPS["cancel"](""),
            whole(pdv(1, 3 | 0xF0, store_request("1.2.3", message=3)), pdv(1, 0xF2, data_set("1.2.3"))),
        )  # fmt: skip
        assert [peer.status() for _ in range(4)] == [0, 0, 0, 0]
        peer.say(STEPS["no data set"]("1.2.4"))
        assert peer.status() == 0xC000
        peer.say(STEPS["find"](""))
        assert peer.status() == 0x0211
        assert peer.echo() == 0, "the association lives"
        assert peer.release() == pdu.RELEASE_RP
    kept = {fields["sop_instance_uid"]: at.read(fields) for kind, fields in at.journalled() if kind == "stored"}
    assert kept == {"1.2.1": one, "1.2.2": two, "1.2.3": data_set("1.2.3")}


def test_who_releases_and_does_not_close_keeps_a_slot_and_no_more(tmp_path: Path) -> None:
    """Bites: free the slot first, and threads and descriptors grow as fast as a client opens associations."""
    with serving(tmp_path, scp={"max_associations": 10}) as at, ExitStack() as stack:
        before = threading.active_count()
        refused = 0
        for _ in range(200):
            peer = stack.enter_context(Raw(at.port))
            peer.say(pdu.request("B", "A", CONTEXTS))
            kind, _ = peer.hear()
            refused += kind == pdu.ASSOCIATE_RJ
            if kind == pdu.ASSOCIATE_AC:
                assert peer.release() == pdu.RELEASE_RP
        assert threading.active_count() <= before + 10
        assert refused > 100
        until(lambda: at.board.associations == 0, "their slots are freed though they do not close")


def test_a_store_needs_a_storage_class_on_a_context_of_one(at: Serving) -> None:
    with associated(at.port) as peer:
        assert peer.store("1.2.1", data_set("1.2.1"), context=3) == 0x0122
        command = store_request("1.2.2", sop_class="1.2.840.10008.1.1")
        peer.say(pdu.p_data(1, pdu.COMMAND, command), pdu.p_data(1, 0, data_set("1.2.2")))
        assert peer.status() == 0x0122
        assert peer.store("1.2.3\0004", data_set("1.2.3\0004")) == 0xC000
    assert [fields["sop_instance_uid"] for kind, fields in at.journalled() if kind != "ended"] == ["1.2.3?4"]


@pytest.mark.parametrize("ending", ["release", "abort", "reset"])
def test_a_data_set_that_is_not_completed_leaves_nothing(at: Serving, ending: str) -> None:
    with associated(at.port) as peer:
        peer.say(STEPS["store command"]("1.2.1"), _unfinished(1, 0, bytes(100_000)), _unfinished(1, 0, bytes(100_000)))
        for _ in range(12):
            peer.say(_unfinished(1, 0, bytes(100_000)))
        if ending == "release":
            assert peer.release() == pdu.RELEASE_RP
        elif ending == "abort":
            peer.say(pdu.abort(0))
        else:
            peer.reset()
        until(lambda: forgotten(at), "ended")
    assert [kind for kind, _ in at.journalled()] == []
    assert list((at.root / "objects" / "incoming").iterdir()) == []


# F11, F12, F13 ---------------------------------------------------------------------------------------------------


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_thousand_silent_and_a_thousand_half_spoken_connections(tmp_path: Path) -> None:
    """F11. Bites: give each connection a thread, or a slot, before it has asked."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with serving(tmp_path, scp={"max_associations": 5}) as at, ExitStack() as stack:
        before, threads = resident(), threading.active_count()
        for number in range(2000):
            peer = stack.enter_context(Raw(at.port))
            if number % 2:
                peer.say(pdu.request("B", "A", CONTEXTS)[: random.Random(number).randint(1, 100)])
            if number % 100 == 0:
                with associated(at.port) as honest:
                    assert honest.echo() == 0
                    assert honest.release() == pdu.RELEASE_RP
        until(lambda: at.board.pending == 2000, "all of them are heard out")
        assert threading.active_count() <= threads + 5
        assert resident() - before < 64 * 2**20


def test_dripping_is_cut_and_slowness_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F12: one byte now and then inside a PDU is no progress; 64 KiB within each deadline is. A hundred of either."""
    monkeypatch.setattr(intake_module, "STALL_S", 2.0)
    with serving(tmp_path, scp={"max_associations": 250}) as at, ExitStack() as stack:
        drips = [stack.enter_context(associated(at.port)) for _ in range(100)]
        honest = [stack.enter_context(associated(at.port)) for _ in range(100)]
        frames = []
        for number in range(len(honest)):
            uid = f"1.2.5.{number}"
            data = pdu.p_data(1, 0, data_set(uid, 600_000), pdu.MAX_LENGTH)
            frames.append(pdu.p_data(1, pdu.COMMAND, store_request(uid)) + data)
        for one in drips:
            one.say(pdu.HEADER.pack(pdu.P_DATA, 1000))
        for place in range(0, max(map(len, frames)), 60_000):
            for one in drips:
                with suppress(OSError):
                    one.say(b"\0")
            for one, frame in zip(honest, frames, strict=True):
                one.say(frame[place : place + 60_000])
            pause(0.2)
        assert [one.status() for one in honest] == [0] * 100
        until(lambda: at.board.associations == 100, "every drip is cut, and nobody else")


def test_two_thousand_resets(at: Serving) -> None:
    """F13: before, within and after the association request; afterwards no thread and no slot is left."""
    before = threading.active_count()
    for number in range(2000):
        with suppress(OSError):
            peer = Raw(at.port)
            if number % 3:
                peer.say(pdu.request("B", "A", CONTEXTS)[: None if number % 3 == 2 else 50])
            if number % 6 == 5:
                peer.hear()
            peer.reset()
    until(lambda: forgotten(at), "every slot is free again")
    until(lambda: threading.active_count() <= before + 20, "the threads have gone")
    with associated(at.port) as honest:
        assert honest.echo() == 0


# F15, names ------------------------------------------------------------------------------------------------------


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The receiving stage as processes; gives its port and data folder."""
    titles = [{"ae_title": "B", "settings": {"pipeline-chest": "chest-ct"}}]
    config = describe(tmp_path, ae_titles=titles, sources=[{"ae_title": "A", "host": "127.0.0.1"}])
    checked = check_config(config).config
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-P", "-m", "console.serve", "intake", str(config)], stderr=log)
    wait_for_port(checked.gateway.scp.port, process)
    yield checked.gateway.scp.port, checked.data
    process.terminate()
    assert process.wait(30) == 0


def _peak(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(one for one in status.splitlines() if one.startswith("VmHWM")).split()[1]) * 1024


def test_half_a_gigabyte_in_little_memory(intake: tuple[int, Path]) -> None:
    """F15: 512 MiB in one instance; no process of receiving takes more than 200 MiB at any time."""
    port, data = intake
    size = 512 * 2**20
    head = data_set("1.2.7", 0)[:-12] + struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, size)
    with associated(port) as peer:
        peer.say(pdu.p_data(1, pdu.COMMAND, store_request("1.2.7")), _unfinished(1, 0, head))
        piece = _unfinished(1, 0, bytes(64 * 1024))
        for _ in range(size // (64 * 1024)):
            peer.say(piece)
        peer.say(pdu.p_data(1, 0, b""))
        assert peer.status() == 0
    until(lambda: bool(_processes(data)), "receiving says its processes")
    peaks = {name: _peak(pid) // 2**20 for name, pid in _processes(data).items()}
    assert max(peaks.values()) <= 200, peaks


def _processes(data: Path) -> dict[str, int]:
    beat = next((one for one in read_heartbeats(data / "run") if one.stage == "intake"), None)
    return dict(beat.facts.get("processes", {})) if beat else {}  # type: ignore[call-overload]


def test_an_endless_message_is_aborted_at_the_cap(at: Serving) -> None:
    with associated(at.port) as peer:
        peer.say(pdu.p_data(1, pdu.COMMAND, store_request("1.2.8")))
        with suppress(OSError):
            for _ in range(100):
                peer.say(_unfinished(1, 0, bytes(64 * 1024)))
        until(lambda: forgotten(at), "aborted")
    assert list((at.root / "objects" / "incoming").iterdir()) == []


HOSTILE = [
    "../../EVIL",
    "/tmp/EVIL",
    "EVIL\\..\\..\\x",
    "EVIL\x00/etc",
    "EVIL" * 30,
    "1.2;EVIL|x",
    "%2e%2e/EVIL",
    "~/EVIL",
]


def test_no_name_from_the_wire_becomes_a_path(tmp_path: Path) -> None:
    """At the level of system calls: whatever UIDs and AE titles say, no file is named by them."""
    titles = [{"ae_title": "B", "settings": {"pipeline-chest": "chest-ct"}}]
    scp = {"port": free_port(), "reject_unknown_sources": False, "workers": 1}
    config = describe(tmp_path, ae_titles=titles, scp=scp)
    port = check_config(config).config.gateway.scp.port
    trace = tmp_path / "trace"
    serve = [sys.executable, "-P", "-m", "console.serve", "intake", str(config)]
    strace = [str(need(Path("/usr/bin/strace"), "strace")), "-f", "-s", "300", "-e", "trace=%file", "-o", str(trace)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*strace, *serve], stdin=subprocess.DEVNULL, stderr=log)
    try:
        wait_for_port(port, process)
        statuses = []
        for text in HOSTILE:
            with Raw(port) as peer:
                peer.associate(calling=text.replace("\0", "")[:16])
                statuses.append(peer.store(text, data_set(text)))
                assert peer.store("1.2.3", data_set("1.2.3", study=text)) == 0xC000
                assert peer.store("1.2.3", data_set("1.2.3", 2_000_000, study=text)) == 0xC000
                assert peer.release() == pdu.RELEASE_RP
        assert set(statuses) == {0xC000}
    finally:
        drain_traced(process)
    calls = trace.read_text(errors="replace")
    assert "openat" in calls
    assert "EVIL" not in calls
