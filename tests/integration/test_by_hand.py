"""`clarion echo` and `clarion send` as a person types them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import clarion
from support.scp import Serving, serving
from support.world import free_port, make_series, uid_of


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path / "gateway") as one:
        yield one


def test_echo(at: Serving) -> None:
    done = clarion("echo", f"B@127.0.0.1:{at.port}", "--calling", "A", "--json")
    assert (done.returncode, json.loads(done.stdout)["status"]) == (0, "0x0000")
    refused = clarion("echo", f"B@127.0.0.1:{at.port}", "--calling", "X")
    assert refused.returncode == 1
    assert "result 1, source 1, reason 3 (our AE title" in refused.stderr
    away = clarion("echo", f"B@127.0.0.1:{free_port()}", "--calling", "A")
    assert away.returncode == 3
    assert "is the peer running there?" in away.stderr


@pytest.mark.parametrize(
    ("peer", "calling"),
    [("B@127.0.0.1:99999", "A"), ("B", "A"), ("B@127.0.0.1:104", "A\\B"), ("B" * 17 + "@127.0.0.1:104", "A"),
     ("B@127.0.0.1:104", "")],
)  # fmt: skip
def test_what_is_no_peer_or_title_is_a_wrong_use(peer: str, calling: str) -> None:
    done = clarion("echo", peer, "--calling", calling)
    assert done.returncode == 2
    assert "clarion: " in done.stderr


def test_send_keeps_a_ledger_and_names_what_was_refused(at: Serving, tmp_path: Path) -> None:
    series = make_series(tmp_path / "series")
    (tmp_path / "series" / "readme.txt").write_text("no DICOM")
    short = tmp_path / "series" / "short.dcm"
    short.write_bytes(series[0].read_bytes()[:-100])
    ledger = tmp_path / "ledger.txt"
    done = clarion(
        "send", tmp_path / "series", f"B@127.0.0.1:{at.port}", "--calling", "A", "--ledger", ledger, "--json"
    )
    said = json.loads(done.stdout)
    assert done.returncode == 1
    assert (
        ledger.read_text().split()
        == said["acknowledged"]
        == sorted(map(uid_of, series), key=said["acknowledged"].index)
    )
    assert said["refused"] == [
        {"file": "short.dcm", "sop_instance_uid": uid_of(series[0]), "status": "0xC000", "comment": "truncated"}
    ]
    assert said["skipped"] == ["readme.txt"]
    stored = {fields["sop_instance_uid"] for kind, fields in at.journalled() if kind == "stored"}
    assert stored == set(said["acknowledged"])


def test_a_ledger_that_cannot_be_written_stops_before_anything_is_sent(at: Serving, tmp_path: Path) -> None:
    file = make_series(tmp_path / "series")[0]
    peer = f"B@127.0.0.1:{at.port}"
    done = clarion("send", file, peer, "--calling", "A", "--ledger", tmp_path / "no" / "ledger")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert at.journalled() == []
    assert clarion("send", file, peer, "--calling", "A").stdout == "1 acknowledged, 0 refused, 0 skipped\n"
