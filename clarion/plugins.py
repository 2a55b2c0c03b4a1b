"""Every contract a plug-in fulfils. Values of `clarion.model` go in and out; errors are those of `clarion.errors`.

A plug-in is a class named by an entry point (`clarion.rules`, `clarion.handlers`, `clarion.operators`,
`clarion.executors`). If it has a class attribute `Config`, a pydantic model, its options are validated before
anything starts and handed to it as the only argument; otherwise it is made without arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime
    from pathlib import Path

    from clarion.events import Event
    from clarion.model import Decision, Group, Instance, OperatorWork, Trigger, WorkState


class GroupingRule(Protocol):
    """Decides which instances belong together, when they are complete, and what they trigger.

    Pure: the same arguments give the same answer, nothing is read or written elsewhere. Sees headers, never pixels.
    """

    def group_of(self, instance: Instance) -> str | None:
        """Give the key of the instance's group, or None when the rule does not take it.

        An InvalidInstanceError sends the instance to quarantine with its reason.
        """

    def is_complete(self, group: Group, now: datetime) -> Decision:
        """Decide about an open group; called again after every arrival and at the time the last decision named."""

    def triggers(self, group: Group) -> list[Trigger]:
        """Name the pipelines that a closed group is given to; all of them are requested, or none."""


class StreamHandler(Protocol):
    """Turns an event into what follows from it. Bears seeing an event twice.

    A handler that is loaded by entry point has a class attribute `kinds`: the event classes it wants to see.
    """

    def handle(self, event: Event) -> Iterable[Event]:
        """Give the events that follow; effects of its own are complete, and harmless when repeated, on return."""


class Workspace(Protocol):
    """What an operator may know of its surroundings."""

    @property
    def outputs(self) -> Mapping[str, Path]:
        """The folder to fill for each declared output."""

    @property
    def facts(self) -> Mapping[str, str]:
        """What the job says of itself: job id, requested time, pipeline name and version, operator, output."""

    def log(self, text: str) -> None:
        """Write a line to the job's log; no patient data."""


class Operator(Protocol):
    """Works on images. Knows nothing of Kafka, jobs or PACS."""

    def run(self, inputs: Mapping[str, Path], workspace: Workspace) -> None:
        """Read the input folders, fill the output folders. Raises OperatorError or another PermanentError."""


class Executor(Protocol):
    """Runs operators somewhere. A work id it knows finds the running one."""

    def submit(self, work: OperatorWork) -> None:
        """Start the work; passed over when its id is known. Raises ResourceBusyError when it cannot start now."""

    def poll(self, work_id: str) -> WorkState:
        """Tell the state of the work; an unknown id is a failure with reason `model.LOST`.

        Work that was ended from outside has a reason that begins with `model.KILLED`; it may be tried again.
        """

    def cancel(self, work_id: str) -> None:
        """End the work and everything it started, and forget it; an unknown id is passed over."""
