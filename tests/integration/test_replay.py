"""Replays: the effect is what the plan says, never more; finished work stays finished; a person stays in control."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from support import postgres
from support.site import Site

from clarion.errors import ConfigError, PermanentError
from console.replay_plan import PlanRequest, make_plan
from console.selection import Expression, Selection
from gateway import removal_plan
from gateway.queries import list_studies
from gateway.removal import Remover
from gateway.retention import Policy
from gateway.selecting import StudyFilter
from streams.queries import read_story, state_of
from streams.replays import Limits, Replay, command, find_replay, is_as_planned, read_items
from streams.tables import replay_items

PLANS_PER_SITE = 20
FAST = Limits(per_minute=100_000, in_flight=50, stop_above_percent=100)


def plan(site: Site, mode: str = "redeliver", **more: Any) -> Replay:
    site.clock.advance(timedelta(seconds=1))
    values = {"selection": Selection(), "limits": FAST, **more}
    request = PlanRequest(mode=mode, reason="a test", by="tester", **values)
    return find_replay(site.database, make_plan(site.app, request))


def carry_out(site: Site, replay: Replay) -> Replay:
    command(site.database, replay, "run", by="tester", now=site.clock.now())
    for _ in range(20):
        site.settle()
        site.clock.advance(timedelta(seconds=61))
        if (now := find_replay(site.database, replay.replay_id)).state != "running":
            return now
    raise AssertionError(f"still {now}")


def targets(site: Site, replay: Replay) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for item in read_items(site.database, replay.replay_id, limit=100_000):
        found.setdefault(item["action"], set()).add(item["target"])
    return found


def effects(before: tuple[Any, Any], after: tuple[Any, Any], given_up: set[str]) -> dict[str, set[str]]:
    """What was done, by comparing the tables: jobs that are new, jobs and deliveries with another attempt."""
    (jobs, deliveries), (jobs_now, deliveries_now) = before, after
    return {
        "new jobs": set(jobs_now) - set(jobs),
        "attempts": {one for one in jobs if jobs_now[one][1] > jobs[one][1]},
        "new deliveries": set(deliveries_now) - set(deliveries),
        "sent again": {one for one in deliveries if deliveries_now[one][1] > deliveries[one][1]} - given_up,
    }


@pytest.mark.parametrize("seed", range(10))
def test_the_effect_is_the_plan(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 scripted plans over ten histories: every target that the plan names was touched, and no other.

    Bites: let the runner publish what the handler says instead of what the plan says, or forget the fence.
    """
    if seed % 5 == 0:
        monkeypatch.setattr(postgres, "current", postgres.POSTGRESQL)
    site = Site(tmp_path / "site")
    site.fill(14, seed)
    rng = random.Random(seed)
    for _ in range(PLANS_PER_SITE):
        site.clock.advance(timedelta(minutes=5))
        mode = rng.choice(["redeliver", "failed", "rerun", "send", "decide"])
        modality = rng.choice([(), ("CT",), ("MR",)])
        to = rng.choice([(), ("pacs",), ("archive",), ("pacs", "archive")]) if mode != "send" else ("archive",)
        selection = Selection(
            studies=StudyFilter(modalities=modality),
            where=rng.choice(["", "study_uid.endsWith('3')", "instances == 1 && accession_number < 'A5'"]),
        )
        before = site.jobs(), site.deliveries()
        replay = plan(site, mode, selection=selection, destinations=to, again=rng.random() < 0.3)
        assert (site.jobs(), site.deliveries()) == before, "a plan does nothing"
        ended = carry_out(site, replay)
        assert (ended.state, ended.counts.get("failed", 0)) == ("finished", 0), ended
        planned = targets(site, replay)
        done = effects(before, (site.jobs(), site.deliveries()), set())
        assert done["new jobs"] == planned.get("request", set()) | planned.get("rerun", set())
        assert done["attempts"] == planned.get("retry", set())
        sent = planned.get("send", set()) | planned.get("resend", set())
        # What a job that ran sends by itself goes where the plan allows, and nowhere else.
        by_jobs = done["new deliveries"] - planned.get("send", set())
        jobs_that_ran = done["new jobs"] | done["attempts"]
        assert len(by_jobs) == len(jobs_that_ran) * len(to)
        assert done["new deliveries"] - by_jobs | done["sent again"] == sent
    site.close()


@pytest.mark.usefixtures("each_database")
def test_finished_work_is_skipped_and_says_why(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for number in range(1, 6):
        site.receive(number)
    site.settle()
    before = site.jobs(), site.deliveries()
    replay = plan(site, destinations=("pacs",))
    assert replay.items == 0
    (reason,) = {one["reason"] for one in read_items(site.database, replay.replay_id)}
    assert reason == "delivery to pacs is verified (query)"
    ended = carry_out(site, replay)
    assert ended.state == "finished"
    assert ended.records_read == 5
    assert (site.jobs(), site.deliveries()) == before


def test_a_broken_model_is_mended_and_what_failed_runs_again_fenced_off(tmp_path: Path) -> None:
    """The bad night. Results stay here until a plan names the PACS; each study's story says what happened."""
    site = Site(tmp_path)
    site.outcome = lambda _: "failed"
    for number in range(1, 5):
        site.receive(number)
    site.settle()
    site.outcome = lambda _: "succeeded"
    ended = carry_out(site, plan(site, "failed", selection=Selection(statuses=("Failed",))))
    assert ended.counts == {"done": 4}
    assert {state for state, _ in site.jobs().values()} == {"succeeded"}
    assert {attempt for _, attempt in site.jobs().values()} == {2}
    assert site.deliveries() == {}, "fenced off"
    sent = carry_out(site, plan(site, "send", destinations=("pacs",)))
    assert sent.counts == {"done": 4}
    assert {state for state, _ in site.deliveries().values()} == {"verified"}
    story = read_story(site.database, "1.2.1")
    assert any(f"Taken up again by replay {ended.replay_id}" in line.text for line in story)
    assert state_of(story) == "Verified"


def test_a_forced_replay_supersedes_when_it_may_send_and_not_when_it_is_fenced(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for number in range(1, 4):
        site.receive(number)
    site.settle()
    first = set(site.jobs())
    carry_out(site, plan(site, "rerun"))
    assert {site.jobs()[one][0] for one in first} == {"succeeded"}, "what was delivered still counts"
    fenced = set(site.jobs()) - first
    assert len(fenced) == 3
    assert len(site.deliveries()) == 3
    carry_out(site, plan(site, "rerun", destinations=("pacs",)))
    assert {site.jobs()[one][0] for one in first | fenced} == {"superseded"}
    assert len(site.jobs()) == 9
    assert len(site.deliveries()) == 6


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    """Bites: keep the runner's progress in memory and items are ordered twice or never."""
    site = Site(tmp_path)
    site.fill(30, 3)
    replay = plan(site, "rerun", limits=Limits(per_minute=100_000, in_flight=2))
    command(site.database, replay, "run", by="t", now=site.clock.now())
    for _ in range(12):
        site.step()
        site.close()
        site.open()
    ended = carry_out_running(site, replay)
    assert ended.counts == {"done": 30}
    assert len([one for one in site.jobs() if one in targets(site, replay)["rerun"]]) == 30


def carry_out_running(site: Site, replay: Replay) -> Replay:
    for _ in range(50):
        site.settle()
        site.clock.advance(timedelta(seconds=61))
        if (now := find_replay(site.database, replay.replay_id)).state != "running":
            return now
    raise AssertionError(f"still {now}")


def test_pause_resume_cancel_and_what_cannot_be_said(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.fill(20, 4)
    replay = plan(site, "rerun", limits=Limits(per_minute=100_000, in_flight=3))
    now = site.clock.now()
    with pytest.raises(PermanentError, match="is planned; pause needs it to be running"):
        command(site.database, replay, "pause", by="t", now=now)
    command(site.database, replay, "run", by="t", now=now)
    for _ in range(3):
        site.step()
    command(site.database, replay, "pause", by="t", now=now)
    site.settle()
    held = find_replay(site.database, replay.replay_id)
    assert held.state == "paused"
    assert 0 < held.counts["planned"] < 20
    site.settle()
    assert find_replay(site.database, replay.replay_id).counts["planned"] == held.counts["planned"]
    command(site.database, held, "resume", by="t", now=now)
    site.step()
    command(site.database, held, "cancel", by="t", now=now)
    site.settle()
    ended = find_replay(site.database, replay.replay_id)
    assert ended.state == "cancelled"
    assert ended.counts.get("cancelled", 0) > 0
    with pytest.raises(PermanentError, match="is cancelled"):
        command(site.database, ended, "run", by="t", now=now)


def test_it_stops_itself_above_the_failures_it_was_allowed(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.fill(30, 5)
    site.outcome = lambda _: "failed"
    limits = Limits(per_minute=100_000, in_flight=2, stop_above_percent=50)
    ended = carry_out(site, plan(site, "rerun", limits=limits))
    assert ended.state == "stopped"
    assert "items failed; more than 50 %" in ended.note
    assert ended.counts["planned"] >= 20
    site.outcome = lambda _: "succeeded"


def test_it_keeps_to_its_rate_and_its_budget(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for number in range(1, 21):
        site.receive(number)
    site.settle()
    replay = plan(site, "rerun", limits=Limits(per_minute=5, in_flight=50))
    command(site.database, replay, "run", by="t", now=site.clock.now())
    for minute in range(1, 4):
        site.settle()
        assert find_replay(site.database, replay.replay_id).counts["done"] == 5 * minute
        site.clock.advance(timedelta(seconds=61))
    site.settle()
    ended = find_replay(site.database, replay.replay_id)
    assert ended.state == "finished"
    second = plan(site, "rerun", limits=Limits(per_minute=1000, in_flight=1, budget_minutes=0))
    assert carry_out(site, second).note == "the budget of 0 job minutes is used up"


@pytest.mark.usefixtures("each_database")
def test_a_plan_that_was_changed_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.fill(5, 6)
    replay = plan(site, "rerun")
    assert is_as_planned(site.database, replay)
    with site.database.transaction() as connection:
        connection.execute(replay_items.update().where(replay_items.c.number == 3).values(destination="pacs"))
    assert not is_as_planned(site.database, replay)
    with pytest.raises(PermanentError, match="plan again"):
        command(site.database, replay, "run", by="t", now=site.clock.now())


def test_work_that_today_s_pipelines_no_longer_ask_for_is_not_done(tmp_path: Path) -> None:
    """The plan was made with one configuration, and is run with another."""
    site = Site(tmp_path)
    site.outcome = lambda _: "requested"
    site.fill(10, 7)
    with site.database.reading() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(replay_items)).scalar() == 0
    replay = plan(site)
    wanted = targets(site, replay).get("request", set())
    assert wanted
    site.close()
    site.config.write_text(site.config.read_text().replace("id: chest-ct", "id: other").replace(
        "pipeline-chest: chest-ct", "pipeline-chest: other"))  # fmt: skip
    site.open()
    ended = carry_out(site, replay)
    assert ended.counts["failed"] == len(wanted)
    notes = {one["note"] for one in read_items(site.database, replay.replay_id, states=["failed"])}
    assert len(notes) == 1
    assert "pipelines that are not configured" in notes.pop()


def test_decide_says_what_would_differ_and_does_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for number in range(1, 4):
        site.receive(number)
    site.settle()
    same = plan(site, "decide")
    assert {one["reason"] for one in read_items(site.database, same.replay_id)} == {"would be decided as it was"}
    site.close()
    other_key = "groupBy: 0020,000E\n      pipeline-chest: chest-ct"
    site.config.write_text(site.config.read_text().replace("pipeline-chest: chest-ct", other_key))
    site.open()
    before = site.jobs()
    other = plan(site, "decide")
    (reason,) = {one["reason"] for one in read_items(site.database, other.replay_id)}
    assert "1 of 1 instances would not be in this group" in reason
    assert carry_out(site, other).state == "finished"
    assert site.jobs() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [("modality +", "Syntax error"), ("nosuch == 1", "undeclared reference to 'nosuch'"), ("modality > 3", "overload"),
     ("instances", "not true or false"), ("a" * 5000, "longer than")],
)  # fmt: skip
def test_a_wrong_expression_is_shown_where_it_is_wrong(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Expression(text)


@pytest.mark.usefixtures("each_database")
def test_selections(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.receive(1, **{"00080060": "MR", "00080020": "20261001"})
    site.receive(2, **{"00080050": "B77"})
    site.receive(3)
    site.settle()

    def chosen(where: str = "", statuses: tuple[str, ...] = (), **studies: Any) -> set[str]:
        selection = Selection(studies=StudyFilter(**studies), where=where, statuses=statuses)
        replay = plan(site, "rerun", selection=selection)
        return {one["study_uid"] for one in read_items(site.database, replay.replay_id)}

    assert chosen() == {"1.2.1", "1.2.2", "1.2.3"}
    assert chosen(modalities=("MR",)) == {"1.2.1"}
    assert chosen(study_date_to="20261015") == {"1.2.1"}
    assert chosen(study_date_from="20261015") == {"1.2.2", "1.2.3"}
    assert chosen(accession_numbers=("B77",)) == {"1.2.2"}
    assert chosen(study_uids=("1.2.3",)) == {"1.2.3"}
    assert chosen(ae_titles=("NOBODY",)) == set()
    assert chosen(ae_titles=("CT1",)) == {"1.2.1", "1.2.2", "1.2.3"}
    assert chosen("modality == 'CT' && accession_number.startsWith('B')") == {"1.2.2"}
    assert chosen("status == 'Verified'") == {"1.2.1", "1.2.2", "1.2.3"}
    assert chosen(statuses=("Failed",)) == set()
    assert chosen("received > timestamp('2100-01-01T00:00:00Z')") == set()
    assert chosen("'by-tag' in rules && instances < 2") == {"1.2.1", "1.2.2", "1.2.3"}


@pytest.mark.usefixtures("each_database")
def test_retention_waits_for_what_is_planned_and_a_plan_says_what_is_gone(tmp_path: Path) -> None:
    """From the sender to the removal. Bites: let go what a plan is about; plan jobs on instances that are gone."""
    site = Site(tmp_path)
    for number in range(1, 4):
        site.receive(number)
    site.settle()
    site.outcome = lambda _: "failed"
    site.receive(4)
    site.settle()
    site.outcome = lambda _: "succeeded"
    failed = plan(site, "failed", selection=Selection(statuses=("Failed",)))

    def kept() -> dict[str, int]:
        site.settle()
        remover = Remover(site.database, site.app.store, site.clock, Policy())
        for _ in range(8):
            site.clock.advance(timedelta(days=1))
            while remover.step(site.clock.now()):
                pass
        return {one.study_uid: one.received - one.removed for one in list_studies(site.database)}

    def held() -> set[str]:
        return {one.reason for one in removal_plan.plan(site.database, Policy(), site.clock.now()).held}

    assert sorted(kept().values()) == [0, 0, 0, 1]
    assert held() == {f"replay {failed.replay_id} is about it"}
    assert carry_out(site, failed).counts == {"done": 1}
    assert set(kept().values()) == {0}
    rerun = plan(site, "rerun")
    assert rerun.items == 0
    assert {one["reason"] for one in read_items(site.database, rerun.replay_id)} == {
        "its instances were removed by retention"
    }
    sent = carry_out(site, plan(site, "send", destinations=("archive",)))
    assert sent.counts == {"done": 4}, "results are not what was received"
    assert "Removed" in {line.state for line in read_story(site.database, "1.2.1")}
    assert state_of(read_story(site.database, "1.2.1")) == "Verified"
    site.close()
