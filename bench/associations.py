"""P14-P17: a hundred associations at once, what they hold, what idle ones cost; how fast they open and end."""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "bench")]

import load  # noqa: E402
from data import EXPLICIT, frames  # noqa: E402
from receivers import Receiver, start  # noqa: E402
from support.raw import VERIFICATION, echo_request  # noqa: E402

from gateway.wire import pdu  # noqa: E402
from gateway.wire.acceptance import STORAGE_ROOT  # noqa: E402

_STORES = 5
_RATED = 200


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


def rate(receiver: Receiver, senders: int, contexts: int) -> float:
    """Open, echo and release from so many senders at once, each with so many contexts; give how many a second."""
    proposed = [pdu.Context(id=1, abstract_syntax=VERIFICATION, transfer_syntaxes=("1.2.840.10008.1.2",))]
    proposed += [
        pdu.Context(id=2 * index + 3, abstract_syntax=f"{STORAGE_ROOT}{index + 1}", transfer_syntaxes=(EXPLICIT,))
        for index in range(contexts - 1)
    ]
    asked = pdu.request(receiver.called, "SENDER", proposed)
    each = _RATED // senders

    def work() -> None:
        for _ in range(each):
            connection = socket.create_connection(("127.0.0.1", receiver.port), 30)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for said, wanted in (
                (asked, pdu.ASSOCIATE_AC),
                (pdu.p_data(1, pdu.COMMAND, echo_request()), pdu.P_DATA),
                (pdu.RELEASE_REQUEST, pdu.RELEASE_RP),
            ):
                connection.sendall(said)
                kind, _ = load.read_pdu(connection)
                if kind != wanted:
                    raise SystemExit(f"PDU {kind} for {wanted}")
            connection.close()

    threads = [threading.Thread(target=work) for _ in range(senders)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return each * senders / (time.monotonic() - begun)


def _rates(ours: Receiver, theirs: Receiver, rounds: int) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for senders in (1, 4):
        for contexts in (1, 64):
            ratios = []
            for number in range(rounds):
                order = (ours, theirs) if number % 2 else (theirs, ours)
                took = {one.label: rate(one, senders, contexts) for one in order}
                ratios.append(round(took[ours.label] / took[theirs.label], 2))
            name = f"P15 open+echo+release / dcmtk-best, {senders} senders, {contexts} contexts"
            found[name] = {"median": statistics.median(ratios), "all": sorted(ratios)}
    return found


def main() -> None:
    """Print what was counted and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hold", type=int, default=100)
    parser.add_argument("--idle-s", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
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
        for name, ratios in _rates(ours, theirs, options.rounds).items():
            print(json.dumps({name: ratios}))
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
