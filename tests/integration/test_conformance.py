"""docs/conformance.md says what the code does, and a live association says the same."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from pydicom.uid import UID, AllTransferSyntaxes
from support.raw import CT, Raw, data_set
from support.scp import serving
from support.tools import load_tool

from gateway.wire import pdu
from gateway.wire.acceptance import PLAIN, STORAGE, STORAGE_COMMITMENT, VERIFICATION

IMPLICIT = "1.2.840.10008.1.2"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("write_conformance")


def test_the_statement_is_what_the_code_says(tool: ModuleType) -> None:
    assert tool.TARGET.read_text() == tool.text(), "run tests/tools/write_conformance.py"


def negotiated(at_port: int, proposed: list[tuple[str, tuple[str, ...]]]) -> list[tuple[int, str]]:
    """Propose contexts, a hundred at a time; give result and transfer syntax of each."""
    answers: list[tuple[int, str]] = []
    for first in range(0, len(proposed), 100):
        contexts = [
            pdu.Context(id=2 * index + 1, abstract_syntax=abstract, transfer_syntaxes=syntaxes)
            for index, (abstract, syntaxes) in enumerate(proposed[first : first + 100])
        ]
        with Raw(at_port) as peer:
            peer.say(pdu.request("B", "A", contexts))
            kind, body = peer.hear()
            assert kind == pdu.ASSOCIATE_AC
            accepted = pdu.parse_accept(body)
            answers += [(accepted.results[one.id], accepted.syntaxes.get(one.id, "")) for one in contexts]
            assert accepted.max_length == pdu.MAX_LENGTH
            assert peer.release() == pdu.RELEASE_RP
    return answers


def test_every_row_of_the_acceptor_on_a_live_association(tmp_path: Path) -> None:
    from pydicom._uid_dict import UID_dictionary

    standard = [uid for uid, entry in UID_dictionary.items() if entry[1] == "SOP Class"]
    storage = [uid for uid in standard if uid.startswith("1.2.840.10008.5.1.4.1.1.")] + sorted(STORAGE)
    others = [uid for uid in standard if uid not in {*storage, VERIFICATION, STORAGE_COMMITMENT}]
    assert len(storage) > 150
    assert len(others) > 80
    jpeg = "1.2.840.10008.1.2.4.70"
    with serving(tmp_path) as at:
        assert set(negotiated(at.port, [(uid, (jpeg, IMPLICIT)) for uid in storage])) == {(pdu.ACCEPTED, jpeg)}
        refused = (pdu.ABSTRACT_SYNTAX_NOT_SUPPORTED, "")
        assert set(negotiated(at.port, [(uid, (IMPLICIT,)) for uid in others])) == {refused}
        every = [str(one) for one in AllTransferSyntaxes]
        assert negotiated(at.port, [(CT, (one,)) for one in every]) == [(pdu.ACCEPTED, one) for one in every]
        for uid in (VERIFICATION, STORAGE_COMMITMENT):
            assert negotiated(at.port, [(uid, (one,)) for one in PLAIN]) == [(pdu.ACCEPTED, one) for one in PLAIN]
            assert negotiated(at.port, [(uid, (jpeg,))]) == [(pdu.TRANSFER_SYNTAXES_NOT_SUPPORTED, "")]
        assert negotiated(at.port, [("1.2.826.0.1.3680043.9.1.1", (IMPLICIT,))]) == [(pdu.ACCEPTED, IMPLICIT)]
        assert UID(STORAGE_COMMITMENT).name == "Storage Commitment Push Model SOP Class"


@pytest.mark.parametrize(
    ("role", "answered"), [((False, True), (False, True)), ((True, True), (True, True)), (None, None)]
)
def test_a_peer_that_reports_commitments_may_play_the_scp(
    role: tuple[bool, bool] | None, answered: tuple[bool, bool] | None, tmp_path: Path
) -> None:
    context = pdu.Context(id=1, abstract_syntax=STORAGE_COMMITMENT, transfer_syntaxes=(IMPLICIT,))
    with serving(tmp_path) as at, Raw(at.port) as peer:
        peer.say(pdu.request("B", "A", [context], roles={STORAGE_COMMITMENT: role} if role else None))
        kind, body = peer.hear()
        assert kind == pdu.ASSOCIATE_AC
        assert pdu.parse_accept(body).roles.get(STORAGE_COMMITMENT) == role


@pytest.mark.parametrize("uid", ["1.2.3", "1.2.3.4"])
def test_uids_come_back_as_they_were_sent(uid: str, tmp_path: Path) -> None:
    """Padded or not (PS3.7 6.3.1 pads with a NUL): echoed as they came, compared without."""
    with serving(tmp_path) as at, Raw(at.port) as peer:
        assert peer.associate().store(uid, data_set(uid)) == 0
