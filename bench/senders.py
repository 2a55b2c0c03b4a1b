"""P10: an unmodified `storescu` (Nagle on, as it comes) into Clarion and into stock `storescp`, interleaved."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "bench")]

from data import write_files  # noqa: E402
from receivers import start  # noqa: E402
from support.dcmtk import tool  # noqa: E402

# As it comes: no TCP_NODELAY in its environment.
_STOCK = {key: value for key, value in os.environ.items() if key != "TCP_NODELAY"}
_COUNTS = {"small": 60, "ct": 40}


def timed(port: int, called: str, paths: list[str]) -> float:
    """Send with stock storescu; give the seconds."""
    begun = time.monotonic()
    command = [tool("storescu"), "-R", "-aet", "SENDER", "-aec", called, "127.0.0.1", str(port), *paths]
    subprocess.run(command, env=_STOCK, check=True, capture_output=True)
    return time.monotonic() - begun


def main() -> None:
    """Print the ratios of the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clarion-bench-")))
        peers = {name: start(name, root / name, stack) for name in ("clarion", "dcmtk-stock")}
        for number in range(options.rounds):
            for kind, count in _COUNTS.items():
                first = 1000 * (number + 1) + (500 if kind == "ct" else 0)
                paths = write_files(kind, count, first, root / f"{kind}{number}")
                order = list(peers)[:: 1 if number % 2 else -1]
                took = {name: timed(peers[name].port, peers[name].called, paths) for name in order}
                found.setdefault(kind, []).append(took["dcmtk-stock"] / took["clarion"])
    for kind, ratios in found.items():
        print(json.dumps({"P10": kind, "median": round(statistics.median(ratios), 1),
                          "all": [round(one, 1) for one in sorted(ratios)]}))  # fmt: skip


if __name__ == "__main__":
    main()
