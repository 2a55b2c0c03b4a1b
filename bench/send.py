"""P18, P19: sending to a sink that answers at once and keeps nothing, against `storescu` with Nagle off."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "bench")]

from data import EXPLICIT, class_of, uid_of, write_files  # noqa: E402
from support.dcmtk import ENVIRONMENT, tool  # noqa: E402

from clarion.dicom import split_part10  # noqa: E402
from clarion.model import Destination  # noqa: E402
from gateway.scu import Requestor, Timeouts  # noqa: E402
from gateway.wire import commands, pdu  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

_COUNTS = {"small": 800, "ct": 300}


@contextmanager
def sinking() -> Iterator[int]:
    """Run the sink as a process of its own; give its port."""
    server = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child == 0:
        sink(server)
    try:
        yield server.getsockname()[1]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def sink(server: socket.socket) -> None:
    """Accept what comes, answer each message with success when it is complete, keep nothing."""
    while True:
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    reader = connection.makefile("rb", buffering=2**18)
    command: dict[int, bytes] = {}
    while head := reader.read(6):
        kind, length = pdu.HEADER.unpack(head)
        body = reader.read(length)
        if kind == pdu.ASSOCIATE_RQ:
            request = pdu.parse_request(body)
            results = [(one.id, 0, one.transfer_syntaxes[0]) for one in request.contexts]
            connection.sendall(pdu.accept(request, results))
        elif kind == pdu.RELEASE_RQ:
            connection.sendall(pdu.RELEASE_RESPONSE)
        elif kind == pdu.P_DATA:
            at = 0
            while at < length:
                size, context, control = pdu.PDV.unpack_from(body, at)
                if control & pdu.COMMAND:
                    command = commands.parse(body[at + 6 : at + 4 + size])
                elif control & pdu.LAST:
                    connection.sendall(pdu.p_data(context, pdu.COMMAND, commands.stored(command)))
                at += 4 + size


def main() -> None:
    """Print the ratios of rate and CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    with sinking() as port, tempfile.TemporaryDirectory(prefix="clarion-bench-") as root:
        for kind, count in _COUNTS.items():
            paths = write_files(kind, count, 0, Path(root) / kind)
            for number in range(options.rounds):
                order = [_ours, _storescu][:: 1 if number % 2 else -1]
                took = {one.__name__: one(port, kind, paths) for one in order}
                ours, theirs = took["_ours"], took["_storescu"]
                found.setdefault(kind, []).append((theirs[0] / ours[0], ours[1] / theirs[1]))
    for kind, ratios in found.items():
        for name, index in (("P18 rate", 0), ("P19 CPU", 1)):
            values = sorted(round(one[index], 2) for one in ratios)
            print(json.dumps({name: kind, "median": statistics.median(values), "all": values}))


def _ours(port: int, kind: str, paths: list[str]) -> tuple[float, float]:
    """Send as a delivery does; seconds and CPU seconds, association and reading included."""
    cpu, begun = time.process_time(), time.monotonic()
    peer = Destination(name="sink", ae_title="SINK", host="127.0.0.1", port=port)
    timeouts = Timeouts(connect_s=5, dimse_s=20)
    with Requestor(peer, own_ae="SENDER", classes=[(class_of(kind), EXPLICIT)], timeouts=timeouts) as scu:
        for number, path in enumerate(paths):
            data, syntax = split_part10(Path(path).read_bytes())
            if scu.store(data, sop_class=class_of(kind), sop_instance=uid_of(number), syntax=syntax):
                raise SystemExit("refused")
    return time.monotonic() - begun, time.process_time() - cpu


def _storescu(port: int, _kind: str, paths: list[str]) -> tuple[float, float]:
    """Send with storescu, Nagle off; the same."""
    cpu, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [tool("storescu"), "-R", "-pdu", "131072", "-aet", "SENDER", "-aec", "SINK", "127.0.0.1", str(port)]
    subprocess.run([*command, *paths], env=ENVIRONMENT, check=True, capture_output=True)
    seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime


if __name__ == "__main__":
    main()
