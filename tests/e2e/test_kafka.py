"""The whole flow with events on a real Kafka: the demo, and a broker that dies in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
import yaml
from support import postgres
from support.dcmtk import storescu
from support.kafka import Broker, start_broker
from support.processes import start_pacs
from support.system import describe, running
from support.world import free_port, make_series

from clarion.testing.phantom import PhantomSpec

CLARION = str(Path(sys.executable).parent / "clarion")


def clarion(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CLARION, *arguments], cwd=cwd, capture_output=True, text=True, timeout=200, check=False)


def test_the_demo_on_kafka_and_postgresql(kafka: Broker, tmp_path: Path) -> None:
    """One line; SEG, RTSTRUCT and SR come back Verified as they do on the embedded bus. Nothing stays in the server."""
    kept, server = tmp_path / "kept", postgres.shared()
    url = server.database("demo")
    others = ("--kafka", kafka.address, "--database", url, "--keep", str(kept))
    done = clarion("demo", "--once", "--json", *others, cwd=tmp_path)
    with psycopg.connect(url) as connection:
        left = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'demo_%'").fetchall()
    assert left == []
    log = (kept / "clarion.log").read_text() if (kept / "clarion.log").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    states = {one["modality"]: one["state"] for one in json.loads(done.stdout)["results"]}
    assert states == {"SEG": "Verified", "RTSTRUCT": "Verified", "SR": "Verified", "OT": "Verified"}


def _on_kafka(config: Path, address: str) -> Path:
    described = yaml.safe_load(config.read_text())
    topics = {"prefix": "mid", "partitions": 3, "replication": 1, "min_insync_replicas": 1}
    described["bus"] = {"kind": "kafka", "kafka": {"bootstrap": address, **topics}}
    config.write_text(yaml.safe_dump(described))
    return config


def test_without_topics_up_refuses_and_says_what_to_do(kafka: Broker, tmp_path: Path) -> None:
    config = _on_kafka(describe(tmp_path), kafka.address)
    described = yaml.safe_load(config.read_text())
    described["bus"]["kafka"]["prefix"] = "nobody-made-these"
    config.write_text(yaml.safe_dump(described))
    done = clarion("up", "-c", str(config), cwd=tmp_path)
    assert done.returncode == 2
    assert "topic nobody-made-these.jobs is missing" in done.stderr
    assert "clarion topics apply" in done.stderr
    assert clarion("topics", "check", "-c", str(config), cwd=tmp_path).returncode == 1
    assert clarion("topics", "apply", "-c", str(config), cwd=tmp_path).returncode == 0
    assert json.loads(clarion("topics", "check", "-c", str(config), "--json", cwd=tmp_path).stdout)["ok"] is True


def test_broker_dies_in_the_middle_and_comes_back(tmp_path: Path) -> None:
    """F23. Receiving and grouping go on without it; afterwards both studies are Verified, each result once."""
    broker = start_broker(tmp_path / "broker")
    if broker.process is None:
        pytest.skip("CLARION_TEST_KAFKA names a broker that is not ours to kill")
    scp, port = free_port(), free_port()
    pacs = start_pacs(tmp_path / "pacs", port, "PACS", ("CLARION", scp))
    entry = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": port}
    try:
        config = _on_kafka(describe(tmp_path, destinations=[entry], scp={"port": scp}), broker.address)
        assert clarion("topics", "apply", "-c", str(config), cwd=tmp_path).returncode == 0
        with running(config) as system:
            first = make_series(tmp_path / "a", PhantomSpec(slices=5, size=64, length_mm=160, seed=31))
            assert len(storescu(first, scp)) == 5
            system.wait_for(lambda: len(system.studies()) == 1, "the first study")
            system.wait_for(lambda: bool(system.view(system.studies()[0]).jobs), "its job")
            broker.kill()
            second = make_series(tmp_path / "b", PhantomSpec(slices=5, size=64, length_mm=160, seed=32))
            assert len(storescu(second, scp)) == 5
            system.wait_for(
                lambda: sorted(system.view(one).counts.grouped for one in system.studies()) == [5, 5], "both grouped"
            )
            broker.start()
            for study in system.studies():
                system.wait_for_state(study, "Verified", deadline_s=150)
            assert len(list((tmp_path / "pacs").glob("*.dcm"))) == 8
            status = json.loads(clarion("status", "--json", "-c", str(config), cwd=tmp_path).stdout)
            assert "relay" in {one["stage"] for one in status["stages"]}
            assert {one["consumer"] for one in status["consumers"]} >= {"relay", "match", "timeline", "ledger"}
    finally:
        pacs.kill()
        broker.stop()
