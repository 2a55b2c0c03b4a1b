"""F03 by construction: with strace, success is answered only after data set, folder and journal were synced."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from support.dcmtk import need, storescu
from support.processes import wait_for_port
from support.system import describe
from support.world import make_series, pause

from console.checks import check_config

STRACE = Path("/usr/bin/strace")
CALLS = "trace=openat,fsync,fdatasync,rename,renameat,renameat2,sendto,write"


def test_success_is_answered_after_every_sync(tmp_path: Path) -> None:
    """Bites: leave out any of the three syncs in FileStore._write or JournalWriter.append, or answer before them."""
    config = describe(tmp_path)
    port = check_config(config).config.gateway.scp.port
    trace = tmp_path / "trace"
    clarion = [sys.executable, "-P", "-m", "console.serve", "intake", str(config)]
    command = [str(need(STRACE, "strace")), "-f", "-y", "-s", "64", "-e", CALLS, "-o", str(trace), *clarion]
    with (tmp_path / "log").open("wb") as log:
        intake = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
    try:
        wait_for_port(port, intake)
        series = make_series(tmp_path / "series")
        assert len(storescu(series, port)) == len(series)
    finally:
        _end(intake)
    lines = trace.read_text(errors="replace").splitlines()
    answers = [index for index, line in enumerate(lines) if _is_answer(line)]
    assert len(answers) == len(series)
    start = 0
    for index in answers:
        _judge(lines[start:index])
        start = index + 1


def _is_answer(line: str) -> bool:
    """A P-DATA-TF (type 4) that a socket was given: between association and release, only C-STORE responses."""
    return re.search(r"(sendto|write)\(\d+<(TCP|socket):[^>]*>, \"\\4\\0", line) is not None


def _judge(before: list[str]) -> None:
    """In order: the data set's file, its place in the store, that folder, the journal."""
    steps = [
        r"fsync\(\d+<[^>]*/objects/incoming/[0-9a-f]+>",
        r"rename\w*\(.*/objects/incoming/.*/objects/[0-9a-f]{2}/",
        r"fsync\(\d+<[^>]*/objects/[0-9a-f]{2}>",
        r"write\(\d+<[^>]*/journal/\d+\.clj>",
        r"fdatasync\(\d+<[^>]*/journal/\d+\.clj>",
    ]
    at = 0
    for step in steps:
        at = next((index + 1 for index in range(at, len(before)) if re.search(step, before[index])), 0)
        assert at, f"no {step} before the answer, in this order:\n" + "\n".join(before[-40:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell what strace runs to drain; strace ends with it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    import os

    for pid in children:
        os.kill(int(pid), signal.SIGTERM)
    for _ in range(3000):
        if process.poll() is not None:
            return
        pause(0.01)
    process.kill()
    raise AssertionError("intake did not drain")
