"""Every rejection and every status that docs/conformance.md lists, made to happen on a live association.

A row that is added to the statement without a case here fails, and so does a case without its row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.raw import CONTEXTS, CT, EXPLICIT, Raw, associated, data_set, store_request
from support.scp import Serving, serving
from support.world import pause

from gateway import space as space_module
from gateway.access import AccessList
from gateway.journal_writer import JournalWriter
from gateway.wire import pdu

STATEMENT = Path(__file__).parents[2] / "docs" / "conformance.md"
SOURCE = {"ae_title": "A", "host": "127.0.0.1"}
PRIVATE = "1.2.826.0.1.3680043.9.1.1"


def rows(heading: str) -> dict[str, str]:
    """The rows of the table whose head begins so: first column to second."""
    return dict(cells_of(heading))


def cells_of(heading: str) -> list[list[str]]:
    lines = STATEMENT.read_text().split(f"\n| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def checks() -> dict[str, str]:
    """The table of rejections, by the check: several have the same codes."""
    return {check: codes for codes, check in cells_of("A-ASSOCIATE-RJ")}


CHECKS = checks()


def rejection(peer: Raw, request: bytes | None = None) -> str:
    """Ask for an association; give result/source/reason of its rejection."""
    peer.say(pdu.request("B", "A", CONTEXTS) if request is None else request)
    kind, body = peer.hear()
    assert kind == pdu.ASSOCIATE_RJ, (kind, body)
    return "/".join(str(one) for one in body[1:4])


def asked(root: Path, request: bytes | None = None, **gateway: Any) -> str:
    """Ask a gateway with a configuration for an association."""
    with serving(root, **gateway) as at, Raw(at.port) as peer:
        return rejection(peer, request)


def one_too_many(root: Path) -> str:
    with serving(root, scp={"max_associations": 1}) as at, associated(at.port), Raw(at.port) as peer:
        return rejection(peer)


def while_draining(root: Path) -> str:
    with serving(root) as at, Raw(at.port) as peer:
        at.board.draining = True
        return rejection(peer)


def when_the_check_fails(root: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AccessList, "check", lambda *_: 1 / 0)
        return asked(root)


def bent(old: bytes, new: bytes) -> bytes:
    """A request with some bytes replaced by as many others."""
    whole = pdu.request("B", "A", CONTEXTS)
    assert whole.count(old) == 1
    assert len(old) == len(new)
    return whole.replace(old, new)


REJECTIONS: dict[str, Callable[[Path], str]] = {
    "association-limit": one_too_many,
    "called-ae": lambda root: asked(root, pdu.request("X", "A", CONTEXTS)),
    "calling-address": lambda root: asked(root, sources=[{**SOURCE, "host": "127.0.0.2"}]),
    "calling-ae": lambda root: asked(root, pdu.request("B", "X", CONTEXTS)),
    "calling-host-unresolved": lambda root: asked(root, sources=[{**SOURCE, "host": "no-such-host.invalid"}]),
    "calling-user": lambda root: asked(root, sources=[{**SOURCE, "user": "somebody"}]),
    "disk-space": lambda root: asked(root, measure=lambda _: (0, 10**12), intake={"reserve_gb": 1}),
    "internal-error": when_the_check_fails,
    "not-ready": while_draining,
}


@pytest.mark.parametrize("check", REJECTIONS)
def test_each_rejection_is_the_one_that_the_statement_has(check: str, tmp_path: Path) -> None:
    assert REJECTIONS[check](tmp_path) == CHECKS[f"`{check}`"]


def test_no_rejection_is_without_a_case() -> None:
    listed = {one.strip("`") for one in CHECKS if not one.startswith("`malformed")}
    assert listed == set(REJECTIONS)


def test_another_context_or_version_is_rejected(tmp_path: Path) -> None:
    said = next(one for check, one in CHECKS.items() if check.startswith("`malformed"))
    context = bent(b"1.2.840.10008.3.1.1.1", b"1.2.840.10008.3.1.1.9")
    version = pdu.request("B", "A", CONTEXTS)
    version = version[:6] + b"\0\2" + version[8:]
    assert [asked(tmp_path / "1", context), asked(tmp_path / "2", version)] == said.split(", ")


def test_the_acceptor_says_of_itself_what_the_statement_says(tmp_path: Path) -> None:
    said = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", STATEMENT.read_text(), re.MULTILINE))
    with serving(tmp_path) as at, Raw(at.port) as peer:
        peer.say(pdu.request("B", "A", CONTEXTS))
        kind, body = peer.hear()
    assert kind == pdu.ASSOCIATE_AC
    items = {"Application Context Name": 0x10, "Implementation Class UID": 0x52, "Implementation Version Name": 0x55}
    for name, item in items.items():
        value = said[name].encode()
        assert bytes((item, 0, *len(value).to_bytes(2, "big"))) + value in body
    assert bytes((0x51, 0, 0, 4)) + int(said["maximum length announced"].split()[0]).to_bytes(4, "big") in body
    assert bytes((0x53, 0, 0, 4)) not in body, "no window is negotiated"


# C-STORE ---------------------------------------------------------------------------------------------------------


@contextmanager
def served(root: Path, **gateway: Any) -> Iterator[tuple[Serving, Raw]]:
    with serving(root, **gateway) as at, associated(at.port) as peer:
        yield at, peer


def no_room(root: Path) -> int:
    free = [10**12]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space_module, "PATIENCE_S", 0.2)
        room = {"measure": lambda _: (free[0], 10**12), "intake": {"reserve_gb": 1}}
        with served(root, **room) as (_, peer):
            free[0] = 0
            return next(one for one in iter(lambda: peer.store("1.2.3", data_set("1.2.3")), None) if one)


def our_fault(root: Path) -> int:
    with pytest.MonkeyPatch.context() as patch, served(root) as (_, peer):
        patch.setattr(JournalWriter, "append", lambda *_: 1 / 0)
        status = peer.store("1.2.3", data_set("1.2.3"))
        patch.undo()
        return status


def private(root: Path) -> int:
    context = (pdu.Context(id=1, abstract_syntax=PRIVATE, transfer_syntaxes=(EXPLICIT,)),)
    with serving(root, scp={"accept_private_sop_classes": False}) as at, Raw(at.port) as peer:
        peer.associate(contexts=context)
        data = data_set("1.2.3").replace(CT.encode(), PRIVATE.encode())
        peer.say(pdu.p_data(1, pdu.COMMAND, store_request("1.2.3", sop_class=PRIVATE)), pdu.p_data(1, 0, data))
        return peer.status()


def from_a_destination(root: Path) -> int:
    pacs = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}
    with serving(root, destinations=[pacs]) as at, Raw(at.port) as peer:
        return peer.associate(calling="PACS").store("1.2.3", data_set("1.2.3"))


def stored(root: Path, uid: str, data: bytes) -> int:
    with served(root) as (_, peer):
        return peer.store(uid, data)


STATUSES: dict[str, Callable[[Path], int]] = {
    "0x0000": lambda root: stored(root, "1.2.3", data_set("1.2.3")),
    "0xA700": no_room,
    "0xA900": lambda root: stored(root, "1.2.3", data_set("1.2.4")),
    "0xC000": lambda root: stored(root, "1.2.3", data_set("1.2.3")[:-5]),
    "0x0110": our_fault,
    "0x0122": private,
    "0x0124": from_a_destination,
}


@pytest.mark.parametrize("status", STATUSES)
def test_each_status_is_answered_when_the_statement_says(status: str, tmp_path: Path) -> None:
    assert f"0x{STATUSES[status](tmp_path):04X}" == status


def test_no_status_is_without_a_case() -> None:
    assert set(rows("status")) == set(STATUSES)


# Places ----------------------------------------------------------------------------------------------------------


def test_an_address_has_its_share_and_no_more(tmp_path: Path) -> None:
    """Bites: count all addresses as one, or never give a place back."""
    scp = {"max_associations": 20, "max_associations_per_address": 2}
    with serving(tmp_path, scp=scp, sources=[{**SOURCE, "host": "127.0.0.0/8"}]) as at:
        with associated(at.port), associated(at.port):
            with Raw(at.port) as third:
                assert rejection(third) == CHECKS["`association-limit`"]
            with Raw(at.port, source="127.0.0.2") as elsewhere:
                elsewhere.associate()
                assert elsewhere.echo() == 0
        for _ in range(200):
            if at.board.associations == 0:
                break
            pause(0.05)
        with associated(at.port) as again:
            assert again.echo() == 0


def test_places_are_kept_for_who_is_known(tmp_path: Path) -> None:
    """Of ten, two. Bites: let who is unknown have them all."""
    scp = {"max_associations": 10, "reject_unknown_sources": False}
    with serving(tmp_path, scp=scp) as at, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(Raw(at.port)).associate(calling="STRANGER")
        with Raw(at.port) as ninth:
            assert rejection(ninth, pdu.request("B", "STRANGER", CONTEXTS)) == CHECKS["`association-limit`"]
        for _ in range(2):
            stack.enter_context(associated(at.port))
        with Raw(at.port) as eleventh:
            assert rejection(eleventh) == CHECKS["`association-limit`"]
