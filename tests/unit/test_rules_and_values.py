"""Pure decisions: identifiers, the rule, statuses, names, back-off, states."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from clarion.errors import BusUnavailableError, InvalidInstanceError, PermanentError, StoreUnavailableError
from clarion.events import GroupClosed, JobRequested, ResultRegistered
from clarion.model import (
    Action,
    Group,
    GroupId,
    Instance,
    ObjectRef,
    SeriesUid,
    SopInstanceUid,
    StudyUid,
    Trigger,
    derive_group_id,
    derive_job_id,
    derive_uid,
    is_uid,
)
from clarion.patience import Patience
from gateway.outbound import backoff
from gateway.statuses import NO_ANSWER, Outcome, classify
from rules.by_tag import ByTag
from streams.match import Match, ResolvedPipeline, job_name
from streams.queries import Line, state_of
from streams.route import Route

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
REF = ObjectRef(location="memory:1", digest="1" * 64, size_bytes=1)


def instance(**attributes: str) -> Instance:
    return Instance(
        sop_instance_uid=SopInstanceUid("1.2.3"),
        digest="d",
        study_uid=StudyUid("1.2"),
        series_uid=SeriesUid("1.2.1"),
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        calling_ae="A",
        called_ae="B",
        received=NOW,
        object=REF,
        attributes=attributes,
    )


def rule(**settings: Any) -> ByTag:
    return ByTag(ByTag.Config.model_validate({"pipeline-ct": "chest-ct", **settings}))


def group(**changes: Any) -> Group:
    values: dict[str, Any] = {
        "group_id": GroupId("g"),
        "called_ae": "B",
        "rule": "by-tag",
        "key": "k",
        "epoch": 0,
        "revision": 1,
        "opened": NOW,
        "last_received": NOW,
        "instances": (),
    }
    return Group(**{**values, **changes})


@pytest.mark.parametrize(
    ("text", "good"), [("1.2.3", True), ("1", True), ("", False), ("1..2", False), ("../1", False), ("1.2\n", False),
                       ("1" * 65, False), ("1.2.a", False)]
)  # fmt: skip
def test_uid(text: str, good: bool) -> None:  # noqa: FBT001
    assert is_uid(text) is good


def test_identifiers_depend_on_every_part() -> None:
    parts = ("chest-ct", "digest", "group", 1, 0)
    same = derive_job_id(*parts)
    assert derive_job_id(*parts) == same
    for place, other in enumerate(("x", "y", "z", 2, 1)):
        changed = (*parts[:place], other, *parts[place + 1 :])
        assert derive_job_id(*changed) != same  # type: ignore[arg-type]
    assert derive_group_id("A", "r", "k", 0) != derive_group_id("A", "r", "k", 1)
    assert is_uid(derive_uid("a", 1))


def test_identifiers_are_fixed_for_ever() -> None:
    """Bites: change NAMESPACE or the order of parts, and results delivered before have other UIDs afterwards."""
    assert derive_group_id("CHEST", "by-tag", "1.2.3", 0) == "cbb6f5c1-6348-5b79-a4b7-129ebee6350f"


def test_rule_groups_by_the_trimmed_value() -> None:
    assert rule().group_of(instance(**{"0020000D": " 1.2 "})) == "1.2"
    assert rule(groupBy="0010,0020").group_of(instance(**{"00100020": "P1"})) == "P1"
    assert rule(groupBy="PatientID").group_of(instance(**{"00100020": "P1"})) == "P1"


@pytest.mark.parametrize("attributes", [{}, {"0020000D": ""}, {"0020000D": "   "}])
def test_rule_quarantines_without_a_value(attributes: dict[str, str]) -> None:
    with pytest.raises(InvalidInstanceError) as caught:
        rule().group_of(instance(**attributes))
    assert caught.value.reason == "group-key-missing"


def test_rule_closes_only_after_longer_than_the_quiet_period() -> None:
    """Bites: `>=` instead of `>` closes at exactly the timeout."""
    by_tag = rule(timeout=7)
    assert by_tag.is_complete(group(), NOW + timedelta(seconds=7)).action is Action.WAIT
    assert by_tag.is_complete(group(), NOW + timedelta(seconds=7, microseconds=1)).action is Action.CLOSE


def test_rule_closes_at_its_deadline_though_instances_keep_coming() -> None:
    late = NOW + timedelta(seconds=61)
    assert rule(deadline=60).is_complete(group(last_received=late), late).action is Action.CLOSE


def test_rule_settings() -> None:
    assert ByTag.Config.model_validate({"pipeline-a": "x", "timeout": "1"}).timeout == 5
    assert ByTag.Config.model_validate({"PIPELINE-a": "x", "priority": "HIGHER"}).priority == "higher"
    for wrong in (
        {"pipeline-a": "x", "timeout": -1},
        {},
        {"pipeline-a": "x", "grupBy": "1"},
        {"pipeline-a": "x", "groupBy": "no"},
    ):
        with pytest.raises(ValidationError):
            ByTag.Config.model_validate(wrong)


def test_rule_triggers_each_pipeline_and_none_for_an_attached_revision() -> None:
    by_tag = rule(**{"pipeline-b": "other"})
    assert [one.pipeline_id for one in by_tag.triggers(group())] == ["other", "chest-ct"]
    assert rule(late="attach").triggers(group(revision=2)) == []


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(0, "done"), (0xB000, "done"), (0xB006, "done"), (0xB007, "done"), (0xA700, "again"), (0xA7FF, "again"),
     (0x0110, "again"), (NO_ANSWER, "again"), (0xA900, "never"), (0xC000, "never"), (0xCFFF, "never"),
     (0x0122, "never"), (0x0124, "never"), (0x0213, "again")],
)  # fmt: skip
def test_statuses(status: int, outcome: str) -> None:
    assert classify(status) is Outcome(outcome)


def test_backoff_doubles_and_is_bounded() -> None:
    assert [backoff(n, 180, 3600).total_seconds() for n in (1, 2, 3, 4, 5, 6, 50)] == [
        180,
        360,
        720,
        1440,
        2880,
        3600,
        3600,
    ]


def closed(*triggers: Trigger) -> GroupClosed:
    return GroupClosed(
        subject="g", sequence=2, time=NOW, source="gateway", rule="by-tag", called_ae="Ä E!", revision=1, instances=3,
        manifest=REF, reason="", triggers=triggers, studies=("1.2",),
    )  # fmt: skip


def test_match_gives_one_job_per_trigger_and_the_same_ones_again() -> None:
    pipelines = tuple(ResolvedPipeline(id=name, definition=REF, destinations=("pacs",)) for name in ("one", "two"))
    match = Match(Match.Config(pipelines=pipelines))
    event = closed(Trigger(pipeline_id="one", name="a"), Trigger(pipeline_id="two", name="b"))
    first, second = list(match.handle(event)), list(match.handle(event))
    assert first == second
    assert len({one.event_id for one in first}) == 2
    assert all(isinstance(one, JobRequested) and one.destinations == ("pacs",) for one in first)


def test_match_refuses_all_when_one_pipeline_is_unknown() -> None:
    """All jobs of a group appear or none do."""
    pipelines = (ResolvedPipeline(id="one", definition=REF, destinations=()),)
    match = Match(Match.Config(pipelines=pipelines))
    with pytest.raises(PermanentError, match="two"):
        match.handle(closed(Trigger(pipeline_id="one", name="a"), Trigger(pipeline_id="two", name="b")))


def test_route_gives_each_destination_its_own_delivery() -> None:
    event = ResultRegistered(
        subject="j",
        sequence=3,
        time=NOW,
        source="o",
        result_set=REF,
        set_digest="d",
        instances=4,
        destinations=("a", "b"),
    )
    requested = list(Route().handle(event))
    assert len({one.subject for one in requested}) == 2
    assert requested == list(Route().handle(event))


def test_job_name_is_normalised() -> None:
    assert job_name("Ä E!", "Chest CT", NOW) == "e-chest-ct-20261123120000"
    assert len(job_name("X" * 80, "p", NOW)) <= 63


def line(kind: str, subject: str, state: str, parent: str = "") -> Line:
    return Line(time="", state=state, text="", kind=kind, subject=subject, parent=parent)


def test_study_state_is_the_least_advanced_and_failures_come_first() -> None:
    story = [
        line("group.closed.v1", "g", "Grouped"),
        line("job.requested.v1", "j", "Triggered", "g"),
        line("job.succeeded.v1", "j", "Produced"),
        line("delivery.requested.v1", "d1", "Produced", "j"),
        line("delivery.requested.v1", "d2", "Produced", "j"),
        line("result.verified.v1", "d1", "Verified"),
    ]
    assert state_of(story[:1]) == "Grouped"
    assert state_of(story[:3]) == "Produced"
    assert state_of(story) == "Produced"
    assert state_of([*story, line("result.verified.v1", "d2", "Verified")]) == "Verified"
    assert state_of([*story, line("delivery.failed.v1", "d2", "Failed")]) == "Failed"


def test_a_study_whose_group_goes_on_is_not_done() -> None:
    """Bites: once a job cites its group, hide what the group says later, and late instances are Verified unseen."""
    done = [
        line("group.closed.v1", "g", "Grouped"),
        line("job.requested.v1", "j", "Triggered", "g"),
        line("delivery.requested.v1", "d", "Produced", "j"),
        line("result.verified.v1", "d", "Verified"),
    ]
    late = [*done, line("group.revised.v1", "g", "Received")]
    assert (state_of(done), state_of(late)) == ("Verified", "Received")
    assert state_of([*late, line("group.blocked.v1", "g", "Failed")]) == "Failed"
    closed = [*late, line("group.closed.v1", "g", "Grouped")]
    assert state_of(closed) == "Grouped"
    again = [*closed, line("job.requested.v1", "k", "Triggered", "g"), line("job.superseded.v1", "j", "Superseded")]
    assert state_of(again) == "Triggered"
    # A late revision that triggers nothing: its line is its own parent.
    assert state_of([*late, line("group.closed.v1", "g", "Grouped", "g")]) == "Verified"
    assert state_of([line("group.closed.v1", "g", "Grouped", "g")]) == "Grouped"


def test_a_superseded_delivery_does_not_hold_a_study_back() -> None:
    story = [
        line("job.requested.v1", "j", "Triggered"),
        line("delivery.requested.v1", "d", "Produced", "j"),
        line("job.superseded.v1", "j", "Superseded"),
        line("delivery.superseded.v1", "d", "Superseded"),
        line("job.requested.v1", "k", "Triggered"),
        line("delivery.requested.v1", "e", "Produced", "k"),
        line("result.verified.v1", "e", "Verified"),
    ]
    assert state_of(story) == "Verified"


def test_patience_counts_what_was_unforeseen_apart_from_what_may_pass() -> None:
    """Bites: count every failure, and one KeyError after four busy disks is a dead letter at once."""
    patience = Patience(tries=3, patience_s=100)
    for now in range(10):
        assert patience.pause_after(StoreUnavailableError("busy", 7), now) == 7
    assert patience.pause_after(KeyError("x"), 20) is not None
    assert patience.pause_after(KeyError("x"), 21) is not None
    assert patience.pause_after(KeyError("x"), 22) is None
    patience.reset()
    assert patience.pause_after(StoreUnavailableError("busy"), 200) is not None
    assert patience.pause_after(StoreUnavailableError("busy"), 301) is None
    assert patience.pause_after(BusUnavailableError("gone"), 9999) is not None, "no dead letter could be written"
    assert patience.pause_after(PermanentError("no"), 0) is None
