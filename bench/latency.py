"""How long it takes from an event to its handler, from a group to its job; and how fast a backlog drains, in order.

The processes are those of a running Clarion (`Service`, doorbells, relay, buses), idle but for what is measured. Needs
a broker: that of CLARION_TEST_KAFKA, or one that is started as the tests do.
`make bench BENCH=latency ARGS="--events 200 --studies 20 --backlog 100000"`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import yaml  # noqa: E402
from support.dcmtk import storescu  # noqa: E402
from support.kafka import start_broker, topics_on  # noqa: E402
from support.system import describe, running  # noqa: E402
from support.world import make_series, pause  # noqa: E402

from clarion.adapters import outbox  # noqa: E402
from clarion.adapters.clock import SystemClock  # noqa: E402
from clarion.adapters.database import Database  # noqa: E402
from clarion.adapters.embedded import EmbeddedBus  # noqa: E402
from clarion.adapters.history import list_events  # noqa: E402
from clarion.adapters.kafka_bus import KafkaBus  # noqa: E402
from clarion.adapters.relay import Relay  # noqa: E402
from clarion.events import GroupClosed, JobStarted  # noqa: E402
from clarion.service import Service, open_wakeup  # noqa: E402
from clarion.testing.phantom import PhantomSpec  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clarion.config import KafkaConfig

KEYS = 200
WARM_UP = 10


class Handling:
    """A stage with one handler, which writes down when it saw what: milliseconds since, key, sequence, time."""

    def __init__(self, bus: Any, seen: Path) -> None:  # noqa: ANN401  any of the buses
        self._bus, self._seen = bus, seen.open("w", buffering=1)
        bus.subscribe("bench", [JobStarted], self)

    def handle(self, event: JobStarted) -> tuple[()]:
        """Write it down."""
        now = datetime.now(UTC)
        self._seen.write(
            f"{(now - event.time).total_seconds() * 1000} {event.subject} {event.sequence} {now.timestamp()}\n"
        )
        return ()

    def step(self) -> bool:
        """Hand over what waits."""
        return bool(self._bus.step())

    def facts(self) -> dict[str, object]:
        """Nothing to say."""
        return {}

    def drain(self) -> None:
        """Leave."""
        self._bus.close()


def serve(role: str, folder: Path, kafka: KafkaConfig | None, runtime: str) -> None:
    """Run one of the processes, as `clarion serve` does."""
    wakeup = open_wakeup(folder, role)
    database = Database(f"sqlite:///{folder / 'bench.db'}", on_commit=wakeup.ring)
    if role == "relay" and kafka is not None:
        Service(role, folder, wakeup).run(Relay(database, kafka))
        return
    bus = (
        EmbeddedBus(database, SystemClock())
        if kafka is None
        else KafkaBus(database, SystemClock(), kafka, runtime=runtime)
    )
    Service(role, folder, wakeup).run(Handling(bus, folder / "seen"))


@contextmanager
def processes(folder: Path, kafka: KafkaConfig | None, runtime: str) -> Iterator[None]:
    """Have them run."""
    spawn = multiprocessing.get_context("spawn")
    roles = ("handler",) if kafka is None else ("relay", "handler")
    started = [spawn.Process(target=serve, args=(role, folder, kafka, runtime)) for role in roles]
    for one in started:
        one.start()
    try:
        yield
    finally:
        for one in reversed(started):
            one.terminate()
            one.join(30)


def seen(folder: Path, count: int, deadline_s: float) -> list[list[str]]:
    """Wait until so many were seen; gives the lines."""
    path, end = folder / "seen", time.monotonic() + deadline_s
    while not path.exists() or path.read_text().count("\n") < count:
        if time.monotonic() > end:
            raise SystemExit(f"not {count} were seen within {deadline_s} s: not a result")
        pause(0.2)
    return [line.split() for line in path.read_text().splitlines()]


def started(key: int, sequence: int) -> JobStarted:
    """Make an event of this moment."""
    return JobStarted(subject=f"k{key}", sequence=sequence, time=datetime.now(UTC), source="bench", attempt=sequence)


def measure_latency(root: Path, address: str, kind: str, count: int) -> dict[str, float]:
    """Give how many milliseconds pass from an event to its handler, one event at a time."""
    folder = root / f"latency-{kind}"
    folder.mkdir()
    database, kafka, runtime = _world(folder, address, kind)
    with processes(folder, kafka, runtime):
        for number in range(1, WARM_UP + count + 1):
            outbox.publish(database, [started(number % KEYS, number)])
            if number == 1:
                seen(folder, 1, 60)
            pause(0.1)
        lines = seen(folder, WARM_UP + count, 60)
    return _figures([float(line[0]) for line in lines[WARM_UP:]])


def measure_backlog(root: Path, address: str, kind: str, count: int) -> dict[str, Any]:
    """Let relay and handler meet a backlog; gives the events a second, and whether each key's came in order, once."""
    folder = root / f"backlog-{kind}"
    folder.mkdir()
    database, kafka, runtime = _world(folder, address, kind)
    each = count // KEYS
    for first in range(1, each + 1, 10):
        last = min(first + 10, each + 1)
        outbox.publish(database, [started(key, number) for number in range(first, last) for key in range(KEYS)])
    begun = time.time()
    with processes(folder, kafka, runtime):
        lines = seen(folder, each * KEYS, 300)
    by_key: dict[str, list[int]] = {}
    for _, key, sequence, _ in lines:
        by_key.setdefault(key, []).append(int(sequence))
    if any(found != list(range(1, each + 1)) for found in by_key.values()):
        raise SystemExit("a key's events came out of order or twice: not a result")
    times = [float(line[3]) for line in lines]
    return {
        "events": len(lines),
        "events_per_s": round(len(lines) / (times[-1] - times[0])),
        "with_start_s": round(times[-1] - begun, 1),
    }


def _world(folder: Path, address: str, kind: str) -> tuple[Database, KafkaConfig | None, str]:
    wakeup = open_wakeup(folder, "bench")
    database = Database(f"sqlite:///{folder / 'bench.db'}", on_commit=wakeup.ring)
    database.create(outbox.SCHEMA)
    return (database, None, "") if kind == "embedded" else (database, topics_on(address), kind)


def measure_dispatch(root: Path, address: str, kind: str, studies: int) -> dict[str, float]:
    """Let a real Clarion receive small studies one by one; gives the milliseconds from a group's event to its job's."""
    folder = root / f"dispatch-{kind}"
    titles = [{"ae_title": "CHEST", "settings": {"pipeline-chest": "chest-ct", "timeout": 2}}]
    config = describe(folder, ae_titles=titles)
    if kind != "embedded":
        described = yaml.safe_load(config.read_text())
        kafka = topics_on(address).model_dump(mode="json", exclude={"security", "streams_runtime"})
        described["bus"] = {"kind": "kafka", "kafka": {**kafka, "streams_runtime": kind}}
        config.write_text(yaml.safe_dump(described))
    with running(config) as system:
        for number in range(studies + 1):
            spec = PhantomSpec(slices=5, size=64, length_mm=160, seed=number)
            storescu(make_series(folder / f"s{number}", spec), system.scp)

            def ended(wanted: int = number + 1) -> bool:
                return len(list_events(system.database, kinds=["job.succeeded.v1"], limit=1000)) == wanted

            system.wait_for(ended, "its job")
        rows = list_events(system.database, kinds=[GroupClosed.kind, JobStarted.kind], limit=1000)
    by_kind: dict[str, list[datetime]] = {}
    for row in rows:
        by_kind.setdefault(row.kind, []).append(datetime.fromisoformat(row.time))
    pairs = zip(by_kind[GroupClosed.kind], by_kind[JobStarted.kind], strict=True)
    # The first one finds everything cold.
    return _figures([(begun - closed).total_seconds() * 1000 for closed, begun in pairs][1:])


def _figures(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "median_ms": round(statistics.median(ordered), 1),
        "p95_ms": round(ordered[int(len(ordered) * 0.95)], 1),
        "max_ms": round(ordered[-1], 1),
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument("--backlog", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", default=["embedded", "faust", "kafka-python"])
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clarion-bench-")))
        broker = start_broker(root / "broker")
        stack.callback(broker.stop)
        for kind in options.kinds:
            found[kind] = {"event to handler": measure_latency(root, broker.address, kind, options.events)}
            found[kind]["group to job"] = measure_dispatch(root, broker.address, kind, options.studies)
            found[kind]["backlog"] = measure_backlog(root, broker.address, kind, options.backlog)
            print(kind, json.dumps(found[kind]), file=sys.stderr)
    print(json.dumps({**found, "cores": os.cpu_count()}, indent=1))


if __name__ == "__main__":
    main()
