"""DCMTK's tools, always by absolute path: pynetdicom installs scripts of the same names."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from support.world import uid_of

from clarion.dicom import split_part10
from clarion.digests import digest_of

BIN = Path("/usr/bin")
# Without it DCMTK 3.6.7 waits 40 ms for each acknowledgement.
ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}


def need(program: Path, package: str) -> Path:
    """Give the program, or skip by name; in CI a missing server is a failure."""
    if program.exists():
        return program
    message = f"{program} is missing; install the package {package} (make servers)"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def tool(name: str) -> str:
    return str(need(BIN / name, "dcmtk"))


def storescu(
    files: list[Path], port: int, *, calling: str = "SENDER", called: str = "CHEST", more: tuple[str, ...] = ()
) -> set[tuple[str, str]]:
    """Send files one after another on one association; gives (SOP Instance UID, digest) of what was acknowledged."""
    command = [tool("storescu"), "-v", "-R", "-aet", calling, "-aec", called, *more, "127.0.0.1", str(port)]
    done = subprocess.run(
        [*command, *map(str, files)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    said = done.stderr + done.stdout
    # One response per request, in order; what follows the first failure is not counted.
    responses = re.findall(r"I: Received Store Response \((\w+)", said)
    acknowledged = set()
    for path, response in zip(files, responses, strict=False):
        if response == "Success":
            data, _ = split_part10(path.read_bytes())
            acknowledged.add((uid_of(path), digest_of(data)))
    return acknowledged


def run(name: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool(name), *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )
