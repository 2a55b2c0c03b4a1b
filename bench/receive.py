"""Receiving against DCMTK: Clarion's durable SCP beside `storescp`, which syncs nothing; both sent to by `storescu`.

Interleaved rounds on loopback, each with data and folders of its own; printed are the ratios within each round and
their median. The classes differ: Clarion answers after data set and journal are synced (D), storescp after writing to
the page cache (N). A ratio says only that much. `make bench ARGS="--rounds 7 --slices 60"`.
"""

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
sys.path.insert(0, str(ROOT / "tests"))

from support.dcmtk import ENVIRONMENT, storescu, tool  # noqa: E402
from support.processes import wait_for_port  # noqa: E402
from support.system import describe, running  # noqa: E402
from support.world import free_port, make_series  # noqa: E402

from clarion.testing.phantom import PhantomSpec  # noqa: E402


def timed(files: list[Path], port: int) -> float:
    """Send the files and give the seconds that it took; a refusal is not a result."""
    begun = time.perf_counter()
    acknowledged = storescu(files, port)
    seconds = time.perf_counter() - begun
    if len(acknowledged) != len(files):
        raise SystemExit(f"{len(acknowledged)} of {len(files)} acknowledged: not a result")
    return seconds


def main() -> None:
    """Print the ratio of every round, and their median as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slices", type=int, default=40)
    options = parser.parse_args()
    ratios = []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clarion-bench-")))
        titles = [{"ae_title": "CHEST", "settings": {"pipeline-chest": "chest-ct", "timeout": 36000}}]
        system = stack.enter_context(running(describe(root / "clarion", ae_titles=titles)))
        port = free_port()
        peer = subprocess.Popen(
            [tool("storescp"), "--fork", "+B", "+xa", "-pdu", "131072", "-od", str(root), str(port)],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
        )
        stack.callback(peer.kill)
        wait_for_port(port, peer)
        for number in range(options.rounds):
            spec = PhantomSpec(slices=options.slices, seed=1000 + number)
            files = make_series(root / f"series{number}", spec)
            pair = [("clarion", system.scp), ("storescp", port)]
            took = {name: timed(files, where) for name, where in (pair if number % 2 else pair[::-1])}
            ratios.append(took["storescp"] / took["clarion"])
            print(f"round {number + 1}: {ratios[-1]:.2f} of storescp's rate", file=sys.stderr)
    print(
        json.dumps(
            {
                "what": "C-STORE rate of one association, 525 kB CT, Clarion (D) / storescp (N)",
                "rounds": options.rounds,
                "median": round(statistics.median(ratios), 3),
                "ratios": [round(one, 3) for one in ratios],
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
