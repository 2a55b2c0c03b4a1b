"""P9, P13, P23, P24: what is counted and not timed: the owner's share of the CPU, memory, system calls, syncs."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "bench")]

import load  # noqa: E402
import receivers  # noqa: E402
from receivers import Receiver, intake_alone, start, tree  # noqa: E402
from support.dcmtk import need  # noqa: E402
from support.processes import drain_traced  # noqa: E402
from support.system import describe  # noqa: E402
from support.world import free_port  # noqa: E402

from console.checks import check_config  # noqa: E402

_SMALL = 4000
# Instances of 256 MB.
_BIG = 4


def main() -> None:
    """Print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="a folder on a disk with room for three gigabytes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clarion-bench-", dir=options.work) as root:
        with ExitStack() as stack:
            ours = start("clarion", Path(root) / "clarion", stack)
            print(json.dumps({"P9 CPU of owner : CPU of receiving, small": _owner(ours)}))
            print(json.dumps(_gigabyte(ours)))
        print(json.dumps({"P23 system calls for each instance, 1 association": _calls(Path(root))}))
        print(json.dumps({"P24 syncs for each small instance": _syncs(Path(root))}))


def _owner(ours: Receiver) -> float:
    """Compare the CPU of what works off the journal with that of what writes it."""
    load.run(ours.port, ours.called, "small", [50] * 4, first=0)
    ours.settle(200)
    before = [_cpu(pid) for pid in ours.pids()]
    load.run(ours.port, ours.called, "small", [_SMALL // 4] * 4, first=200)
    ours.settle(200 + _SMALL)
    intake, *others = [_cpu(pid) - was for pid, was in zip(ours.pids(), before, strict=True)]
    return round(sum(others) / intake, 2)


def _cpu(root: int) -> float:
    return sum(receivers._cpu(pid) for pid in tree(root))  # noqa: SLF001


def _gigabyte(ours: Receiver) -> dict[str, float]:
    """Give the memory of the largest receiving process before, and at most while a gigabyte comes."""
    intake = ours.pids()[0]
    workers = tree(intake)
    idle = max(_resident(pid) for pid in workers)
    seen, done = [idle], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(max(_resident(pid) for pid in workers))

    watcher = threading.Thread(target=watch)
    watcher.start()
    loads = load.run(ours.port, ours.called, "big", [_BIG], first=10**6)
    done.set()
    watcher.join()
    if any(one.failed for one in loads):
        raise SystemExit("a large instance was not taken")
    growth = (max(seen) - idle) / 2**20
    return {"P13 MB of the worker while 1 GB comes": round(max(seen) / 2**20, 1), "of that new": round(growth, 1)}


def _resident(pid: int) -> int:
    """Give the memory that is a process's own: what it has mapped of a file that is being read does not count."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(one) for one in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", text))


def _syncs(root: Path) -> dict[str, float]:
    """Count fdatasync with strace while one, four, eight and thirty-two associations send at once."""
    # Without the filter in the kernel every call would stop, and hardly any two would share a sync.
    only = ["--seccomp-bpf", "-e", "trace=fdatasync"]
    return {str(conc): _traced(root / f"syncs{conc}", only, r" fdatasync\(", "small", conc) for conc in (1, 4, 8, 32)}


def _calls(root: Path) -> dict[str, float]:
    """Count every call of receiving, in the steady state."""
    return {kind: _traced(root / f"calls-{kind}", [], r"^\d+ +[a-z0-9_]+\(", kind, 1) for kind in ("small", "ct")}


def _traced(folder: Path, options: list[str], pattern: str, kind: str, conc: int) -> float:
    """Let intake receive under strace; give the calls of a pattern for each instance."""
    count = {"small": 1600, "ct": 400}[kind]
    config = describe(folder, scp={"port": free_port(), "max_associations": 100})
    port = check_config(config).config.gateway.scp.port
    trace = folder / "trace"
    strace = str(need(Path("/usr/bin/strace"), "strace"))
    process = intake_alone(config, [strace, "-f", *options, "-o", str(trace)])
    seen = re.compile(pattern, re.MULTILINE)
    # The first ones begin a segment, and an association.
    load.run(port, "CHEST", kind, [10] * conc, first=10**6)
    time.sleep(1)
    before = len(seen.findall(trace.read_text()))
    load.run(port, "CHEST", kind, [count // conc] * conc, first=0)
    found = round((len(seen.findall(trace.read_text())) - before) / count, 2)
    drain_traced(process)
    return found


if __name__ == "__main__":
    main()
