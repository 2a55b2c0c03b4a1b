"""Receiving, whole gateway, against DCMTK made to sync, DCMTK at its best and Orthanc: interleaved rounds of ratios.

Each run has a fresh store; the order of the receivers is shuffled within a round. After a run every data set is read
back and compared byte for byte with what was sent; which runs count says `validity.py`. Where the file system has no
journal, one is made in a file and mounted (root). `make bench ARGS="--rounds 9 --conc 1 4 --sets ct small"`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "bench")]

import load  # noqa: E402
from data import frames, uid_of  # noqa: E402
from machine import create_us, facts, file_system, keeps_promises  # noqa: E402
from receivers import Receiver, start  # noqa: E402
from send import sinking  # noqa: E402
from validity import ROUNDS, mark, scattered  # noqa: E402

# Instances per run, over all associations: long enough to count, short enough to repeat.
_COUNTS = {"ct": 5600, "small": 8000, "tiny": 8000, "big": 8}
# Slower and faster ones get so much of it.
_SHARE = {
    ("orthanc", "small"): 0.1,
    ("dcmtk-best", "ct"): 3.0,
    ("dcmtk-best", "small"): 3.0,
    ("clarion-written", "ct"): 1.5,
}
# Before the clock runs: a log of every worker has filled a segment, as on any system that has been used.
_WARM = {"ct": 600}
_IMAGE_MIB = 16384


def main() -> None:
    """Run the cells, write every run as a line, print ratios."""
    options = _options()
    rng = random.Random(options.seed)  # noqa: S311  an order, not a secret
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        work = _work(options, stack)
        for number in range(options.rounds):
            for kind in options.sets:
                for conc in options.conc:
                    order = list(options.recv)
                    rng.shuffle(order)
                    for name in order:
                        place = work / f"{number}-{kind}-{conc}-{name}"
                        run = {**_run(name, place, kind, conc, options), "round": number, **file_system(work)}
                        run["sink_rate"] = sink_rate(kind, conc)
                        runs.append(run)
                        print(json.dumps(_short(run)), file=sys.stderr)
                        if options.out:
                            with options.out.open("a") as file:
                                file.write(json.dumps({**run, **facts(work)}) + "\n")
    found = report(runs)
    print(json.dumps(found, indent=1))
    print(judge(found["cells"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--recv", nargs="+", default=["clarion", "clarion-written", "dcmtk-sync", "dcmtk-best", "orthanc"]
    )
    parser.add_argument("--sets", nargs="+", default=["ct", "small"], choices=sorted(_COUNTS))
    parser.add_argument("--conc", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="instances per run, relative to the usual")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a folder on the file system to be measured")
    parser.add_argument("--here", action="store_true", help="measure on the file system of --work, whatever it is")
    parser.add_argument("--out", type=Path, help="append every run as a line of JSON")
    return parser.parse_args()


def _work(options: argparse.Namespace, stack: ExitStack) -> Path:
    """Give the folder to work in: a file system with a journal, where it can be had."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clarion-bench-", dir=options.work)))
    if options.here or keeps_promises(file_system(root)["file_system"]) or os.geteuid():
        return root
    image, mount = root / "image", root / "mount"
    mount.mkdir()
    # Written out, so that the file below does not grow while the one above is measured.
    with image.open("wb", buffering=0) as file:
        for _ in range(_IMAGE_MIB // 16):
            file.write(bytes(16 * 2**20))
        os.fsync(file.fileno())
    lazy = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
    _command("mkfs.ext4", "-q", "-E", lazy, str(image))
    # Past the cache of the file system below: like a disk, and not each byte kept and copied twice.
    device = _command("losetup", "--find", "--show", "--direct-io=on", str(image))
    stack.callback(_command, "losetup", "--detach", device)
    _command("mount", "-o", "nodiscard", device, str(mount))
    stack.callback(_command, "umount", "-l", str(mount))
    return mount


def _command(name: str, *arguments: str) -> str:
    return subprocess.run(
        [shutil.which(name) or name, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def _empty(root: Path) -> None:
    """Give back what a run stored, without removing a file: that makes creating others dear on some file systems."""
    for path in root.rglob("*"):
        # A database's index in memory is mapped by us as well.
        if path.is_file() and ".db" not in path.name:
            os.truncate(path, 0)


def _run(name: str, root: Path, kind: str, conc: int, options: argparse.Namespace) -> dict[str, Any]:
    share = _SHARE.get((name, kind), 1.0) * (2 if conc >= 4 and kind != "ct" else 1)
    each = [max(1, int(_COUNTS[kind] * options.scale * share) // conc)] * conc
    root.parent.mkdir(exist_ok=True)
    dear = create_us(root.parent / f"{root.name}-create")
    with ExitStack() as stack:
        receiver = start(name, root, stack)
        warm = _WARM.get(kind, sum(each) // 10) // conc * conc or conc
        load.run(receiver.port, receiver.called, kind, [warm // conc] * conc, first=0)
        receiver.settle(warm)
        receiver.rest()
        cpu, begun = receiver.cpu(), [0.0, 0.0, 0.0]

        def began(receiver: Receiver = receiver, begun: list[float] = begun) -> None:
            begun[:] = receiver.cpu(), _all_cpu(), time.monotonic()

        loads = load.run(receiver.port, receiver.called, kind, each, first=warm, began=began)
        busy, elapsed = _all_cpu() - begun[1], time.monotonic() - begun[2]
        ours = receiver.cpu() - begun[0] + sum(one.cpu for one in loads)
        foreign = (busy - ours) / elapsed / (os.cpu_count() or 1)
        receiver.settle(warm + sum(each))
        spent = receiver.cpu() - cpu
        seconds = max(one.ended for one in loads) - min(one.begun for one in loads)
        latencies = sorted(one for each_load in loads for one in each_load.latencies)
        wrong = _compare(receiver, kind, [warm // conc] * conc, 0) + _compare(receiver, kind, each, warm)
        memory, events = receiver.memory(), receiver.events()
    _empty(root)
    return {
        "receiver": name, "class": receiver.label, "set": kind, "conc": conc, "instances": sum(each),
        "seconds": seconds, "rate": sum(each) / seconds, "cpu_s": spent, "cpu_ms": 1000 * spent / sum(each),
        "p50_ms": 1000 * latencies[len(latencies) // 2], "p99_ms": 1000 * latencies[len(latencies) * 99 // 100],
        "max_ms": 1000 * latencies[-1],
        "failed": sum(one.failed for one in loads), "wrong": wrong, "sender_cpu_s": sum(one.cpu for one in loads),
        "memory_mb": memory / 2**20, "foreign": round(foreign, 2), "create_us": dear, "events": events,
        "expected_events": warm + sum(each),
    }  # fmt: skip


def _compare(receiver: Receiver, kind: str, each: list[int], first: int) -> int:
    """Give how many instances are not stored as they were sent."""
    if receiver.read_back is None:
        return 0
    kept = receiver.read_back()
    wrong = 0
    for series, count in enumerate(each):
        made = frames(kind, series)
        for number in range(first, first + count):
            wrong += kept(uid_of(number)) != made[number % len(made)].expected(number)
        first += count
    return wrong


@functools.cache
def sink_rate(kind: str, conc: int) -> float:
    """Give the rate at which the load can send to a peer that keeps nothing."""
    with sinking() as port:
        loads = load.run(port, "SINK", kind, [_COUNTS[kind] // conc] * conc, first=0)
    seconds = max(one.ended for one in loads) - min(one.begun for one in loads)
    return sum(one.sent for one in loads) / seconds


def _all_cpu() -> float:
    """Give the seconds that all processors have been busy."""
    fields = [int(one) for one in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _short(run: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in run.items()}


# The musts of `receive-performance.md` 3 that this measures: cell, peer, figure, at least or at most, name.
_MUSTS = (
    ("ct 4", "dcmtk-sync", "rate", 1.0, "P1"),
    ("small 4", "dcmtk-sync", "rate", 1.2, "P2"),
    ("ct 1", "dcmtk-sync", "rate", 0.8, "P3 ct"),
    ("small 1", "dcmtk-sync", "rate", 1.2, "P3 small"),
    ("small 32", "dcmtk-sync", "rate", 1.5, "P4"),
    ("ct 4", "dcmtk-best", "rate", 0.2, "P5 ct (D / N)"),
    ("small 4", "dcmtk-best", "rate", 0.15, "P5 small (D / N)"),
    ("ct 4 written", "dcmtk-best", "rate", 0.5, "P6 ct (N / N)"),
    ("small 4 written", "dcmtk-best", "rate", 0.35, "P6 small (N / N)"),
    ("ct 4", "orthanc", "rate", 2.0, "P7 ct"),
    ("small 4", "orthanc", "rate", 8.0, "P7 small"),
    ("ct 4", "dcmtk-sync", "cpu", -2.0, "P8 ct"),
    ("small 4", "dcmtk-sync", "cpu", -2.5, "P8 small"),
    ("ct 4", "dcmtk-sync", "p50", -1.2, "P11 ct p50"),
    ("ct 4", "dcmtk-sync", "p99", -1.5, "P11 ct p99"),
    ("small 4", "dcmtk-sync", "p50", -1.2, "P11 small p50"),
    ("small 4", "dcmtk-sync", "p99", -1.5, "P11 small p99"),
)


def judge(cells: dict[str, Any]) -> str:
    """Compare with the musts; give the line that says how many of those measured are met, and which are not."""
    measured, missed = 0, []
    for cell, peer, figure, bound, name in _MUSTS:
        found = cells.get(f"{cell} / {peer}", {}).get(figure)
        if found is None:
            continue
        measured += 1
        if not (found["median"] >= bound if bound > 0 else found["median"] <= -bound):
            missed.append(f"{name}: {found['median']}, wanted {'>=' if bound > 0 else '<='} {abs(bound)}")
    few = sorted({note for one in cells.values() for note in one["notes"]})
    return "\n".join([*missed, *few, f"musts met / measured: {measured - len(missed)} / {measured}"])


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Give medians and quartiles of the ratios within rounds, of ours to each peer, and which runs do not count."""
    mark(runs)
    cells: dict[str, Any] = {}
    names = {one["receiver"] for one in runs}
    pairs = [("clarion", peer) for peer in sorted(names - {"clarion", "clarion-written"})]
    # Class N against class N.
    pairs += [("clarion-written", "dcmtk-best")] if {"clarion-written", "dcmtk-best"} <= names else []
    for kind, conc in sorted({(one["set"], one["conc"]) for one in runs}):
        here = [one for one in runs if (one["set"], one["conc"]) == (kind, conc)]
        for ours, peer in pairs:
            name = f"{kind} {conc}" + " written" * (ours == "clarion-written")
            cells[f"{name} / {peer}"] = _ratios(here, ours, peer)
    wrong = [
        [one["receiver"], one["set"], one["conc"], one["round"], *one["invalid"]] for one in runs if one["invalid"]
    ]
    return {"cells": cells, "runs": len(runs), "invalid": wrong}


def _ratios(runs: list[dict[str, Any]], our_name: str, peer: str) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    theirs_all = [one["rate"] for one in runs if one["receiver"] == peer and not one["invalid"]]
    for number in sorted({one["round"] for one in runs}):
        ours, theirs = (
            next(
                (one for one in runs if (one["round"], one["receiver"]) == (number, name) and not one["invalid"]), None
            )
            for name in (our_name, peer)
        )
        if ours is None or theirs is None:
            continue
        for key, figure in (("rate", "rate"), ("cpu", "cpu_ms"), ("p50", "p50_ms"), ("p99", "p99_ms")):
            found.setdefault(key, []).append(ours[figure] / theirs[figure])
    cell: dict[str, Any] = {
        key: {"median": round(statistics.median(all_), 2), "all": [round(one, 2) for one in sorted(all_)]}
        for key, all_ in found.items()
    }
    rounds = len(found.get("rate", ()))
    said = [f"only {rounds} valid rounds"] if rounds < ROUNDS else []
    return {**cell, "notes": [*said, *(["the peer's own rates are too far apart"] if scattered(theirs_all) else [])]}


if __name__ == "__main__":
    main()
