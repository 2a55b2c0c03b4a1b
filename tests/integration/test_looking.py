"""What operations staff see: events, counts, metrics, the page. Nothing of it names a patient or a whole UID."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.site import Site
from support.world import free_port

from clarion.adapters.deadletters import Place, bury
from clarion.adapters.history import list_events
from clarion.errors import PermanentError
from console.pages.stage import ConsoleStage
from console.replay_plan import PlanRequest, make_plan
from console.selection import Selection

CLARION = str(Path(sys.executable).parent / "clarion")
STUDY = "1.2.840.99999.1.2.3.4.5.6.7.8.12345"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("site"))
    first = site.receive(1)
    site.receive(STUDY)
    site.outcome = lambda group_id: "failed" if group_id == first.subject else "succeeded"
    site.settle()
    (row, *_) = list_events(site.database, 1, subjects=[first.subject])
    place = Place(origin="events", partition=0, position=row.position)
    error = PermanentError("a broken model")
    bury(site.database, "match", place, row.record, error=error, tries=1, now=site.clock.now())
    site.clock.advance(timedelta(seconds=1))
    make_plan(site.app, PlanRequest(mode="rerun", reason="to see it", by="t", selection=Selection()))
    site.settle()
    return site


def clarion(site: Site, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [CLARION, *arguments, "-c", str(site.config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def said(site: Site, *arguments: str) -> Any:
    done = clarion(site, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tail_filters_by_study_group_and_type_and_masks(site: Site) -> None:
    lines = [json.loads(line) for line in clarion(site, "events", "tail", "--json").stdout.splitlines()]
    assert [one["position"] for one in lines] == sorted(one["position"] for one in lines)
    assert {one["topic"] for one in lines} == {"groups", "jobs", "deliveries", "replays"}
    mine = clarion(site, "events", "tail", "--study", STUDY, "--json").stdout
    assert STUDY not in mine
    told = [json.loads(line) for line in mine.splitlines()]
    assert any(f"…{STUDY[-14:]}" in one["body"].get("studies", ()) for one in told)
    kinds = {one["type"] for one in told}
    assert {"group.closed.v1", "job.requested.v1", "result.delivered.v1"} <= kinds
    assert "job.failed.v1" not in kinds
    failed = clarion(site, "events", "tail", "--type", "job.failed", "--type", "result.").stdout.splitlines()
    assert {line.split()[1] for line in failed} <= {"job.failed.v1", "result.registered.v1", "result.delivered.v1",
                                                   "result.verified.v1"}  # fmt: skip
    assert STUDY in clarion(site, "events", "tail", "--study", STUDY, "--unmask", "--json").stdout


def test_one_trace_from_group_to_pacs(site: Site) -> None:
    """Bites: drop `cause` where a handler's answer is published, and jobs begin traces of their own."""
    lines = clarion(site, "events", "tail", "--study", STUDY, "--json", "--limit", "1000").stdout.splitlines()
    assert len({json.loads(line)["trace_id"] for line in lines}) == 1
    assert len(lines) > 6


def test_show(site: Site) -> None:
    (row, *_) = list_events(site.database, 1, kinds=["job.requested"])
    found = said(site, "events", "show", row.event_id[:12])
    assert found["type"] == "job.requested.v1"
    assert found["body"]["pipeline_id"] == "chest-ct"
    unknown = clarion(site, "events", "show", "nosuch")
    assert (unknown.returncode, "clarion events tail" in unknown.stderr) == (1, True)


def test_statistics(site: Site) -> None:
    found = said(site, "events", "stats")
    assert found["events"]["group.closed.v1"] == 2
    assert found["topics"]["jobs"] >= 5
    assert found["dead_letters"] == [{"consumer": "match", "state": "open", "reason": "a broken model", "count": 1}]
    assert set(found["consumers"]) >= {"match", "timeline", "ledger", "delivery"}
    assert found["relay"] is None, "nothing is relayed on the embedded bus"


def test_the_document_of_the_topics(site: Site) -> None:
    found = json.loads(
        subprocess.run([CLARION, "events", "schema", "--prefix", "x"], capture_output=True, check=True).stdout
    )
    assert found["channels"]["jobs"]["address"] == "x.jobs"


@pytest.fixture(scope="module")
def page(site: Site) -> Iterator[str]:
    config = site.app.checked.config
    port = free_port()
    described = config.model_copy(update={"console": config.console.model_copy(update={"port": port})})
    from dataclasses import replace

    stage = ConsoleStage(replace(site.app.checked, config=described), site.database, site.app.store)
    yield f"http://127.0.0.1:{port}"
    stage.drain()


def test_metrics_are_what_prometheus_reads(page: str) -> None:
    answer = httpx.get(page + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = {
        (one.name, *sorted(one.labels.values())): one.value
        for family in text_string_to_metric_families(answer.text)
        for one in family.samples
    }
    assert samples["clarion_dead_letters", "match", "open"] == 1
    assert samples["clarion_jobs", "succeeded"] == samples["clarion_jobs", "failed"] == 1
    assert samples["clarion_deliveries", "verified"] == 1
    assert samples["clarion_consumer_lag_events", "match"] == 0
    assert samples["clarion_broker_up",] == 1
    assert samples["clarion_events_total",] > 10
    assert samples["clarion_stage_up", "intake"] == 0
    assert STUDY not in answer.text


def test_the_page_shows_letters_replays_and_events(page: str) -> None:
    text = httpx.get(page + "/operations").text
    for wanted in ("a broken model", "to see it", "0 of 2 items", "job.requested.v1", "timeline"):
        assert wanted in text
    assert STUDY not in text
