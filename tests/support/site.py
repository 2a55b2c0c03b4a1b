"""A site with a history: studies that were received, grouped and worked on, without pixels; for replays.

Everything but the images is real: tables, outbox, handlers, ledger, deliveries, the streams stage and, if there is one,
the broker. Jobs and deliveries end as `outcome` says.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import yaml
from support.postgres import url_in
from support.world import pause

from clarion.adapters.memory import ManualClock
from clarion.adapters.outbox import events_table, record_events
from clarion.adapters.wakeup import Wakeup
from clarion.config import KafkaConfig
from clarion.events import GroupClosed
from clarion.model import JobId, ObjectRef, ResultInstance, ResultSet, Trigger, derive_group_id
from clarion.ports import EventBus
from clarion.testing.suites import MOMENT
from console.app import App
from console.checks import check_config
from console.schema import create_tables
from gateway import tables
from gateway.outbound import Outbound
from orchestrator.ledger import Failure, Ledger, jobs, operators
from streams.tables import timeline

OUTCOMES = ("succeeded", "failed", "requested", "missing")
EMPTY = ObjectRef(location="file:none", digest="00" * 32, size_bytes=0)


class Site:
    """One configuration with pipeline `chest-ct`, destinations `pacs` and `archive`."""

    def __init__(self, root: Path, *, kafka: KafkaConfig | None = None) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        described: dict[str, Any] = {
            "data": "data",
            "database": {"url": url_in(root)},
            "gateway": {
                "ae_titles": [{"ae_title": "CHEST", "settings": {"pipeline-chest": "chest-ct"}}],
                "destinations": [
                    {"name": name, "ae_title": name.upper(), "host": "127.0.0.1", "port": 104}
                    for name in ("pacs", "archive")
                ],
            },
            "pipelines": [{"id": "chest-ct", "file": "builtin:chest-ct", "destinations": ["pacs"]}],
        }
        if kafka is not None:
            described["bus"] = {"kind": "kafka", "kafka": kafka.model_dump(mode="json", exclude={"security"})}
        self.config = root / "clarion.yaml"
        self.config.write_text(yaml.safe_dump(described))
        self.clock = ManualClock(MOMENT)
        self.outcome: Callable[[str], str] = lambda _: "succeeded"
        self._left: list[str] = []
        self.open()

    def open(self) -> None:
        """Start, or start again as after a restart."""
        checked = check_config(self.config)
        checked.config.data.mkdir(exist_ok=True)
        (checked.config.data / "run").mkdir(exist_ok=True)
        self.app = App(checked=checked, wakeup=Wakeup(checked.config.data / "wake", "site"), clock=self.clock)
        self.database = self.app.database
        create_tables(self.database)
        self.ledger = Ledger(self.database, self.clock)
        self.outbound = Outbound(self.database)
        self.relay = self.app.relay() if checked.config.bus.kind == "kafka" else None
        self.streams = self.app.streams()
        self.orchestrator = self.app.orchestrator()
        self.delivery: EventBus = self.app.delivery()._bus
        self.buses: list[Any] = [self.streams._bus, self.orchestrator._bus, self.delivery]

    def close(self) -> None:
        for bus in self.buses:
            if hasattr(bus, "close"):
                bus.close()
        self.streams._replay._history.close()
        if self.relay is not None:
            self.relay.drain()

    # What happens -----------------------------------------------------------------------------------------------

    def receive(self, number: int | str, **attributes: str) -> GroupClosed:
        """Let a study of one instance have been received and grouped, an hour after the one before."""
        study = f"1.2.{number}" if isinstance(number, int) else number
        time = MOMENT - timedelta(hours=1000 - (number if isinstance(number, int) else 0))
        group_id = derive_group_id("CHEST", "by-tag", study, 0)
        known = {"00080060": "CT", "00080020": "20261101", "00080050": f"A{number}", "0020000D": study}
        event = GroupClosed(
            subject=group_id, sequence=1, time=time, source="gateway", rule="by-tag", called_ae="CHEST", revision=1,
            instances=1, manifest=EMPTY, reason="quiet", triggers=(Trigger(pipeline_id="chest-ct", name="chest"),),
            studies=(study,),
        )  # fmt: skip
        rows = _rows(study, group_id, time.isoformat(), {**known, **attributes})
        with self.database.transaction() as connection:
            for table, row in rows:
                connection.execute(table.insert().values(**row))
            record_events(connection, [event])
        return event

    def settle(self, rounds: int = 2000) -> None:
        """Let everything that may happen by itself happen."""
        quiet = 0
        for _ in range(rounds):
            moved = self.step()
            quiet = 0 if moved else quiet + 1
            if quiet > 2 and self._caught_up():
                return
            if not moved and self.relay is not None:
                pause(0.01)
        raise AssertionError("the site never came to rest")

    def step(self) -> bool:
        moved = self.relay.step() if self.relay is not None else False
        moved |= self.streams.step() | self.orchestrator._bus.step() | self.delivery.step()
        return self._work() | self._send() | moved

    def _caught_up(self) -> bool:
        return all(bus.caught_up() for bus in self.buses) if self.relay is not None else True

    def _work(self) -> bool:
        """Run jobs: no operators, only their ends."""
        job = self.ledger.next_job(self._left)
        if job is None:
            return False
        outcome = self.outcome(job.group_id)
        if outcome == "requested":
            self._left.append(job.job_id)
            return True
        attempt = self.ledger.start(job, [])
        assert attempt is not None
        if outcome == "failed":
            self.ledger.fail(job, attempt, Failure(cause="OperatorError", operator="model", reason="a broken model"))
            return True
        instance = ResultInstance(
            output="o", modality="SEG", study_uid="1.2", series_uid="1.3", sop_instance_uid=f"1.4.{job.job_id[:4]}",
            sop_class_uid="1.5", transfer_syntax_uid="1.6", object=self.app.store.put(job.job_id.encode()),
        )  # type: ignore[arg-type]  # fmt: skip
        results = ResultSet(job_id=JobId(job.job_id), instances=(instance,))
        self.ledger.succeed(job, attempt, results, self.app.store.put(results.encode()))
        return True

    def _send(self) -> bool:
        """Deliver: no associations, only their ends."""
        due = self.outbound.due(self.clock.now())
        for one in due:
            if one.state == "waiting":
                for item in self.outbound.items(one.delivery_id):
                    self.outbound.answered(one.delivery_id, [(item.instance.sop_instance_uid, 0, "")])
                self.outbound.settle_sent(one, now=self.clock.now(), verify_until=self.clock.now(), verify=True)
            else:
                self.outbound.settle_verified(one, now=self.clock.now(), how="query")
        return bool(due)

    # What there is ----------------------------------------------------------------------------------------------

    def jobs(self) -> dict[str, tuple[str, int]]:
        """Give each job's state and attempts."""
        with self.database.reading() as connection:
            return {row.job_id: (row.state, row.attempt) for row in connection.execute(sa.select(jobs))}

    def deliveries(self) -> dict[str, tuple[str, int]]:
        """Give each delivery's state, and how many times it was begun."""
        table = tables.deliveries
        with self.database.reading() as connection:
            rows = connection.execute(sa.select(table.c.delivery_id, table.c.state, table.c.sequence)).all()
        return {row.delivery_id: (row.state, row.sequence) for row in rows}

    def fill(self, count: int, seed: int) -> None:
        """A history of studies that ended each in its own way, and the world as it is then."""
        rng = random.Random(seed)
        chosen: dict[str, str] = {}
        self.outcome = lambda group_id: chosen[group_id]
        for number in range(1, count + 1):
            event = self.receive(number, **{"00080060": rng.choice(["CT", "CT", "MR"])})
            chosen[event.subject] = rng.choice(OUTCOMES[:3])
        self.settle()
        self._forget_some(rng)
        self.outcome = lambda _: "succeeded"

    def _forget_some(self, rng: random.Random) -> None:
        with self.database.reading() as connection:
            here = jobs.c.state.in_(("requested", "failed"))
            rows = connection.execute(sa.select(jobs.c.group_id).where(here).order_by(jobs.c.job_id)).scalars().all()
        self.forget({group_id for group_id in rows if rng.random() < 0.3})

    def forget(self, groups: set[str]) -> None:
        """Let the jobs of some groups never have been: as when the event that asked for them was a dead letter."""
        with self.database.transaction() as connection:
            query = sa.select(jobs.c.job_id).where(jobs.c.group_id.in_(sorted(groups)))
            forgotten = connection.execute(query).scalars().all()
            deliveries, items = tables.deliveries, tables.delivery_instances
            theirs = sa.select(deliveries.c.delivery_id).where(deliveries.c.job_id.in_(forgotten))
            subjects = [*forgotten, *connection.execute(theirs).scalars().all()]
            connection.execute(items.delete().where(items.c.delivery_id.in_(subjects)))
            connection.execute(deliveries.delete().where(deliveries.c.delivery_id.in_(subjects)))
            connection.execute(operators.delete().where(operators.c.job_id.in_(subjects)))
            connection.execute(jobs.delete().where(jobs.c.job_id.in_(subjects)))
            connection.execute(events_table.delete().where(events_table.c.subject.in_(subjects)))
            connection.execute(timeline.delete().where(timeline.c.subject.in_(subjects)))
        self._left = [one for one in self._left if one not in forgotten]


def _rows(study: str, group_id: str, time: str, attributes: dict[str, str]) -> list[tuple[sa.Table, dict[str, Any]]]:
    instance = {
        "sop_instance_uid": f"{study}.1", "digest": "d", "study_uid": study, "series_uid": f"{study}.0",
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2", "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "calling_ae": "CT1", "called_ae": "CHEST", "received": time, "object": asdict(EMPTY),
        "attributes": attributes, "state": "grouped", "reason": "", "conflicted": False,
    }  # fmt: skip
    group = {
        "group_id": group_id, "called_ae": "CHEST", "rule": "by-tag", "key": study, "epoch": 0, "state": "closed",
        "revision": 1, "sequence": 1, "opened": time, "last_received": time, "closed": time, "check_at": time,
        "reason": "quiet",
    }  # fmt: skip
    revision = {"group_id": group_id, "revision": 1, "manifest": asdict(EMPTY), "manifest_digest": "d",
                "instances": 1, "closed": time}  # fmt: skip
    member = {"group_id": group_id, "sop_instance_uid": f"{study}.1", "digest": "d"}
    received = {"study_uid": study, "sequence": 0, "first_received": time, "last_received": time}
    return [
        (tables.studies, received), (tables.instances, instance), (tables.groups, group),
        (tables.members, member), (tables.group_studies, {"group_id": group_id, "study_uid": study}),
        (tables.revisions, revision),
    ]  # fmt: skip


def fill_finished(site: Site, count: int, batch: int = 2000) -> None:
    """Let many studies have been received, grouped and worked on with success, as rows and events; quickly."""
    pipeline = site.app.pipelines()[0]
    for first in range(1, count + 1, batch):
        _finish(site, range(first, min(first + batch, count + 1)), pipeline)


def _finish(site: Site, numbers: range, pipeline: Any) -> None:
    from streams.match import Match

    match = Match(Match.Config(pipelines=(pipeline,)))
    by_table: dict[sa.Table, list[dict[str, Any]]] = {}
    said: list[Any] = []
    for number in numbers:
        study, time = f"1.2.{number}", MOMENT - timedelta(seconds=number)
        group_id = derive_group_id("CHEST", "by-tag", study, 0)
        event = GroupClosed(
            subject=group_id, sequence=1, time=time, source="gateway", rule="by-tag", called_ae="CHEST", revision=1,
            instances=1, manifest=EMPTY, reason="quiet", triggers=(Trigger(pipeline_id="chest-ct", name="chest"),),
            studies=(study,),
        )  # fmt: skip
        for table, row in _rows(study, group_id, time.isoformat(), {"00080060": "CT"}):
            by_table.setdefault(table, []).append(row)
        (requested,) = match.handle(event)
        by_table.setdefault(jobs, []).append(_job_row(requested, time))
        said += [event, requested]
    with site.database.transaction() as connection:
        for table, rows in by_table.items():
            connection.execute(table.insert(), rows)
        record_events(connection, said)


def _job_row(requested: Any, time: datetime) -> dict[str, Any]:
    from orchestrator.requests import _row_of

    ended = {"state": "succeeded", "attempt": 1, "started": time.isoformat(), "finished": time.isoformat()}
    return {**_row_of(requested), **ended, "result_set": None}
