"""F34 on a real broker, and a second client that reads what we say there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from support.kafka import Broker, stand_at_end, topics_on
from support.site import Site, fill_finished
from support.world import pause

from clarion.adapters.kafka_topics import read_lag
from console.asyncapi import make_document
from console.replay_plan import PlanRequest, make_plan
from console.selection import Selection
from gateway.selecting import StudyFilter
from streams.replays import Limits, Replay, command, find_replay

# A finished study is two events: 50,000 in all (F34).
FINISHED, FORCED = 25_000, 100
FAST = Limits(per_minute=1_000_000, in_flight=500, stop_above_percent=100)


@pytest.fixture(scope="module")
def site(kafka: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site whose history of finished work lies in the topics, read by its handlers long ago."""
    config = topics_on(kafka.address)
    site = Site(tmp_path_factory.mktemp("site"), kafka=config)
    fill_finished(site, FINISHED)
    assert site.relay is not None
    while site.relay.step():
        pass
    for one in (one for bus in site.buses for one in bus._subscriptions):
        stand_at_end(config, f"{config.prefix}.{one.hand.consumer}", one.topics)
    yield site
    site.close()


def plan(site: Site, mode: str, selection: Selection) -> Replay:
    request = PlanRequest(mode=mode, reason="F34", by="t", selection=selection, limits=FAST)
    return find_replay(site.database, make_plan(site.app, request))


def run(site: Site, replay: Replay) -> Replay:
    """Only the replay goes on, and the ledger: live handlers are left where they are."""
    command(site.database, replay, "run", by="t", now=site.clock.now())
    for _ in range(20_000):
        moved = site.streams._replay.step()
        if (now := find_replay(site.database, replay.replay_id)).state != "running":
            return now
        if not moved:
            assert site.relay is not None
            moved = site.relay.step() | site.orchestrator._bus.step() | site.streams._bus.step() | site._work()
        if not moved:
            pause(0.01)
    raise AssertionError(f"still {now}")


def test_finished_work_has_no_effects_and_live_groups_stay_where_they_are(site: Site) -> None:
    """50,000 events in the topics, those of groups read again: no new job, no new event but the replay's own two."""
    before, lag = site.jobs(), read_lag(site.app.checked.config.bus.kafka)  # type: ignore[arg-type]
    from clarion.adapters.history import last_position

    position = last_position(site.database)
    replay = plan(site, "redeliver", Selection())
    assert (replay.items, replay.counts) == (0, {"skipped": FINISHED})
    ended = run(site, replay)
    assert (ended.state, ended.records_read) == ("finished", FINISHED)
    assert site.jobs() == before
    assert last_position(site.database) == position + 2
    assert read_lag(site.app.checked.config.bus.kafka) == lag  # type: ignore[arg-type]


def test_a_forced_replay_of_a_hundred_makes_a_hundred_jobs(site: Site) -> None:
    before = set(site.jobs())
    chosen = Selection(studies=StudyFilter(study_uids=tuple(f"1.2.{number}" for number in range(1, FORCED + 1))))
    ended = run(site, plan(site, "rerun", chosen))
    assert (ended.state, ended.counts) == ("finished", {"done": FORCED})
    new = {job: state for job, state in site.jobs().items() if job not in before}
    assert len(new) == FORCED
    assert set(new.values()) == {("succeeded", 1)}


def validator(schema: dict[str, Any]) -> Any:
    """Make what checks documents against a schema, once for all of them."""
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


def test_another_client_reads_what_we_say(site: Site) -> None:
    """librdkafka, by nothing but the AsyncAPI document: keys, headers and bodies are as it says."""
    from confluent_kafka import Consumer

    kafka = site.app.checked.config.bus.kafka
    assert kafka is not None
    document = make_document(kafka.prefix)
    topics = [one["address"] for one in document["channels"].values()]
    described = {
        kind: [validator(one["headers"]), validator(one["payload"]["schema"])]
        for kind, one in document["components"]["messages"].items()
    }
    consumer = Consumer({
        "bootstrap.servers": ",".join(kafka.bootstrap), "group.id": "a-stranger", "auto.offset.reset": "earliest",
        "enable.partition.eof": True,
    })  # fmt: skip
    consumer.subscribe(topics)
    kinds: dict[str, int] = {}
    for _ in range(5000):
        message = consumer.poll(10)
        assert message is not None
        if message.error() is None:
            headers = {name: value.decode() for name, value in message.headers()}
            body = json.loads(message.value())
            for one, said in zip(described[headers["ce_type"]], (headers, body), strict=True):
                one.validate(said)
            assert body["subject"] == message.key().decode()
            kinds[headers["ce_type"]] = kinds.get(headers["ce_type"], 0) + 1
    consumer.close()
    assert sum(kinds.values()) > 4000
