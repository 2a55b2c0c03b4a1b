"""The engine: takes requested jobs from the ledger, runs their operators, registers or refuses what they made.

Contract. One engine, one thread, no waiting: each step looks at what runs and starts what is ready. What the engine
remembers is only a view of the ledger: after a crash, jobs found running get a new attempt within their budget, and
the results of a second attempt have the same UIDs as those of the first.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import structlog

from clarion.adapters.files import make_folder
from clarion.errors import InvalidPipelineError, PermanentError, ResourceBusyError, StoreUnavailableError
from orchestrator.attempt import PAYLOAD, Attempt
from orchestrator.ledger import Failure
from orchestrator.payload import materialise
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
        self._interrupted = ledger.interrupted()
        self._draining = False

    def step(self) -> bool:
        """Take requests, start a job if there is room, move every running one on."""
        moved = self._bus.step()
        moved |= self._start_next()
        for attempt in list(self._active.values()):
            moved |= self._advance(attempt)
        if not moved and self._active:
            # Processes end without ringing; look a little more often than once a second.
            time.sleep(0.05)
            return True
        return moved

    def facts(self) -> dict[str, object]:
        """Name the jobs that run."""
        return {"jobs_running": sorted(self._active)}

    def idle(self) -> bool:
        """Tell whether nothing runs."""
        return not self._active and not self._interrupted

    def drain(self) -> None:
        """End what runs; the ledger starts a new attempt of it next time."""
        for attempt in self._active.values():
            for operator in attempt.running:
                self._executor.cancel(attempt.work_id(operator))
        self._active.clear()

    def _start_next(self) -> bool:
        if len(self._active) >= self._config.max_jobs:
            return False
        job = self._interrupted.pop(0) if self._interrupted else self._ledger.next_requested()
        if job is None:
            return False
        if job.attempt > self._config.retry_budget:
            reason = f"interrupted {job.attempt} times; see the orchestrator's log for why it ended"
            self._ledger.fail(job, job.attempt, Failure(cause="InterruptedError", operator="", reason=reason))
            return True
        try:
            pipeline = self._read_pipeline(job)
        except InvalidPipelineError as error:
            self._refuse(job, "InvalidPipelineError", str(error))
            return True
        self._begin(job, pipeline)
        return True

    def _begin(self, job: Job, pipeline: Pipeline) -> None:
        number = self._ledger.start(job, [one.name for one in pipeline.operators])
        log.info("job.started", job=job.job_id, attempt=number)
        # What an attempt that ended with the engine left behind.
        shutil.rmtree(self._work / job.job_id, ignore_errors=True)
        folder = make_folder(self._work / job.job_id / str(number))
        limit = min(pipeline.timeout_s or self._config.timeout_default_s, self._config.timeout_max_s)
        attempt = Attempt(
            job=job, number=number, pipeline=pipeline, folder=folder, deadline=self._clock.monotonic() + limit
        )
        self._active[job.job_id] = attempt
        try:
            materialise(self._store, job.manifest, folder / PAYLOAD)
        except (PermanentError, StoreUnavailableError) as error:
            self._fail(attempt, Failure(cause=type(error).__name__, operator="", reason=str(error)))

    def _read_pipeline(self, job: Job) -> Pipeline:
        return read_pipeline(job.pipeline_id, self._store.read(job.definition))

    def _refuse(self, job: Job, cause: str, reason: str) -> None:
        number = self._ledger.start(job, [])
        self._ledger.fail(job, number, Failure(cause=cause, operator="", reason=reason))

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
        attempt.running.discard(operator)
        kept = attempt.keep_log(operator, self._store)
        if exit_status == 0 and not reason:
            attempt.completed.add(operator)
            self._ledger.operator_ended(attempt.job.job_id, attempt.number, operator, reason="", log=kept)
            return True
        cause, said = attempt.failure_of(operator, reason)
        self._ledger.operator_ended(attempt.job.job_id, attempt.number, operator, reason=said, log=kept)
        self._fail(attempt, Failure(cause=cause, operator=operator, reason=said))
        return False

    def _finish(self, attempt: Attempt) -> None:
        try:
            result_set, ref = attempt.keep_results(self._store)
            findings = attempt.findings(GATE)
        except (PermanentError, OSError, ValueError) as error:
            self._fail(attempt, Failure(cause=type(error).__name__, operator=GATE, reason=str(error)))
            return
        if findings:
            rules = tuple(sorted({one["rule"] for one in findings}))
            reason = "; ".join(f"{one['rule']} {one['output']}: {one['detail']}" for one in findings[:5])
            failure = Failure(cause="InvalidResultError", operator=GATE, reason=reason, rules=rules)
            self._end(attempt)
            self._ledger.fail(attempt.job, attempt.number, failure, quarantined=ref)
            log.error("job.blocked", job=attempt.job.job_id, rules=rules)
            return
        self._ledger.succeed(attempt.job, attempt.number, result_set, ref)
        log.info("job.succeeded", job=attempt.job.job_id, results=len(result_set.instances))
        self._end(attempt)

    def _fail(self, attempt: Attempt, failure: Failure) -> None:
        log.error("job.failed", job=attempt.job.job_id, cause=failure.cause, operator=failure.operator)
        self._end(attempt)
        self._ledger.fail(attempt.job, attempt.number, failure)

    def _abandon(self, attempt: Attempt) -> None:
        log.info("job.superseded", job=attempt.job.job_id)
        self._end(attempt)

    def _end(self, attempt: Attempt) -> None:
        """Stop what still runs and remove the attempt's folder; logs and results are objects by now."""
        for operator in attempt.running:
            self._executor.cancel(attempt.work_id(operator))
        attempt.running.clear()
        self._active.pop(attempt.job.job_id, None)
        shutil.rmtree(attempt.folder.parent, ignore_errors=True)
