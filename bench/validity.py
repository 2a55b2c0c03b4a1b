"""Which runs count (performance specification, section 4): one that does not is kept, marked, and in no median."""

from __future__ import annotations

import statistics
from typing import Any

from machine import keeps_promises

SHORTEST_S = 2.0
LEAST_CPU_S = 1.0
_MOST_FOREIGN = 0.4
_DEARER = 2.0
_SENDER_HEADROOM = 1.5
ROUNDS = 5
"""A cell with fewer valid rounds is printed and says so."""


def mark(runs: list[dict[str, Any]]) -> None:
    """Note in each run why it does not count; an empty list: it does."""
    cheapest = min((run["create_us"] for run in runs), default=0.0)
    for run in runs:
        run["invalid"] = list(_reasons(run, cheapest))


def _reasons(run: dict[str, Any], cheapest_us: float) -> list[str]:
    found = {
        "instances failed": run["failed"] > 0,
        "stored something else than was sent": run["wrong"] > 0,
        "events are missing": run["events"] not in {None, run["expected_events"]},
        "too short": run["seconds"] < SHORTEST_S or run["cpu_s"] < LEAST_CPU_S,
        "other load": run["foreign"] > _MOST_FOREIGN,
        "files were dear to create": run["create_us"] > _DEARER * cheapest_us,
        "no journalled disk": run["class"] == "D" and not keeps_promises(run["file_system"]),
        "the sender is the limit": run["sink_rate"] < _SENDER_HEADROOM * run["rate"],
    }
    return [reason for reason, holds in found.items() if holds]


def scattered(rates: list[float]) -> bool:
    """Tell whether a reference's own quartiles lie further apart than a ratio to it may be believed."""
    if len(rates) < 4:
        return bool(rates) and max(rates) > 2 * min(rates)
    low, _, high = statistics.quantiles(rates, n=4)
    return high > 2 * low
