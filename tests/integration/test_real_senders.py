"""Real clients, unmodified, as senders: dicom-rs, Orthanc, DCMTK and pynetdicom; every byte is compared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.data import real
from support.dcmtk import need, run
from support.processes import ORTHANC, start_orthanc
from support.scp import Serving, serving
from support.tap import Tap
from support.world import free_port, make_series, pause, uid_of

from clarion.dicom import read_file_meta, split_part10
from clarion.errors import InvalidInstanceError

DICOM_RS = "0.10.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "clarion"


def dicom_rs() -> Path:
    """Give dicom-rs's storescu, which `make servers` builds where there is a Rust tool chain."""
    program = CACHE / f"dicom-storescu-{DICOM_RS}" / "bin" / "dicom-storescu"
    if not program.exists() and shutil.which("cargo") is None:
        pytest.skip(
            "dicom-rs has to be built, and there is no cargo; install Rust (https://rustup.rs), then make servers"
        )
    return need(program, "dicom-rs (make servers)")


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path / "gateway", sources=[{"ae_title": "A", "host": "127.0.0.1"}]) as one:
        yield one


def samples() -> list[Path]:
    """One file for each transfer syntax of the sample data, those that name what they are."""
    found: dict[str, Path] = {}
    for path in sorted(one for one in real("transfer-syntaxes").rglob("*") if one.is_file()):
        try:
            meta, _ = read_file_meta(path.read_bytes())
        except InvalidInstanceError:
            continue
        if meta.get(0x00020002) and meta.get(0x00020003) and meta.get(0x00020010):
            found.setdefault(meta[0x00020010], path)
    assert len(found) >= 8
    return list(found.values())


def kept(at: Serving) -> dict[str, bytes]:
    return {
        fields["sop_instance_uid"]: at.read(fields)
        for kind, fields in at.journalled()
        if kind in {"stored", "quarantined"}
    }


def data_of(files: list[Path]) -> dict[str, bytes]:
    return {uid_of(path): split_part10(path.read_bytes())[0] for path in files}


def test_dicom_rs_sends_a_series_over_several_associations(at: Serving, tmp_path: Path) -> None:
    files = make_series(tmp_path / "series")
    command = [dicom_rs(), "--calling-ae-title", "A", "--called-ae-title", "B", "--never-transcode", "--fail-first",
               "-c", "2", f"127.0.0.1:{at.port}", *files]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert kept(at) == data_of(files)


def test_dicom_rs_sends_every_transfer_syntax_and_every_byte_is_kept(at: Serving) -> None:
    """It writes sequences anew, so what is compared is what passed on the wire."""
    count = 0
    for path in samples():
        with Tap(at.port) as tap:
            command = [dicom_rs(), "--calling-ae-title", "A", "--called-ae-title", "B", "--never-transcode",
                       f"127.0.0.1:{tap.port}", path]  # fmt: skip
            subprocess.run([*map(str, command)], capture_output=True, timeout=60, check=False)
            sent = tap.data_sets()
            if sent:
                assert [kept(at).get(uid_of(path))] == sent, path
            count += len(sent)
    # It does not know the retired ones.
    assert count >= len(samples()) - 4


def test_dicom_rs_shows_its_user_identity(tmp_path: Path) -> None:
    """PS3.7 D.3.3.7, by a client that is not ours."""
    source = {"ae_title": "A", "host": "127.0.0.1", "user": "ct", "passcode": "open"}
    file = make_series(tmp_path / "series")[0]
    with serving(tmp_path / "gateway", sources=[source]) as at:
        command = [
            str(dicom_rs()),
            "--calling-ae-title",
            "A",
            "--called-ae-title",
            "B",
            f"127.0.0.1:{at.port}",
            str(file),
        ]
        for words, accepted in (((), False), (("--username", "ct", "--password", "wrong"), False),
                                (("--username", "ct", "--password", "open"), True)):  # fmt: skip
            subprocess.run([*command, *words], capture_output=True, timeout=60, check=False)
            assert (kept(at) == data_of([file])) is accepted
        assert at.board.refusals == {"calling-user": 2}


def test_orthanc_sends_every_transfer_syntax_and_every_byte_is_kept(tmp_path: Path) -> None:
    """Its sender keeps Nagle on, asks for many contexts at once, and writes sequences anew."""
    need(ORTHANC, "orthanc")
    http = free_port()
    sources = [{"ae_title": "ORTHANC", "host": "127.0.0.1"}]
    with serving(tmp_path / "gateway", sources=sources) as at, Tap(at.port) as tap:
        orthanc = start_orthanc(tmp_path / "orthanc", dicom=free_port(), http=http, caller=("B", tap.port))
        try:
            count = 0
            for path in samples():
                taken = httpx.post(f"http://127.0.0.1:{http}/instances", content=path.read_bytes())
                if taken.status_code != 200:
                    continue
                said = taken.json()
                answer = httpx.post(f"http://127.0.0.1:{http}/modalities/clarion/store", json=[said["ID"]], timeout=30)
                count += answer.status_code == 200
                assert len(tap.data_sets()) == count
                if answer.status_code == 200:
                    assert kept(at)[uid_of(path)] == tap.data_sets()[-1], path
                # The same image comes in many transfer syntaxes.
                httpx.delete(f"http://127.0.0.1:{http}/instances/{said['ID']}")
            # It does not take or send those that are younger than it is.
            assert count >= len(samples()) - 4
        finally:
            orthanc.kill()
            orthanc.wait()


def test_pynetdicom_s_own_storescu(at: Serving, tmp_path: Path) -> None:
    files = make_series(tmp_path / "series")
    program = Path(sys.executable).parent / "storescu"
    command = [str(program), "-aet", "A", "-aec", "B", "127.0.0.1", str(at.port), str(tmp_path / "series")]
    done = subprocess.run([sys.executable, "-m", "pynetdicom", *command[1:]] if not program.exists() else command,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(kept(at)) == set(map(uid_of, files))


def test_dcmsend_sends_a_folder(at: Serving, tmp_path: Path) -> None:
    files = make_series(tmp_path / "series")
    done = run("dcmsend", "-aet", "A", "-aec", "B", "+sd", "127.0.0.1", str(at.port), str(tmp_path / "series"))
    assert done.returncode == 0, done.stderr
    for _ in range(100):
        if len(kept(at)) == len(files):
            break
        pause(0.02)
    assert set(kept(at)) == set(map(uid_of, files))
