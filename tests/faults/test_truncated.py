"""F17: data sets cut at every byte, whose last fragment is said to be the last: by C-STORE, STOW-RS, from a folder.

A cut between two elements leaves a data set that is whole as far as its bytes go, and is stored. Any other is not
acknowledged, and lies in quarantine; bytes that a sender did not send are never made up.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.raw import CT, EXPLICIT, Raw, element
from support.scp import serving
from support.stow import Stow, listed, multipart

from clarion.dicom import part10
from clarion.model import Destination
from console.sending import look_through, send_folder
from gateway.wire import pdu

JPEG = "1.2.840.10008.1.2.4.50"
UID = "1.2.3.4"
TOGETHER = 150
_ITEM, _ITEM_END, _END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_UNDEFINED = 0xFFFFFFFF


def _item(tag: tuple[int, int], length: int, value: bytes = b"") -> bytes:
    return struct.pack("<HHI", *tag, length) + value


def _long(group: int, number: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    said = len(value) if length is None else length
    return struct.pack("<HH2sHI", group, number, vr.encode(), 0, said) + value


def _elements(pixels: bytes) -> list[bytes]:
    """A CT with sequences of both kinds of length, nested, and a private element, in front of its pixels."""
    code = element(8, 0x100, "SH", b"T-D1100") + element(8, 0x104, "LO", b"Head")
    nested = _long(0x40, 0xA168, "SQ", _item(_ITEM, len(code), code))
    undefined = _item(_ITEM, _UNDEFINED, code + nested) + _item(_ITEM_END, 0) + _item(_END, 0)
    return [
        element(8, 0x16, "UI", CT.encode()),
        element(8, 0x18, "UI", UID.encode()),
        element(8, 0x60, "CS", b"CT"),
        _long(8, 0x1140, "SQ", undefined, _UNDEFINED),
        element(9, 0x10, "LO", b"SOMEBODY"),
        _long(9, 0x1001, "UN", bytes(range(40))),
        element(0x10, 0x10, "PN", b"Test^Truncated"),
        element(0x20, 0xD, "UI", b"1.2.9"),
        element(0x20, 0xE, "UI", b"1.2.9.1"),
        element(0x28, 0x10, "US", struct.pack("<H", 8)),
        pixels,
    ]


NATIVE = _elements(_long(0x7FE0, 0x10, "OW", bytes(range(128))))
FRAGMENTS = _item(_ITEM, 0) + _item(_ITEM, 60, bytes(60)) + _item(_ITEM, 40, bytes(40)) + _item(_END, 0)
ENCAPSULATED = _elements(_long(0x7FE0, 0x10, "OB", FRAGMENTS, _UNDEFINED))
FILES = {"native": (EXPLICIT, NATIVE), "encapsulated": (JPEG, ENCAPSULATED)}
# Behind this element everything is there that a data set must say of itself.
_IDENTIFIED = 9


def seams(elements: list[bytes]) -> set[int]:
    """Where a cut leaves whole elements, and all that an instance is known by."""
    ends = list(itertools.accumulate(map(len, elements)))
    return set(ends[_IDENTIFIED - 1 :])


def cuts(elements: list[bytes]) -> Iterator[tuple[int, bytes]]:
    data = b"".join(elements)
    for end in range(1, len(data) + 1):
        yield end, data[:end]


@pytest.mark.parametrize("name", FILES)
def test_by_c_store(name: str, tmp_path: Path) -> None:
    """Bites: take the peer's word that a fragment is the last."""
    syntax, elements = FILES[name]
    contexts = (pdu.Context(id=1, abstract_syntax=CT, transfer_syntaxes=(syntax,)),)
    accepted: dict[int, bytes] = {}
    with serving(tmp_path) as at:
        with Raw(at.port).associate(contexts=contexts) as peer:
            for end, data in cuts(elements):
                status = peer.store(UID, data)
                assert status in {0, 0xC000, 0xA900}
                if status == 0:
                    accepted[end] = data
            assert peer.release() == pdu.RELEASE_RP
        journalled = at.journalled()
        stored = [at.read(fields) for kind, fields in journalled if kind == "stored"]
        aside = [at.read(fields) for kind, fields in journalled if kind == "quarantined"]
    assert set(accepted) == seams(elements)
    assert stored == list(accepted.values())
    assert aside == [data for end, data in cuts(elements) if end not in accepted]


@pytest.mark.parametrize("name", FILES)
def test_by_stow(name: str, tmp_path: Path) -> None:
    syntax, elements = FILES[name]
    files = [
        part10(data, sop_class_uid=CT, sop_instance_uid=UID, transfer_syntax_uid=syntax) for _, data in cuts(elements)
    ]
    stow = Stow(tmp_path)
    taken = 0
    try:
        for at in range(0, len(files), TOGETHER):
            answer = stow.post(*files[at : at + TOGETHER])
            taken += len(listed(answer, "00081199"))
        stored = [fields["object"]["size_bytes"] for kind, fields in stow.journalled() if kind == "stored"]
    finally:
        stow.stage.drain()
    assert taken == len(stored)
    assert set(stored) == seams(elements)


@pytest.mark.parametrize("name", FILES)
def test_a_request_that_is_cut(name: str, tmp_path: Path) -> None:
    """A body that ends within a part says nothing of the part. Bites: take what has come for all of it."""
    syntax, elements = FILES[name]
    data = b"".join(elements)
    body, _ = multipart(part10(data, sop_class_uid=CT, sop_instance_uid=UID, transfer_syntax_uid=syntax))
    stow = Stow(tmp_path)
    try:
        end = body.index(b"\r\n--bb--")
        for cut in range(len(body) - len(data), end, 7):
            assert not listed(stow.post_body(body[:cut]), "00081199")
        assert [kind for kind, _ in stow.journalled() if kind == "stored"] == []
    finally:
        stow.stage.drain()


@pytest.mark.parametrize("name", FILES)
def test_from_a_folder(name: str, tmp_path: Path) -> None:
    """`clarion send`: what is no whole data set is sent as it is and refused by who gets it, or said to be skipped."""
    syntax, elements = FILES[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    for end, data in cuts(elements):
        whole = part10(data, sop_class_uid=CT, sop_instance_uid=UID, transfer_syntax_uid=syntax)
        (folder / f"{end:05d}.dcm").write_bytes(whole)
    files, found = look_through(folder)
    with serving(tmp_path / "gateway") as at:
        to = Destination(name="us", ae_title="B", host="127.0.0.1", port=at.port)
        sent = send_folder(folder, to, own_ae="A")
    assert len(files) + len(found.skipped) == len(b"".join(elements))
    assert len(sent.acknowledged) == len(seams(elements))
    assert len(sent.refused) == len(files) - len(sent.acknowledged)
