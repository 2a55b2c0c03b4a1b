"""Received instances are kept until they need not be, then they go whole: rows, counts, events, bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from support.processes import clarion
from support.receiving import PER_SEGMENT, SIZE, Receiving

from clarion import crashpoints, events
from clarion.adapters.outbox import events_table
from clarion.digests import digest_of
from clarion.errors import ConfigError, MissingObjectError, StoreUnavailableError
from clarion.model import ObjectRef
from clarion.testing.suites import MOMENT
from gateway import groups, tables
from gateway.groups import REMOVED
from gateway.holds import hold
from gateway.jobs import GroupJobs
from gateway.queries import list_studies
from gateway.removal_plan import plan, release
from gateway.retention import Policy
from gateway.strays import find_strays

# Where the statements matter, on either database.
on_both = pytest.mark.usefixtures("each_database")
LARGE = 1_500_000
WEEK, DAY, MINUTE = timedelta(days=7), timedelta(days=1), timedelta(minutes=1)
NOWHERE = ObjectRef(location="memory:0", digest="0", size_bytes=0)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Receiving:
    return Receiving(tmp_path, monkeypatch)


def files(rig: Receiving) -> list[str]:
    """The files that receipts have of their own."""
    return sorted(one.name for one in (rig.root / "objects" / "received").rglob("*") if one.is_file())


def rows(rig: Receiving, table: sa.Table) -> list[Any]:
    with rig.database.reading() as connection:
        return list(connection.execute(sa.select(table)).all())


def close(rig: Receiving) -> str:
    """Let the groups close; give the id of the last."""
    rig.settle()
    rig.clock.advance(MINUTE)
    rig.settle()
    found = rows(rig, tables.groups)
    assert {one.state for one in found} <= {"closed", REMOVED}
    return str(max(found, key=lambda one: one.epoch).group_id)


def request(group_id: str, job_id: str = "j", *, pipeline: str = "p", revision: int = 1) -> events.JobRequested:
    return events.JobRequested(
        subject=job_id, sequence=1, time=MOMENT, source="streams", name="n", pipeline_id=pipeline, definition=NOWHERE,
        group_id=group_id, revision=revision, manifest=NOWHERE, priority="normal", destinations=(), studies=("1.2.9",),
    )  # fmt: skip


def ended(rig: Receiving, job_id: str = "j") -> events.JobSucceeded:
    return events.JobSucceeded(
        subject=job_id, sequence=3, time=rig.clock.now(), source="orchestrator", attempt=1, results=1
    )


def failed(rig: Receiving, job_id: str = "j") -> events.JobFailed:
    return events.JobFailed(
        subject=job_id, sequence=3, time=rig.clock.now(), source="orchestrator", attempt=1, cause="operator",
        operator="o", reason="why",
    )  # fmt: skip


def stopped(rig: Receiving, state: str) -> events.ReplayFinished:
    return events.ReplayFinished(
        subject="r", sequence=2, time=rig.clock.now(), source="streams", state=state, plan_digest="d", done=1, failed=0,
        left=0, reason="",
    )  # fmt: skip


def say(rig: Receiving, *said: events.Event) -> None:
    """Tell the gateway of jobs; each twice, as a bus may."""
    for event in said:
        for _ in range(2):
            assert list(GroupJobs(rig.database).handle(event)) == []


def days_go_by(rig: Receiving, days: float) -> None:
    """The owner looks once a day, and has nothing else to do."""
    until, owner = rig.clock.now() + timedelta(days=days), rig.owner()
    while rig.clock.now() < until:
        rig.clock.advance(min(timedelta(days=1), until - rig.clock.now()))
        for _ in range(100):
            if not owner.step():
                break
        else:
            raise AssertionError("it never came to rest")


@on_both
def test_a_week_after_its_job_a_group_goes_whole(rig: Receiving) -> None:
    """Bites: count from the closing of the group; leave its bytes, or what it counts for in its study."""
    for number in range(3 * PER_SEGMENT):
        rig.receive(f"1.2.{number}")
    rig.receive("1.2.100", LARGE)
    group_id = close(rig)
    say(rig, request(group_id))
    days_go_by(rig, 2)
    say(rig, ended(rig))
    days_go_by(rig, 6.9)
    rig.judge()
    before = list_studies(rig.database)[0]
    assert (before.received, before.grouped, before.removed) == (31, 31, 0)
    (due,) = plan(rig.database, Policy(), rig.clock.now() + DAY).groups
    assert (due.instances, due.group_id) == (31, group_id)
    days_go_by(rig, 0.2)
    assert rows(rig, tables.instances) == rows(rig, tables.members) == rows(rig, tables.unwanted) == []
    assert files(rig) == []
    assert len(rig.freed()) >= 2, "the segments that it lay in can be written over"
    assert [one.state for one in rows(rig, tables.groups)] == [REMOVED]
    after = list_studies(rig.database)[0]
    assert (after.received, after.grouped, after.removed) == (31, 31, 31)
    assert after.last_received == before.last_received
    said = [one for one in rows(rig, events_table) if one.kind == "instance.removed.v1"]
    assert len(said) == 1
    gone = json.loads(said[0].body)["size_bytes"]
    assert gone == due.size_bytes == sum(map(len, rig.wanted.values())), "what was planned is what went"


@pytest.mark.parametrize(
    ("told", "held_by"),
    [
        (lambda _, __: (), "has not been requested"),
        (lambda rig, group: (request(group, revision=9), ended(rig)), "has not been requested"),
        (lambda _, group: (request(group, pipeline="else"), request(group, "k", pipeline="else")), "has not ended"),
        (lambda _, group: (request(group),), "has not ended"),
        (lambda rig, group: (request(group), failed(rig)), "failed"),
        (lambda rig, group: (failed(rig), request(group)), "failed"),
        (
            lambda rig, group: (
                request(group),
                failed(rig),
                events.JobRetried(subject="j", sequence=4, time=MOMENT, source="orchestrator", replay="r"),
            ),
            "has not ended",
        ),
    ],
)  # fmt: skip
def test_nothing_goes_because_something_failed(
    rig: Receiving, told: Callable[[Receiving, str], tuple[events.Event, ...]], held_by: str
) -> None:
    """Bites: take a job that nobody has asked for yet, that runs or that failed for one that has ended."""
    rig.receive("1.2.1")
    group_id = close(rig)
    say(rig, *told(rig, group_id))
    days_go_by(rig, 40)
    rig.judge()
    found = plan(rig.database, Policy(), rig.clock.now() + timedelta(days=400))
    assert found.groups == ()
    (held,) = found.held
    assert held_by in held.reason
    say(rig, request(group_id), ended(rig), ended(rig, "k"))
    days_go_by(rig, 7.5)
    assert rows(rig, tables.instances) == []


@on_both
def test_a_person_lets_a_group_go_whose_job_failed(rig: Receiving) -> None:
    rig.receive("1.2.1")
    group_id = close(rig)
    say(rig, request(group_id))
    with pytest.raises(ConfigError, match="has not ended"):
        release(rig.database, group_id, Policy(), by="me", reason="why", now=rig.clock.now())
    say(rig, failed(rig))
    days_go_by(rig, 8)
    rig.judge()
    with pytest.raises(ConfigError, match="no group"):
        release(rig.database, "nobody", Policy(), by="me", reason="why", now=rig.clock.now())
    with pytest.raises(ConfigError, match="say why"):
        release(rig.database, group_id, Policy(), by="me", reason=" ", now=rig.clock.now())
    for already in (False, True):
        done = release(rig.database, group_id, Policy(), by="me", reason="why", now=rig.clock.now())
        assert (done.already, done.released) == (already, "me: why")
    assert len([one for one in rows(rig, events_table) if one.kind == "group.released.v1"]) == 1
    (due,) = plan(rig.database, Policy(), rig.clock.now()).groups
    assert due.reason == "released by me: why"
    days_go_by(rig, 0.1)
    assert rows(rig, tables.instances) == []


def test_a_group_whose_rule_failed_until_it_was_given_up_is_held(
    rig: Receiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bites: take it for one that its rule discarded."""
    rig.receive("1.2.1")
    rig.settle()

    def fails(*_: object) -> None:
        raise ValueError

    with monkeypatch.context() as patch:
        patch.setattr("rules.by_tag.ByTag.is_complete", fails)
        days_go_by(rig, 9)
    assert [one.state for one in rows(rig, tables.groups)] == ["discarded"]
    days_go_by(rig, 30)
    rig.judge()
    (held,) = plan(rig.database, Policy(), rig.clock.now()).held
    assert held.reason == "it was given up: rule-failed for 7 days"
    release(rig.database, held.group_id, Policy(), by="me", reason="why", now=rig.clock.now())
    days_go_by(rig, 0.5)
    assert rows(rig, tables.instances) == []


def test_a_site_may_let_what_failed_go_by_itself(rig: Receiving) -> None:
    rig.policy = Policy(failed=timedelta(days=30))
    rig.receive("1.2.1")
    say(rig, request(close(rig)), failed(rig))
    days_go_by(rig, 29)
    rig.judge()
    days_go_by(rig, 2)
    assert rows(rig, tables.instances) == []


@on_both
def test_an_instance_that_is_in_another_group_as_well_stays_for_that(rig: Receiving) -> None:
    """Bites: look at one group alone."""
    rig.receive("1.2.1")
    rig.receive("1.2.2")
    first = close(rig)
    say(rig, request(first), ended(rig))
    days_go_by(rig, 3)
    rig.receive("1.2.1", called_ae="OTHER")
    rig.settle()
    rig.clock.advance(MINUTE)
    rig.settle()
    days_go_by(rig, 5)
    assert [one.sop_instance_uid for one in rows(rig, tables.instances)] == ["1.2.1"]
    del rig.wanted["1.2.2"]
    rig.judge()
    (second,) = [one.group_id for one in rows(rig, tables.groups) if one.called_ae == "OTHER"]
    say(rig, request(second, "k", pipeline="q"), ended(rig, "k"))
    days_go_by(rig, 8)
    assert rows(rig, tables.instances) == []


def test_what_comes_again_after_its_removal_is_new(rig: Receiving) -> None:
    """Bites: put it into the group that has been emptied, and no job ever sees it."""
    data = rig.receive("1.2.1", LARGE)
    first = close(rig)
    say(rig, request(first), ended(rig))
    days_go_by(rig, 8)
    assert files(rig) == []
    rig.receive("1.2.1", LARGE)
    second = close(rig)
    assert first != second
    rig.judge()
    (row,) = rows(rig, tables.instances)
    assert rig.store.read(ObjectRef(**row.object)) == data
    study = list_studies(rig.database)[0]
    assert (study.received, study.removed) == (2, 1)


def test_received_again_while_it_is_removed_nothing_is_lost(rig: Receiving) -> None:
    """Bites: name the file of a large instance by its digest: what was acknowledged a moment ago goes with the old."""
    data = rig.receive("1.2.1", LARGE)
    say(rig, request(close(rig)), ended(rig))
    days_go_by(rig, 6.9)
    owner = rig.owner()
    rig.clock.advance(DAY / 2)
    while rows(rig, tables.instances):
        assert owner.step()
    assert rows(rig, tables.unwanted), "its row is gone, its bytes are not"
    rig.receive("1.2.1", LARGE)
    assert len(files(rig)) == 2
    rig.settle()
    assert len(files(rig)) == 1
    (row,) = rows(rig, tables.instances)
    assert rig.store.read(ObjectRef(**row.object)) == data


@on_both
def test_the_file_of_a_duplicate_goes_at_once_and_repairs_the_first_if_need_be(rig: Receiving) -> None:
    """Bites: keep both; throw the second away unseen."""
    data = rig.receive("1.2.1", LARGE)
    rig.settle()
    (first,) = files(rig)
    rig.receive("1.2.1", LARGE)
    rig.settle()
    assert files(rig) == [first]
    (path,) = [one for one in (rig.root / "objects" / "received").rglob("*") if one.is_file()]
    path.write_bytes(data[:-1] + b"\xff")
    with pytest.raises(MissingObjectError):
        rig.judge()
    rig.receive("1.2.1", LARGE)
    rig.settle()
    rig.judge()
    assert files(rig) == [first]


@on_both
def test_what_no_rule_takes_and_what_is_set_aside_have_their_own_time(rig: Receiving) -> None:
    rig.receive("1.2.1", called_ae="NOBODY")
    rig.receive("1.2.2", LARGE, kind="quarantined")
    rig.settle()
    (ignored,) = rows(rig, tables.instances)
    assert ignored.state == "ignored"
    assert plan(rig.database, Policy(), rig.clock.now() + timedelta(days=6)).loose == ()
    loose = plan(rig.database, Policy(), rig.clock.now() + timedelta(days=91), now=rig.clock.now()).loose
    assert [(one.reason, one.instances) for one in loose] == [("ignored-retention", 1), ("quarantine-retention", 1)]
    days_go_by(rig, 6.9)
    assert len(rows(rig, tables.instances)) == 1
    days_go_by(rig, 1)
    assert rows(rig, tables.instances) == []
    days_go_by(rig, 81)
    assert len(files(rig)) == len(rows(rig, tables.quarantine)) == 1
    days_go_by(rig, 3)
    assert files(rig) == rows(rig, tables.quarantine) == []
    study = list_studies(rig.database)[0]
    assert (study.received, study.ignored, study.quarantined, study.removed) == (2, 1, 1, 2)


@on_both
def test_what_conflicts_is_kept_when_its_group_goes(rig: Receiving) -> None:
    rig.receive("1.2.1")
    rig.receive("1.2.2")
    rig.receive("1.2.1", SIZE + 2)
    say(rig, request(close(rig)), ended(rig))
    days_go_by(rig, 9)
    assert sorted(one.sop_instance_uid for one in rows(rig, tables.instances)) == ["1.2.1", "1.2.1"]
    assert rows(rig, tables.members) == []
    days_go_by(rig, 80)
    assert len(rows(rig, tables.instances)) == 2
    days_go_by(rig, 3)
    assert rows(rig, tables.instances) == []
    study = list_studies(rig.database)[0]
    assert (study.received, study.grouped, study.removed) == (3, 3, 3)


@on_both
def test_a_large_group_goes_in_pieces_also_while_records_never_cease(
    rig: Receiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bites: remove only when there is nothing else to do."""
    monkeypatch.setattr("gateway.removal._ROWS", 7)
    monkeypatch.setattr("gateway.grouping._TIDY_S", 0.0)
    for number in range(40):
        rig.receive(f"1.2.{number}")
    say(rig, request(close(rig)), ended(rig))
    days_go_by(rig, 6.9)
    rig.clock.advance(DAY / 2)
    owner, steps = rig.owner(), 0
    while any(one.sop_instance_uid.startswith("1.2.") for one in rows(rig, tables.instances)):
        rig.receive(f"1.3.{steps}")
        owner.step()
        steps += 1
        assert steps < 100
    assert steps > 40 // 7
    rig.settle()
    rig.wanted = {uid: data for uid, data in rig.wanted.items() if uid.startswith("1.3.")}
    rig.judge()


def test_a_group_of_an_older_version_is_held_until_its_event_was_read(rig: Receiving) -> None:
    """Bites: take what is not known for none."""
    rig.receive("1.2.1")
    group_id = close(rig)
    with rig.database.transaction() as connection:
        connection.execute(tables.revisions.update().values(pipelines=None))
    days_go_by(rig, 9)
    rig.judge()
    with rig.database.reading() as connection:
        studies = groups.studies_of(connection, group_id)
    closed = events.GroupClosed(
        subject=group_id, sequence=2, time=MOMENT, source="gateway", rule="by-tag", called_ae="B", revision=1,
        instances=1, manifest=NOWHERE, reason="", triggers=(), studies=studies,
    )  # fmt: skip
    say(rig, closed)
    days_go_by(rig, 0.5)
    assert rows(rig, tables.instances) == []


POINTS = [
    f"{side}:{name}{count}"
    for name in ("retention.groups", "retention.group", "retention.old", "store.remove", "retention.dropped")
    for side in ("before", "after")
    for count in ("", "#2")
    if not (count and name == "retention.groups")
]


def test_a_replay_keeps_what_its_plan_is_about_until_it_has_ended(rig: Receiving) -> None:
    """Bites: let go when it is stopped, or at once when it ends; hold what is being removed."""
    rig.receive("1.2.1")
    group_id = close(rig)
    say(rig, request(group_id), ended(rig))
    assert hold(rig.database, "r", [group_id]) == set()
    days_go_by(rig, 20)
    for state, days in (("stopped", 5.0), ("finished", 0.9)):
        say(rig, stopped(rig, state))
        days_go_by(rig, days)
        (held,) = plan(rig.database, Policy(), rig.clock.now()).held
        assert held.reason == "replay r is about it"
    rig.judge()
    days_go_by(rig, 1)
    assert rows(rig, tables.instances) == []
    assert hold(rig.database, "s", [group_id]) == {group_id}, "too late"
    assert plan(rig.database, Policy(), rig.clock.now()).held == ()


def test_a_release_is_of_what_it_was_given_for(rig: Receiving) -> None:
    """Bites: keep it when a late instance makes another revision, whose job fails too."""
    rig.receive("1.2.1")
    group_id = close(rig)
    say(rig, request(group_id), failed(rig))
    release(rig.database, group_id, Policy(), by="me", reason="why", now=rig.clock.now())
    hold(rig.database, "r", [group_id])
    (held,) = plan(rig.database, Policy(), rig.clock.now()).held
    assert "replay" in held.reason, "it answers for what failed alone"
    say(rig, stopped(rig, "cancelled"))
    rig.receive("1.2.2")
    assert close(rig) == group_id
    days_go_by(rig, 20)
    rig.judge()
    (held,) = plan(rig.database, Policy(), rig.clock.now()).held
    assert "revision 2" in held.reason


@on_both
def test_the_plan_is_what_goes_also_of_what_groups_share(rig: Receiving) -> None:
    """Bites: count what is in two groups that go with neither, or with both."""
    for number in range(4):
        rig.receive(f"1.2.{number}")
        rig.receive(f"1.2.{number}", called_ae="OTHER")
    rig.receive("1.2.9", called_ae="OTHER")
    rig.receive("1.2.8", SIZE + 2)
    rig.receive("1.2.8", called_ae="OTHER")
    close(rig)
    for one in rows(rig, tables.groups):
        pipeline = "p" if one.called_ae == "B" else "q"
        say(rig, request(one.group_id, f"j{pipeline}", pipeline=pipeline), ended(rig, f"j{pipeline}"))
    days_go_by(rig, 6.5)
    now = rig.clock.now()
    soon, later = (plan(rig.database, Policy(), now + one, now=now) for one in (DAY, timedelta(days=100)))
    assert sum(one.instances for one in soon.groups) == 5
    assert [(one.reason, one.instances) for one in later.loose] == [("conflict-retention", 2)]
    days_go_by(rig, 1)
    said = [json.loads(one.body) for one in rows(rig, events_table) if one.kind == "instance.removed.v1"]
    assert sum(one["instances"] for one in said) == 5
    assert sum(one["size_bytes"] for one in said) == sum(one.size_bytes for one in soon.groups)


def test_nothing_leaves_quarantine_that_was_not_announced_a_week_before(
    rig: Receiving, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after an upgrade, or when the time was made shorter. Bites: remove first and say so afterwards."""
    rig.policy = Policy(quarantined=timedelta(days=1000))
    rig.receive("1.2.1", kind="quarantined")
    rig.settle()
    days_go_by(rig, 100)
    assert "quarantine.expiring" not in capsys.readouterr().out
    rig.policy = Policy()
    days_go_by(rig, 6)
    assert len(rows(rig, tables.quarantine)) == 1
    assert "quarantine.expiring" in capsys.readouterr().out
    days_go_by(rig, 3)
    assert rows(rig, tables.quarantine) == []


def test_a_clock_that_jumps_is_not_believed_for_a_day(rig: Receiving) -> None:
    """Bites: remove by whatever the clock says; everything goes when its battery is flat."""
    rig.receive("1.2.1")
    say(rig, request(close(rig)), ended(rig))
    days_go_by(rig, 1)
    right = rig.clock.now()
    rig.clock.advance(timedelta(days=10_000))
    rig.settle()
    rig.clock.advance(timedelta(hours=20))
    rig.settle()
    rig.judge()
    rig.clock.advance(right - rig.clock.now())
    days_go_by(rig, 5.5)
    rig.judge()
    days_go_by(rig, 2)
    assert rows(rig, tables.instances) == []


def test_what_comes_again_is_kept_from_then(rig: Receiving) -> None:
    """Bites: acknowledge an instance, and remove it a moment later because it had come before."""
    rig.receive("1.2.1", called_ae="NOBODY")
    rig.receive("1.2.2", kind="quarantined")
    rig.settle()
    days_go_by(rig, 6.5)
    rig.receive("1.2.1", called_ae="NOBODY")
    rig.settle()
    days_go_by(rig, 6.5)
    assert len(rows(rig, tables.instances)) == 1
    days_go_by(rig, 76)
    assert len(rows(rig, tables.instances)) == 0
    rig.receive("1.2.2", kind="quarantined")
    rig.settle()
    days_go_by(rig, 85)
    assert len(rows(rig, tables.quarantine)) == 1


def test_a_file_that_cannot_be_removed_keeps_nothing_else_from_going(
    rig: Receiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bites: begin with it again at every step; neither retention nor compaction would come to anything else."""
    for number in range(3):
        rig.receive(f"1.2.{number}", LARGE)
    rig.settle()
    stuck = files(rig)[0]
    say(rig, request(close(rig)), ended(rig))
    days_go_by(rig, 6.9)
    unlink = Path.unlink

    def refuse(path: Path, **how: bool) -> None:
        if path.name == stuck:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        days_go_by(rig, 1)
        assert files(rig) == [stuck]
        assert len(rows(rig, tables.unwanted)) == 1
    rig.settle()
    assert files(rig) == []


def test_a_duplicate_that_cannot_be_read_keeps_nothing_else_from_going(rig: Receiving) -> None:
    rig.receive("1.2.1", LARGE)
    rig.settle()
    rig.receive("1.2.1", LARGE)
    for path in (rig.root / "objects" / "received").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    rig.settle()
    assert rows(rig, tables.unwanted) == []


def test_files_that_nothing_refers_to_are_found_and_no_others(rig: Receiving) -> None:
    """Bites: take what the owner has not read yet, or what was restored from a segment, for nobody's."""
    for number in range(2 * PER_SEGMENT):
        rig.receive(f"1.2.{number}")
    for _ in range(3):
        rig.receive("1.2.0")
        for number in range(PER_SEGMENT - 1):
            rig.receive(f"1.2.{number}")
    rig.receive("1.3.1", LARGE)
    rig.receive("1.3.2", LARGE, kind="quarantined")
    rig.settle()
    with rig.database.reading() as connection:
        first = connection.execute(sa.select(tables.instances.c.object)).scalars().first()
    rig.store.restore(ObjectRef(**first), rig.store.read(ObjectRef(**first)))
    rig.receive("1.3.3", LARGE)  # not read yet
    lost = rig.store.receive()
    lost.write(b"x" * 100)
    lost.keep(digest_of(b"x" * 100))
    lost.abandon()
    there = files(rig)
    assert any("-" in one for one in there), "some were restored"
    assert find_strays(rig.database, rig.store, rig.root / "journal") == [], "they are young"
    (found,) = find_strays(rig.database, rig.store, rig.root / "journal", older_than_s=-60)
    assert found.size_bytes == 100
    rig.store.remove_files([found.path])
    assert files(rig) == [one for one in there if one != found.path.name]
    rig.settle()
    rig.wanted.pop("1.3.2")
    rig.judge()


def test_what_a_person_is_told(rig: Receiving) -> None:
    """The commands as they are typed, of what happened in November 2026; today all of it is due."""
    rig.receive("1.2.1")
    group_id = close(rig)
    say(rig, request(group_id), failed(rig))
    rig.receive("1.2.2", kind="quarantined")
    rig.settle()
    config = rig.root / "clarion.yaml"
    config.write_text(f"data: {rig.root}\n")
    nothing = clarion("cleanup", "plan", "-c", config)
    assert (nothing.returncode, "nothing has run" in nothing.stderr) == (2, True)
    (rig.root / "run").mkdir()
    told = clarion("cleanup", "plan", "-c", config, "--days", 36000)
    assert "held: 1 groups, 1 instances" in told.stdout
    assert f"{group_id[:8]}  B " in told.stdout
    assert "job j of pipeline p failed" in told.stdout
    assert "1 instances, 2.1 kB: in quarantine" in told.stdout
    assert "release" in told.stderr
    for words, said in (
        (("release", "zzz", "--reason", "x"), "no group"),
        (("release", group_id[:6], "--reason", " "), "say why"),
        (("release", group_id[:6]), "--reason"),
    ):
        refused = clarion("cleanup", *words, "-c", config)
        assert refused.returncode == 2
        assert said in refused.stderr
    done = json.loads(clarion("cleanup", "release", group_id[:6], "--reason", "x", "-c", config, "--json").stdout)
    assert (done["group_id"], done["already"]) == (group_id, False)
    assert done["due"] == (rig.clock.now() + WEEK).isoformat()
    plan_ = json.loads(clarion("cleanup", "plan", "-c", config, "--days", 36000, "--json").stdout)
    assert [one["group_id"] for one in plan_["groups"]] == [group_id]
    assert plan_["held"] == plan_["waiting"] == []


def test_the_last_copy_is_kept_that_the_disk_cannot_read_now(rig: Receiving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bites: throw the duplicate away though the first copy is damaged, for it could not be read for a moment."""
    data = rig.receive("1.2.1", LARGE)
    rig.settle()
    (first,) = [one for one in (rig.root / "objects" / "received").rglob("*") if one.is_file()]
    rig.receive("1.2.1", LARGE)
    first.write_bytes(b"damaged")

    def unavailable(*_: object) -> bytes:
        raise StoreUnavailableError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("clarion.adapters.objects.FileStore.read", unavailable)
        rig.settle()
    assert len(rows(rig, tables.unwanted)) == 1
    rig.settle()
    assert rows(rig, tables.unwanted) == []
    assert first.read_bytes() == data
    rig.judge()


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_step_it_is_finished_by_the_next(
    rig: Receiving, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bites: remove the bytes and then the row; count in a transaction of its own."""
    monkeypatch.setattr("gateway.removal._ROWS", 4)
    for number in range(6):
        rig.receive(f"1.2.{number}", LARGE if number % 3 == 0 else SIZE)
        rig.receive(f"1.3.{number}", called_ae="NOBODY")
    say(rig, request(close(rig)), ended(rig))
    rig.receive("1.4.1", LARGE, called_ae="OTHER")
    rig.settle()
    days_go_by(rig, 6.9)
    rig.clock.advance(DAY / 2)
    rig.receive("1.4.1", LARGE, called_ae="OTHER")
    rig.database.close()
    pid = os.fork()
    if pid == 0:
        crashpoints.arm(point)
        rig.settle()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the point was not reached"
    rig.settle()
    rig.wanted = {"1.4.1": rig.wanted["1.4.1"]}
    rig.judge()
    assert len(files(rig)) == 1
    assert rows(rig, tables.unwanted) == []
    study = list_studies(rig.database)[0]
    assert (study.received, study.removed, study.grouped, study.ignored) == (13, 12, 7, 6)
    said = [one for one in rows(rig, events_table) if one.kind == "instance.removed.v1"]
    assert len(said) == len({one.sequence for one in said}) == 4
