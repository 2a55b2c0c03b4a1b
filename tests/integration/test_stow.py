"""Receiving by STOW-RS: the same identity, journal and statuses as by C-STORE; streamed, bounded, closed."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.certificates import Authority
from support.dcmtk import storescu
from support.processes import clarion
from support.raw import CT, EXPLICIT, data_set
from support.scp import serving
from support.stow import HEADERS, TOKEN, Stow, listed, multipart
from support.system import describe, running
from support.world import free_port, make_series, pause, uid_of

from clarion.dicom import part10, split_part10
from clarion.digests import digest_of
from clarion.errors import ConfigError
from clarion.model import Destination, WebAccess
from console.checks import check_config
from gateway.scu import Requestor, Timeouts
from gateway.web_peer import WebPeer


@pytest.fixture
def stow(tmp_path: Path) -> Iterator[Stow]:
    one = Stow(tmp_path / "gateway")
    yield one
    one.stage.drain()


def file(uid: str, data: bytes | None = None) -> bytes:
    data = data_set(uid) if data is None else data
    return part10(data, sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT)


def test_what_is_acknowledged_is_kept_byte_for_byte_and_journalled_as_by_c_store(stow: Stow, tmp_path: Path) -> None:
    files = make_series(tmp_path / "series")
    answer = stow.post(*[one.read_bytes() for one in files])
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/dicom+json")
    assert {uid for uid, _ in listed(answer, "00081199")} == set(map(uid_of, files))
    assert stow.kept() == {uid_of(one): split_part10(one.read_bytes())[0] for one in files}
    by_stow = [fields for kind, fields in stow.journalled() if kind == "stored"]
    with serving(tmp_path / "dimse") as at:
        storescu(files, at.port, calling="A", called="B")
        by_dimse = [fields for kind, fields in at.journalled() if kind == "stored"]
    for one, other in zip(by_stow, by_dimse, strict=True):
        assert set(one) == set(other)
        assert one["object"]["digest"] == other["object"]["digest"]
        assert {**one, "object": 0, "association": 0, "calling_ae": 0} == {
            **other, "object": 0, "association": 0, "calling_ae": 0,
        }  # fmt: skip
    ended = [fields for kind, fields in stow.journalled() if kind == "ended"]
    assert [(one["calling_ae"], one["called_ae"], one["stored"], one["reason"]) for one in ended] == [
        ("WEB", "B", len(files), "released")
    ]


def test_each_instance_has_its_own_result(stow: Stow) -> None:
    """As by C-STORE: 0xA900, 0xC000, quarantined; what is no DICOM file is counted without a name."""
    other = data_set("1.2.99")
    files = [file("1.2.1"), file("1.2.2", other), file("1.2.3", data_set("1.2.3")[:-10]), b"no DICOM at all", b""]
    answer = stow.post(*files)
    assert answer.status_code == 202
    assert listed(answer, "00081199") == [("1.2.1", 0)]
    assert listed(answer, "00081198") == [("1.2.2", 0xA900), ("1.2.3", 0xC000)]
    assert listed(answer, "0008119A") == [("", 0xC000), ("", 0xC000)]
    kinds = [(kind, fields.get("reason")) for kind, fields in stow.journalled() if kind not in {"ended", "opened"}]
    assert kinds == [("stored", None), ("quarantined", "sop-instance-mismatch"), ("quarantined", "truncated")]
    assert stow.post(files[1]).status_code == 409


def test_what_may_be_stored_is_what_an_association_may_store(tmp_path: Path) -> None:
    """Bites: ask for the standard's Storage classes only, and a private one is kept against `gateway.scp`."""
    private = part10(data_set("1.2.1"), sop_class_uid="1.3.6.1.4.1.1", sop_instance_uid="1.2.1",
                     transfer_syntax_uid=EXPLICIT)  # fmt: skip
    stow = Stow(tmp_path / "gateway", scp={"accept_private_sop_classes": False})
    try:
        answer = stow.post(private)
        assert (answer.status_code, listed(answer, "00081198")) == (409, [("1.2.1", 0x0122)])
    finally:
        stow.stage.drain()


@pytest.mark.parametrize("boundary", ["boundary*=utf-8''bb", "boundary*0=b; boundary*1=b"])
def test_a_boundary_may_be_written_as_rfc_2231_has_it(boundary: str, stow: Stow) -> None:
    answer = stow.post(file("1.2.1"), **{"Content-Type": f'multipart/related; type="application/dicom"; {boundary}'})
    assert answer.status_code == 200


def test_a_changed_client_ca_counts_at_once(tmp_path: Path) -> None:
    """Whom the old one vouches for is let in no longer. Bites: take over the certificate and leave who is believed."""
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    pair = old.issue("ours", "127.0.0.1")
    believed = tmp_path / "believed.pem"
    believed.write_bytes(old.ca.read_bytes())
    tls = {"certificate": str(pair.certificate), "key": str(pair.key), "client_ca": str(believed)}
    stow = Stow(tmp_path / "gateway", stow={"tls": tls})

    def post(by: Authority) -> int:
        theirs = by.issue("theirs")
        context = ssl.create_default_context(cafile=old.ca)
        context.load_cert_chain(theirs.certificate, theirs.key)
        body, kind = multipart(file("1.2.1"))
        url = f"https://127.0.0.1:{stow.port}/B/studies"
        answer = httpx.post(url, content=body, headers={**HEADERS, "Content-Type": kind}, verify=context, timeout=30)
        return answer.status_code

    try:
        assert post(old) == 200
        with pytest.raises(httpx.TransportError):
            post(new)
        believed.write_bytes(new.ca.read_bytes())
        assert post(new) == 200
        with pytest.raises(httpx.TransportError):
            post(old)
    finally:
        stow.stage.drain()


def test_a_study_in_the_path_has_to_be_that_of_the_instances(stow: Stow) -> None:
    right, wrong = file("1.2.1"), file("1.2.2", data_set("1.2.2", study="1.2.77"))
    answer = stow.post(right, wrong, path="/B/studies/1.2.9")
    assert answer.status_code == 202
    assert listed(answer, "00081198") == [("1.2.2", 0xA900)]
    assert stow.post(right, path="/B/studies/no-uid").status_code == 400


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/B/studies", {"Authorization": ""}, 401),
        ("/B/studies", {"Authorization": "Bearer wrong"}, 401),
        ("/B/studies", {"Authorization": f"Basic {TOKEN}"}, 401),
        ("/X/studies", {}, 404),
        ("/B/series", {}, 404),
        ("/B/studies", {"Content-Type": "multipart/related; type=application/dicom+json; boundary=bb"}, 415),
        ("/B/studies", {"Content-Type": "application/dicom"}, 415),
        ("/B/studies", {"Content-Type": "multipart/related; boundary="}, 400),
        ("/B/studies", {"Accept": "application/dicom+xml"}, 406),
    ],
)
def test_who_and_what_is_turned_away(path: str, headers: dict[str, str], status: int, stow: Stow) -> None:
    """Bites: leave one route without the check, and anybody stores."""
    answer = stow.post(file("1.2.1"), path=path, **headers)
    assert answer.status_code == status
    assert "detail" in answer.json()
    assert stow.kept() == {}


def test_a_body_that_is_cut_acknowledges_nothing(stow: Stow) -> None:
    body, kind = multipart(file("1.2.1"), file("1.2.2"))
    answer = httpx.post(
        f"{stow.url}/B/studies", content=body[:-300], headers={**HEADERS, "Content-Type": kind}, timeout=30
    )
    assert answer.status_code == 400
    assert "last boundary" in answer.json()["detail"]
    with socket.create_connection(("127.0.0.1", stow.port)) as peer:
        head = f"POST /B/studies HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {kind}\r\n"
        peer.sendall(head.encode() + b"Content-Length: 100000\r\n\r\n" + body[:200])
    for _ in range(500):
        if [1 for kind, _ in stow.journalled() if kind == "ended"] and not stow.stage.facts()["requests"]:
            break
        pause(0.01)
    assert stow.stage.facts()["requests"] == 0
    assert set(stow.kept()) <= {"1.2.1"}


def test_a_large_instance_takes_no_memory(stow: Stow) -> None:
    """300 MB arrive; the process grows by less than a tenth of that. Bites: read the body before it is parsed."""
    size, uid = 300 * 2**20, "1.2.1"
    head = part10(data_set(uid)[:-100], sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT)
    head = head[:-4] + size.to_bytes(4, "little")
    block = bytes(2**20)

    def body() -> Iterator[bytes]:
        yield b"--bb\r\nContent-Type: application/dicom\r\n\r\n" + head
        for _ in range(300):
            yield block
        yield b"\r\n--bb--\r\n"

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind = multipart()[1]
    answer = httpx.post(f"{stow.url}/B/studies", content=body(), headers={**HEADERS, "Content-Type": kind}, timeout=120)
    assert answer.status_code == 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30 * 1024
    stored = [fields for kind, fields in stow.journalled() if kind == "stored"]
    assert stored[0]["object"]["size_bytes"] > size


def _endless(head: bytes) -> Iterator[bytes]:
    yield head
    for _ in range(200):
        yield bytes(2**20)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"--bb\r\nContent-Type: application/dicom\r\n\r\n%b", "does not end"),
        (b"--bb\r\nContent-Type: text/plain\r\n\r\n", "does not end"),
        (b"--bb\r\nX: ", "header fields"),
        (b"not a boundary", "before the first boundary"),
        (b"--bb\r\nContent-Type: application/dicom\r\n\r\n%b\r\n--bb--\r\n", "behind the last"),
    ],
)
def test_an_endless_body_is_cut_at_the_cap(head: bytes, said: str, tmp_path: Path) -> None:
    """F15 by STOW-RS: 200 MiB where 3 MB may come. Bites: read and drop until the client is done."""
    stow = Stow(tmp_path, scp={"max_instance_gb": 0.003})
    uid, heard = "1.2.1", b""
    begun = head.replace(b"%b", file(uid)[:-100] if said == "does not end" else file(uid))
    request = (
        f"POST /B/studies HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {multipart()[1]}\r\n"
        f"Content-Length: {2**40}\r\n\r\n"
    )
    sent = 0
    try:
        with socket.create_connection(("127.0.0.1", stow.port), timeout=30) as peer:
            peer.sendall(request.encode())
            with contextlib.suppress(OSError):
                for piece in _endless(begun):
                    peer.sendall(piece)
                    sent += len(piece)
            with contextlib.suppress(OSError):
                heard = peer.recv(65536)
        assert sent < 100 * 2**20
        assert not heard or (b" 400 " in heard and said.encode() in heard)
        for _ in range(500):
            if not stow.stage.facts()["requests"]:
                break
            pause(0.01)
        assert stow.stage.facts()["requests"] == 0
        assert set(stow.kept()) == ({uid} if said == "behind the last" else set())
        incoming = tmp_path / "objects" / "incoming"
        assert not incoming.exists() or not list(incoming.iterdir())
    finally:
        stow.stage.drain()


def test_short_disk_is_said_before_anything_is_read_and_ends_by_itself(tmp_path: Path) -> None:
    stow = Stow(tmp_path / "gateway", intake={"watermark_percent": 100, "reserve_gb": 10**6})
    try:
        answer = stow.post(file("1.2.1"))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")
        assert stow.stage.facts()["refusals"] == {"disk-space": 1}
    finally:
        stow.stage.drain()


def test_requests_at_once_are_bounded(tmp_path: Path) -> None:
    stow = Stow(tmp_path / "gateway", stow={"max_requests": 1})
    go = threading.Event()
    body, kind = multipart(file("1.2.1"))

    def slowly() -> Iterator[bytes]:
        yield body[:100]
        go.wait(20)
        yield body[100:]

    answers: list[int] = []

    def send() -> None:
        headers = {**HEADERS, "Content-Type": kind}
        answers.append(httpx.post(f"{stow.url}/B/studies", content=slowly(), headers=headers, timeout=30).status_code)

    try:
        thread = threading.Thread(target=send)
        thread.start()
        for _ in range(500):
            if stow.stage.facts()["requests"]:
                break
            pause(0.01)
        refused = stow.post(file("1.2.2"))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        go.set()
        thread.join()
        assert answers == [200]
    finally:
        stow.stage.drain()


def test_our_own_client_delivers_to_our_own_server_under_tls(tmp_path: Path) -> None:
    """The pair that two sites of ours make; a renewed certificate is shown without a restart."""
    authority = Authority(tmp_path / "authority")
    pair = authority.issue("ours", "127.0.0.1")
    tls = {"certificate": str(pair.certificate), "key": str(pair.key)}
    stow = Stow(tmp_path / "gateway", stow={"tls": tls})
    try:
        context = ssl.create_default_context(cafile=authority.ca)

        def shown() -> bytes:
            with (
                socket.create_connection(("127.0.0.1", stow.port)) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
            ):
                return secured.getpeercert(binary_form=True) or b""

        first = shown()
        from support.delivering import data_set as described
        from support.delivering import encoded

        from clarion.adapters.memory import MemoryStore
        from clarion.model import ResultInstance, SeriesUid, SopInstanceUid, StudyUid, TlsFiles

        store, data = MemoryStore(), encoded(described(1))
        instance = ResultInstance(
            output="o", modality="CT", study_uid=StudyUid("1.2"), series_uid=SeriesUid("1.2.3"),
            sop_instance_uid=SopInstanceUid("1.2.3.1"), sop_class_uid=CT, transfer_syntax_uid=EXPLICIT,
            object=store.put(data),
        )  # fmt: skip
        destination = Destination(
            name="site", ae_title="", host="", port=0, tls=TlsFiles(trusted=authority.ca),
            web=WebAccess(url=f"https://127.0.0.1:{stow.port}/B", secret=TOKEN),
        )  # fmt: skip
        with WebPeer(destination, Timeouts(connect_s=30, dimse_s=30)) as peer:
            assert peer.store([instance], store) == {"1.2.3.1": (0, "")}
        assert stow.kept() == {"1.2.3.1": data}
        authority.issue("ours", "127.0.0.1")
        stow.stage.step()
        assert shown() != first
    finally:
        stow.stage.drain()


def test_a_study_by_stow_becomes_a_job_in_the_running_system(tmp_path: Path) -> None:
    """As a process of `clarion up`; a restart in the middle finds everything that was acknowledged."""
    port = free_port()
    client = {"ae_title": "WEB", "token": TOKEN}
    config = describe(tmp_path / "clarion", stow={"port": port, "clients": [client]})
    files = make_series(tmp_path / "series")
    body, kind = multipart(*[one.read_bytes() for one in files])
    with running(config) as system:
        answer = httpx.post(
            f"http://127.0.0.1:{port}/CHEST/studies",
            content=body,
            headers={**HEADERS, "Content-Type": kind},
            timeout=30,
        )
        assert answer.status_code == 200
    with running(config) as system:
        system.wait_for(lambda: bool(system.studies()), "the study")
        view = system.wait_for_state(system.studies()[0], "Produced", "Failed")
        assert view.state == "Produced"
        digests = {digest_of(split_part10(one.read_bytes())[0]) for one in files}
        assert len(digests) == len(files)


def test_a_connection_that_asks_for_nothing_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bites: leave it to the web server, and silent connections stay until there is no descriptor left."""
    monkeypatch.setattr("console.web_server.FIRST_REQUEST_S", 0.5)
    stow = Stow(tmp_path / "gateway")
    try:
        for said in (b"", b"POST /B/studies HTTP/1.1\r\nHost: h\r\n"):
            with socket.create_connection(("127.0.0.1", stow.port), 20) as peer:
                peer.sendall(said)
                assert peer.recv(100) == b""
        assert stow.post(file("1.2.1")).status_code == 200
    finally:
        stow.stage.drain()


def test_two_clients_may_not_have_one_token(tmp_path: Path) -> None:
    """Bites: take the last that fits, and instances are said to come from somebody else."""
    path = tmp_path / "clarion.yaml"
    clients = [{"ae_title": "WEB", "token": TOKEN}, {"ae_title": "OTHER", "token": TOKEN}]
    path.write_text(json.dumps({"gateway": {"stow": {"clients": clients}}}))
    with pytest.raises(ConfigError, match="used twice") as caught:
        check_config(path)
    assert TOKEN not in str(caught.value)


def test_beyond_loopback_it_needs_tls(tmp_path: Path) -> None:
    path = tmp_path / "clarion.yaml"
    client = {"ae_title": "WEB", "token": TOKEN}
    path.write_text(json.dumps({"gateway": {"stow": {"host": "0.0.0.0", "clients": [client]}}}))
    with pytest.raises(ConfigError, match="tokens would be in the clear; set tls"):
        check_config(path)


def test_what_was_set_aside_can_be_looked_at_and_taken_out(tmp_path: Path) -> None:
    config = describe(tmp_path / "clarion")
    broken = data_set("1.2.3")[:-10]
    with running(config) as system:
        peer = Destination(name="c", ae_title="CHEST", host="127.0.0.1", port=system.scp)
        timeouts = Timeouts(connect_s=30, dimse_s=30)
        with Requestor(peer, own_ae="SENDER", classes=[(CT, EXPLICIT)], timeouts=timeouts) as scu:
            assert scu.store(broken, sop_class=CT, sop_instance="1.2.3", syntax=EXPLICIT) == 0xC000
        system.wait_for(lambda: "truncated" in clarion("quarantine", "list", "-c", config).stdout, "the quarantine")
        (row,) = json.loads(clarion("quarantine", "list", "-c", config, "--json").stdout)
        found = row["quarantine_id"][:8]
        assert "SENDER" in clarion("quarantine", "show", found, "-c", config).stdout
        target = tmp_path / "out.dcm"
        assert clarion("quarantine", "export", found, target, "-c", config).returncode == 0
        assert split_part10(target.read_bytes()) == (broken, EXPLICIT)
        assert target.stat().st_mode & 0o077 == 0
        unknown = clarion("quarantine", "show", "zzz", "-c", config)
        assert (unknown.returncode, "none in quarantine begin so" in unknown.stderr) == (2, True)
