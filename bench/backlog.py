"""P12: response times while the owner works off 100,000 instances that were received before, against those without.

The backlog is received by intake alone; then everything is started, and windows of small instances are sent at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "bench")]

import load  # noqa: E402
from receivers import describe_without_jobs, intake_alone, settle, stored  # noqa: E402
from support.system import running  # noqa: E402

from console.checks import check_config  # noqa: E402

_LANES = 4
_WINDOW = 1000
_WINDOWS = 5
_LONGEST_S = 600


def main() -> None:
    """Print the p50 and p99 of either, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backlog", type=int, default=100_000)
    parser.add_argument("--work", type=Path, help="a folder on the file system to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clarion-bench-", dir=options.work) as root, ExitStack() as stack:
        config = describe_without_jobs(Path(root) / "clarion")
        port = check_config(config).config.gateway.scp.port
        _receive_alone(config, port, options.backlog)
        system = stack.enter_context(running(config))
        wanted = options.backlog
        behind, caught_up = [], []
        for _ in range(_WINDOWS):
            behind.append(_window(port, wanted))
            wanted += _WINDOW * _LANES
            if stored(system) >= options.backlog:
                raise SystemExit("the backlog was worked off before the windows had ended: take a larger one")
        left = wanted - stored(system)
        settle(system, wanted, _LONGEST_S)
        for _ in range(_WINDOWS):
            caught_up.append(_window(port, wanted))
            wanted += _WINDOW * _LANES
            settle(system, wanted, _LONGEST_S)
    print(json.dumps({"left of the backlog after the windows": left, "with": behind, "without": caught_up}))
    medians = [statistics.median(one[1] for one in each) for each in (behind, caught_up)]
    print(json.dumps({"P12 p99 with a backlog : without": round(medians[0] / medians[1], 2)}))


def _receive_alone(config: Path, port: int, count: int) -> None:
    """Receive with nobody to work it off."""
    process = intake_alone(config)
    try:
        loads = load.run(port, "CHEST", "tiny", [count // _LANES] * _LANES, first=0)
    finally:
        process.terminate()
        process.wait(60)
    if any(one.failed for one in loads):
        raise SystemExit("an instance of the backlog was not taken")


def _window(port: int, first: int) -> tuple[float, float]:
    """Send a window; give p50 and p99 in milliseconds."""
    loads = load.run(port, "CHEST", "small", [_WINDOW] * _LANES, first=first)
    if any(one.failed for one in loads):
        raise SystemExit("an instance was not taken")
    latencies = sorted(one for each in loads for one in each.latencies)
    p50, p99 = (round(1000 * latencies[len(latencies) * part // 100], 2) for part in (50, 99))
    return p50, p99


if __name__ == "__main__":
    main()
