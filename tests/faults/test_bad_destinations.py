"""F29, F30: destinations that are down for a day, refuse in every way there is, abort, or lose what they took."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from pydicom import Dataset
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made from a table at import
    StudyRootQueryRetrieveInformationModelFind,
)
from support.delivering import EXPLICIT, Rig, dripping, peer
from support.scp import CT
from support.world import free_port, pause

from clarion.adapters.memory import MemoryStore
from clarion.errors import PeerRefusedError, PeerUnavailableError
from clarion.model import Destination
from gateway import tables
from gateway.pool import Pool
from gateway.scu import Requestor, Timeouts
from gateway.sending import Sender
from gateway.statuses import Outcome, classify
from gateway.wire import pdu

DELIVERIES = 10
# PS3.7 annex C and PS3.4 B.2.3: success, warnings, and each failure that a C-STORE may be answered with.
STATUSES = (
    0x0000, 0xB000, 0xB006, 0xB007, 0x0105, 0x0106, 0x0107, 0x0110, 0x0111, 0x0112, 0x0115, 0x0116, 0x0117, 0x0118,
    0x0119, 0x0120, 0x0121, 0x0122, 0x0123, 0x0124, 0x0210, 0x0211, 0x0212, 0x0213, 0xA700, 0xA701, 0xA7FF, 0xA900,
    0xA9FF, 0xC000, 0xC123, 0xCFFF, 0xFE00,
)  # fmt: skip
DONE = {0x0000, 0xB000, 0xB006, 0xB007}
NEVER = {0x0122, 0x0124, 0xA900, 0xA9FF, 0xC000, 0xC123, 0xCFFF}


def statuses_of(rig: Rig) -> dict[str, tuple[int, str]]:
    table = tables.delivery_instances
    with rig.database.reading() as connection:
        rows = connection.execute(sa.select(table)).all()
    return {row.sop_instance_uid: (row.status, row.note) for row in rows}


def test_a_destination_that_is_down_for_a_day_holds_up_nobody_and_gets_everything_once(tmp_path: Path) -> None:
    """F29. Bites: try a dead destination's deliveries one after another, and the healthy one waits its turn."""
    port = free_port()
    with peer() as healthy:
        places = [
            {"name": "dead", "ae_title": "PACS", "host": "127.0.0.1", "port": port},
            {"name": "healthy", "ae_title": "PACS", "host": "127.0.0.1", "port": healthy.port},
        ]
        rig = Rig(tmp_path, 0, destination=places, max_retries=0)
        for number in range(DELIVERIES):
            rig.request(to="dead", delivery=f"d{number}")
        for hour in range(24):
            rig.request(to="healthy", delivery=f"h{hour}")
            rig.step_until(lambda name=f"h{hour}": (row := rig.row(name)) is not None and row.state == "verified")  # type: ignore[misc]
            for _ in range(60):
                rig.clock.advance(timedelta(minutes=1))
                rig.stage.step()
                while not rig.stage.idle():
                    pause(0.001)
        assert {rig.row(f"h{hour}").attempts for hour in range(24)} == {1}
        for number in range(DELIVERIES):
            row = rig.row(f"d{number}")
            assert (row.state, row.attempts) == ("waiting", row.spent)
        assert "is the peer running there?" in rig.row("d0").reason
        # About one try a minute, all together, and each delivery says once why it waits.
        assert 24 * 50 < sum(rig.row(f"d{number}").attempts for number in range(DELIVERIES)) < 24 * 70
        assert rig.kinds().count("delivery.failed.v1") <= DELIVERIES
    with peer(port=port) as returned:
        again = [f"d{number}" for number in range(DELIVERIES)]
        for _ in range(2000):
            rig.stage.step()
            if all(rig.row(one).state == "verified" for one in again):
                break
            rig.clock.advance(timedelta(seconds=1))
            pause(0.005)
        assert {rig.row(one).state for one in again} == {"verified"}
        # Ten deliveries of the same four instances here: each was stored once by each.
        assert set(returned.stored.values()) == {DELIVERIES}


def test_an_outage_longer_than_is_allowed_spends_the_budget(tmp_path: Path) -> None:
    """Bites: count an outage's tries, and it ends after a few; never count them, and nobody hears of it."""
    port = free_port()
    rig = Rig(tmp_path, port, max_retries=2, retry_delay_s=180, outage_h=1)
    for name in ("d", "e", "f"):
        rig.request(delivery=name)
    for minute in range(100):
        rig.clock.advance(timedelta(minutes=1))
        rig.stage.step()
        while not rig.stage.idle():
            pause(0.001)
        if minute == 55:
            assert rig.row().state == "waiting"
    for name in ("d", "e", "f"):
        assert rig.row(name).state == "failed", "each has waited as long"
        assert rig.row(name).attempts - rig.row(name).spent == 3
    with peer(port=port) as returned:
        rig.outbound.retry(["d"], rig.clock.now())
        rig.clock.advance(timedelta(minutes=2))
        assert rig.settle().state == "verified"
        assert set(returned.stored.values()) == {1}


def test_what_was_sent_before_an_outage_is_proved_after_it(tmp_path: Path) -> None:
    """Bites: give up after a minute, and what a PACS took before it was restarted is never verified."""
    port = free_port()
    with peer(find=lambda _: 0xA700, port=port) as before:
        rig = Rig(tmp_path, port, commitment_timeout_s=1000)
        rig.request()
        rig.step_until(lambda: rig.row() is not None and rig.row().state == "sent" and rig.stage.idle())
        kept = dict(before.stored)
    rig.stage._pool.close(0)
    for _ in range(40):
        rig.clock.advance(timedelta(minutes=1))
        rig.stage.step()
        while not rig.stage.idle():
            pause(0.001)
    assert rig.row().state == "sent"
    assert rig.stage.facts()["destinations_unreached"], "its circuit is open: nobody else has to wait for it"
    with peer(port=port) as after:
        after.stored.update(kept)
        assert rig.settle().state == "verified"
        assert after.stored == kept


def test_every_status_is_mapped_kept_and_shown(tmp_path: Path) -> None:
    """F30. A refused instance is never Sent; what may succeed is tried again, what never will is not."""
    with peer(lambda uid, _: STATUSES[int(uid.rsplit(".", 1)[1])]) as pacs:
        rig = Rig(tmp_path, pacs.port, max_retries=1)
        rig.request(count=len(STATUSES))
        row = rig.settle()
    assert row.state == "failed"
    found = statuses_of(rig)
    for number, status in enumerate(STATUSES):
        outcome = Outcome.DONE if status in DONE else Outcome.NEVER if status in NEVER else Outcome.AGAIN
        uid = f"1.2.3.{number}"
        assert classify(status) is outcome, hex(status)
        assert found[uid][0] == status
        assert f"0x{status:04X}" in found[uid][1]
        assert pacs.stored[uid] == (2 if outcome is Outcome.AGAIN else 1), hex(status)
    assert f"{len(STATUSES) - len(DONE) - len(NEVER)} of {len(STATUSES)} instances" in row.reason


def test_every_status_there_may_be_has_an_outcome() -> None:
    """F30, the table itself: success and warnings alone are Done; nothing unknown counts as delivered."""
    done = {status for status in range(2**16) if classify(status) is Outcome.DONE}
    assert done == DONE
    for status in range(2**16):
        if status >> 8 == 0xA9 or status >> 12 == 0xC:
            assert classify(status) is Outcome.NEVER


def test_what_was_accepted_and_lost_is_found_and_sent_again(tmp_path: Path) -> None:
    """F30. A hundred of a hundred. Bites: take success for proof, and nobody ever knows."""
    lost = True
    with peer(find=lambda _: 0x0000 if lost else 0xFF00) as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request(count=100)
        rig.step_until(lambda: len(pacs.stored) == 100)
        for _ in range(2000):
            rig.stage.step()
            if rig.row().reason.startswith("accepted-then-lost"):
                break
            if rig.stage.idle():
                rig.clock.advance(timedelta(seconds=2))
            pause(0.002)
        assert rig.row().reason == "accepted-then-lost: 100 instances"
        lost = False
        assert rig.settle().state == "verified"
        assert set(pacs.stored.values()) == {2}


def test_a_peer_that_aborts_midway_gets_only_the_rest(tmp_path: Path) -> None:
    aborted: list[str] = []

    def status(uid: str, _: int) -> int:
        if uid == "1.2.3.3" and not aborted:
            aborted.append(uid)
            for one in server_associations:
                one.abort()
        return 0

    server_associations: list[Association] = []
    with peer(status) as pacs:
        pacs.on_association = server_associations.append
        rig = Rig(tmp_path, pacs.port)
        rig.request(count=7)
        assert rig.settle().state == "verified"
        assert rig.row().attempts == 2
    assert pacs.stored == {f"1.2.3.{number}": 2 if number == 3 else 1 for number in range(7)}


# Peers that drip ------------------------------------------------------------------------------------------------


def accepted() -> bytes:
    """An association that takes CT on the first context, and the head of a PDU of a mebibyte."""
    request = pdu.parse_request(pdu.request("PACS", "US", [CONTEXT])[pdu.HEADER.size :])
    return pdu.accept(request, [(1, 0, EXPLICIT)], max_length=16384) + pdu.HEADER.pack(pdu.P_DATA, 2**20)


CONTEXT = pdu.Context(id=1, abstract_syntax=CT, transfer_syntaxes=(EXPLICIT,))


@pytest.mark.parametrize(
    "after", [pdu.HEADER.pack(pdu.ASSOCIATE_AC, 1000), accepted()], ids=["its acceptance", "its answer"]
)
def test_a_peer_that_drips_is_given_up(after: bytes) -> None:
    """Bites: begin the deadline anew with each byte, and the thread of the delivery stays for ever."""
    failed = []

    def send(port: int) -> None:
        timeouts = Timeouts(connect_s=0.5, dimse_s=0.5)
        try:
            with Requestor(
                Destination(name="c", ae_title="C", host="127.0.0.1", port=port),
                own_ae="US",
                classes=[(CT, EXPLICIT)],
                timeouts=timeouts,
            ) as scu:
                scu.store(b"12345678", sop_class=CT, sop_instance="1.2.3", syntax=EXPLICIT)
        except PeerUnavailableError as error:
            failed.append(str(error))

    with dripping(after) as port:
        thread = threading.Thread(target=send, args=(port,), daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    assert len(failed) == 1
    assert "not whole before the deadline" in failed[0]


def test_an_endless_query_is_given_up() -> None:
    """Bites: believe that a pending answer is followed by a last one."""

    def find(_: evt.Event) -> Iterator[tuple[int, Dataset]]:
        for number in itertools.count():
            found = Dataset()
            found.SOPInstanceUID = f"1.2.{number % 10}"
            yield 0xFF00, found

    ae = AE("C")
    ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_FIND, find)])
    assert server is not None
    peer = Destination(name="c", ae_title="C", host="127.0.0.1", port=server.server_address[1])
    try:
        with Requestor(peer, own_ae="US", timeouts=Timeouts(connect_s=5, dimse_s=0.2)) as scu:
            with pytest.raises(PeerUnavailableError, match="do not end"):
                scu.find("1.2", "1.2.3")
            scu.abort()
    finally:
        server.shutdown()


# What one thread settles and another has taken up ----------------------------------------------------------------


@pytest.mark.parametrize("settle", ["verified", "unverified", "lost", "asked", "looked"])
def test_what_was_taken_up_meanwhile_is_not_settled_as_it_was(settle: str, tmp_path: Path) -> None:
    """A person takes a delivery up while its proof is on the way: it is sent again, whatever the proof says.

    Bites: write the state without looking, and the replay that was ordered never happens.
    """
    with peer() as pacs:
        rig = Rig(tmp_path, pacs.port, verify=False)
        rig.request()
        rig.settle()
        rig.outbound.retry(["d"], rig.clock.now())
        before, kinds = rig.row(), rig.kinds()
        delivery, now = rig.outbound.due(rig.clock.now())[0], rig.clock.now()
        if settle == "verified":
            rig.outbound.settle_verified(delivery, now=now, how="query")
        elif settle == "unverified":
            rig.outbound.settle_unverified("d", "no proof")
        elif settle == "lost":
            rig.outbound.lost(delivery, missing={"1.2.3.0"}, now=now, again=None)
        elif settle == "asked":
            rig.outbound.commitment_asked("d", "1.2.3", now)
        else:
            rig.outbound.look_again("d", now + timedelta(days=1))
        assert (rig.row(), rig.kinds()) == (before, kinds)


def test_a_peer_that_refuses_the_association_anew_says_nothing_about_the_instance() -> None:
    """Bites: take any error for good for one of the instance, and it is never sent, though only the peer was busy."""

    class Gone:
        requestor = SimpleNamespace(accepts=lambda *_: True, store=_unavailable)

        def renew(self) -> bool:
            raise PeerRefusedError("c: association rejected")

    store = MemoryStore()
    ref = store.put(b"12345678")
    instance = SimpleNamespace(object=ref, sop_class_uid=CT, transfer_syntax_uid=EXPLICIT, sop_instance_uid="1.2.3")
    sender = Sender(
        store=store,
        outbound=None,  # type: ignore[arg-type]  # nothing is noted
        pool=None,  # type: ignore[arg-type]  # nothing is lent
        threshold=1,
        join=lambda: False,
        leave=lambda: None,
    )
    with pytest.raises(PeerRefusedError):
        sender._send_one(Gone(), None, SimpleNamespace(instance=instance))  # type: ignore[arg-type]  # as much as it asks


def _unavailable(*_: object, **__: object) -> int:
    raise PeerUnavailableError("gone")


def test_idle_associations_count_towards_what_a_peer_takes() -> None:
    """Bites: look for one that will do and open another beside it: a peer of two has three."""
    open_now, most = [], 0

    class Fake:
        def __init__(self) -> None:
            nonlocal most
            open_now.append(self)
            most = max(most, len(open_now))

        def is_there(self) -> bool:
            return True

        def release(self) -> None:
            open_now.remove(self)

        abort = release

    pool = Pool(lambda _destination, _classes: Fake(), most=3, idle_s=60)  # type: ignore[arg-type,return-value]
    for name in ("one", "two"):
        place = Destination(name=name, ae_title="C", host="127.0.0.1", port=1, max_associations=2)
        for number in range(6):
            with pool.lend(place, frozenset({(f"1.{number}", EXPLICIT)})):
                pass
        assert most == 2 if name == "one" else most == 3
