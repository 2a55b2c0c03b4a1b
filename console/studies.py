"""One study as people look at it: counts, story, jobs, deliveries, results, put together from the stages' queries."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clarion.adapters.deadletters import DeadLetter, read_dead_letters
from clarion.errors import MissingObjectError, StoreUnavailableError
from clarion.model import ResultInstance, ResultSet
from gateway.queries import DeliveryRow, StudyCounts, list_deliveries, list_studies
from orchestrator.queries import JobRow, list_jobs
from streams.queries import Line, read_story, state_of

if TYPE_CHECKING:
    from clarion.adapters.database import Database
    from clarion.ports import ObjectStore

FAILED = "Failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """A study in the list."""

    counts: StudyCounts
    state: str
    last: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyView:
    """A study with all that is known of it."""

    counts: StudyCounts
    state: str
    story: list[Line]
    jobs: list[JobRow]
    deliveries: list[DeliveryRow]
    dead_letters: list[DeadLetter]
    results: dict[str, tuple[ResultInstance, ...]]


def read_studies(database: Database, limit: int = 200) -> list[StudyRow]:
    """List the studies, the latest first."""
    rows = []
    letters = read_dead_letters(database)
    for counts in list_studies(database, limit):
        story = read_story(database, counts.study_uid)
        given_up = _of(letters, counts.study_uid, story)
        last = f"Event given up: {given_up[0].reason}" if given_up else story[-1].text if story else "Receiving"
        rows.append(StudyRow(counts=counts, state=FAILED if given_up else state_of(story), last=last))
    return rows


def read_study(database: Database, store: ObjectStore, study_uid: str) -> StudyView | None:
    """Read one study; None when it is unknown."""
    found = list_studies(database, 1, study_uid)
    if not found:
        return None
    story = read_story(database, study_uid)
    letters = _of(read_dead_letters(database), study_uid, story)
    job_ids = list(dict.fromkeys(line.subject for line in story if line.kind.startswith("job.requested")))
    jobs = list_jobs(database, job_ids)
    results = {}
    for job in jobs:
        if job.result_set is not None:
            # A set that is gone is said by who needed it; the rest of the study is still worth seeing.
            with contextlib.suppress(MissingObjectError, StoreUnavailableError):
                results[job.job_id] = ResultSet.decode(store.read(job.result_set)).instances
    return StudyView(
        counts=found[0],
        state=FAILED if letters else state_of(story),
        story=story,
        jobs=jobs,
        deliveries=list_deliveries(database, job_ids),
        dead_letters=letters,
        results=results,
    )


def _of(letters: list[DeadLetter], study_uid: str, story: list[Line]) -> list[DeadLetter]:
    """Choose the dead letters about a study: its own events, and those of its groups, jobs and deliveries."""
    subjects = {study_uid, *(line.subject for line in story)}
    return [one for one in letters if one.subject in subjects]
