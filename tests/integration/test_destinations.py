"""The profile of a destination: associations, PDU length, transfer syntaxes, hours, reachability, DICOMweb."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.dcmtk import need
from support.delivering import EXPLICIT, Rig, data_set, dripping, encoded, peer
from support.processes import DICOMWEB, ORTHANC, clarion, start_orthanc
from support.tap import Tap
from support.world import free_port, pause

from clarion.model import Schedule, Window
from clarion.testing.suites import MOMENT
from console.checks import check_config
from gateway.queries import list_deliveries
from gateway.windows import is_open, opens
from gateway.wire import pdu

CT = "1.2.840.10008.5.1.4.1.1.2"
IMPLICIT = "1.2.840.10008.1.2"
MANY = 40


# Associations ---------------------------------------------------------------------------------------------------


def test_much_work_is_shared_by_as_many_associations_as_the_profile_allows(tmp_path: Path) -> None:
    """Each instance is sent once, whoever took it. Bites: let two threads take the same one, and it is stored twice."""
    together = threading.Barrier(3, timeout=10)

    def status(_: str, __: int) -> int:
        if together.n_waiting or not met:
            together.wait()
            met.append(1)
        return 0

    met: list[int] = []
    with peer(status) as pacs:
        rig = Rig(tmp_path, pacs.port, destination={"max_associations": 3})
        rig.request(count=MANY)
        assert rig.settle().state == "verified"
        assert pacs.stored == {f"1.2.3.{number}": 1 for number in range(MANY)}
        assert pacs.associations[1] == 3


def test_little_work_is_not(tmp_path: Path) -> None:
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port, destination={"max_associations": 3})
        rig.request()
        assert rig.settle().state == "verified"
        assert pacs.associations[1] == 1


def test_a_delivery_in_the_list_can_be_matched_to_its_study(tmp_path: Path) -> None:
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port)
        for name in ("d", "e"):
            rig.request(delivery=name)
        rig.settle()
        rows = list_deliveries(rig.database)
    assert sorted((one.delivery_id, one.study_uid, one.requested) for one in rows) == [
        (name, "1.2", MOMENT.isoformat()) for name in ("d", "e")
    ]


def test_all_destinations_together_have_so_many_and_no_more(tmp_path: Path) -> None:
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port, destination={"max_associations": 8}, scu={"max_associations": 1})
        rig.request(count=MANY)
        assert rig.settle().state == "verified"
        assert pacs.associations[1] == 1


def test_a_peer_that_takes_fewer_gets_everything_on_those(tmp_path: Path) -> None:
    with peer(most=1) as pacs:
        rig = Rig(tmp_path, pacs.port, destination={"max_associations": 3})
        rig.request(count=MANY)
        assert rig.settle().state == "verified"
        assert set(pacs.stored.values()) == {1}
        assert rig.row().attempts == 1


def test_an_association_serves_what_comes_next_and_one_that_has_gone_is_noticed(tmp_path: Path) -> None:
    """Bites: lend an idle association without looking, and the second delivery fails its first attempt."""
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port, verify=False)
        rig.request()
        rig.settle()
        rig.request(delivery="e")
        rig.step_until(lambda: rig.row("e") is not None and rig.row("e").state == "unverified")
        assert pacs.associations[0] == 1
    with peer() as pacs:
        (tmp_path / "again").mkdir()
        rig = Rig(tmp_path / "again", pacs.port, verify=False)
        rig.request()
        rig.settle()
        idle = rig.stage._pool._idle[0].requestor
        idle._dialogue._socket.shutdown(2)  # type: ignore[attr-defined]
        rig.request(delivery="e")
        rig.step_until(lambda: rig.row("e") is not None and rig.row("e").state == "unverified")
        assert (pacs.associations[0], rig.row("e").attempts) == (2, 1)


def test_an_idle_association_is_released_by_itself(tmp_path: Path) -> None:
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port, verify=False)
        rig.stage._pool._idle_s = 0.05
        rig.request()
        rig.settle()
        for _ in range(500):
            if pacs.associations[2] == 0:
                break
            pause(0.01)
        assert pacs.associations == [1, 1, 0]


def test_a_destination_that_cannot_be_reached_is_left_alone_and_holds_up_nobody(tmp_path: Path) -> None:
    """Bites: try it for each delivery, and eight dead ones with a thousand deliveries leave no room for the ninth."""
    dead = [
        {"name": f"dead{number}", "ae_title": "DEAD", "host": "127.0.0.1", "port": free_port()} for number in range(8)
    ]
    with peer() as pacs:
        alive = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": pacs.port}
        rig = Rig(tmp_path, pacs.port, destination=[*dead, alive], scu={"max_associations": 1})
        for number in range(8):
            for once in range(3):
                rig.request(to=f"dead{number}", delivery=f"x{number}-{once}")
        rig.step_until(lambda: len(rig.stage.facts()["destinations_unreached"]) == 8)  # type: ignore[arg-type]
        rig.request()
        rig.step_until(lambda: rig.row() is not None and rig.row().state == "verified")
    attempts = [rig.row(f"x{number}-{once}").attempts for number in range(8) for once in range(3)]
    assert sorted(attempts) == [0] * 16 + [1] * 8


def test_the_peer_s_pdu_length_and_ours_are_both_obeyed(tmp_path: Path) -> None:
    """The longest PDU on the wire has as many bytes as the profile says, header not counted."""
    with peer() as pacs, Tap(pacs.port) as tap:
        rig = Rig(tmp_path, tap.port, destination={"max_pdu": 4096})
        rig.request(pixels=bytes(20_000))
        assert rig.settle().state == "verified"
        assert rig.stage.drain() is None
        data = [len(body) for kind, body in pdus(tap.said()) if kind == pdu.P_DATA]
        assert max(data) == 4096


def pdus(stream: bytes) -> list[tuple[int, bytes]]:
    """Cut what the only client said into PDUs: type and what follows the header."""
    found, at = [], 0
    while at < len(stream):
        kind, length = pdu.HEADER.unpack_from(stream, at)
        found.append((kind, stream[at + 6 : at + 6 + length]))
        at += 6 + length
    return found


def test_only_the_transfer_syntaxes_of_the_profile_are_offered(tmp_path: Path) -> None:
    with peer(syntaxes=(EXPLICIT, IMPLICIT)) as pacs, Tap(pacs.port) as tap:
        rig = Rig(tmp_path, tap.port, destination={"transfer_syntaxes": [IMPLICIT]})
        rig.request()
        assert rig.settle().state == "verified"
        kind, body = pdus(tap.said())[0]
    assert kind == pdu.ASSOCIATE_RQ
    offered = [one.transfer_syntaxes for one in pdu.parse_request(body).contexts if one.abstract_syntax == CT]
    assert offered == [(IMPLICIT,)]


# Hours ----------------------------------------------------------------------------------------------------------

NIGHT = Window(days=("mon", "tue", "wed", "thu", "fri"), begins=time(22), ends=time(6))
WEEKEND = Window(days=("sat", "sun"), begins=time(), ends=None)
OFF_PEAK = Schedule(windows=(NIGHT, WEEKEND), holidays=(date(2026, 12, 25),), timezone="Europe/Berlin")


@pytest.mark.parametrize(
    ("moment", "open_"),
    [
        ("2026-11-27T20:59:59+00:00", False),  # Friday, 21:59:59 in Berlin
        ("2026-11-27T21:00:00+00:00", True),
        ("2026-11-28T04:59:59+00:00", True),
        ("2026-11-28T12:00:00+00:00", True),  # Saturday
        ("2026-11-29T22:59:59+00:00", True),
        ("2026-11-29T23:00:00+00:00", False),  # Monday 00:00: Sunday's window has ended, Monday's begins at 22:00
        ("2026-12-25T10:00:00+00:00", True),
        ("2026-12-24T10:00:00+00:00", False),
        ("2026-07-01T20:30:00+00:00", True),  # summer time: 22:30
    ],
)
def test_windows_are_in_the_destination_s_own_time(moment: str, open_: bool) -> None:  # noqa: FBT001
    """Bites: compare with UTC, and the first window opens an hour late in winter, two in summer."""
    assert is_open(OFF_PEAK, datetime.fromisoformat(moment)) is open_


def test_when_a_window_opens_next() -> None:
    now = datetime.fromisoformat("2026-11-30T10:00:00+00:00")
    assert opens(OFF_PEAK, now) == datetime.fromisoformat("2026-11-30T21:00:00+00:00")
    christmas = datetime.fromisoformat("2026-12-24T08:00:00+00:00")
    assert opens(OFF_PEAK, christmas) == datetime.fromisoformat("2026-12-24T21:00:00+00:00")
    holiday_only = Schedule(windows=(), holidays=(date(2026, 12, 25),), timezone="Europe/Berlin")
    assert opens(holiday_only, christmas) == datetime.fromisoformat("2026-12-24T23:00:00+00:00")
    assert opens(holiday_only, now) is None


def test_times_without_quotes_are_what_they_look_like(tmp_path: Path) -> None:
    """YAML makes minutes of them. Bites: take them as they come, and delivery cannot start."""
    path = tmp_path / "clarion.yaml"
    path.write_text(
        "gateway:\n  destinations:\n  - {name: p, ae_title: A, host: h, port: 1, timezone: UTC, "
        "windows: [{from: 22:00, to: 06:00}, {days: [sat], from: 0:00, to: 24:00}]}\n"
    )
    schedule = check_config(path).config.gateway.destinations[0].destination.schedule
    assert schedule is not None
    assert [(one.begins, one.ends) for one in schedule.windows] == [(time(22), time(6)), (time(), None)]
    assert is_open(schedule, datetime.fromisoformat("2026-11-30T23:00:00+00:00"))
    assert not is_open(schedule, datetime.fromisoformat("2026-11-30T12:00:00+00:00"))


def test_what_a_person_takes_up_does_not_wait_for_a_window(tmp_path: Path) -> None:
    window = {"days": ["sun"], "from": "13:00", "to": "24:00"}
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port, destination={"windows": [window], "timezone": "UTC"})
        rig.request()
        rig.step_until(lambda: rig.row() is not None)
        assert rig.outbound.retry(["d"], rig.clock.now()) == ["d"]
        assert rig.settle().state == "verified"


def test_nothing_is_sent_outside_the_windows_and_everything_when_one_opens(tmp_path: Path) -> None:
    """MOMENT is a Monday, 12:00 UTC."""
    assert (MOMENT.weekday(), MOMENT.hour) == (0, 12)
    window = {"days": ["mon"], "from": "13:00", "to": "24:00"}
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port, destination={"windows": [window], "timezone": "UTC"})
        rig.request()
        rig.step_until(lambda: rig.row() is not None)
        for _ in range(20):
            rig.stage.step()
        assert (rig.row().state, rig.row().attempts, pacs.stored) == ("waiting", 0, {})
        assert rig.stage.facts()["destinations_waiting"] == {"pacs": str(MOMENT.replace(hour=13))}
        rig.clock.advance(timedelta(hours=1))
        assert rig.settle().state == "verified"


def test_a_window_that_closes_lets_the_delivery_in_hand_end_and_no_other_begin(tmp_path: Path) -> None:
    """Bites: look at the hour when a night's work is taken up, and it is sent into the day."""
    window = {"days": ["mon"], "from": "13:00", "to": "24:00"}

    def status(uid: str, _: int) -> int:
        if uid == "1.2.3.0" and rig.clock.now() < closed:
            rig.clock.advance(timedelta(hours=12))
        return 0

    with peer(status) as pacs:
        rig = Rig(tmp_path, pacs.port, destination={"windows": [window], "timezone": "UTC"})
        closed = rig.clock.now() + timedelta(hours=12)
        for name in ("d", "e", "f"):
            rig.request(delivery=name)
        rig.step_until(lambda: rig.row("f") is not None)
        rig.clock.advance(timedelta(hours=1))
        rig.step_until(lambda: rig.stage.idle() and rig.row().state != "waiting")
        for _ in range(20):
            rig.stage.step()
        assert set(pacs.stored.values()) == {1}
        assert [(rig.row(name).state, rig.row(name).attempts) for name in ("e", "f")] == [("waiting", 0)] * 2


# DICOMweb -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    need(ORTHANC, "orthanc")
    need(DICOMWEB, "orthanc-dicomweb")
    http = free_port()
    folder = tmp_path_factory.mktemp("web") / "orthanc"
    process = start_orthanc(folder, dicom=free_port(), http=http, caller=("US", free_port()), users={"u": "secret"})
    yield f"http://127.0.0.1:{http}"
    process.kill()
    process.wait()


def web(url: str, **more: Any) -> list[dict[str, Any]]:
    return [{"name": "pacs", "dicomweb": {"url": f"{url}/dicom-web", **more}}]


def test_orthanc_takes_results_by_stow_and_proves_them_by_qido(orthanc: str, tmp_path: Path) -> None:
    rig = Rig(tmp_path, 1, destination=web(orthanc, user="u", password="secret"))
    rig.request(count=23)
    row = rig.settle()
    assert (row.state, row.reason, row.attempts) == ("verified", "qido-rs", 1)
    assert stored_in(orthanc) == {f"1.2.3.{number}": encoded(data_set(number)) for number in range(23)}


def stored_in(orthanc: str) -> dict[str, bytes]:
    """Give the data sets that Orthanc has, by SOP Instance UID, read through its own interface."""
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, orthanc, "u", "secret")
    opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords))
    from clarion.dicom import split_part10

    found = {}
    for one in json.load(opener.open(f"{orthanc}/instances")):
        tags = json.load(opener.open(f"{orthanc}/instances/{one}/simplified-tags"))
        file = opener.open(f"{orthanc}/instances/{one}/file").read()
        found[tags["SOPInstanceUID"]] = split_part10(file)[0]
    return found


def test_a_wrong_password_is_said_and_opens_the_circuit(orthanc: str, tmp_path: Path) -> None:
    rig = Rig(tmp_path, 1, destination=web(orthanc, user="u", password="wrong"), max_retries=0)
    rig.request()
    row = rig.settle()
    assert row.state == "failed"
    assert "HTTP 401; is the user or token right?" in row.reason
    assert "pacs" in rig.stage.facts()["destinations_unreached"]  # type: ignore[operator]


class Service:
    """A DICOMweb service that answers as a test wants it: `answers` are (HTTP status, body) in turn."""

    def __init__(self, *answers: tuple[int, Any]) -> None:
        self.asked: list[tuple[str, str, bytes]] = []
        service, rest = self, list(answers)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.asked.append((self.headers["Content-Type"], self.headers.get("Authorization", ""), body))
                self._answer(*rest.pop(0))

            def do_GET(self) -> None:
                self._answer(204, None)

            def _answer(self, status: int, body: Any) -> None:
                data = b"" if body is None else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def settled(service: Service, root: Path) -> tuple[Rig, Any]:
    """Have a delivery sent to a service to its end, and close that."""
    try:
        rig = Rig(root, 1, destination=web(service.url))
        rig.request()
        return rig, rig.settle()
    finally:
        service.close()


def result(uid: str, reason: int | None = None) -> dict[str, Any]:
    item: dict[str, Any] = {"00081155": {"vr": "UI", "Value": [uid]}}
    if reason is not None:
        item["00081197"] = {"vr": "US", "Value": [reason]}
    return item


def answer(stored: list[str], failed: dict[str, int]) -> dict[str, Any]:
    return {
        "00081199": {"vr": "SQ", "Value": [result(one) for one in stored]},
        "00081198": {"vr": "SQ", "Value": [result(uid, reason) for uid, reason in failed.items()]},
    }


def test_the_doctor_asks_a_service_and_names_one_that_does_not_answer(orthanc: str, tmp_path: Path) -> None:
    for url, said in ((f"{orthanc}/dicom-web", "answers QIDO-RS"), (f"{orthanc}/elsewhere", "is http"),
                      (f"http://127.0.0.1:{free_port()}", "cannot be reached")):  # fmt: skip
        path = tmp_path / "clarion.yaml"
        described = {"name": "pacs", "dicomweb": {"url": url, "user": "u", "password": "secret"}}
        path.write_text(json.dumps({"gateway": {"destinations": [described]}}))
        done = clarion("doctor", "-c", path, "--json")
        found = [one for one in json.loads(done.stdout) if one["name"] == "destination pacs"]
        assert said in found[0]["found"]


def test_each_instance_has_its_own_result_and_only_what_may_succeed_is_sent_again(tmp_path: Path) -> None:
    """Bites: believe the 202, and what was refused counts as delivered."""
    mixed = answer(["1.2.3.0"], {"1.2.3.1": 0xA900, "1.2.3.2": 0xA700})
    service = Service((202, mixed), (200, answer(["1.2.3.2", "1.2.3.3"], {})))
    try:
        rig = Rig(tmp_path, 1, destination=web(service.url, token="abc"))
        rig.request()
        row = rig.settle()
        assert row.state == "failed"
        assert "1 of 4" in row.reason
        assert "0xA900" in row.reason
    finally:
        service.close()
    kinds, tokens, bodies = zip(*service.asked, strict=True)
    assert all('type="application/dicom"' in one for one in kinds)
    assert set(tokens) == {"Bearer abc"}
    assert [body.count(b"DICM") for body in bodies] == [4, 2]
    assert b"1.2.3.2" in bodies[1]
    assert b"1.2.3.3" in bodies[1], "in neither list: no answer, so it is sent again"


@pytest.mark.parametrize(
    ("status", "tries", "said"),
    [
        (415, 3, "HTTP 415; does"), (404, 3, "HTTP 404; does"), (302, 3, "HTTP 302; does"), (500, 3, "HTTP 500"),
        (429, 3, "HTTP 429"), (400, 5, "HTTP 400"),
    ],
)  # fmt: skip
def test_http_statuses(status: int, tries: int, said: str, tmp_path: Path) -> None:
    """What is wrong with the place is tried again; what is wrong with a body is looked for instance by instance.

    Bites: take a service's 404, which a restart of it answers, for one of the instances: they are never sent again.
    """
    service = Service(*[(status, None)] * 5)
    rig, row = settled(service, tmp_path)
    assert (row.state, len(service.asked)) == ("failed", tries)
    assert said in row.reason + str(notes(rig))


def test_a_service_that_is_away_behind_a_proxy_costs_no_tries(tmp_path: Path) -> None:
    """Bites: count a 503, and the service gets nothing when it is back."""
    everything = (200, answer([f"1.2.3.{number}" for number in range(4)], {}))
    service = Service(*[(503, None)] * 5, everything)
    try:
        rig = Rig(tmp_path, 1, destination=web(service.url), verify=False)
        rig.request()
        row = rig.settle()
    finally:
        service.close()
    assert row.state == "unverified", "sent, and not to be proved"
    assert len(service.asked) == 6
    assert row.attempts == 6
    assert rig.kinds().count("delivery.failed.v1") == 1, "an outage is said once"


def test_one_that_a_service_does_not_like_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    """413 for the batch, and for one of the four: three are stored. Bites: call all of them unsendable."""
    taken = [(200, answer([f"1.2.3.{number}"], {})) for number in (0, 1, 3)]
    service = Service((413, None), taken[0], taken[1], (413, None), taken[2])
    rig, row = settled(service, tmp_path)
    assert row.state == "failed"
    assert row.reason.startswith("1 of 4 instances; first 1.2.3.2: cannot be sent")
    assert sorted(one for one in notes(rig) if "HTTP" in one) == ["HTTP 413"]


@pytest.mark.parametrize("after", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n"])
def test_a_service_that_drips_is_cut_off(after: bytes, tmp_path: Path) -> None:
    """Bites: leave it to the deadline of each read, and the thread of the delivery stays for hours."""
    with dripping(after) as port:
        rig = Rig(
            tmp_path, 1, destination=web(f"http://127.0.0.1:{port}"), max_retries=0, dimse_timeout_s=0.5,
            connect_timeout_s=0.5,
        )  # fmt: skip
        rig.request()
        row = rig.settle()
    assert (row.state, row.attempts) == ("failed", 1)
    assert "4 of 4 instances" in row.reason


def notes(rig: Rig) -> list[str]:
    import sqlalchemy as sa

    from gateway import tables

    with rig.database.reading() as connection:
        return list(connection.execute(sa.select(tables.delivery_instances.c.note)).scalars())


def test_an_object_that_is_gone_does_not_break_its_batch(orthanc: str, tmp_path: Path) -> None:
    rig = Rig(tmp_path, 1, destination=web(orthanc, user="u", password="secret"))
    rig.request(missing=2)
    row = rig.settle()
    assert row.state == "failed"
    assert "1.2.3.2: cannot be sent" in row.reason
    assert "1 of 4" in row.reason


# Configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("destination", "said"),
    [
        ({"name": "p", "host": "h", "port": 1}, "give ae_title, host and port, or dicomweb"),
        ({"name": "p", "ae_title": "A", "host": "h", "port": 1, "dicomweb": {"url": "http://h"}}, "not both"),
        ({"name": "p", "dicomweb": {"url": "ftp://h"}}, "URL scheme should be 'http' or 'https'"),
        ({"name": "p", "dicomweb": {"url": "http://h", "user": "u"}}, "user and password go together"),
        ({"name": "p", "ae_title": "A", "host": "h", "port": 1, "timezone": "Berlin"}, "no time zone 'Berlin'"),
        ({"name": "p", "ae_title": "A", "host": "h", "port": 1, "transfer_syntaxes": ["LE"]}, "'LE' is no UID"),
        (
            {"name": "p", "ae_title": "A", "host": "h", "port": 1, "windows": [{"from": "9", "to": "10:00"}]},
            "in quotes",
        ),
        ({"name": "p", "ae_title": "A", "host": "h", "port": 1, "windows": [{"from": 9, "to": "10:00"}]}, "in quotes"),
    ],
)
def test_faults_of_a_destination_are_named(destination: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "clarion.yaml"
    path.write_text(json.dumps({"gateway": {"destinations": [destination]}}))
    done = clarion("config", "check", path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "gateway.destinations.0" in done.stderr or "gateway.destinations[0]" in done.stderr
