"""F29, F30: destinations that are down for a day, refuse in every way there is, abort, or lose what they took."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa
from pynetdicom.association import Association
from support.delivering import Rig, peer
from support.world import free_port, pause

from gateway import tables
from gateway.statuses import Outcome, classify

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
        rig = Rig(tmp_path, 0, destination=places, max_retries=3, retry_delay_s=180)
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
            assert (row.state, row.attempts) == ("failed", 4)
            assert "is the peer running there?" in row.reason
    with peer(port=port) as returned:
        again = [f"d{number}" for number in range(DELIVERIES)]
        assert sorted(rig.outbound.retry(again, rig.clock.now())) == sorted(again)
        for _ in range(2000):
            rig.stage.step()
            if all(rig.row(one).state == "verified" for one in again):
                break
            rig.clock.advance(timedelta(seconds=1))
            pause(0.005)
        assert {rig.row(one).state for one in again} == {"verified"}
        # Ten deliveries of the same four instances here: each was stored once by each.
        assert set(returned.stored.values()) == {DELIVERIES}


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
