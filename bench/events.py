"""Events: the relay beside a bare producer, a handler beside a bare consumer, and how a replay of finished work grows.

Interleaved rounds on one machine, each with topics and a database of its own; printed are the ratios within each round
and their medians. Needs a broker: that of CLARION_TEST_KAFKA, or one that is started as the tests do.
`make bench BENCH=events ARGS="--rounds 5 --events 20000"`.
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
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import sqlalchemy as sa  # noqa: E402
from kafka import KafkaConsumer, KafkaProducer, TopicPartition  # noqa: E402
from kafka.structs import OffsetAndMetadata  # noqa: E402
from support.kafka import start_broker, topics_on  # noqa: E402
from support.site import Site, fill_finished  # noqa: E402

from clarion.adapters import outbox  # noqa: E402
from clarion.adapters.clock import SystemClock  # noqa: E402
from clarion.adapters.database import Database  # noqa: E402
from clarion.adapters.kafka import client_settings  # noqa: E402
from clarion.adapters.kafka_bus import KafkaBus  # noqa: E402
from clarion.adapters.relay import Relay  # noqa: E402
from clarion.adapters.topics import topic_of  # noqa: E402
from clarion.events import JobStarted  # noqa: E402
from clarion.testing.suites import started  # noqa: E402
from console.replay_plan import PlanRequest, make_plan  # noqa: E402
from console.selection import Selection  # noqa: E402
from orchestrator.ledger import jobs  # noqa: E402
from streams.replays import command, find_replay  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 200


def timed(work: Callable[[], None]) -> float:
    """Give the seconds that something takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


class Round:
    """Topics and a database of one's own, with events in its outbox."""

    def __init__(self, address: str, root: Path, count: int) -> None:
        self.config = topics_on(address)
        self.count = count
        self.database = Database(f"sqlite:///{root / self.config.prefix}.db")
        self.database.create(outbox.SCHEMA)
        for first in range(0, count, 1000):
            outbox.publish(self.database, [started(f"k{one % 50}", one) for one in range(first, first + 1000)])
        with self.database.reading() as connection:
            self.records = [outbox.record_of(row) for row in outbox.read_after(connection, 0, count)]
        self.topic = topic_of(JobStarted.kind, self.config.prefix)

    def relay(self) -> None:
        """Copy the outbox as the relay does."""
        relay = Relay(self.database, self.config)
        while relay.step():
            pass
        relay.drain()

    def produce(self) -> None:
        """Send the same records with a bare producer of the same settings, to a topic of the same kind."""
        producer = KafkaProducer(**client_settings(self.config), acks="all", enable_idempotence=True, linger_ms=5)
        for record in self.records:
            headers = [(name, value.encode()) for name, value in record.headers.items()]
            producer.send(f"{self.config.prefix}.groups", key=record.key.encode(), value=record.body, headers=headers)
        producer.flush()
        producer.close()

    def handle(self, runtime: str) -> float:
        """Hand every record to a handler that gives nothing; the seconds from the first one to the last."""
        times: list[float] = []

        class Timing:
            def handle(self, _event: object) -> tuple[()]:
                times.append(time.perf_counter())
                return ()

        bus = KafkaBus(self.database, SystemClock(), self.config, runtime=runtime)
        bus.subscribe(f"bench-{runtime}", [JobStarted], Timing())
        while len(times) < self.count:
            bus.step()
        bus.close()
        return times[-1] - times[0]

    def consume(self) -> float:
        """Read the same records with a bare consumer that commits after as many; the seconds likewise."""
        client = KafkaConsumer(
            **client_settings(self.config), group_id="bare", enable_auto_commit=False, auto_offset_reset="earliest"
        )
        client.subscribe([self.topic])
        seen, begun = 0, 0.0
        while seen < self.count:
            for place, records in client.poll(timeout_ms=3000, max_records=BATCH).items():
                begun = begun or time.perf_counter()
                seen += len(records)
                client.commit(
                    {TopicPartition(place.topic, place.partition): OffsetAndMetadata(records[-1].offset + 1, "", -1)}
                )
        took = time.perf_counter() - begun
        client.close()
        return took


def measure_bus(address: str, rounds: int, count: int) -> dict[str, Any]:
    """Give the ratios of the relay, and of a handler on either runtime, to bare clients."""
    relay: list[float] = []
    handler: dict[str, list[float]] = {"kafka-python": [], "faust": []}
    with tempfile.TemporaryDirectory(prefix="clarion-bench-") as root:
        for number in range(rounds):
            one = Round(address, Path(root), count)
            ours, bare = (one.relay, one.produce) if number % 2 else (one.produce, one.relay)
            first, second = timed(ours), timed(bare)
            took_relay, took_bare = (first, second) if number % 2 else (second, first)
            relay.append(took_bare / took_relay)
            bare_s = one.consume()
            for runtime in sorted(handler, reverse=bool(number % 2)):
                handler[runtime].append(bare_s / one.handle(runtime))
            said = ", ".join(f"{runtime} {found[-1]:.2f}" for runtime, found in handler.items())
            print(f"round {number + 1}: relay {relay[-1]:.2f}, {said}", file=sys.stderr)
    ratios = {f"handler on {runtime} / bare consumer": _median(found) for runtime, found in handler.items()}
    return {"relay / bare producer": _median(relay), **ratios}


def measure_replay(counts: list[int]) -> list[dict[str, Any]]:
    """Give what a replay of so much finished work takes, planned and run on the embedded bus, and its memory.

    In a process of its own, whose memory before it begins is the floor; the work was finished by another process.
    """
    found = []
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="clarion-bench-") as root:
            for part in ("fill", "replay"):
                command = [sys.executable, __file__, "--in", root, "--part", part, "--finished", str(count)]
                said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append(json.loads(said.splitlines()[-1]))
            print(found[-1], file=sys.stderr)
    return found


def part_of_replay(part: str, root: Path, count: int) -> None:
    """Do what one of the processes of `measure_replay` does."""
    site = Site(root)
    if part == "fill":
        fill_finished(site, count)
        return
    floor = _memory("VmRSS")
    before = _effects(site)
    seconds = timed(lambda: _replay(site))
    assert _effects(site) == before, "a replay of finished work has effects"
    figures = {
        "finished": count,
        "seconds": round(seconds, 1),
        "us_each": round(seconds / count * 1e6, 1),
        "peak_growth_mib": round((_memory("VmHWM") - floor) / 1024, 1),
    }
    print(json.dumps(figures))


def _memory(name: str) -> int:
    """Give a figure of this process's memory in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _effects(site: Site) -> tuple[int, int]:
    """Count the jobs, and the events but those of replays."""
    with site.database.reading() as connection:
        ours = outbox.events_table.c.kind.not_like("replay.%")
        query = sa.select(sa.func.count()).select_from(outbox.events_table).where(ours)
        return (
            connection.execute(sa.select(sa.func.count()).select_from(jobs)).scalar_one(),
            connection.execute(query).scalar_one(),
        )


def _replay(site: Site) -> None:
    request = PlanRequest(mode="redeliver", reason="bench", by="bench", selection=Selection())
    replay = find_replay(site.database, make_plan(site.app, request))
    command(site.database, replay, "run", by="bench", now=site.clock.now())
    while find_replay(site.database, replay.replay_id).state == "running":
        for _ in range(50):
            site.streams._replay.step()  # noqa: SLF001  the runner alone, without the live handlers


def _median(values: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(values), 3), "ratios": [round(one, 3) for one in values]}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--finished", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--in", dest="root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=["fill", "replay"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part_of_replay(options.part, options.root, options.finished[0])
        return
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clarion-broker-")))
        broker = start_broker(root / "broker")
        stack.callback(broker.stop)
        figures = measure_bus(broker.address, options.rounds, options.events)
    figures |= {"replay of finished work": measure_replay(options.finished), "cores": os.cpu_count()}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
