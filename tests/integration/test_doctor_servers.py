"""What `clarion doctor` finds wrong with a broker and a database."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from support import postgres
from support.kafka import Broker
from support.system import describe
from support.world import free_port

from clarion.adapters.kafka_topics import apply_topics
from clarion.config import KafkaConfig
from console.doctor import Check, diagnose


def look(root: Path, name: str, **keys: Any) -> Check:
    config = describe(root)
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **keys}))
    return {one.name: one for one in diagnose(config)}[name]


def test_a_broker_without_topics_with_others_and_none(kafka: Broker, tmp_path: Path) -> None:
    wanted = {"bootstrap": kafka.address, "prefix": f"d{uuid.uuid4().hex[:8]}", "partitions": 2, "replication": 1,
              "min_insync_replicas": 1}  # fmt: skip

    def broker(**keys: Any) -> Check:
        return look(tmp_path, "broker", bus={"kind": "kafka", "kafka": {**wanted, **keys}})

    missing = broker()
    assert not missing.good
    assert f"topic {wanted['prefix']}.jobs is missing" in missing.found
    assert "clarion topics apply" in missing.remedy
    apply_topics(KafkaConfig.model_validate(wanted))
    assert broker().good
    differing = broker(retention_hours=7)
    assert not differing.good
    assert "retention" in differing.found
    away = broker(bootstrap=f"127.0.0.1:{free_port()}")
    assert not away.good
    assert "Kafka at" in away.found


@pytest.mark.parametrize(
    ("setting", "value"),
    [("default_transaction_read_only", "on")],
)
def test_a_database_that_takes_no_commits(setting: str, value: str, tmp_path: Path) -> None:
    """Bites: ask only whether it answers. (`synchronous_commit` is set for every transaction of ours.)"""
    name = f"doctor_{setting}"
    url = postgres.shared().database(name)
    assert look(tmp_path, "database", database={"url": url}).good
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET {setting} = {value}")
    found = look(tmp_path, "database", database={"url": url})
    assert not found.good
    assert f"{setting} is {value}" in found.found


def test_a_database_that_is_away(tmp_path: Path) -> None:
    found = look(tmp_path, "database", database={"url": f"postgresql://clarion@127.0.0.1:{free_port()}/none"})
    assert not found.good
    assert "receiving goes on" in found.remedy
