"""What the console may ask of the streams: the story of a study, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from streams.tables import links, timeline

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.adapters.database import Database

# From the least to the most advanced.
PROGRESS = ("Received", "Grouped", "Triggered", "Running", "Produced", "Sent", "Verified")
# States that ask for somebody's attention, the most pressing first.
ATTENTION = ("Failed", "Quarantined", "Conflicted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a study's story."""

    time: str
    state: str
    text: str
    kind: str
    subject: str
    parent: str


def read_story(database: Database, study_uid: str) -> list[Line]:
    """Give a study's story in the order in which it happened."""
    query = sa.select(timeline).where(timeline.c.study_uid == study_uid).order_by(timeline.c.position)
    with database.reading() as connection:
        return [
            Line(time=row.time, state=row.state, text=row.text, kind=row.kind, subject=row.subject, parent=row.parent)
            for row in connection.execute(query)
        ]


def subjects_of(database: Database, study_uid: str) -> list[str]:
    """Give everything a study's events may be about: itself, its groups, their jobs and deliveries."""
    query = sa.select(links.c.subject).where(links.c.study_uid == study_uid)
    with database.reading() as connection:
        return sorted({study_uid, *connection.execute(query).scalars()})


def state_of(story: Iterable[Line]) -> str:
    """Tell where a study stands: what asks for attention, else its least advanced job or delivery."""
    latest: dict[str, str] = {}
    passed: set[str] = set()
    last = "Received"
    for line in story:
        if line.state in {"Released", "Removed"}:
            continue  # what became of the study does not change by what is kept of it
        last = line.state
        if line.kind.startswith(("job.", "delivery.", "result.", "group.")):
            latest[line.subject] = line.state
            # What had been passed on and speaks again, as a group with late instances, is not done.
            passed.discard(line.subject)
        if line.parent:
            passed.add(line.parent)
        if line.kind.startswith("instance."):
            latest[line.kind] = line.state
    open_states = [state for subject, state in latest.items() if subject not in passed and state != "Superseded"]
    for state in ATTENTION:
        if state in open_states:
            return state
    advanced = [state for state in open_states if state in PROGRESS]
    if not advanced:
        return open_states[0] if open_states else last
    return min(advanced, key=PROGRESS.index)
