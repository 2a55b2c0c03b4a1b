"""group.closed -> job.requested: one job per trigger, its id derived from pipeline version and group revision."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from clarion import events
from clarion.errors import PermanentError
from clarion.model import ObjectRef, derive_job_id

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from clarion.events import Event

SOURCE = "streams"
MAX_NAME = 63


class ResolvedPipeline(BaseModel):
    """A pipeline that a trigger may name: its definition as an object, and where its results go."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    id: str
    definition: ObjectRef
    destinations: tuple[str, ...]


class Match:
    """Requests the jobs that a closed group triggers."""

    kinds: ClassVar = (events.GroupClosed,)

    class Config(BaseModel):
        """The pipelines there are."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        pipelines: tuple[ResolvedPipeline, ...]

    def __init__(self, config: Config) -> None:
        self._pipelines = {pipeline.id: pipeline for pipeline in config.pipelines}

    def handle(self, event: Event) -> Iterable[Event]:
        """Give one job.requested per trigger; all of them, or a PermanentError naming the unknown pipeline."""
        if not isinstance(event, events.GroupClosed):
            return []
        unknown = sorted({one.pipeline_id for one in event.triggers} - set(self._pipelines))
        if unknown:
            raise PermanentError(
                f"rule {event.rule!r} triggers pipelines that are not configured: {', '.join(unknown)}"
            )
        return [
            self._request(event, self._pipelines[one.pipeline_id], name=one.name, priority=one.priority)
            for one in event.triggers
        ]

    def _request(
        self, closed: events.GroupClosed, pipeline: ResolvedPipeline, *, name: str, priority: str
    ) -> events.JobRequested:
        digest = pipeline.definition.digest
        return events.JobRequested(
            subject=derive_job_id(pipeline.id, digest, closed.subject, closed.revision),
            sequence=1,
            time=closed.time,
            source=SOURCE,
            name=job_name(closed.called_ae, name, closed.time),
            pipeline_id=pipeline.id,
            definition=pipeline.definition,
            group_id=closed.subject,
            revision=closed.revision,
            manifest=closed.manifest,
            priority=priority,
            destinations=pipeline.destinations,
            studies=closed.studies,
        )


def job_name(called_ae: str, pipeline: str, closed: datetime) -> str:
    """Make a job's name (registry specification 5.1); with the time of closing, so a retry has the same."""
    text = re.sub(r"-+", "-", re.sub(r"[^A-Za-z0-9-]", "-", f"{called_ae}-{pipeline}-{closed:%Y%m%d%H%M%S}"))
    return text.strip("-")[:MAX_NAME].strip("-").lower()
