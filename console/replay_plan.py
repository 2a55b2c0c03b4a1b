"""Makes a replay's plan: exactly what would be done to which work, what would not and why. It does nothing else.

A plan pins the ids of the jobs and deliveries it is about, and the definitions that they run, so that its effect is
what it says or less: what has been done in the meantime is found done.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from clarion import events
from clarion.adapters.outbox import read_of_subjects
from clarion.codec import decode
from clarion.errors import ConfigError, PermanentError
from clarion.model import ResultSet, derive_delivery_id, derive_job_id
from console.selection import Selection, choose_studies
from gateway.holds import hold, keep_only
from gateway.queries import list_deliveries
from gateway.registry import load_registry
from gateway.selecting import decide_again
from orchestrator.queries import GroupJob, jobs_of_groups, mean_minutes
from streams.match import Match
from streams.replay import body_of
from streams.replays import MODES, SKIP, Header, Item, Limits, id_of, save_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from clarion.codec import Record
    from console.app import App
    from gateway.queries import DeliveryRow
    from gateway.selecting import SelectedStudy

_BATCH = 200
_WINDOW = timedelta(seconds=1)
# States of a job and of a delivery that need nobody.
# What differs between deliveries that failed for the same reason.
_FIRST_INSTANCE = re.compile(r"first [0-9.]+: ")
_UNDER_WAY = ("requested", "running")
_PRIORITY = "lower"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What a person asks for. `again` also sends what the destination has proved to keep."""

    mode: str
    reason: str
    by: str
    selection: Selection
    destinations: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    again: bool = False


def make_plan(app: App, request: PlanRequest) -> str:
    """Make a plan and keep it; gives the replay's id. Raises ConfigError for what cannot be meant."""
    _check(app, request)
    now = app.clock.now()
    received = request.selection.studies.received_from
    header = Header(
        mode=request.mode,
        reason=request.reason,
        planned_by=request.by,
        created=now.isoformat(),
        window_start=_window_start(app, request, received),
        selection=request.selection.described(),
        destinations=request.destinations,
        limits=request.limits,
    )
    planner = Planner(app, request, now, id_of(header))
    needed: set[str] = set()
    try:
        save_plan(app.database, header, planner.items())
        needed = planner.needed
    finally:
        keep_only(app.database, id_of(header), needed)
    return id_of(header)


def _check(app: App, request: PlanRequest) -> None:
    known = {one.name for one in app.checked.config.gateway.destinations}
    unknown = sorted(set(request.destinations) - known)
    if request.mode not in MODES:
        raise ConfigError([f"--mode: is one of {', '.join(MODES)}"])
    if not request.reason.strip():
        raise ConfigError(["--reason: say why; it is kept with the replay"])
    if unknown:
        raise ConfigError([f"--to {unknown[0]}: gateway.destinations has: {', '.join(sorted(known)) or 'none'}"])
    if request.mode == "send" and not request.destinations:
        raise ConfigError(["--to: name the destinations that `send` may send to"])


def _window_start(app: App, request: PlanRequest, received_from: str) -> str:
    """From when on the events of the selection may lie in a topic."""
    if received_from:
        return (datetime.fromisoformat(received_from) - _WINDOW).isoformat()
    first = next(iter(choose_studies(app.database, request.selection)), None)
    return app.clock.now().isoformat() if first is None else first.first_received


class Planner:
    """Turns a selection into items, a batch of studies at a time."""

    def __init__(self, app: App, request: PlanRequest, now: datetime, replay_id: str) -> None:
        self._replay_id = replay_id
        self._app = app
        self._request = request
        self._now = now
        self._match = Match(Match.Config(pipelines=app.pipelines()))
        self._minutes = mean_minutes(app.database)
        self._registry = load_registry(app.checked.config.gateway) if request.mode == "decide" else {}
        # Groups whose instances the plan needs.
        self.needed: set[str] = set()
        # Groups of several studies that were looked at; those of one study come only once.
        self._seen: set[str] = set()

    def items(self) -> Iterator[Item]:
        """Give the items, study by study in the order of their receiving."""
        studies = choose_studies(self._app.database, self._request.selection)
        while batch := list(itertools.islice(studies, _BATCH)):
            yield from self._batch(batch)

    def _batch(self, studies: Sequence[SelectedStudy]) -> Iterator[Item]:
        group_ids = sorted({group.group_id for study in studies for group in study.groups})
        # Before anything is planned: from here on they stay.
        gone = hold(self._app.database, self._replay_id, group_ids) if self._request.mode != "send" else set()
        closed: dict[tuple[str, int], tuple[Record, events.GroupClosed]] = {}
        for record in read_of_subjects(self._app.database, group_ids, events.GroupClosed.kind):
            event = decode(record)
            if isinstance(event, events.GroupClosed):
                closed[event.subject, event.revision] = record, event
        jobs: dict[str, list[GroupJob]] = {}
        for job in jobs_of_groups(self._app.database, group_ids):
            jobs.setdefault(job.group_id, []).append(job)
        deliveries = self._deliveries([job.job_id for found in jobs.values() for job in found])
        for study in studies:
            for group in study.groups:
                found = closed.get((group.group_id, group.revision))
                if found is None or group.group_id in self._seen:
                    continue
                if len(found[1].studies) > 1:
                    self._seen.add(group.group_id)
                on_it, removed = jobs.get(group.group_id, []), group.group_id in gone
                work = _Work(study.study_uid, found[0], found[1], on_it, deliveries, removed)
                yield from self._group(work)

    def _deliveries(self, job_ids: list[str]) -> dict[str, DeliveryRow]:
        if not self._request.destinations:
            return {}
        rows = list_deliveries(self._app.database, job_ids, limit=len(job_ids) * 100 or 1)
        return {row.delivery_id: row for row in rows}

    def _group(self, work: _Work) -> Iterator[Item]:
        mode = self._request.mode
        if mode == "decide":
            yield self._gone(work) if work.removed else self._decide(work)
            return
        if mode == "send":
            for job in work.jobs:
                if self._is_wanted(job.pipeline_id, job.version) and job.revision == work.closed.revision:
                    yield from self._send(work, job)
            return
        for wanted in self._asked(work):
            if self._is_wanted(wanted.pipeline_id, ""):
                yield from self._job(work, wanted)

    def _asked(self, work: _Work) -> list[events.JobRequested]:
        """Give what today's pipelines ask for; nothing when they cannot, which is then said by `decide`."""
        try:
            found = list(self._match.handle(work.closed))
        except PermanentError:
            return []
        return [one for one in found if isinstance(one, events.JobRequested)]

    def _is_wanted(self, pipeline_id: str, version: str) -> bool:
        selection = self._request.selection
        by_pipeline = not selection.pipelines or pipeline_id in selection.pipelines
        return by_pipeline and (not version or not selection.versions or version.startswith(selection.versions))

    # Jobs ------------------------------------------------------------------------------------------------------

    def _job(self, work: _Work, wanted: events.JobRequested) -> Iterator[Item]:
        same = [
            job for job in work.jobs if job.pipeline_id == wanted.pipeline_id and job.revision == work.closed.revision
        ]
        versions = self._request.selection.versions
        if versions and not any(job.version.startswith(versions) for job in same):
            return
        if self._request.mode == "rerun":
            yield self._rerun(work, wanted, same)
            return
        known = next((job for job in same if job.job_id == wanted.subject), None)
        latest = known or (same[-1] if same else None)
        if latest is None:
            if self._request.mode == "redeliver":
                yield self._request_job(work, wanted, "no job was ever requested")
        elif latest.state == "failed":
            yield self._failed(work, wanted, latest)
        elif latest.state == "succeeded" and self._request.destinations:
            yield from self._send(work, latest)
        else:
            yield self._skip(work, latest, _why_nothing(latest, wanted.subject))

    def _failed(self, work: _Work, wanted: events.JobRequested, job: GroupJob) -> Item:
        if job.job_id != wanted.subject:
            return self._request_job(work, wanted, f"failed ({job.cause}) with another version of the pipeline")
        if work.removed:
            return self._gone(work, job.pipeline_id)
        self.needed.add(job.group_id)
        order = {"action": "retry", "job_id": job.job_id, "destinations": list(self._request.destinations),
                 "result_set": None, "set_digest": "", "instances": 0}  # fmt: skip
        return self._item(
            work,
            action="retry",
            reason=f"failed: {job.cause}",
            pipeline_id=job.pipeline_id,
            job_id=job.job_id,
            target=job.job_id,
            destination=", ".join(self._request.destinations),
            minutes=self._minutes.get(job.pipeline_id, 0.0),
            body=json.dumps(order),
        )

    def _request_job(self, work: _Work, wanted: events.JobRequested, reason: str) -> Item:
        return self._job_item(work, replace(wanted, destinations=self._request.destinations), "request", reason)

    def _rerun(self, work: _Work, wanted: events.JobRequested, same: list[GroupJob]) -> Item:
        attempt_class = 1 + max((job.attempt_class for job in same), default=0)
        digest, group_id = wanted.definition.digest, wanted.group_id
        job_id = derive_job_id(wanted.pipeline_id, digest, group_id, wanted.revision, attempt_class)
        forced = replace(wanted, subject=job_id, attempt_class=attempt_class, destinations=self._request.destinations)
        return self._job_item(work, forced, "rerun", f"forced; attempt class {attempt_class}")

    def _job_item(self, work: _Work, event: events.JobRequested, action: str, reason: str) -> Item:
        if work.removed:
            return self._gone(work, event.pipeline_id)
        self.needed.add(event.group_id)
        event = replace(event, priority=_PRIORITY, time=self._now)
        return self._item(
            work,
            action=action,
            reason=reason,
            pipeline_id=event.pipeline_id,
            job_id=event.subject,
            target=event.subject,
            destination=", ".join(event.destinations),
            minutes=self._minutes.get(event.pipeline_id, 0.0),
            body=body_of(event),
            source_event=work.record.headers["ce_id"],
        )

    # Deliveries ------------------------------------------------------------------------------------------------

    def _send(self, work: _Work, job: GroupJob) -> Iterator[Item]:
        if job.state != "succeeded" or job.result_set is None:
            yield self._skip(work, job, f"job is {job.state}: it has no results to send")
            return
        results = ResultSet.decode(self._app.store.read(job.result_set))
        for destination in self._request.destinations:
            target = derive_delivery_id(job.job_id, destination, results.digest)
            known = work.deliveries.get(target)
            if known is None and self._request.mode == "failed":
                continue
            if known is not None and not self._is_to_send(known):
                reason = f"delivery to {destination} is {known.state}" + (f" ({_why(known)})" if known.reason else "")
                yield self._skip(work, job, reason, destination=destination)
                continue
            order = {"action": "send", "job_id": job.job_id, "destinations": [destination],
                     "result_set": asdict(job.result_set), "set_digest": results.digest,
                     "instances": len(results.instances)}  # fmt: skip
            yield self._item(
                work,
                action="send" if known is None else "resend",
                reason="never sent there" if known is None else f"delivery is {known.state}: {_why(known)}",
                pipeline_id=job.pipeline_id,
                job_id=job.job_id,
                target=target,
                destination=destination,
                body=json.dumps(order),
            )

    def _is_to_send(self, known: DeliveryRow) -> bool:
        return known.state in {"failed", "unverified", "superseded"} or (
            self._request.again and known.state != "waiting"
        )

    # ---------------------------------------------------------------------------------------------------------

    def _decide(self, work: _Work) -> Item:
        closed = work.closed
        found = decide_again(self._app.database, self._registry, closed.subject, before=closed.triggers, now=self._now)
        there = {job.job_id for job in work.jobs}
        found += [
            f"pipeline {one.pipeline_id} would run as another version"
            for one in self._asked(work)
            if one.subject not in there and any(job.pipeline_id == one.pipeline_id for job in work.jobs)
        ]
        action = "decide" if found else SKIP
        return self._item(work, action=action, reason="; ".join(found) or "would be decided as it was")

    def _gone(self, work: _Work, pipeline_id: str = "") -> Item:
        return self._item(work, action=SKIP, reason="its instances were removed by retention", pipeline_id=pipeline_id)

    def _skip(self, work: _Work, job: GroupJob, reason: str, *, destination: str = "") -> Item:
        return self._item(
            work, action=SKIP, reason=reason, pipeline_id=job.pipeline_id, job_id=job.job_id, destination=destination
        )

    @staticmethod
    def _item(work: _Work, **values: Any) -> Item:  # noqa: ANN401  the fields of an Item
        return Item(study_uid=work.study_uid, group_id=work.closed.subject, revision=work.closed.revision, **values)


@dataclass(frozen=True, slots=True)
class _Work:
    """A closed group with all there is of it."""

    study_uid: str
    record: Record
    closed: events.GroupClosed
    jobs: list[GroupJob]
    deliveries: dict[str, DeliveryRow]
    # Its instances are gone: what needs them cannot be done.
    removed: bool


def _why(delivery: DeliveryRow) -> str:
    """Say why a delivery is as it is, the same for all that are so for the same reason: a plan counts its reasons."""
    return _FIRST_INSTANCE.sub("", delivery.reason)


def _why_nothing(job: GroupJob, wanted: str) -> str:
    if job.state in _UNDER_WAY:
        return f"job is {job.state}"
    if job.job_id != wanted:
        return f"{job.state} with another version of the pipeline; `--mode rerun` runs today's"
    return f"job is {job.state}"
