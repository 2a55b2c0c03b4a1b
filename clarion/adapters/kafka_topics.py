"""Topics as they are to be, and as they are: made and compared, never created by chance."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kafka.admin import (  # type: ignore[attr-defined]  # the package names not all that it gives
    ConfigResource,
    ConfigResourceType,
    KafkaAdminClient,
    NewPartitions,
    NewTopic,
    OffsetSpec,
)
from kafka.errors import KafkaError
from kafka.structs import TopicPartition

from clarion.adapters.kafka import client_settings
from clarion.adapters.topics import TOPICS
from clarion.errors import BusUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clarion.config import KafkaConfig


def _names(config: KafkaConfig) -> list[str]:
    return [f"{config.prefix}.{one}" for one in TOPICS]


def _wanted(config: KafkaConfig) -> dict[str, str]:
    return {
        "cleanup.policy": "delete",
        "retention.ms": str(config.retention_hours * 3_600_000),
        "min.insync.replicas": str(min(config.min_insync_replicas, config.replication)),
    }


@contextmanager
def _administering(config: KafkaConfig) -> Iterator[KafkaAdminClient]:
    """Open an administrator's connection; what the broker refuses, or a broker that is away, may pass."""
    try:
        admin = KafkaAdminClient(**client_settings(config), client_id=f"{config.prefix}-topics")
        try:
            yield admin
        finally:
            admin.close()
    except KafkaError as error:
        raise BusUnavailableError(f"Kafka at {', '.join(config.bootstrap)}: {type(error).__name__}") from error


def check_topics(config: KafkaConfig) -> list[str]:
    """Say what is not as the configuration wants it; an empty list when all is well. Raises BusUnavailableError."""
    with _administering(config) as admin:
        return list(_differences(admin, config))


def apply_topics(config: KafkaConfig) -> list[str]:
    """Make and mend our topics; says what was done. Partitions are only ever added. Raises BusUnavailableError."""
    with _administering(config) as admin:
        return list(_apply(admin, config))


def read_lag(config: KafkaConfig) -> dict[str, int]:
    """Give how many records each of our consumer groups is behind. Raises BusUnavailableError."""
    with _administering(config) as admin:
        return _lag(admin, config)


def read_lag_and_records(config: KafkaConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Give what `read_lag` gives, and how many records each of our topics holds now. Raises BusUnavailableError."""
    with _administering(config) as admin:
        return _lag(admin, config), _records(admin, config)


def _lag(admin: KafkaAdminClient, config: KafkaConfig) -> dict[str, int]:
    ours = [one["group_id"] for one in admin.list_groups() if one["group_id"].startswith(f"{config.prefix}.")]
    offsets = admin.list_group_offsets(ours) if ours else {}
    partitions = {place for found in offsets.values() for place in found}
    latest = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST)) if partitions else {}
    return {
        group: sum(max(0, latest[place].offset - committed.offset) for place, committed in found.items())
        for group, found in sorted(offsets.items())
    }


def _records(admin: KafkaAdminClient, config: KafkaConfig) -> dict[str, int]:
    there = set(admin.list_topics())
    names = [name for name in _names(config) if name in there]
    places = [
        TopicPartition(one["name"], partition["partition_index"])
        for one in admin.describe_topics(names)
        for partition in one["partitions"]
    ]
    first = admin.list_partition_offsets(dict.fromkeys(places, OffsetSpec.EARLIEST))
    last = admin.list_partition_offsets(dict.fromkeys(places, OffsetSpec.LATEST))
    counts = dict.fromkeys(names, 0)
    for place in places:
        counts[place.topic] += last[place].offset - first[place].offset
    return counts


def _differences(admin: KafkaAdminClient, config: KafkaConfig) -> Iterator[str]:
    there = set(admin.list_topics())
    for name in _names(config):
        if name not in there:
            yield f"topic {name} is missing"
            continue
        (described,) = admin.describe_topics([name])
        partitions = described["partitions"]
        replication = len(partitions[0]["replica_nodes"])
        if len(partitions) < config.partitions:
            yield f"topic {name} has {len(partitions)} partitions, {config.partitions} are wanted"
        if replication != config.replication:
            yield f"topic {name} has {replication} replicas, {config.replication} are wanted"
        for key, (value, wanted) in _unlike(admin, name, config).items():
            yield f"topic {name} has {key} {value}, {wanted} is wanted"


def _apply(admin: KafkaAdminClient, config: KafkaConfig) -> Iterator[str]:
    there = set(admin.list_topics())
    for name in _names(config):
        if name not in there:
            topic = NewTopic(name, config.partitions, config.replication, topic_configs=_wanted(config))
            admin.create_topics([topic], wait_for_metadata=True)
            yield f"made topic {name}: {config.partitions} partitions, {config.replication} replicas"
            continue
        (described,) = admin.describe_topics([name])
        if len(described["partitions"]) < config.partitions:
            # More partitions send a key elsewhere from then on: order across the change is not kept.
            admin.create_partitions({name: NewPartitions(config.partitions)})
            yield f"topic {name}: {config.partitions} partitions; order per key holds anew from here on"
        changed = {key: wanted for key, (_, wanted) in _unlike(admin, name, config).items()}
        if changed:
            admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, configs=changed)])
            yield f"topic {name}: set {', '.join(f'{key}={value}' for key, value in changed.items())}"


def _unlike(admin: KafkaAdminClient, name: str, config: KafkaConfig) -> dict[str, tuple[str, str]]:
    """Give the settings of a topic that are not as wanted: as they are, and as they are to be."""
    found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)], config_filter="all")
    there = {key: str(one["value"]) for key, one in found["topic"][name].items()}
    pairs = {key: (there.get(key, "no value"), wanted) for key, wanted in _wanted(config).items()}
    return {key: (value, wanted) for key, (value, wanted) in pairs.items() if value != wanted}
