"""P20, P21: sending to a peer ten milliseconds away over one and over four associations; sends that are lost."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "bench")]

from data import EXPLICIT, SR, frames  # noqa: E402
from send import sinking  # noqa: E402
from support.delivering import Rig  # noqa: E402
from support.tap import Tap  # noqa: E402

from clarion.model import Destination  # noqa: E402
from gateway.scu import Requestor, Timeouts  # noqa: E402

_INSTANCES = 1000
_SENDS = 10_000
_ONE_WAY_S = 0.005


def main() -> None:
    """Print the ratio and the count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    ratios = []
    with sinking() as port:
        for number in range(options.rounds):
            took = {lanes: _deliver(port, lanes) for lanes in ((1, 4) if number % 2 else (4, 1))}
            ratios.append(round(took[1] / took[4], 2))
        print(json.dumps({"P20 four associations : one, 10 ms away": statistics.median(ratios), "all": sorted(ratios)}))
        print(json.dumps({f"P21 lost of {_SENDS} sends": _lost(port)}))


def _deliver(port: int, lanes: int) -> float:
    """Deliver as the product does, every answer noted in the database; give the seconds."""
    with tempfile.TemporaryDirectory(prefix="clarion-bench-") as root, Tap(port, delay_s=_ONE_WAY_S) as tap:
        rig = Rig(Path(root), tap.port, destination={"max_associations": lanes}, verify=False)
        rig.request(count=_INSTANCES)
        begun = time.monotonic()
        while rig.row() is None or rig.row().state == "waiting":
            rig.stage.step()
            time.sleep(0.01)
        seconds = time.monotonic() - begun
        if rig.row().state != "unverified":
            raise SystemExit(f"not delivered: {rig.row().reason}")
        return seconds


def _lost(port: int) -> int:
    """Send to a peer that answers at once, and count what has no answer."""
    data = frames("small", 0)[0].expected(0)
    peer = Destination(name="sink", ae_title="SINK", host="127.0.0.1", port=port)
    lost = 0
    with Requestor(peer, own_ae="SENDER", classes=[(SR, EXPLICIT)], timeouts=Timeouts(connect_s=5, dimse_s=20)) as scu:
        for _ in range(_SENDS):
            lost += scu.store(data, sop_class=SR, sop_instance="1.2.3", syntax=EXPLICIT) != 0
    return lost


if __name__ == "__main__":
    main()
