"""Headers of every length are read, whether or not they end in what is kept of a record that was just written."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from support.raw import CT, EXPLICIT, data_set, element
from support.receiving import Receiving

from clarion.adapters.objects import FileStore
from clarion.digests import digest_of
from gateway import journal_writer, tables
from gateway.blocks import BlockBuffer
from gateway.segments import SEGMENT_BYTES

LARGEST = 300_000


@pytest.mark.parametrize(
    ("before", "heads", "wholes"), [(100, 0, 0), (6_000, 0, 0), (10_000, 5, 0), (30_000, 5, 6)], ids=str
)
def test_the_header_is_read(
    before: int, heads: int, wholes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private value of so many bytes in front of the UIDs. Bites: read the whole data set for a header of 10 kB."""
    rig = Receiving(tmp_path, monkeypatch)
    monkeypatch.setattr(journal_writer, "SEGMENT_BYTES", SEGMENT_BYTES)
    asked: list[str] = []
    for name in ("read_head", "read"):
        real = getattr(FileStore, name)
        monkeypatch.setattr(FileStore, name, lambda *given, _n=name, _r=real: asked.append(_n) or _r(*given))
    buffer = BlockBuffer(LARGEST)
    for number in range(6):
        uid = f"1.2.{number}"
        plain = data_set(uid, 200_000)
        split = plain.index(element(0x20, 0xD, "UI", b"1.2.9"))
        data = plain[:split] + element(0x19, 0x1001, "LO", b"x" * before) + plain[split:]
        buffer.data[: len(data)] = data
        fields = {
            "sop_class_uid": CT, "sop_instance_uid": uid, "transfer_syntax_uid": EXPLICIT, "calling_ae": "A",
            "called_ae": "B", "association": "a", "study_uid": "1.2.9", "series_uid": "1.2.9.1",
            "object": {"digest": digest_of(data)},
        }  # fmt: skip
        rig.writer.append("stored", fields, buffer.data[: len(data)], buffer)
        rig.wanted[uid] = data
    rig.settle()
    # The first one of a log comes from its segment, with a longer head.
    assert asked.count("read_head") == heads
    assert asked.count("read") == wholes
    with rig.database.reading() as connection:
        rows = connection.execute(sa.select(tables.instances)).all()
    assert {one.state for one in rows} == {"grouped"}
    assert {one.attributes["0020000E"] for one in rows} == {"1.2.9.1"}, "behind the long one"
    rig.judge()
