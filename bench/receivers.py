"""The receivers that are compared: Clarion as users start it, DCMTK made to sync, DCMTK at its best, Orthanc.

Class D answers after the bytes are on the disk, class N after they are in the page cache. A ratio across classes is
printed only with both labels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from support.dcmtk import ENVIRONMENT, tool
from support.processes import start_orthanc, wait_for_port
from support.system import System, describe, running
from support.world import free_port

from clarion.adapters.outbox import events_table
from clarion.dicom import split_part10
from clarion.events import InstanceStored
from clarion.model import ObjectRef
from console.checks import check_config
from gateway import tables
from gateway.journal import segments
from gateway.segments import MOST_READY, ready

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import ExitStack

_TICK = os.sysconf("SC_CLK_TCK")
SYNC_C = Path(__file__).parent / "sync_on_close.c"
NO_SYNC_C = Path(__file__).parent / "no_sync.c"


@dataclass
class Receiver:
    """A running receiver: where it listens, whose CPU it uses, how to wait until it is done, and to read it back."""

    label: str
    port: int
    called: str
    pids: Callable[[], list[int]]
    settle: Callable[[int], None]
    read_back: Callable[[], Callable[[str], bytes | None]] | None
    events: Callable[[], int | None] = lambda: None
    """Counts the events of stored instances, where there are such."""
    rest: Callable[[], None] = lambda: None
    """Waits until it stands as between two studies: what it prepares in idle moments is there."""

    def cpu(self) -> float:
        """Give the CPU seconds of its processes, ended children included."""
        return sum(_cpu(pid) for pid in dict.fromkeys(one for root in self.pids() for one in tree(root)))

    def memory(self) -> int:
        """Give the largest resident memory of one of its processes, in bytes."""
        return max(_rss(pid) for root in self.pids() for pid in tree(root))


def tree(pid: int) -> list[int]:
    """Give a process and its living descendants."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        # The process CPU clock of another process, see clock_getcpuclockid(3): nanoseconds, where stat has ticks.
        return time.clock_gettime(~pid << 3 | 2) + (int(fields[13]) + int(fields[14])) / _TICK
    except OSError:
        return 0.0


def _rss(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def start(name: str, root: Path, stack: ExitStack, *, max_associations: int = 100) -> Receiver:
    """Start a receiver on a fresh store."""
    root.mkdir(parents=True)
    if name == "clarion":
        return _clarion(root, stack, max_associations)
    if name == "clarion-written":
        os.environ["LD_PRELOAD"] = str(_preload(root.parent, NO_SYNC_C))
        try:
            return replace(_clarion(root, stack, max_associations), label="N")
        finally:
            del os.environ["LD_PRELOAD"]
    if name == "orthanc":
        return _orthanc(root, stack)
    return _storescp(name, root, stack)


def _clarion(root: Path, stack: ExitStack, max_associations: int) -> Receiver:
    config = describe_without_jobs(root, max_associations)
    system = stack.enter_context(running(config))

    def rest() -> None:
        end = time.monotonic() + 60
        while not all(map(_is_prepared, (config.parent / "data" / "journal").glob("w*"))):
            if time.monotonic() > end:
                raise SystemExit("no segments are prepared; is the disk full?")
            time.sleep(0.05)

    def read_back() -> Callable[[str], bytes | None]:
        with system.database.reading() as connection:
            rows = connection.execute(sa.select(tables.instances.c.sop_instance_uid, tables.instances.c.object)).all()
        refs = {row.sop_instance_uid: ObjectRef(**row.object) for row in rows}
        return lambda uid: system.store.read(refs[uid]) if uid in refs else None

    stages = ("intake", "grouping", "streams", "orchestrator", "delivery", "console")
    return Receiver(
        label="D",
        port=system.scp,
        called="CHEST",
        pids=lambda: [system.supervisor.pid_of(one) for one in stages],
        settle=lambda count: settle(system, count, 300),
        read_back=read_back,
        events=lambda: _events(system),
        rest=rest,
    )


def describe_without_jobs(root: Path, max_associations: int = 100) -> Path:
    """Write a configuration whose groups stay open: no job takes part in what is measured."""
    titles = [{"ae_title": "CHEST", "settings": {"pipeline-chest": "chest-ct", "timeout": 36000}}]
    return describe(root, ae_titles=titles, scp={"port": free_port(), "max_associations": max_associations})


def stored(system: System) -> int:
    """Count the instances that the grouping owner has taken."""
    with system.database.reading() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(tables.instances)).scalar_one())


def _events(system: System) -> int:
    table = events_table
    with system.database.reading() as connection:
        query = sa.select(sa.func.count()).where(table.c.kind == InstanceStored.kind)
        return int(connection.execute(query).scalar_one())


def settle(system: System, count: int, longest_s: float) -> None:
    """Wait until the grouping owner has taken so many instances."""
    end = time.monotonic() + longest_s
    while stored(system) < count:
        if time.monotonic() > end:
            raise SystemExit(f"the grouping owner has {stored(system)} of {count} instances")
        time.sleep(0.05)


def intake_alone(config: Path, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start intake with nobody to work off what it receives, under another command if one is given; it listens."""
    command = [*before, sys.executable, "-P", "-m", "console.serve", "intake", str(config)]
    with (config.parent / "alone.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, stdout=log)
    wait_for_port(check_config(config).config.gateway.scp.port, process)
    return process


def _is_prepared(log: Path) -> bool:
    """Tell whether a log that has filled a segment has as many ready as it may."""
    return len(segments(log)) == 1 or len(ready(log)) >= MOST_READY


def _storescp(name: str, root: Path, stack: ExitStack) -> Receiver:
    port = free_port()
    environment = dict(ENVIRONMENT)
    if name == "dcmtk-sync":
        environment["LD_PRELOAD"] = str(_preload(root.parent, SYNC_C))
    elif name == "dcmtk-stock":
        del environment["TCP_NODELAY"]
    best = ["+B", "-pdu", "131072"] if name != "dcmtk-stock" else []
    command = [tool("storescp"), "-q", "--fork", "-pm", *best, "+xa", "-od", str(root), str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)
    wait_for_port(port, process)

    def read_back() -> Callable[[str], bytes | None]:
        paths = {path.name.split(".", 1)[1]: path for path in root.iterdir()}
        return lambda uid: split_part10(paths[uid].read_bytes())[0] if uid in paths else None

    return Receiver(
        label="D" if name == "dcmtk-sync" else "N",
        port=port,
        called="ANY",
        pids=lambda: [process.pid],
        settle=lambda _: None,
        read_back=read_back,
    )


def _preload(folder: Path, source: Path) -> Path:
    library = folder / f"{source.stem}.so"
    if not library.exists():
        command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True)
    return library


def _orthanc(root: Path, stack: ExitStack) -> Receiver:
    dicom, http = free_port(), free_port()
    # At its best: its DICOM library has Nagle on unless it is told not to.
    os.environ["TCP_NODELAY"] = "1"
    process = start_orthanc(root / "orthanc", dicom=dicom, http=http, caller=("SENDER", free_port()))
    stack.callback(process.wait)
    stack.callback(process.kill)

    def settle(count: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{http}/statistics", timeout=30) as answer:
            stored = json.load(answer)["CountInstances"]
        if stored != count:
            print(f"orthanc stored {stored} of {count}", file=sys.stderr)

    return Receiver(label="D", port=dicom, called="ORTHANC", pids=lambda: [process.pid], settle=settle, read_back=None)
