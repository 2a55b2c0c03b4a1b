"""P22: what an instance costs when much is stored already: CPU, bytes written, memory, in one life of the processes.

At each size the owner reads everything, then windows of instances are sent and worked off. A fixed loop of Python
beside each window takes the machine's mood out of its CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "bench")]

import load  # noqa: E402
from receivers import Receiver, start  # noqa: E402

_LANES = 4
_PER_STUDY = 1000
_WINDOW = 2000
_WINDOWS = 9


@dataclass
class _Growing:
    """A receiver, and how much it has been sent."""

    receiver: Receiver
    folder: Path
    sent: int = 0
    series: int = 0
    windows: dict[int, list[dict[str, float]]] = field(default_factory=dict)

    def send(self, count: int) -> None:
        """Send as many, a study of at most a thousand to an association, and wait until all are grouped."""
        while count > 0:
            each = min(_PER_STUDY, max(1, count // _LANES))
            loads = load.run(
                self.receiver.port, self.receiver.called, "tiny", [each] * _LANES, self.sent, series=self.series
            )
            if any(one.failed for one in loads):
                raise SystemExit("an instance was not taken")
            self.sent, self.series, count = self.sent + each * _LANES, self.series + _LANES, count - each * _LANES
        self.receiver.settle(self.sent)

    def window(self) -> dict[str, float]:
        """Send a window; give the CPU and the bytes written for each instance, the CPU of a loop, the memory."""
        self.receiver.rest()
        loop, cpu, written = _loop(), self.receiver.cpu(), _written(self.folder)
        self.send(_WINDOW)
        spent, bytes_ = self.receiver.cpu() - cpu, _written(self.folder) - written
        return {
            "cpu_ms": 1000 * spent / _WINDOW,
            "loop_ms": 1000 * statistics.mean((loop, _loop())),
            "bytes": bytes_ / _WINDOW,
            "memory_mb": self.receiver.memory() / 2**20,
        }


def main() -> None:
    """Print a line for each size, and the ratio of the last to the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--work", type=Path, help="a folder on the file system to be measured")
    options = parser.parse_args()
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="clarion-bench-", dir=options.work) as root, ExitStack() as stack:
        growing = _Growing(start("clarion", Path(root) / "clarion", stack), Path(root))
        growing.send(_LANES * 100)
        for size in options.sizes:
            growing.send(size - growing.sent)
            windows = [growing.window() for _ in range(_WINDOWS)]
            one = {key: statistics.median(each[key] for each in windows) for key in windows[0]}
            found.append({"stored": size, "cpu": one["cpu_ms"] / one["loop_ms"], **one})
            print(json.dumps({key: round(value, 3) for key, value in found[-1].items()}), flush=True)
    ratios = {key: round(found[-1][key] / found[0][key], 3) for key in ("cpu", "bytes", "memory_mb")}
    print(json.dumps({f"P22 {found[-1]['stored']} stored : {found[0]['stored']} stored": ratios}))


def _loop() -> float:
    """Give the CPU seconds of a fixed loop."""
    begun, total = time.process_time(), 0
    for number in range(3_000_000):
        total += number & 3
    return time.process_time() - begun


def _written(folder: Path) -> int:
    """Give the bytes that the disk beneath a folder has written, by whomever: see Documentation/block/stat in Linux.

    What the kernel counts for a process (`/proc/PID/io`) is whole folios, of half a megabyte for what was laid out.
    """
    device = folder.stat().st_dev
    fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return int(fields[6]) * 512


if __name__ == "__main__":
    main()
