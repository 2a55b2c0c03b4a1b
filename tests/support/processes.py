"""Real servers as private processes: our small PACS, Orthanc, DCMTK's storescp. Ended by the fixture that made them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from support.world import pause

CLARION = str(Path(sys.executable).parent / "clarion")
ORTHANC = Path("/usr/sbin/Orthanc")


def clarion(*words: object, cwd: Path | None = None, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command as a person types it, and wait for its end."""
    return subprocess.run(
        [CLARION, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for_port(port: int, process: subprocess.Popen[bytes], deadline_s: float = 30) -> None:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        pause(0.05)
    raise AssertionError(f"nothing listens on {port} after {deadline_s} s")


def start_pacs(folder: Path, port: int, ae_title: str, caller: tuple[str, int]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "clarion.testing.pacs", str(folder), str(port), ae_title]
    process = subprocess.Popen([*command, "--caller", caller[0], "127.0.0.1", str(caller[1])])
    wait_for_port(port, process)
    return process


DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def start_orthanc(
    folder: Path, *, dicom: int, http: int, caller: tuple[str, int], users: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A fresh Orthanc on loopback that knows the caller, for storage commitment reports too.

    With `users` it has DICOMweb, and asks who one is.
    """
    folder.mkdir(parents=True)
    described = {
        "Name": "clarion-test",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "DicomAet": "ORTHANC",
        "DicomPort": dicom,
        "HttpPort": http,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": users is not None,
        "RegisteredUsers": users or {},
        "DicomModalities": {"clarion": [caller[0], "127.0.0.1", caller[1]]},
        "Plugins": [] if users is None else [str(DICOMWEB)],
    }
    (folder / "orthanc.json").write_text(json.dumps(described))
    process = subprocess.Popen(
        [str(ORTHANC), str(folder / "orthanc.json")],
        stdout=(folder / "log").open("wb"),
        stderr=subprocess.STDOUT,
        env=dict(os.environ),
    )
    wait_for_port(dicom, process)
    wait_for_port(http, process)
    return process


def drain_traced(process: subprocess.Popen[bytes]) -> None:
    """Tell what strace runs to drain; strace ends with it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in children:
        os.kill(int(pid), signal.SIGTERM)
    for _ in range(3000):
        if process.poll() is not None:
            return
        pause(0.01)
    process.kill()
    raise AssertionError("intake did not drain")
