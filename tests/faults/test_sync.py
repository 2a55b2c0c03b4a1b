"""F03 by construction: with strace, success is answered only after data set, folder and journal were synced.

The same of C-STORE and of STOW-RS, which lie on one intake path.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid
from support.dcmtk import need, storescu
from support.processes import drain_traced, wait_for_port
from support.system import describe
from support.world import free_port, make_series

from console.checks import check_config
from gateway.intake import COLLECTED_BYTES

STRACE = Path("/usr/bin/strace")
CALLS = "trace=pwritev,pwritev2,pwrite64,write,fsync,fdatasync,rename,sendto,sendmsg"
SMALL, LARGE = 4, 2
TOKEN = "a-token-of-a-modality"


def test_success_is_answered_after_every_sync(tmp_path: Path) -> None:
    """Bites: leave out a sync in Segment or IncomingFile, or answer before it (`test_the_proof_bites`)."""
    answers, broken = _judge(_trace(tmp_path), ANSWER)
    assert answers == SMALL + LARGE
    assert broken == []


def test_a_web_request_is_answered_after_every_sync(tmp_path: Path) -> None:
    """Requests of one instance and of several, small and large. Bites: the same."""
    answers, broken = _judge(_trace_web(tmp_path), WEB_ANSWER)
    assert answers == SMALL + LARGE + 1
    assert broken == []


@pytest.mark.parametrize("left_out", ["segments", "objects"])
def test_the_proof_bites(left_out: str, tmp_path: Path) -> None:
    """The same, with the product's syncs replaced by nothing: then the judge must say so."""
    _, broken = _judge(_trace(tmp_path, left_out), ANSWER)
    assert len(broken) >= (SMALL if left_out == "segments" else LARGE)


@pytest.mark.parametrize("left_out", ["segments", "objects"])
def test_the_proof_of_web_requests_bites(left_out: str, tmp_path: Path) -> None:
    _, broken = _judge(_trace_web(tmp_path, left_out), WEB_ANSWER)
    assert len(broken) >= (SMALL if left_out == "segments" else LARGE)


def _trace(root: Path, left_out: str = "") -> list[str]:
    config = describe(root, scp={"port": free_port(), "workers": 1})
    port = check_config(config).config.gateway.scp.port

    def send(files: list[Path]) -> None:
        assert len(storescu(files, port)) == SMALL + LARGE

    return _traced(root, "intake", config, port, send, left_out)


def _trace_web(root: Path, left_out: str = "") -> list[str]:
    port = free_port()
    config = describe(root, stow={"port": port, "clients": [{"ae_title": "WEB", "token": TOKEN}]})

    def send(files: list[Path]) -> None:
        for sent in [*([one] for one in files), files]:
            body = b"".join(b"--bb\r\nContent-Type: application/dicom\r\n\r\n%b\r\n" % one.read_bytes() for one in sent)
            kind = 'multipart/related; type="application/dicom"; boundary=bb'
            answer = httpx.post(
                f"http://127.0.0.1:{port}/CHEST/studies", content=body + b"--bb--\r\n", timeout=60,
                headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": kind},
            )  # fmt: skip
            assert answer.status_code == HTTPStatus.OK, answer.text

    return _traced(root, "stow", config, port, send, left_out)


def _traced(
    root: Path, stage: str, config: Path, port: int, send: Callable[[list[Path]], None], left_out: str
) -> list[str]:
    trace = root / "trace"
    serve = [sys.executable, "-P", "-m", "console.serve", stage, str(config)]
    if left_out:
        module = {"segments": "gateway.segments", "objects": "clarion.adapters.objects"}[left_out]
        code = (
            f"import sys, types, os, {module} as m; m.os = types.SimpleNamespace(**{{**vars(os), 'fdatasync': print}})"
        )
        code += "; from console import serve; sys.argv = sys.argv[:1] + sys.argv[-2:]; sys.exit(serve.main())"
        serve = [sys.executable, "-P", "-c", code, *serve[-2:]]
    command = [str(need(STRACE, "strace")), "-f", "-y", "-s", "64", "-e", CALLS, "-o", str(trace), *serve]
    with (root / "log").open("wb") as log:
        receiving = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, stdout=log)
    try:
        wait_for_port(port, receiving)
        series = make_series(root / "series")[:SMALL]
        large = [_enlarge(path, root / f"large{path.name}") for path in series[:LARGE]]
        send([*series, *large])
    finally:
        drain_traced(receiving)
    return trace.read_text(errors="replace").splitlines()


def _enlarge(source: Path, target: Path) -> Path:
    """Give a copy of an instance, under a UID of its own, that is too large for a segment."""
    ds = dcmread(source)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.add_new(0x00420011, "OB", bytes(2 * COLLECTED_BYTES))
    ds.save_as(target)
    return target


def _judge(lines: list[str], success: re.Pattern[str]) -> tuple[int, list[str]]:
    """Give the number of answers of success, and for each that came too soon what was not durable then.

    Every write to a journal segment or an incoming file has to be followed by a sync of that file that begins after
    it and ends before the answer; a file put in place by a sync of its folder.
    """
    answers, broken = 0, []
    unsynced: dict[str, str] = {}
    begun: dict[str, tuple[str, set[str]]] = {}
    for line in lines:
        pid, call = line.split(maxsplit=1)
        if "resumed>" in call:
            name, covered = begun.pop(pid, ("", set()))
            if name and re.search(r"= 0$", call):
                unsynced = {key: what for key, what in unsynced.items() if key not in covered}
            continue
        path = re.search(r"\(\d+<([^>]*)>", call)
        if re.match(r"(pwritev2?|pwrite64|write)\(", call) and path and _matters(path[1]):
            unsynced[path[1]] = call
        elif re.match(r"rename\(", call) and "/objects/" in call:
            target = call.split('"')[3]
            unsynced[str(Path(target).parent)] = call
        elif re.match(r"f(data)?sync\(", call) and path:
            begun[pid] = (path[1], {path[1]} & set(unsynced))
            if call.endswith("= 0"):
                unsynced.pop(path[1], None)
                del begun[pid]
        elif success.search(call):
            answers += 1
            if unsynced:
                broken.append(f"{call} with {unsynced}")
    return answers, broken


# A P-DATA-TF (type 4) that a socket is given: between association and release, only C-STORE responses.
ANSWER = re.compile(r"sendto\(\d+<(TCP|socket):[^>]*>, \"\\4\\0")
WEB_ANSWER = re.compile(r"sendto\(\d+<(TCP|socket):[^>]*>, \"HTTP/1.1 200")


def _matters(path: str) -> bool:
    return path.endswith(".seg") or "/objects/incoming/" in path
