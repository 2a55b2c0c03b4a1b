"""The streams process: the handlers on the bus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clarion.crashpoints import effect
from clarion.loading import build, find, names
from streams.match import Match, ResolvedPipeline
from streams.replay import ReplayRunner
from streams.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.adapters.database import Database
    from clarion.ports import Clock, EventBus, ObjectStore
    from streams.replay import EventHistory

HANDLERS = "clarion.handlers"


def resolve(
    pipelines: Iterable[tuple[str, bytes, tuple[str, ...]]], store: ObjectStore
) -> tuple[ResolvedPipeline, ...]:
    """Keep each definition as an object, so that a job names exactly the text it runs."""
    with effect("match.definition"):
        return tuple(
            ResolvedPipeline(id=pipeline_id, definition=store.put(definition), destinations=destinations)
            for pipeline_id, definition, destinations in pipelines
        )


class StreamsStage:
    """Hands events to every handler there is."""

    def __init__(
        self,
        *,
        bus: EventBus,
        database: Database,
        clock: Clock,
        pipelines: tuple[ResolvedPipeline, ...],
        history: EventHistory,
    ) -> None:
        self._bus = bus
        timeline = Timeline(database)
        bus.subscribe("timeline", timeline.kinds, timeline)
        for name in names(HANDLERS):
            settings = {"pipelines": pipelines} if name == "match" else {}
            bus.subscribe(name, find(HANDLERS, name).kinds, build(HANDLERS, name, settings))
        match = Match(Match.Config(pipelines=pipelines))
        self._replay = ReplayRunner(database, clock, history=history, match=match)

    def step(self) -> bool:
        """Handle a batch; a replay goes on only when no live event waits."""
        return self._bus.step() or self._replay.step()

    def facts(self) -> dict[str, object]:
        """Name the handlers."""
        return {"handlers": ["timeline", *names(HANDLERS)]}

    def drain(self) -> None:
        """Leave the bus; nothing is in hand between steps."""
        self._bus.close()
