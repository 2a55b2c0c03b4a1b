"""TLS on both sides (PS3.15 B.12): DCMTK and pynetdicom as peers, what is refused, renewal, and what the wire shows."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pynetdicom import AE, evt
from structlog.testing import capture_logs
from support.certificates import Authority, Pair
from support.dcmtk import ENVIRONMENT, storescu, tool
from support.processes import clarion
from support.raw import CONTEXTS, Raw, data_set
from support.scp import CT, Serving, serving
from support.tap import Tap
from support.threads import ReceiverThreads
from support.world import free_port, make_series, pause, uid_of

from clarion.dicom import split_part10
from clarion.errors import ConfigError, PeerUnavailableError
from clarion.model import Destination, TlsFiles
from console.checks import check_config
from gateway.scu import Requestor, Timeouts
from gateway.wire import pdu

TIMEOUTS = Timeouts(connect_s=30, dimse_s=30)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def ours(authority: Authority) -> Pair:
    return authority.issue("ours", "127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def theirs(authority: Authority) -> Pair:
    return authority.issue("theirs", "127.0.0.1", "localhost")


def secured(pair: Pair, ca: Path | None) -> dict[str, object]:
    return {
        "port": free_port(),
        "certificate": str(pair.certificate),
        "key": str(pair.key),
        "client_ca": str(ca) if ca else None,
    }


@pytest.fixture
def tls(authority: Authority, ours: Pair) -> dict[str, object]:
    return secured(ours, authority.ca)


@pytest.fixture
def at(tmp_path: Path, tls: dict[str, object]) -> Iterator[Serving]:
    with serving(tmp_path / "gateway", scp={"tls": tls}) as one:
        yield one


class Spoken(Raw):
    """A peer at the level of PDUs, under TLS."""

    def __init__(self, port: int, authority: Authority, pair: Pair | None) -> None:
        super().__init__(port)
        context = ssl.create_default_context(cafile=authority.ca)
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        self.socket = context.wrap_socket(self.socket, server_hostname="127.0.0.1")


def port_of(tls: dict[str, object]) -> int:
    assert isinstance(tls["port"], int)
    return tls["port"]


def test_dcmtk_stores_with_mutual_authentication(
    at: Serving, tls: dict[str, object], theirs: Pair, authority: Authority, tmp_path: Path
) -> None:
    files = make_series(tmp_path / "series")
    options = ("+tls", str(theirs.key), str(theirs.certificate), "+cf", str(authority.ca), "-ic")
    acknowledged = storescu(files, port_of(tls), calling="A", called="B", more=options)
    assert {uid for uid, _ in acknowledged} == set(map(uid_of, files))
    stored = [fields for kind, fields in at.journalled() if kind == "stored"]
    assert {(one["sop_instance_uid"], one["object"]["digest"]) for one in stored} == acknowledged
    assert at.board.associations == 0


def test_without_a_certificate_that_is_vouched_for_nobody_speaks(
    at: Serving, tls: dict[str, object], authority: Authority, tmp_path: Path
) -> None:
    """Bites: leave verify_mode as it is by default, and whoever has no certificate is served."""
    stranger = Authority(tmp_path / "stranger").issue("theirs")
    for pair in (None, stranger):
        with capture_logs() as logs:
            with pytest.raises((OSError, AssertionError)):
                Spoken(port_of(tls), authority, pair).associate()
            until_said(logs, "connection.refused")
    until_refused(at, 2)
    assert at.board.refusals == {"tls": 2}
    with Raw(at.port) as plain:
        assert plain.associate().echo() == 0


def until_refused(at: Serving, count: int) -> None:
    for _ in range(500):
        if sum(at.board.refusals.values()) >= count:
            return
        pause(0.01)


def until_said(logs: list[dict[str, object]], event: str) -> None:  # type: ignore[type-arg]
    for _ in range(500):
        if any(one["event"] == event for one in logs):
            return
        pause(0.01)
    raise AssertionError((event, logs))


@pytest.mark.parametrize(("calling", "called", "answer"), [("X", "B", (1, 1, 3)), ("A", "X", (1, 1, 7))])
def test_the_access_list_holds_under_tls_as_well(
    calling: str, called: str, answer: tuple[int, ...], at: Serving, tls: dict[str, object], theirs: Pair,
    authority: Authority,
) -> None:  # fmt: skip
    with Spoken(port_of(tls), authority, theirs) as peer:
        peer.say(pdu.request(called, calling, CONTEXTS))
        kind, body = peer.hear()
        assert (kind, tuple(body[1:])) == (pdu.ASSOCIATE_RJ, answer)
        assert peer.hear()[0] == 0
    until_refused(at, 1)
    assert list(at.board.refusals.values()) == [1]
    assert calling in at.board.last_refusal


def test_each_port_says_so_when_spoken_to_in_the_wrong_way(
    at: Serving, tls: dict[str, object], authority: Authority, theirs: Pair
) -> None:
    with capture_logs() as logs:
        with Raw(port_of(tls)) as plain:
            plain.say(pdu.request("B", "A", CONTEXTS))
            assert plain.hear()[0] == pdu.ABORT
        with pytest.raises(OSError, match=r".+"):
            Spoken(at.port, authority, theirs)
    said = [one["reason"] for one in logs if one["event"] == "connection.refused"]
    assert said == ["no TLS on the port that speaks it", "TLS on a port that speaks in the clear"]


def test_a_hundred_that_shake_no_hands_keep_nobody_out(
    at: Serving, tls: dict[str, object], authority: Authority, theirs: Pair
) -> None:
    """Silent ones stay with the guard, half a greeting costs a worker its deadline; neither costs an association.

    Bites: count who is still shaking hands as an association, and the honest peer is over the limit of 25.
    """
    held = [socket.create_connection(("127.0.0.1", port_of(tls))) for _ in range(100)]
    try:
        for one in held[:40]:
            one.sendall(b"\x16\x03\x01\x02\x00")
        with Spoken(port_of(tls), authority, theirs) as peer:
            assert peer.associate().store("1.2.3", data_set("1.2.3")) == 0
            assert peer.release() == pdu.RELEASE_RP
    finally:
        for one in held:
            one.close()


def test_a_renewed_certificate_is_shown_without_a_restart(authority: Authority, theirs: Pair, tmp_path: Path) -> None:
    """While certificate and key do not go together, the old ones are shown."""
    pair = authority.issue("renewed")
    tls = secured(pair, authority.ca)
    with serving(tmp_path / "gateway", scp={"tls": tls}):
        first = shown(port_of(tls), authority, theirs)
        old_key = pair.key.read_bytes()
        authority.issue("renewed")
        new_key = pair.key.read_bytes()
        pair.key.write_bytes(old_key)
        with capture_logs() as logs:
            assert shown(port_of(tls), authority, theirs) == first
        assert any("the key is not the certificate's" in one.get("reason", "") for one in logs)
        pair.key.write_bytes(new_key)
        assert shown(port_of(tls), authority, theirs) != first


def shown(port: int, authority: Authority, pair: Pair) -> bytes:
    with Spoken(port, authority, pair) as peer:
        assert peer.associate().echo() == 0
        assert isinstance(peer.socket, ssl.SSLSocket)
        return peer.socket.getpeercert(binary_form=True) or b""


def test_old_versions_and_weak_suites_are_refused(
    at: Serving, tls: dict[str, object], authority: Authority, theirs: Pair
) -> None:
    for version, ciphers in ((ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0"), (ssl.TLSVersion.TLSv1_2, "AES128-SHA")):
        context = ssl.create_default_context(cafile=authority.ca)
        context.load_cert_chain(theirs.certificate, theirs.key)
        context.set_ciphers(ciphers)
        context.minimum_version = context.maximum_version = version
        with socket.create_connection(("127.0.0.1", port_of(tls))) as plain, pytest.raises(ssl.SSLError):
            context.wrap_socket(plain, server_hostname="127.0.0.1")
    assert at.board.associations == 0


def test_large_data_sets_and_aborts_within_them(
    at: Serving, tls: dict[str, object], authority: Authority, theirs: Pair
) -> None:
    """A record holds 16 KiB at most: every data set is cut elsewhere than its PDUs."""
    sizes = (1, 16_300, 16_384, 131_072, 3_000_000)
    with Spoken(port_of(tls), authority, theirs) as peer:
        peer.associate()
        for size in sizes:
            assert peer.store(f"1.2.{size}", data_set(f"1.2.{size}", size)) == 0
        peer.say(pdu.p_data_head(1, 0, 50) + bytes(10))
    kept = {fields["sop_instance_uid"]: at.read(fields) for kind, fields in at.journalled() if kind == "stored"}
    assert kept == {f"1.2.{size}": data_set(f"1.2.{size}", size) for size in sizes}


def test_draining_ends_an_association_under_tls(tmp_path: Path, tls: dict[str, object], authority: Authority,
                                                theirs: Pair) -> None:  # fmt: skip
    with serving(tmp_path / "gateway", scp={"tls": tls}) as at:
        peer = Spoken(port_of(tls), authority, theirs).associate()
        receiver = at.stage.receiver
        assert isinstance(receiver, ReceiverThreads)
        for serving_one in list(receiver.workers[0]._worker._open):  # type: ignore[attr-defined]
            serving_one.stop("draining")
        assert peer.hear()[0] == pdu.ABORT
        peer.socket.close()


# As requestor ---------------------------------------------------------------------------------------------------


def peer_at(port: int, authority: Authority, pair: Pair | None, *, check_host: bool = True) -> Destination:
    files = TlsFiles(
        trusted=authority.ca,
        certificate=pair.certificate if pair else None,
        key=pair.key if pair else None,
        check_host=check_host,
    )
    return Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=port, tls=files)


def test_sending_to_dcmtk_under_tls_shows_nothing_on_the_wire(
    authority: Authority, ours: Pair, theirs: Pair, tmp_path: Path
) -> None:
    """Bites: write past the TLS layer, by sendmsg or sendfile on the descriptor, and the proxy reads the UIDs."""
    port = free_port()
    into = tmp_path / "into"
    into.mkdir()
    command = [tool("storescp"), "-aet", "PACS", "-od", str(into), "+B",
               "+tls", str(theirs.key), str(theirs.certificate), "+cf", str(authority.ca), str(port)]  # fmt: skip
    file = make_series(tmp_path / "series")[0]
    data, syntax = split_part10(file.read_bytes())
    with subprocess.Popen(command, env=ENVIRONMENT) as server:
        try:
            until_listening(port)
            with Tap(port) as tap:
                peer = peer_at(tap.port, authority, ours)
                with Requestor(peer, own_ae="US", classes=[(CT, syntax)], timeouts=TIMEOUTS) as requestor:
                    assert requestor.store(data, sop_class=CT, sop_instance=uid_of(file), syntax=syntax) == 0
                seen = tap.seen()
        finally:
            server.terminate()
    assert len(seen) > len(data)
    for said in (b"PACS", uid_of(file).encode(), CT.encode()):
        assert said not in seen
    received = [split_part10(one.read_bytes())[0] for one in into.iterdir()]
    assert received == [data]


def until_listening(port: int) -> None:
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            pause(0.02)
        else:
            return
    raise AssertionError(f"nobody listens on {port}")


def test_a_peer_that_cannot_be_trusted_gets_nothing(authority: Authority, ours: Pair, tmp_path: Path) -> None:
    """Another authority, another name: both are said, and both are worth a retry once somebody has mended them."""
    stranger = Authority(tmp_path / "stranger").issue("theirs")
    elsewhere = authority.issue("elsewhere", "pacs.example.org")
    for pair, said in ((stranger, "not accepted"), (elsewhere, "not accepted")):
        with pynetdicom_server(pair) as port:
            with pytest.raises(PeerUnavailableError, match=said):
                Requestor(peer_at(port, authority, ours), own_ae="US", timeouts=TIMEOUTS)
            if pair is elsewhere:
                peer = peer_at(port, authority, ours, check_host=False)
                with Requestor(peer, own_ae="US", timeouts=TIMEOUTS) as requestor:
                    assert requestor.echo() == 0


class pynetdicom_server:  # noqa: N801  reads as the context manager it is
    def __init__(self, pair: Pair) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        ae = AE(ae_title="PACS")
        ae.add_supported_context("1.2.840.10008.1.1")
        self._server = ae.start_server(
            ("127.0.0.1", 0), block=False, ssl_context=context, evt_handlers=[(evt.EVT_C_ECHO, lambda _: 0)]
        )

    def __enter__(self) -> int:
        assert self._server is not None
        return int(self._server.socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()


def test_echo_and_send_by_hand(
    at: Serving, tls: dict[str, object], authority: Authority, theirs: Pair, tmp_path: Path
) -> None:
    file = make_series(tmp_path / "series")[0]
    peer = f"B@127.0.0.1:{port_of(tls)}"
    both = tmp_path / "both.pem"
    both.write_bytes(theirs.certificate.read_bytes() + theirs.key.read_bytes())
    options = ("--calling", "A", "--tls-ca", authority.ca, "--tls-cert", both)
    done = clarion("echo", peer, *options, "--json")
    assert (done.returncode, json.loads(done.stdout)["status"]) == (0, "0x0000"), done.stderr
    assert clarion("send", file, peer, *options).stdout == "1 acknowledged, 0 refused, 0 skipped\n"
    place = ("--ae", "B", "--port", str(port_of(tls)))
    load = clarion("load", "studies", file, *place, "--count", "3", "--associations", "2", *options, "--json")
    assert (load.returncode, json.loads(load.stdout)["acknowledged"]) == (0, 3), load.stderr
    unknown = clarion("echo", peer, "--calling", "A", "--tls-ca", authority.ca)
    assert unknown.returncode == 3
    assert "the peer ended TLS" in unknown.stderr
    assert "does it want another certificate of ours?" in unknown.stderr
    clear = clarion("echo", peer, "--calling", "A")
    assert "does it speak TLS on this port?" in clear.stderr
    untrusted = clarion("echo", peer, "--calling", "A", "--tls")
    assert untrusted.returncode == 3
    assert "the peer's certificate is not accepted" in untrusted.stderr


def test_faults_of_the_files_are_found_before_anything_starts(
    authority: Authority, ours: Pair, theirs: Pair, tmp_path: Path
) -> None:
    encrypted = tmp_path / "encrypted.key"
    ended = authority.issue("ended", until=datetime(2025, 2, 1, tzinfo=UTC))
    subprocess.run(
        ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", str(ours.key), "-out", str(encrypted)]
        if b"RSA" in ours.key.read_bytes()
        else ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", str(ours.key), "-out", str(encrypted)],
        check=True, capture_output=True,
    )  # fmt: skip
    for certificate, key, said in (
        (ours.certificate, theirs.key, "the key is not the certificate's"),
        (ours.certificate, encrypted, "the key is encrypted"),
        (tmp_path / "none.pem", ours.key, "No such file"),
        (authority.ca, authority.ca, "no PEM file as it should be"),
        (ended.certificate, ended.key, "the certificate ended on"),
    ):
        path = tmp_path / "clarion.yaml"
        path.write_text(json.dumps({"gateway": {"scp": {"tls": {"certificate": str(certificate), "key": str(key)}}}}))
        with pytest.raises(ConfigError, match=said) as caught:
            check_config(path)
        assert "gateway.scp.tls" in str(caught.value)


def test_who_was_turned_away_takes_nobodys_place(
    at: Serving, tls: dict[str, object], authority: Authority, theirs: Pair
) -> None:
    """Forty are rejected and do not close. Bites: count them until they have, and both ports are full for seconds."""
    held = []
    try:
        for _ in range(40):
            peer = Spoken(port_of(tls), authority, theirs)
            held.append(peer)
            peer.say(pdu.request("X", "A", CONTEXTS))
            assert peer.hear()[0] == pdu.ASSOCIATE_RJ
        assert at.board.associations == 0
        with Spoken(port_of(tls), authority, theirs) as peer:
            assert peer.associate().echo() == 0
        with Raw(at.port) as plain:
            assert plain.associate().echo() == 0
    finally:
        for peer in held:
            peer.socket.close()


def test_the_limit_holds_however_many_ask_at_once(
    tmp_path: Path, tls: dict[str, object], authority: Authority, theirs: Pair
) -> None:
    """Sixteen at the same moment, five are let in. Bites: look and count apart, and several see the last free place."""
    together, answers = threading.Barrier(16, timeout=30), []
    done = threading.Event()

    def ask() -> None:
        with Spoken(port_of(tls), authority, theirs) as peer:
            together.wait()
            peer.say(pdu.request("B", "A", CONTEXTS))
            answers.append(peer.hear()[0])
            done.wait(30)

    with serving(tmp_path / "gateway", workers=2, scp={"tls": tls, "max_associations": 5}) as at:
        threads = [threading.Thread(target=ask) for _ in range(16)]
        for one in threads:
            one.start()
        for _ in range(3000):
            if len(answers) == 16:
                break
            pause(0.01)
        assert at.board.associations == 5
        done.set()
        for one in threads:
            one.join(30)
    assert sorted(answers) == [pdu.ASSOCIATE_AC] * 5 + [pdu.ASSOCIATE_RJ] * 11


def test_an_address_that_greets_by_halves_leaves_others_their_places(
    at: Serving, tls: dict[str, object], authority: Authority, theirs: Pair
) -> None:
    """A hundred of one address before an honest one of another. Bites: take them in the order in which they came."""
    held = [socket.create_connection(("127.0.0.1", port_of(tls)), source_address=("127.0.0.2", 0)) for _ in range(100)]
    try:
        for one in held:
            one.sendall(b"\x16\x03\x01\x02\x00")
        for _ in range(500):
            if sum(one.opening for one in at.board.slots) == 32:
                break
            pause(0.01)
        assert sum(one.opening for one in at.board.slots) == 32
        with Spoken(port_of(tls), authority, theirs) as peer:
            assert peer.associate().echo() == 0
        assert sum(one.opening for one in at.board.slots) == 32, "it did not wait for their deadline"
    finally:
        for one in held:
            one.close()
