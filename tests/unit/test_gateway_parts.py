"""The gateway's parts without a socket: access list, watermark, intake's answers."""

from __future__ import annotations

import struct
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.world import pause

from clarion.adapters.objects import FileStore
from clarion.config import GatewayConfig, IntakeConfig
from clarion.digests import digest_of
from clarion.elements import EXPLICIT_LE
from clarion.errors import PeerUnavailableError, StoreUnavailableError
from clarion.model import ObjectRef
from clarion.scanning import scan
from gateway.access import (
    CALLED_UNKNOWN,
    CALLING_ELSEWHERE,
    CALLING_UNKNOWN,
    CALLING_USER,
    UNRESOLVED,
    AccessList,
    Admission,
    matches,
)
from gateway.intake import COLLECTED_BYTES, Answer, Arrival, Intake
from gateway.space import Space
from gateway.wire.pdu import UserIdentity

CT = "1.2.840.10008.5.1.4.1.1.2"


class ListJournal:
    """Stands for the journal: what would be synced, in order, or the error to raise."""

    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, Any]]] = []
        self.data: list[bytes] = []
        self.broken = False

    def append(self, kind: str, fields: dict[str, Any], data: bytes = b"", _: object = None) -> None:
        if self.broken:
            raise StoreUnavailableError("no")
        self.records.append((kind, fields))
        self.data.append(bytes(data))


def element(group: int, number: int, vr: str, value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HH2sH", group, number, vr.encode(), len(value)) + value


def data_set(**changed: bytes | None) -> bytes:
    values: dict[str, bytes | None] = {
        "sop_class": CT.encode(),
        "sop": b"1.2.3",
        "study": b"1.2",
        "series": b"1.2.1",
        **changed,
    }
    tags = {"sop_class": (8, 0x16), "sop": (8, 0x18), "study": (0x20, 0xD), "series": (0x20, 0xE)}
    return b"".join(element(*tags[name], "UI", value) for name, value in values.items() if value is not None)


@pytest.fixture
def journal() -> ListJournal:
    return ListJournal()


class Making:
    """Makes an intake over a folder of the test's own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(
        self, journal: ListJournal, free: int = 10**12, ignored: dict[str, frozenset[str]] | None = None
    ) -> Intake:
        space = Space(Path("/"), IntakeConfig(), measure=lambda _: (free, 10**12))
        store = FileStore(self.root / "objects")
        return Intake(store=store, journal=journal, space=space, ignored_classes=ignored or {})  # type: ignore[arg-type]


@pytest.fixture
def intake(tmp_path: Path) -> Making:
    return Making(tmp_path)


def receive(one: Intake, data: bytes, piece: int = 1000, **changed: str) -> Answer:
    values = {
        "sop_class_uid": CT, "sop_instance_uid": "1.2.3", "transfer_syntax_uid": EXPLICIT_LE, "calling_ae": "A",
        "called_ae": "B", "association": "x", **changed,
    }  # fmt: skip
    reception = one.begin(Arrival(**values))
    for at in range(0, len(data), piece):
        reception.write(memoryview(bytearray(data[at : at + piece])))
    return reception.finish()


def test_stored(journal: ListJournal, intake: Making) -> None:
    data = data_set()
    assert receive(intake(journal), data).status == 0x0000
    kind, fields = journal.records[0]
    assert (kind, fields["object"]["digest"], journal.data[0]) == ("stored", digest_of(data), data)


@pytest.mark.parametrize("size", [COLLECTED_BYTES - 1000, COLLECTED_BYTES + 1000, 5 * COLLECTED_BYTES + 2])
def test_large_data_sets_have_a_file_and_small_ones_lie_in_the_record(
    size: int, journal: ListJournal, intake: Making
) -> None:
    data = data_set() + struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, size // 2 * 2) + bytes(size // 2 * 2)
    one = intake(journal)
    assert receive(one, data, piece=70_001).status == 0x0000
    (_, fields), kept = journal.records[0], journal.data[0]
    assert fields["object"]["digest"] == digest_of(data)
    if len(data) <= COLLECTED_BYTES:
        assert kept == data
    else:
        assert kept == b""
        assert one.store.read(ObjectRef(**fields["object"])) == data
    assert list((intake.root / "objects" / "incoming").iterdir()) == []


@pytest.mark.parametrize("size", [1000, 3 * COLLECTED_BYTES])
def test_what_is_abandoned_leaves_nothing(size: int, journal: ListJournal, intake: Making) -> None:
    one = intake(journal)
    reception = one.begin(Arrival(
        sop_class_uid=CT, sop_instance_uid="1.2.3", transfer_syntax_uid=EXPLICIT_LE, calling_ae="A", called_ae="B",
        association="x",
    ))  # fmt: skip
    reception.write(bytes(size))
    reception.abandon()
    assert journal.records == []
    assert [path for path in intake.root.rglob("*") if path.is_file()] == []


def test_a_long_list_of_references_before_the_study_is_no_fault(journal: ListJournal, intake: Making) -> None:
    """A SEG of many slices: its UIDs come after thousands of elements in sequences of undefined length."""
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + element(8, 0x1155, "UI", b"1.2.3")
    item += struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    references = struct.pack("<HH2sHI", 8, 0x1115, b"SQ", 0, 0xFFFFFFFF) + item * 3000
    references += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    whole = data_set()
    at = whole.find(struct.pack("<HH", 0x20, 0xD))
    assert receive(intake(journal), whole[:at] + references + whole[at:]).status == 0x0000
    assert journal.records[0][1]["unchecked"] is True
    assert journal.records[0][1]["series_uid"] == "1.2.1"


def test_a_uid_that_claims_the_whole_data_set_costs_no_memory(journal: ListJournal, intake: Making) -> None:
    claim = struct.pack("<HHI", 8, 0x18, 900_000) + bytes(900_000)
    seen = scan(claim, "1.2.840.10008.1.2")
    assert len(seen.sop_instance_uid) < 200
    answer = receive(intake(journal), claim, transfer_syntax_uid="1.2.840.10008.1.2")
    assert answer.status == 0xC000


def test_too_many_elements_are_kept_and_left_to_be_checked(journal: ListJournal, intake: Making) -> None:
    data = data_set() + b"".join(element(0x0029, 0x1000 + number, "LO", b"x") for number in range(2001))
    assert receive(intake(journal), data).status == 0x0000
    assert journal.records[0][1]["unchecked"] is True


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"", 0xC000, "empty-data-set"),
        (data_set(study=None), 0xC000, "missing-study-uid"),
        (data_set(series=b""), 0xC000, "missing-series-uid"),
        (data_set(sop=None), 0xC000, "missing-sop-instance-uid"),
        (data_set(study=b"../../etc"), 0xC000, "invalid-study-uid"),
        (data_set(sop=b"9.9"), 0xA900, "sop-instance-mismatch"),
        (data_set(sop_class=b"1.2.840.10008.5.1.4.1.1.4"), 0xA900, "sop-class-mismatch"),
        (data_set()[:-2], 0xC000, "truncated"),
        (b"not DICOM at all, but long enough to look at", 0xC000, "malformed"),
    ],
)
def test_refused_and_quarantined(data: bytes, status: int, reason: str, journal: ListJournal, intake: Making) -> None:
    answer = receive(intake(journal), data)
    assert (answer.status, answer.comment) == (status, reason)
    kind, fields = journal.records[0]
    assert (kind, fields["reason"]) == ("quarantined", reason)
    assert (fields["object"] is None) == (data == b"")


def test_each_shortage_has_a_patience_of_its_own(tmp_path: Path) -> None:
    """Small data sets that found room meanwhile end the first. Bites: let only those that waited end it."""
    free = [0, 0]
    space = Space(tmp_path, IntakeConfig(watermark_percent=100, reserve_gb=0), lambda _: (free[0], 10**9))
    space.patience_s = 0.3
    assert not space.wait_for(0)
    free[0] = 10**6
    pause(0.06)
    with space.holding(10) as room:
        assert room
    free[0] = 0
    pause(0.06)
    timer = threading.Timer(0.1, lambda: free.__setitem__(0, 10**6))
    timer.start()
    assert space.wait_for(0), "it is kept waiting again"
    timer.join()


def test_low_disk_is_transient_and_keeps_nothing(journal: ListJournal, intake: Making) -> None:
    assert receive(intake(journal, free=10**9), data_set()).status == 0xA700
    assert journal.records == []


def test_journal_failure_is_never_a_success(journal: ListJournal, intake: Making) -> None:
    """Bites: catch the error around the append alone and the answer becomes 0x0000."""
    journal.broken = True
    assert receive(intake(journal), data_set()).status == 0xA700


def test_unforeseen_failure_has_a_log_id(journal: ListJournal, intake: Making) -> None:
    journal.append = None  # type: ignore[assignment,method-assign]
    answer = receive(intake(journal), data_set())
    assert answer.status == 0x0110
    assert "log id" in answer.comment


def test_ignored_class_is_success_without_bytes(journal: ListJournal, intake: Making) -> None:
    answer = receive(intake(journal, ignored={"B": frozenset((CT,))}), data_set())
    assert answer.status == 0x0000
    assert journal.records[0][0] == "ignored"
    assert "object" not in journal.records[0][1]


def test_reserve_counts_what_is_being_received() -> None:
    space = Space(Path("/"), IntakeConfig(watermark_percent=100, reserve_gb=0), measure=lambda _: (100, 1000))
    with space.holding(60) as first, space.holding(60) as second:
        assert (first, second) == (True, False)
    # They were written since: until the disk is asked again, they are counted.
    with space.holding(60) as again:
        assert not again
    pause(0.06)
    with space.holding(60) as again:
        assert again


CONFIG = GatewayConfig.model_validate(
    {
        "ae_titles": [{"ae_title": "CHEST", "settings": {}}],
        "sources": [{"ae_title": "CT1", "host": "10.1.0.0/16, 127.0.0.1"}, {"ae_title": "BOTH", "host": "127.0.0.3"}],
        "destinations": [
            {"name": "p", "ae_title": "PACS", "host": "127.0.0.2", "port": 104},
            {"name": "b", "ae_title": "BOTH", "host": "127.0.0.3", "port": 104},
        ],
    }
)
STORES = Admission(may_store=True, may_report=False)
REPORTS = Admission(may_store=False, may_report=True)


@pytest.mark.parametrize(
    ("calling", "called", "address", "expected"),
    [
        ("CT1", "CHEST", "10.1.2.3", STORES),
        ("CT1", "CHEST", "::ffff:10.1.2.3", STORES),
        ("CT1", "CHEST", "10.2.2.3", CALLING_ELSEWHERE),
        ("ct1", "CHEST", "127.0.0.1", CALLING_UNKNOWN),
        ("CT1", "chest", "127.0.0.1", CALLED_UNKNOWN),
        ("PACS", "CLARION", "127.0.0.2", REPORTS),
        ("PACS", "CHEST", "127.0.0.2", REPORTS),
        ("BOTH", "CHEST", "127.0.0.3", Admission(may_store=True, may_report=True)),
        # Nothing is grouped under the name we send by: what came there would be acknowledged and ignored.
        ("BOTH", "CLARION", "127.0.0.3", REPORTS),
        ("PACS", "OTHER", "127.0.0.2", CALLED_UNKNOWN),
        ("PACS", "CLARION", "127.0.0.1", CALLING_ELSEWHERE),
    ],
)
def test_access_list(calling: str, called: str, address: str, expected: object) -> None:
    assert AccessList(CONFIG).check(calling, called, address) == expected


def test_open_access_takes_every_source_and_no_stranger_as_destination() -> None:
    config = GatewayConfig.model_validate({"scp": {"reject_unknown_sources": False}, "ae_titles": [{"ae_title": "B"}]})
    assert AccessList(config).check("ANYONE", "B", "203.0.113.9") == replace(STORES, known=False)
    assert AccessList(config).check("ANYONE", "C", "203.0.113.9") == CALLED_UNKNOWN


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        (None, CALLING_USER),
        (UserIdentity(kind=1, wants_answer=False, name="ct"), CALLING_USER),
        (UserIdentity(kind=2, wants_answer=False, name="ct", secret=b"wrong"), CALLING_USER),
        (UserIdentity(kind=2, wants_answer=False, name="other", secret=b"open"), CALLING_USER),
        (UserIdentity(kind=2, wants_answer=True, name="ct", secret=b"open"), STORES),
    ],
)
def test_a_source_with_a_user_has_to_come_with_it(identity: UserIdentity | None, expected: object) -> None:
    """Bites: look at the name alone, and the third row comes in."""
    config = GatewayConfig.model_validate({
        "ae_titles": [{"ae_title": "B"}],
        "sources": [{"ae_title": "A", "host": "127.0.0.1", "user": "ct", "passcode": "open"},
                    {"ae_title": "A", "host": "127.0.0.2"}],
    })  # fmt: skip
    assert AccessList(config).check("A", "B", "127.0.0.1", identity) == expected
    assert AccessList(config).check("A", "B", "127.0.0.2", identity) == STORES


def test_a_passcode_without_a_user_is_a_fault() -> None:
    with pytest.raises(ValueError, match="belongs to a user"):
        GatewayConfig.model_validate({"sources": [{"ae_title": "A", "host": "127.0.0.1", "passcode": "x"}]})


def test_host_names_match_their_addresses() -> None:
    assert matches("localhost", "127.0.0.1")
    assert matches("no-such-host.invalid, 127.0.0.1", "127.0.0.1")
    with pytest.raises(PeerUnavailableError, match="no-such-host"):
        matches("no-such-host.invalid", "127.0.0.1")


def test_a_name_that_cannot_be_resolved_is_refused_for_now_only() -> None:
    config = GatewayConfig.model_validate({
        "ae_titles": [{"ae_title": "B"}], "sources": [{"ae_title": "A", "host": "no-such-host.invalid"}],
    })  # fmt: skip
    assert AccessList(config).check("A", "B", "127.0.0.1") == UNRESOLVED
    assert AccessList(config).check("X", "B", "127.0.0.1") == CALLING_UNKNOWN


def test_a_destination_whose_name_does_not_resolve_still_stores_as_a_source() -> None:
    """Bites: resolve both lists in one go, and receiving depends on the DNS of a PACS."""
    config = GatewayConfig.model_validate({
        "ae_titles": [{"ae_title": "B"}],
        "sources": [{"ae_title": "A", "host": "127.0.0.1"}],
        "destinations": [{"name": "a", "ae_title": "A", "host": "no-such-host.invalid", "port": 104}],
    })  # fmt: skip
    assert AccessList(config).check("A", "B", "127.0.0.1") == STORES
    assert AccessList(config).check("A", "B", "127.0.0.2") == UNRESOLVED
