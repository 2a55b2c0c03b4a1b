"""F31: 100,000 inputs, real files and PDUs bent in every way. No crash, no hang, and the quick scan says what the
thorough one says: no data set that is cut passes for a whole one."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.data import real
from support.raw import CONTEXTS, CT, EXPLICIT, data_set, store_request

from clarion.adapters.clock import SystemClock
from clarion.adapters.objects import FileStore
from clarion.attributes import read_attributes, read_head
from clarion.config import IntakeConfig, ScpConfig
from clarion.dicom import part10, read_header, split_part10
from clarion.errors import InvalidInstanceError
from clarion.model import ObjectRef
from clarion.scanning import scan
from gateway.intake import Intake
from gateway.journal import START
from gateway.journal import read as read_journal
from gateway.journal_writer import JournalWriter
from gateway.multipart import MultipartError
from gateway.space import Space
from gateway.uploads import Client, Upload
from gateway.wire import commands, pdu
from gateway.wire.pdu import PduError

INPUTS = 100_000
HANG_S = 2.0
LARGEST = 12_000
LENGTHS = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xfe\xff\x00\xe0", b"\xff\xff\xff\x7f")


def bend(data: bytes, rng: random.Random) -> bytes:
    bent = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        if not bent:
            break
        at = rng.randrange(len(bent))
        match rng.randrange(6):
            case 0:
                bent[at] = rng.randrange(256)
            case 1:
                del bent[at:]
            case 2:
                bent[at:at] = rng.randbytes(rng.randint(1, 12))
            case 3:
                del bent[at : at + rng.randint(1, 12)]
            case 4:
                bent[at : at + 4] = rng.choice(LENGTHS)
            case _:
                piece = bent[at : at + rng.randint(1, 60)]
                bent[at:at] = piece * rng.randint(1, 20)
    return bytes(bent[:LARGEST])


def seeds() -> list[tuple[bytes, str]]:
    found = [(data_set("1.2.3"), "1.2.840.10008.1.2.1")]
    folder = real("malformed").parent
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size < 3_000_000:
            with suppress(InvalidInstanceError, OSError):
                data, syntax = split_part10(path.read_bytes())
                found.append((data[: LARGEST // 2] + data[-LARGEST // 4 :], syntax))
    return found


@pytest.mark.timeout(280)
def test_bent_data_sets_are_judged_alike_and_in_time() -> None:
    rng = random.Random(31)
    corpus = seeds()
    assert len(corpus) > 50
    checked = 0
    for _ in range(INPUTS * 7 // 10):
        data, syntax = rng.choice(corpus)
        bent = bend(data, rng)
        begun = time.monotonic()
        seen = scan(bent, syntax)
        assert time.monotonic() - begun < HANG_S
        if seen.checked and rng.random() < 0.3:
            header = read_header(bent, syntax)
            checked += 1
            assert (seen.fault is None) == (header.fault is None), (bent, syntax, seen.fault, header.fault)
            if seen.fault is None:
                assert (seen.study_uid[:60], seen.sop_instance_uid[:60]) == (
                    header.study_uid[:60],
                    header.sop_instance_uid[:60],
                )
            part = read_head(bent[: len(bent) // 2], len(bent), syntax)
            assert part is None or header.fault is not None or part == read_attributes(bent, syntax)
    assert checked > 10_000


def test_bent_pdus_and_commands_are_refused_by_name() -> None:
    rng = random.Random(32)
    whole = pdu.request("CALLED", "CALLING", CONTEXTS, roles={"1.2.840.10008.1.20.1": (True, False)})[6:]
    accepted = pdu.accept(pdu.parse_request(whole), [(1, 0, "1.2.840.10008.1.2")], answers_identity=True)[6:]
    command = store_request("1.2.3")
    understood = 0
    for _ in range(INPUTS // 10):
        for parse, data in ((pdu.parse_request, whole), (pdu.parse_accept, accepted), (commands.parse, command)):
            with suppress(PduError):
                parse(bend(data, rng))  # type: ignore[operator]  # three functions of bytes
                understood += 1
    assert understood > 1000


def test_bent_uploads_are_answered_and_nothing_that_is_cut_passes(tmp_path: Path) -> None:
    """Whole STOW-RS bodies, cut anywhere between feeds: every part has a result, or the body is refused as a whole."""
    rng = random.Random(33)
    journal = JournalWriter(tmp_path / "journal" / "stow", SystemClock())
    store = FileStore(tmp_path / "objects")
    space = Space(tmp_path, IntakeConfig(watermark_percent=100, reserve_gb=0))
    intake = Intake(store=store, journal=journal, space=space, ignored_classes={})
    parts = [
        part10(data_set(f"1.2.{number}", 200), sop_class_uid=CT, sop_instance_uid=f"1.2.{number}",
               transfer_syntax_uid=EXPLICIT)
        for number in range(3)
    ]  # fmt: skip
    body = b"".join(b"--b\r\nContent-Type: application/dicom\r\n\r\n%b\r\n" % one for one in parts) + b"--b--\r\n"
    ended = refused = stored = 0
    for _ in range(INPUTS // 50):
        bent = bend(body, rng)
        upload = Upload("b", Client(calling_ae="A", called_ae="B"), intake, ScpConfig(max_instance_gb=2e-6))
        try:
            while bent:
                count = rng.randint(1, 2000)
                upload.feed(bent[:count])
                bent = bent[count:]
            results = upload.finish()
            ended += 1
            stored += sum(one.stored for one in results)
        except MultipartError:
            upload.abandon("cut")
            refused += 1
    assert ended > 100
    assert refused > 100
    assert stored > 100
    kept = [one for one in read_journal(tmp_path / "journal" / "stow", START, 10**6) if one.kind == "stored"]
    assert len(kept) >= stored
    for one in kept:
        data = store.read(ObjectRef(**one.fields["object"]))
        assert read_header(data, EXPLICIT).fault is None


def test_an_upload_is_abandoned_when_nobody_is_at_it_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may be cancelled while a thread writes its part. Bites: take the buffer from under it."""
    journal = JournalWriter(tmp_path / "journal" / "stow", SystemClock())
    space = Space(tmp_path, IntakeConfig(watermark_percent=100, reserve_gb=0))
    intake = Intake(store=FileStore(tmp_path / "objects"), journal=journal, space=space, ignored_classes={})
    part = part10(data_set("1.2.1", 5000), sop_class_uid=CT, sop_instance_uid="1.2.1", transfer_syntax_uid=EXPLICIT)
    upload = Upload("b", Client(calling_ae="A", called_ae="B"), intake, ScpConfig())
    writing, go_on, real = threading.Event(), threading.Event(), journal.append

    def append(kind: str, *arguments: Any) -> Any:
        if kind == "stored":
            writing.set()
            go_on.wait(10)
        return real(kind, *arguments)

    monkeypatch.setattr(journal, "append", append)
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\n%b\r\n--b--\r\n" % part
    feeding = threading.Thread(target=upload.feed, args=(body,))
    feeding.start()
    assert writing.wait(10)
    leaving = threading.Thread(target=upload.abandon, args=("cancelled",))
    leaving.start()
    leaving.join(0.2)
    assert leaving.is_alive()
    go_on.set()
    for one in (feeding, leaving):
        one.join(10)
        assert not one.is_alive()
    kinds = [one.kind for one in read_journal(tmp_path / "journal" / "stow", START, 10)]
    assert kinds == ["stored", "ended"]
