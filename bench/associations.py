"""P14, P16, P17: a hundred associations at once, what they hold, and what twenty idle ones cost."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "bench")]

import load  # noqa: E402
from data import frames  # noqa: E402
from receivers import Receiver, start  # noqa: E402

_STORES = 5


def hold(receiver: Receiver, count: int) -> tuple[int, float]:
    """Open associations at once, five stores each; give how many did all of it, and the seconds."""
    made = frames("small", 0)
    done: list[int] = []

    lock = threading.Lock()

    def safely(number: int) -> None:
        try:
            with lock:
                data = [bytes(made[0].patch(1000 * number + index)) for index in range(_STORES)]
            _send(receiver, data, done, number)
        except (OSError, SystemExit):
            return

    begun = time.monotonic()
    threads = [threading.Thread(target=safely, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(done), time.monotonic() - begun


def _send(receiver: Receiver, data: list[bytes], done: list[int], number: int) -> None:
    connection = load.associate(receiver.port, receiver.called)
    for one in data:
        connection.sendall(one)
        kind, answer = load.read_pdu(connection)
        if not load.is_success(kind, answer):
            return
    done.append(number)
    connection.close()


def main() -> None:
    """Print what was counted and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hold", type=int, default=100)
    parser.add_argument("--idle-s", type=float, default=10.0)
    options = parser.parse_args()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clarion-bench-")))
        ours = start("clarion", root / "clarion", stack, max_associations=200)
        theirs = start("dcmtk-best", root / "dcmtk", stack)
        opened, seconds = hold(ours, options.hold)
        opened_there, seconds_there = hold(theirs, options.hold)
        print(json.dumps({"P16": {"all did all": opened == options.hold, "clarion": opened, "storescp": opened_there,
                                  "rate / dcmtk-best (D / N)": round(seconds_there / seconds, 2)}}))  # fmt: skip
        ours.settle(_STORES * options.hold)
        before = ours.memory()
        held = [load.associate(ours.port, ours.called) for _ in range(options.hold)]
        print(json.dumps({"P14 MB for each open association": round((ours.memory() - before) / 2**20 / len(held), 3)}))
        for one in held[20:]:
            one.close()
        time.sleep(3)
        cpu = ours.cpu()
        time.sleep(options.idle_s)
        idle = ours.cpu() - cpu
        for one in held[:20]:
            one.close()
        time.sleep(3)
        cpu = ours.cpu()
        time.sleep(options.idle_s)
        print(
            json.dumps({"P17 cores for 20 idle associations": round((idle - (ours.cpu() - cpu)) / options.idle_s, 4)})
        )


if __name__ == "__main__":
    main()
