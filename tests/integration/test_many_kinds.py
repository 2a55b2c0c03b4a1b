"""More SOP classes and syntaxes than one association can propose: 128 presentation contexts (PS3.8 9.3.2.2)."""

from __future__ import annotations

from pathlib import Path

from pydicom import Dataset
from support.delivering import EXPLICIT, Rig, data_set, encoded, peer

from clarion.dicom import part10
from clarion.model import Destination
from console.sending import send_folder
from gateway.proposals import MOST_CLASSES, share_out


def test_more_kinds_than_an_association_can_propose_go_on_several(tmp_path: Path) -> None:
    """Each class is offered in two transfer syntaxes. Bites: cut off what does not fit, and those are refused."""
    kinds = [f"1.2.840.10008.5.1.4.1.1.{number}" for number in range(1, 91)]
    with peer(classes=kinds) as pacs:
        rig = Rig(tmp_path, pacs.port)
        rig.request(count=len(kinds), classes=kinds)
        assert rig.settle().state == "verified"
        assert pacs.stored == {f"1.2.3.{number}": 1 for number in range(len(kinds))}
        assert pacs.associations[0] >= 2


def test_what_one_association_can_propose_goes_on_one() -> None:
    items = list(range(500))
    assert share_out(items, lambda one: [(f"1.2.{one % 62}", "a"), (f"1.2.{one % 62}", "b")]) == [items]
    parts = share_out(items, lambda one: [(f"1.2.{one % 300}", "a")])
    assert len(parts) == 3, "as few as can be"
    assert sorted(one for part in parts for one in part) == items
    for part in parts:
        assert len({one % 300 for one in part}) <= MOST_CLASSES


def _file(ds: Dataset) -> bytes:
    uids = {"sop_class_uid": ds.SOPClassUID, "sop_instance_uid": ds.SOPInstanceUID}
    return part10(encoded(ds), **uids, transfer_syntax_uid=EXPLICIT)


def test_a_folder_of_many_kinds_is_sent(tmp_path: Path) -> None:
    kinds = [f"1.2.840.10008.5.1.4.1.1.{number}" for number in range(1, 151)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, one in enumerate(kinds):
        ds = data_set(number)
        ds.SOPClassUID = one
        (folder / f"{number}.dcm").write_bytes(_file(ds))
    with peer(classes=kinds) as pacs:
        to = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=pacs.port)
        sent = send_folder(folder, to, own_ae="A")
        assert len(sent.acknowledged) == len(pacs.stored) == len(kinds)
        assert not sent.refused
        assert pacs.associations[0] == 2
