"""What Clarion counts, in the Prometheus text format; read from the tables and heartbeats when it is asked for."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from clarion.adapters.deadletters import count_by_reason
from clarion.adapters.history import last_position
from clarion.service import read_heartbeats
from console.stages import read_stages
from gateway.queries import count_deliveries, count_open_groups, count_quarantine
from orchestrator.queries import count_jobs
from streams.replays import list_replays

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from clarion.adapters.database import Database
    from clarion.config import Config
    from console.carriage import Carried

METRICS_TYPE = CONTENT_TYPE_LATEST


def render_metrics(config: Config, database: Database, carried: Carried) -> bytes:
    """Give every metric as text. Raises BusUnavailableError when the database cannot be read."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Reading([*_carriage(carried), *_stages(config), *_peers(config), *_tables(database)]))
    return generate_latest(registry)


class _Reading:
    """What was read, as prometheus-client wants it."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        yield from self._metrics


def _carriage(carried: Carried) -> Iterator[Metric]:
    lag = GaugeMetricFamily(
        "clarion_consumer_lag_events", "Events that a handler has not seen yet.", labels=["consumer"]
    )
    for one in carried.consumers:
        lag.add_metric([one.consumer], one.behind)
    yield lag
    kept = GaugeMetricFamily("clarion_topic_records", "Records that a topic holds.", labels=["topic"])
    for name, count in carried.topics.items():
        kept.add_metric([name], count)
    yield kept
    yield GaugeMetricFamily("clarion_broker_up", "Whether the bus can be asked.", value=carried.broker == "ok")
    if carried.relay is not None:
        yield GaugeMetricFamily(
            "clarion_relay_backlog_events", "Events that are not in Kafka yet.", value=carried.relay["backlog"]
        )
        yield GaugeMetricFamily(
            "clarion_relay_oldest_unpublished_seconds",
            "For how long the oldest of them has waited.",
            value=carried.relay["oldest_seconds"],
        )


def _stages(config: Config) -> Iterator[Metric]:
    up = GaugeMetricFamily("clarion_stage_up", "Whether the process of a stage lives.", labels=["stage"])
    well = GaugeMetricFamily("clarion_stage_well", "Whether it does its work without trouble.", labels=["stage"])
    for one in read_stages(config):
        up.add_metric([one["stage"]], one["alive"])
        well.add_metric([one["stage"]], one["state"] == "running")
    yield up
    yield well


def _peers(config: Config) -> Iterator[Metric]:
    """What each calling AE title sent since the receiving processes started, by C-STORE and by STOW-RS."""
    labels = ["calling_ae", "by"]
    families = {
        "associations": CounterMetricFamily("clarion_peer_associations", "Associations, or requests.", labels=labels),
        "stored": CounterMetricFamily("clarion_peer_instances_stored", "Instances acknowledged.", labels=labels),
        "refused": CounterMetricFamily("clarion_peer_instances_refused", "Instances refused.", labels=labels),
        "bytes": CounterMetricFamily("clarion_peer_bytes", "Bytes of data sets.", labels=labels),
    }
    rejected = CounterMetricFamily(
        "clarion_associations_rejected", "Associations rejected, by the check that failed.", labels=["check", "by"]
    )
    for beat in read_heartbeats(config.data / "run"):
        by = {"intake": "c-store", "stow": "stow-rs"}.get(beat.stage)
        if by is None:
            continue
        for title, counts in _mapping(beat.facts.get("peers")).items():
            for name, family in families.items():
                family.add_metric([title, by], _mapping(counts).get(name, 0))
        for check, count in _mapping(beat.facts.get("refusals")).items():
            rejected.add_metric([check, by], count)
    yield from families.values()
    yield rejected
    ends = GaugeMetricFamily("clarion_certificate_expires_seconds", "When our certificate ends, as Unix time.")
    for beat in read_heartbeats(config.data / "run"):
        until = beat.facts.get("certificate_until")
        if isinstance(until, str):
            ends.add_metric([], datetime.fromisoformat(until).timestamp())
    yield ends


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _tables(database: Database) -> Iterator[Metric]:
    yield CounterMetricFamily("clarion_events", "Events that were recorded.", value=last_position(database))
    letters = GaugeMetricFamily(
        "clarion_dead_letters", "Dead letters that ask for attention.", labels=["consumer", "state"]
    )
    counted: dict[tuple[str, str], int] = {}
    for consumer, state, _, count in count_by_reason(database):
        counted[consumer, state] = counted.get((consumer, state), 0) + count
    for (consumer, state), count in counted.items():
        letters.add_metric([consumer, state], count)
    yield letters
    for name, what, found in (
        ("clarion_jobs", "Jobs by state.", count_jobs(database)),
        ("clarion_deliveries", "Deliveries by state.", count_deliveries(database)),
        ("clarion_replay_items", "Items of replays that run, by state.", _replay_items(database)),
    ):
        family = GaugeMetricFamily(name, what, labels=["state"])
        for state, count in found.items():
            family.add_metric([state], count)
        yield family
    yield GaugeMetricFamily("clarion_open_groups", "Groups that wait for more.", value=count_open_groups(database))
    yield GaugeMetricFamily("clarion_quarantined", "Data sets in quarantine.", value=count_quarantine(database))


def _replay_items(database: Database) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in list_replays(database, states=["running", "paused"]):
        for state, count in one.counts.items():
            found[state] = found.get(state, 0) + count
    return found
