"""F01: the process ends before and after every effect of the flow; afterwards I1 to I6 hold (docs/faults.md)."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import scipy.ndimage  # noqa: F401  as below
import sqlalchemy as sa
from support.postgres import url_in
from support.results import make_results
from support.world import Case, fork, make_series

# Imported before the first fork, so that no case pays for it.
import streams.stage  # noqa: F401
from clarion import crashpoints
from clarion.adapters.database import Database
from clarion.adapters.deadletters import Place, State, bury, mark, read_dead_letters, redrive
from clarion.adapters.embedded import EmbeddedBus, read_lag
from clarion.adapters.memory import ManualClock
from clarion.adapters.objects import FileStore
from clarion.adapters.outbox import dead_letters, events_table, find_record, record_of
from clarion.config import GatewayConfig
from clarion.crashpoints import EFFECTS
from clarion.errors import PermanentError
from clarion.events import DeliveryRequested, Event, JobRequested, JobStarted, JobSuperseded
from clarion.model import JobId, ResultInstance, ResultSet, derive
from clarion.testing.suites import MOMENT, Recorder, drain, started
from console.schema import create_tables
from gateway import tables
from gateway.answers import CommitmentAnswers, judge
from gateway.holds import hold
from gateway.jobs import GroupJobs
from gateway.notices import ClockGuard, Notices
from gateway.outages import Outages
from gateway.outbound import Delivery, Outbound
from gateway.removal_plan import release
from gateway.requests import DeliveryRequests, SupersededJobs
from gateway.retention import Policy
from orchestrator.ledger import Job, Ledger
from orchestrator.ledger import jobs as jobs_table
from orchestrator.requests import JobRequests

SEEDS = (1, 2, 3)
# Passed only when something fails, or by chance; they have cases of their own below.
ONLY_ON_FAILURE = {
    "ledger.fail", "bus.deadletter", "ledger.handback", "commitment.report", "delivery.unverified", "delivery.look",
    "delivery.lost", "delivery.retry", "delivery.supersede", "delivery.outage", "delivery.outageended",
    "deadletters.mark", "deadletters.settle",
    "commitment.settle",
    # Those of replays have a campaign of their own (test_replay_crash.py).
    "ledger.retry", "delivery.replay", "replay.plan", "replay.state", "replay.order", "replay.settle",
    # And so have retention (test_retention.py),
    "store.remove", "retention.groups", "retention.group", "retention.old", "retention.dropped",
    "retention.job", "retention.release", "retention.hold",
    "retention.notice", "retention.mark",
    # compaction and preparing (test_compaction.py), and writing past the page cache (test_past_cache.py).
    "segment.forget", "segment.free", "segment.prepare", "segment.zeros", "segment.zerossynced", "journal.writeblocks",
    "journal.allocate",
}  # fmt: skip
POINTS = [f"{side}:{name}" for name in EFFECTS if name not in ONLY_ON_FAILURE for side in ("before", "after")]


@pytest.fixture(scope="session")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    # What the libraries load at their first use is loaded before the first fork, so that no case pays for it.
    make_results(tmp_path_factory.mktemp("warm"))
    return make_series(tmp_path_factory.mktemp("series"))


@pytest.fixture(scope="session")
def reference(series: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One undisturbed run: it must satisfy the same judge, and tells how often each point is passed."""
    case = Case(tmp_path_factory.mktemp("reference") / "case", series, None, 0)
    case.run()
    case.judge()
    assert case.kills == 0
    return case


def test_reference_passes_every_point(reference: Case) -> None:
    """A point nobody passes would test nothing."""
    assert len(POINTS) >= 60
    assert set(POINTS) <= set(reference.passes), sorted(set(POINTS) - set(reference.passes))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("point", POINTS)
def test_crash(point: str, seed: int, reference: Case, series: list[Path], tmp_path: Path) -> None:
    """Bites: move the journal append behind the answer in Intake._receive, and `after:scp.respond` loses instances."""
    # The last passes differ from run to run; stay where every run comes.
    most = max(1, reference.passes[point] // 2)
    at = 1 if seed == SEEDS[0] else random.Random(f"{point}{seed}").randint(1, most)
    case = Case(tmp_path / "case", series, f"{point}#{at}", seed)
    case.run()
    assert case.kills == 1, "the point was not reached"
    case.judge()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("side", ["before", "after"])
def test_crash_while_a_job_fails(side: str, seed: int, tmp_path: Path) -> None:
    """A pipeline given MR instead of CT fails once, with its reason, whatever happens in between."""
    series = make_series(tmp_path / "series", modality="MR")
    case = Case(tmp_path / "case", series, f"{side}:ledger.fail#1", seed, final="Failed")
    case.run()
    assert case.kills == 1
    case.judge()


def _refuse_the_first(event: Event) -> Exception | None:
    return PermanentError("the reason") if event.sequence == 1 else None


@pytest.mark.usefixtures("each_database")
@pytest.mark.parametrize("side", ["before", "after"])
def test_crash_while_a_dead_letter_is_written(side: str, tmp_path: Path) -> None:
    """It is written once, and the record behind it is still handled."""
    url = url_in(tmp_path)

    def consume(point: str | None) -> list[int]:
        crashpoints.arm(point)
        recorder = Recorder(trouble=_refuse_the_first)
        bus = EmbeddedBus(Database(url), ManualClock(MOMENT))
        bus.subscribe("suite", [JobStarted], recorder)
        drain(bus)
        return [event.sequence for event in recorder.seen]

    EmbeddedBus(Database(url), ManualClock(MOMENT)).publish([started("a", 1), started("a", 2)])
    status = os.waitpid(fork(lambda: consume(f"{side}:bus.deadletter")), 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert consume(None) == [2]
    database = Database(url)
    assert [one.reason for one in read_dead_letters(database)] == ["the reason"]
    assert [one.behind for one in read_lag(database)] == [0]


class Ledgers:
    """A delivery and a job in a database of their own, opened anew by whoever works on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.database = Database(url_in(root))
        self.store = FileStore(root / "objects")
        create_tables(self.database)
        self.outbound = Outbound(self.database)
        self.ledger = Ledger(self.database, ManualClock(MOMENT))

    def fill(self) -> Ledgers:
        """One delivery of two instances that is sent, one job that runs."""
        ref = self.store.put(b"x")
        instances = tuple(
            ResultInstance(
                output="o", modality="SEG", study_uid="1", series_uid="1.1", sop_instance_uid=f"1.1.{number}",
                sop_class_uid="1.2", transfer_syntax_uid="1.2", object=ref,
            )  # type: ignore[arg-type]
            for number in (1, 2)
        )  # fmt: skip
        result_set = self.store.put(ResultSet(job_id=JobId("j"), instances=instances).encode())
        common: dict[str, Any] = {"sequence": 1, "time": MOMENT, "source": "t"}
        requested = DeliveryRequested(
            subject="d", **common, job_id="j", destination="p", result_set=result_set, instances=2
        )
        bus = EmbeddedBus(self.database, ManualClock(MOMENT))
        bus.publish([requested])
        DeliveryRequests(self.database, self.store).handle(requested)
        job = JobRequested(
            subject="j", **common, name="n", pipeline_id="p", definition=ref, group_id="g", revision=1, manifest=ref,
            priority="normal", destinations=(), studies=("1",),
        )  # fmt: skip
        bus.publish([job])
        JobRequests(self.database).handle(job)
        self.ledger.start(self.job(), ["a"])
        return self

    def job(self) -> Job:
        job = self.ledger.next_job([])
        assert job is not None
        return job

    def owe(self) -> None:
        """As if somebody had asked us to commit to an instance."""
        asked = {"transaction_uid": "1.7", "peer": "P", "instances": [["1.2", "1.3"]]}
        with self.database.transaction() as connection:
            connection.execute(tables.commitment_answers.insert(), [judge(connection, asked, MOMENT)])

    def end_group(self) -> None:
        """As if a group had been given up."""
        ended = {
            "group_id": "g", "called_ae": "A", "rule": "r", "key": "k", "epoch": 0, "state": "discarded", "revision": 1,
            "sequence": 1, "opened": "t", "last_received": "t", "closed": MOMENT.isoformat(), "check_at": "t",
            "reason": "rule-failed for 7 days",
        }  # fmt: skip
        with self.database.transaction() as connection:
            connection.execute(tables.groups.insert().values(**ended))

    def answers(self) -> CommitmentAnswers:
        return CommitmentAnswers(self.database, GatewayConfig(), ManualClock(MOMENT))

    def delivery(self) -> Delivery:
        return self.outbound.due(MOMENT + timedelta(days=1))[0]

    def bury_request(self) -> None:
        """As if the delivery's request had been given up."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(events_table).where(events_table.c.subject == "d")).first()
        assert row is not None
        place = Place(origin="events", partition=0, position=int(row.position))
        bury(self.database, "delivery", place, record_of(row), error=PermanentError("why"), tries=1, now=MOMENT)

    def letter(self) -> str:
        return derive("deadletter", "delivery", "events", 0, 1)

    def state(self) -> dict[str, Any]:
        """All that an operation may change, and the events that report it."""
        with self.database.reading() as connection:
            found = {
                table.name: [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]
                for table in (
                    tables.commitment_answers,
                    tables.deliveries,
                    tables.delivery_instances,
                    tables.commitments,
                    tables.outages,
                    tables.superseded_jobs,
                    tables.groups,
                    tables.group_jobs,
                    tables.group_holds,
                    tables.notices,
                    tables.retention_marks,
                    jobs_table,
                    dead_letters,
                )
            }
            rows = connection.execute(sa.select(events_table.c.subject, events_table.c.event_id)).all()
        return {**found, "events": sorted(tuple(row) for row in rows)}


def _lose(one: Ledgers) -> None:
    one.outbound.lost(one.delivery(), missing={"1.1.2"}, now=MOMENT, again=MOMENT)


def _send(one: Ledgers) -> None:
    one.outbound.settle_sent(one.delivery(), now=MOMENT, verify_until=MOMENT, verify=True)


OPERATIONS: dict[str, tuple[Callable[[Ledgers], object], Callable[[Ledgers], object]]] = {
    # effect: (what comes before, what is done; done twice it must leave what it leaves when done once)
    "delivery.lost": (_send, _lose),
    "delivery.unverified": (_send, lambda one: one.outbound.settle_unverified("d", "why")),
    "delivery.look": (_send, lambda one: one.outbound.look_again("d", MOMENT + timedelta(seconds=9))),
    "delivery.retry": (
        lambda one: one.outbound.settle_failed(one.delivery(), now=MOMENT, reason="why", again=None),
        lambda one: one.outbound.retry(["d"], MOMENT),
    ),
    "delivery.outage": (lambda _: None, lambda one: Outages(one.database).failed("PACS", MOMENT)),
    "delivery.outageended": (
        lambda one: Outages(one.database).failed("PACS", MOMENT),
        lambda one: Outages(one.database).worked("PACS", verify_until=MOMENT),
    ),
    "delivery.supersede": (
        lambda _: None,
        lambda one: SupersededJobs(one.database).handle(
            JobSuperseded(subject="j", sequence=9, time=MOMENT, source="t", by="k")
        ),
    ),
    "commitment.report": (
        lambda _: None,
        lambda one: one.outbound.commitment_reported("1.5", "P", now=MOMENT, stored=("1.1.1",), failed=()),
    ),
    "commitment.settle": (
        lambda one: one.owe(),
        lambda one: one.answers().tell(one.answers().due(MOMENT)[0], None) if one.answers().due(MOMENT) else None,
    ),
    "deadletters.mark": (
        lambda one: one.bury_request(),
        lambda one: mark(one.database, [one.letter()], State.DISCARDED),
    ),
    "deadletters.settle": (
        lambda one: (one.bury_request(), mark(one.database, [one.letter()], State.REDRIVE)),
        lambda one: redrive(
            one.database,
            {"delivery": DeliveryRequests(one.database, one.store)},
            lambda letter: find_record(one.database, letter.subject, letter.event_id),
        ),
    ),
    "retention.job": (
        lambda _: None,
        lambda one: GroupJobs(one.database).handle(
            JobSuperseded(subject="j", sequence=9, time=MOMENT, source="t", by="k")
        ),
    ),
    "retention.release": (
        lambda one: one.end_group(),
        lambda one: release(one.database, "g", Policy(), by="me", reason="why", now=MOMENT),
    ),
    "retention.hold": (lambda _: None, lambda one: hold(one.database, "r", ["g", "h"])),
    "retention.notice": (lambda _: None, lambda one: Notices(one.database, Policy()).tell(MOMENT)),
    "retention.mark": (lambda _: None, lambda one: ClockGuard(one.database).is_believable(MOMENT)),
    "ledger.handback": (lambda _: None, lambda one: one.ledger.hand_back(one.job(), 1)),
}


@pytest.mark.usefixtures("each_database")
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_crash_in_what_only_happens_when_something_is_wrong(name: str, side: str, tmp_path: Path) -> None:
    """All or nothing is in the database; done again, it leaves what one undisturbed run leaves."""
    prepare, operate = OPERATIONS[name]
    reference = Ledgers(tmp_path / "reference").fill()
    prepare(reference)
    untouched = reference.state()
    operate(reference)
    done = reference.state()
    assert done != untouched
    killed = Ledgers(tmp_path / "killed").fill()
    prepare(killed)
    killed.database.close()

    def child() -> None:
        crashpoints.arm(f"{side}:{name}")
        operate(Ledgers(tmp_path / "killed"))

    status = os.waitpid(fork(child), 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    again = Ledgers(tmp_path / "killed")
    assert again.state() == (untouched if side == "before" else done)
    if side == "before":
        operate(again)
        assert again.state() == done
