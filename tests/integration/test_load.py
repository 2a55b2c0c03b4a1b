"""`clarion load studies`: the load is what was asked for, and the ledger is what the receiver really has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from support.data import real
from support.processes import CLARION, clarion
from support.scp import Serving, serving
from support.world import free_port, make_series, pause, uid_of

from clarion.dicom import read_header, split_part10
from clarion.digests import digest_of
from clarion.errors import InvalidInstanceError
from clarion.renaming import rename


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path / "gateway") as one:
        yield one


def load(at: Serving, folder: Path, *words: object) -> dict[str, Any]:
    done = clarion("load", "studies", folder, "-a", "B", "--port", at.port, "--calling", "A", "--json", *words)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert isinstance(said, dict)
    return said


def stored(at: Serving) -> list[tuple[str, str]]:
    return [
        (fields["sop_instance_uid"], fields["object"]["digest"]) for kind, fields in at.journalled() if kind == "stored"
    ]


def ledger_of(path: Path) -> list[tuple[str, str]]:
    return [tuple(line.split()) for line in path.read_text().splitlines()]  # type: ignore[misc]


def test_the_ledger_is_what_the_receiver_has(at: Serving, tmp_path: Path) -> None:
    """Three passes over four associations: each pass its own studies, every data set whole."""
    files = make_series(tmp_path / "series")
    ledger = tmp_path / "ledger"
    said = load(at, tmp_path / "series", "-n", 3, "--associations", 4, "--reorder", "--ledger", ledger)
    assert said["acknowledged"] == said["planned"] == 3 * len(files)
    assert sorted(ledger_of(ledger)) == sorted(stored(at))
    studies = Counter(fields["study_uid"] for kind, fields in at.journalled() if kind == "stored")
    assert list(studies.values()) == [len(files)] * 3
    assert said["response_ms"]["max"] >= said["response_ms"]["p50"] > 0


def test_each_twice(at: Serving, tmp_path: Path) -> None:
    files = make_series(tmp_path / "series")
    said = load(at, tmp_path / "series", "--duplicate")
    assert said["acknowledged"] == 2 * len(files)
    assert Counter(uid for uid, _ in stored(at)) == {uid_of(one): 2 for one in files}


def test_a_rate_is_kept(at: Serving, tmp_path: Path) -> None:
    """No faster: the last of eight at ten a second begins seven tenths after the first."""
    make_series(tmp_path / "series")
    said = load(at, tmp_path / "series", "-n", 2, "--rate", 10, "--associations", 2)
    assert said["seconds"] >= 0.7


def test_a_peer_that_is_not_there_and_one_that_refuses(at: Serving, tmp_path: Path) -> None:
    file = make_series(tmp_path / "series")[0]
    stranger = clarion("load", "studies", file, "-a", "B", "--port", at.port, "--calling", "X")
    assert stranger.returncode == 1
    away = clarion("load", "studies", file, "-a", "B", "--port", free_port(), "--json")
    assert away.returncode == 3
    assert json.loads(away.stdout)["pending"] == 1
    assert "is the peer running there?" in json.loads(away.stdout)["trouble"]
    ds = dcmread(file)
    ds.StudyInstanceUID = ""
    ds.save_as(file)
    refused = clarion("load", "studies", file, "-a", "B", "--port", at.port, "--calling", "A")
    assert refused.returncode == 1
    assert "1 refused 0xC000" in refused.stdout


def test_interrupted_it_says_how_many_are_pending(at: Serving, tmp_path: Path) -> None:
    make_series(tmp_path / "series")
    ledger = tmp_path / "ledger"
    words = ["load", "studies", str(tmp_path / "series"), "-a", "B", "--port", str(at.port), "--calling", "A",
             "--rate", "2", "-n", "50", "--ledger", str(ledger), "--json"]  # fmt: skip
    with subprocess.Popen([CLARION, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in range(2000):
            if ledger.exists() and ledger.read_text():
                break
            pause(0.01)
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    said = json.loads(out)
    assert said["planned"] == 200
    assert said["pending"] == 200 - said["acknowledged"]
    assert said["acknowledged"] == len(ledger_of(ledger)) >= 1


def test_renamed_data_sets_differ_in_three_elements_only() -> None:
    """In every transfer syntax of the sample data. Bites: write the length in the wrong order, and pydicom fails."""
    seen = set()
    for path in sorted(one for one in real("transfer-syntaxes").rglob("*") if one.is_file()):
        try:
            data, syntax = split_part10(path.read_bytes())
        except InvalidInstanceError:
            continue
        if syntax == "1.2.840.10008.1.2.1.99":
            continue
        seen.add(syntax)
        changed, instance = rename(data, syntax, "salt")
        before, after = read_header(data, syntax), read_header(changed, syntax)
        assert after.fault is None
        assert after.sop_instance_uid == instance != before.sop_instance_uid
        assert bool(before.study_uid) == after.study_uid.startswith("2.25.")
        assert after.sop_class_uid == before.sop_class_uid
        assert digest_of(changed) != digest_of(data)
        assert data[-1000:] == changed[-1000:]
        assert rename(data, syntax, "salt") == (changed, instance)
    assert len(seen) >= 8
