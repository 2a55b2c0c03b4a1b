"""The engine: takes requested jobs from the ledger, runs their operators, registers or refuses what they made.

Contract. One engine, one thread, no waiting: each step looks at what runs and starts what is ready. What the engine
remembers is only a view of the ledger: after a crash, jobs found running get a new attempt within their budget, and
the results of a second attempt have the same UIDs as those of the first. The ledger is told before the engine forgets.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from clarion.adapters.files import make_folder
from clarion.errors import (
    BusUnavailableError,
    ClarionError,
    PermanentError,
    ResourceBusyError,
    StoreUnavailableError,
    TransientError,
    describe,
)
from clarion.model import KILLED, LOST
from orchestrator.attempt import PAYLOAD, Attempt
from orchestrator.ledger import RUNNING, Failure
from orchestrator.payload import materialise, remove, seal
from orchestrator.pipelines import GATE, read_pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from clarion.config import OrchestratorConfig
    from clarion.plugins import Executor
    from clarion.ports import Clock, EventBus, ObjectStore
    from orchestrator.ledger import Job, Ledger
    from orchestrator.pipelines import Pipeline

log = structlog.get_logger()

# Operators of one job that run side by side.
_PARALLEL_OPERATORS = 2
# How long a job rests before it is tried again.
_REST_S = 10.0


class Engine:
    """The orchestrator's process."""

    def __init__(
        self,
        *,
        config: OrchestratorConfig,
        bus: EventBus,
        ledger: Ledger,
        executor: Executor,
        store: ObjectStore,
        work: Path,
        clock: Clock,
    ) -> None:
        self._config = config
        self._bus = bus
        self._ledger = ledger
        self._executor = executor
        self._store = store
        self._work = make_folder(work)
        self._clock = clock
        self._active: dict[str, Attempt] = {}
        # Jobs that wait before they are tried again, until when, and why the last attempt ended.
        self._waiting: dict[str, tuple[float, str]] = {}

    def step(self) -> bool:
        """Take requests, start a job if there is room, move every running one on."""
        try:
            moved = self._bus.step()
        except BusUnavailableError:
            # What runs goes on while no request can come.
            self._move()
            raise
        return self._move() or moved

    def _move(self) -> bool:
        moved = self._start_next()
        for attempt in list(self._active.values()):
            moved |= self._advance_alone(attempt)
        if not moved and self._active:
            # Processes end without ringing; look a little more often than once a second.
            time.sleep(0.05)
            return True
        return moved

    def facts(self) -> dict[str, object]:
        """Name the jobs that run."""
        return {"jobs_running": sorted(self._active)}

    def drain(self) -> None:
        """End what runs and hand it back to the ledger; the next engine begins a new attempt of it."""
        for attempt in list(self._active.values()):
            self._end(attempt)
            self._ledger.hand_back(attempt.job, attempt.number)
        self._bus.close()

    def _start_next(self) -> bool:
        if len(self._active) >= self._config.max_jobs:
            return False
        now = self._clock.monotonic()
        resting = [job_id for job_id, (until, _) in self._waiting.items() if until > now]
        job = self._ledger.next_job([*self._active, *resting])
        if job is None:
            return False
        why = self._waiting.pop(job.job_id, (0.0, "the orchestrator ended while it ran; see its log"))[1]
        if job.state == RUNNING and job.retries >= self._config.retry_budget:
            reason = f"given up after {job.attempt} attempts; the last one: {why}"
            self._ledger.fail(job, job.attempt, Failure(cause="RetriesExhaustedError", operator="", reason=reason))
            return True
        try:
            pipeline = read_pipeline(job.pipeline_id, self._store.read(job.definition))
        except PermanentError as error:
            self._refuse(job, Failure(cause=type(error).__name__, operator="", reason=str(error)))
        except StoreUnavailableError as error:
            self._rest(job.job_id, str(error))
        else:
            self._begin(job, pipeline)
        return True

    def _begin(self, job: Job, pipeline: Pipeline) -> None:
        number = self._ledger.start(job, [one.name for one in pipeline.operators])
        if number is None:
            return
        log.info("job.started", job=job.job_id, attempt=number)
        # What an attempt that ended with the engine left behind.
        remove(self._work / job.job_id)
        limit = min(pipeline.timeout_s or self._config.timeout_default_s, self._config.timeout_max_s)
        attempt = Attempt(
            job=job,
            number=number,
            pipeline=pipeline,
            folder=self._work / job.job_id / str(number),
            deadline=self._clock.monotonic() + limit,
        )
        try:
            make_folder(attempt.folder)
            materialise(self._store, job.manifest, attempt.folder / PAYLOAD)
        except PermanentError as error:
            self._fail(attempt, Failure(cause=type(error).__name__, operator="", reason=str(error)))
        except (StoreUnavailableError, OSError) as error:
            self._try_again(attempt, f"the payload cannot be written now: {_said(error)}")
        else:
            # Only a whole payload is ever worked on.
            self._active[job.job_id] = attempt

    def _refuse(self, job: Job, failure: Failure) -> None:
        number = self._ledger.start(job, [])
        if number is not None:
            self._ledger.fail(job, number, failure)

    def _try_again(self, attempt: Attempt, why: str) -> None:
        """Give this attempt up; the ledger keeps the job as running, and the budget decides about another one."""
        log.warning("job.again", job=attempt.job.job_id, attempt=attempt.number, reason=why)
        self._rest(attempt.job.job_id, why)
        self._end(attempt)

    def _rest(self, job_id: str, why: str) -> None:
        self._waiting[job_id] = (self._clock.monotonic() + _REST_S, why)

    def _advance_alone(self, attempt: Attempt) -> bool:
        """Move one attempt on; what goes wrong with it keeps no other from moving."""
        try:
            moved = self._advance(attempt)
        except (TransientError, OSError) as error:
            log.warning("job.waiting", job=attempt.job.job_id, reason=_said(error))
            return False
        except Exception as error:  # noqa: BLE001  ours, and said so: it concerns this job alone
            self._fail(attempt, Failure(cause="InternalError", operator="", reason=describe(error)))
            return True
        return moved

    def _advance(self, attempt: Attempt) -> bool:
        if self._ledger.is_superseded(attempt.job.job_id):
            self._abandon(attempt)
            return True
        moved = False
        for operator in sorted(attempt.running):
            state = self._executor.poll(attempt.work_id(operator))
            if state.exit_status is None:
                continue
            moved = True
            if not self._ended(attempt, operator, state.exit_status, state.reason):
                return True
        moved |= self._submit_ready(attempt)
        if attempt.done:
            self._finish(attempt)
        return moved

    def _submit_ready(self, attempt: Attempt) -> bool:
        moved = False
        for operator in attempt.ready():
            if len(attempt.running) >= _PARALLEL_OPERATORS:
                break
            remaining = attempt.deadline - self._clock.monotonic()
            if remaining <= 0:
                self._fail(attempt, Failure(cause="TimeoutError", operator=operator.name, reason="job time limit"))
                return True
            try:
                self._executor.submit(attempt.work(operator, remaining))
            except ResourceBusyError as error:
                log.warning("operator.waiting", job=attempt.job.job_id, operator=operator.name, reason=str(error))
                break
            attempt.running.add(operator.name)
            self._ledger.operator_started(attempt.job.job_id, attempt.number, operator.name)
            moved = True
        return moved

    def _ended(self, attempt: Attempt, operator: str, exit_status: int, reason: str) -> bool:
        """Note how an operator ended; tell whether the job goes on."""
        kept = attempt.keep_log(operator, self._store)
        if exit_status == 0 and not reason:
            seal(attempt.outputs_of(operator))
            self._ledger.operator_ended(attempt.job.job_id, attempt.number, operator, reason="", log=kept)
            attempt.running.discard(operator)
            attempt.completed.add(operator)
            return True
        cause, said = attempt.failure_of(operator, reason)
        self._ledger.operator_ended(attempt.job.job_id, attempt.number, operator, reason=said, log=kept)
        if reason == LOST or reason.startswith(KILLED):
            # Ended from outside, perhaps for want of memory: another attempt may succeed.
            self._try_again(attempt, f"{operator} {said}")
        else:
            self._fail(attempt, Failure(cause=cause, operator=operator, reason=said))
        return False

    def _finish(self, attempt: Attempt) -> None:
        try:
            result_set, ref = attempt.keep_results(self._store)
            findings = attempt.findings(GATE)
        except (PermanentError, ValueError) as error:
            self._fail(attempt, Failure(cause=type(error).__name__, operator=GATE, reason=_said(error)))
            return
        if findings:
            rules = tuple(sorted({one["rule"] for one in findings}))
            reason = "; ".join(f"{one['rule']} {one['output']}: {one['detail']}" for one in findings[:5])
            failure = Failure(cause="InvalidResultError", operator=GATE, reason=reason, rules=rules)
            self._ledger.fail(attempt.job, attempt.number, failure, quarantined=ref)
            log.error("job.blocked", job=attempt.job.job_id, rules=rules)
            self._end(attempt)
            return
        self._ledger.succeed(attempt.job, attempt.number, result_set, ref)
        log.info("job.succeeded", job=attempt.job.job_id, results=len(result_set.instances))
        self._end(attempt)

    def _fail(self, attempt: Attempt, failure: Failure) -> None:
        log.error("job.failed", job=attempt.job.job_id, cause=failure.cause, operator=failure.operator)
        self._ledger.fail(attempt.job, attempt.number, failure)
        self._end(attempt)

    def _abandon(self, attempt: Attempt) -> None:
        log.info("job.superseded", job=attempt.job.job_id)
        self._end(attempt)

    def _end(self, attempt: Attempt) -> None:
        """Stop what still runs, let the executor forget the attempt, remove its folder; what counts is kept by now."""
        self._active.pop(attempt.job.job_id, None)
        for operator in attempt.pipeline.operators:
            self._executor.cancel(attempt.work_id(operator.name))
        remove(attempt.folder.parent)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ClarionError) else describe(error)
