"""What a figure was measured on: file system, versions, what the machine has, and what creating a file costs now."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from support.dcmtk import tool
from support.processes import ORTHANC

_FILES = 100


def facts(work: Path) -> dict[str, Any]:
    """Give what is to be kept beside every run."""
    cpu = next((one for one in Path("/proc/cpuinfo").read_text().splitlines() if one.startswith("model name")), "")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "commit": _said(shutil.which("git") or "git", "describe", "--always", "--dirty"),
        "command": sys.argv, "work": str(work), **file_system(work), "cpu": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count(), "memory_gib": round(memory, 1), "kernel": platform.release(),
        "python": f"{platform.python_version()} {platform.python_compiler()}", "blake3": version("blake3"),
        "dcmtk": _said(tool("storescp"), "--version"), "orthanc": _said(str(ORTHANC), "--version"),
    }  # fmt: skip


def file_system(work: Path) -> dict[str, str]:
    """Give kind, device and options of the file system under a folder, and whether an ext4 has a journal."""
    mount = work.resolve()
    while not mount.is_mount():
        mount = mount.parent
    device, kind, options = "", "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        if fields[1] == str(mount):
            device, kind, options = fields[0], fields[2], fields[3]
    if kind == "ext4" and not _has_journal(Path(device).name):
        kind = "ext4 without a journal"
    return {"file_system": kind, "device": device, "mount_options": options}


def keeps_promises(kind: str) -> bool:
    """Tell whether what is synced there costs what it costs users: nothing in memory, nothing without a journal."""
    return kind not in {"tmpfs", "ramfs", "overlay", "ext4 without a journal"}


def _has_journal(device: str) -> bool:
    journals = Path("/proc/fs/jbd2")
    return journals.is_dir() and any(one.name.rpartition("-")[0] == device for one in journals.iterdir())


def _said(*command: str) -> str:
    """Give the first line that a command says, of a version the number only."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    line = (ran.stdout + ran.stderr).strip().partition("\n")[0]
    found = re.search(r"v?\d+(\.\d+)+", line)
    return found.group() if found and "--version" in command else line


def create_us(folder: Path) -> float:
    """Give the microseconds of CPU that creating a file takes now: after removals it is dear for minutes on some."""
    folder.mkdir()
    begun = time.process_time()
    for number in range(_FILES):
        os.close(os.open(folder / str(number), os.O_CREAT | os.O_WRONLY))
    return round((time.process_time() - begun) / _FILES * 1e6, 1)
