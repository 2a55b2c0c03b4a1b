"""Every event, past tense. Its subject is its key on the bus; its sequence is dense per subject, so a gap shows.

No pixel data, no patient name, no patient id: identifiers and references only. A new field has a default; anything
else is a new version (`group.closed.v2`) beside the old one, and both are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003  pydantic reads the annotations at run time
from typing import ClassVar

from clarion.model import ObjectRef, Trigger, derive


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What every event carries; `kind` is its type with its version."""

    kind: ClassVar[str] = ""

    subject: str
    sequence: int
    time: datetime
    source: str

    @property
    def event_id(self) -> str:
        """The event's identifier, the same whenever it is said again."""
        return derive(self.kind, self.subject, self.sequence)


# Subject: Study Instance UID ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStored(Event):
    """An instance was received and acknowledged."""

    kind: ClassVar[str] = "instance.stored.v1"

    series_uid: str
    sop_instance_uid: str
    digest: str
    sop_class_uid: str
    transfer_syntax_uid: str
    calling_ae: str
    called_ae: str
    object: ObjectRef
    received: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceIgnored(Event):
    """An instance was received and no rule takes it, or its SOP Class is configured to be ignored."""

    kind: ClassVar[str] = "instance.ignored.v1"

    sop_instance_uid: str
    sop_class_uid: str
    calling_ae: str
    called_ae: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceQuarantined(Event):
    """A data set was set aside with a reason; `object` is None when nothing of it is kept."""

    kind: ClassVar[str] = "instance.quarantined.v1"

    sop_instance_uid: str
    calling_ae: str
    called_ae: str
    reason: str
    object: ObjectRef | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceConflicted(Event):
    """An instance came again with other content; both are kept, the group uses the one named by `used_digest`."""

    kind: ClassVar[str] = "instance.conflicted.v1"

    sop_instance_uid: str
    kept_digest: str
    other_digest: str
    used_digest: str
    calling_ae: str
    called_ae: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AssociationEnded(Event):
    """An association that carried instances of this study was released, aborted or lost."""

    kind: ClassVar[str] = "association.ended.v1"

    association: str
    calling_ae: str
    called_ae: str
    reason: str
    stored: int
    refused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancesRemoved(Event):
    """Instances of this study were kept for as long as they had to be, and are gone.

    `reason` is `retention` (of the group `group_id`), `ignored-retention`, `conflict-retention` or
    `quarantine-retention`.
    """

    kind: ClassVar[str] = "instance.removed.v1"

    reason: str
    instances: int
    size_bytes: int
    group_id: str = ""


# Subject: group id ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOpened(Event):
    """A rule put a first instance into a group."""

    kind: ClassVar[str] = "group.opened.v1"

    rule: str
    called_ae: str
    studies: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRevised(Event):
    """A late instance came for a closed group; a new revision is being collected."""

    kind: ClassVar[str] = "group.revised.v1"

    revision: int
    studies: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupClosed(Event):
    """A revision of a group is complete, with what its rule triggers."""

    kind: ClassVar[str] = "group.closed.v1"

    rule: str
    called_ae: str
    revision: int
    instances: int
    manifest: ObjectRef
    reason: str
    triggers: tuple[Trigger, ...]
    studies: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBlocked(Event):
    """A group cannot be judged: its rule fails or was removed. It is asked again until it answers, or given up.

    `reason` is empty when it can be judged again and goes on waiting.
    """

    kind: ClassVar[str] = "group.blocked.v1"

    revision: int
    reason: str
    studies: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDiscarded(Event):
    """A rule gave a group up; its instances are kept."""

    kind: ClassVar[str] = "group.discarded.v1"

    revision: int
    reason: str
    studies: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReleased(Event):
    """A person let a group's instances go when their time comes, whatever became of the jobs on it."""

    kind: ClassVar[str] = "group.released.v1"

    by: str
    reason: str
    studies: tuple[str, ...]


# Subject: job id ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequested(Event):
    """A pipeline is to be run on a revision of a group.

    `attempt_class` counts forced replays of the same work; `replay` names the replay that asked for it, or is empty.
    """

    kind: ClassVar[str] = "job.requested.v1"

    name: str
    pipeline_id: str
    definition: ObjectRef
    group_id: str
    revision: int
    manifest: ObjectRef
    priority: str
    destinations: tuple[str, ...]
    studies: tuple[str, ...]
    attempt_class: int = 0
    replay: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRetried(Event):
    """A job that had failed was taken up again, with a new budget of attempts, by a replay."""

    kind: ClassVar[str] = "job.retried.v1"

    replay: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStarted(Event):
    """An attempt of a job began."""

    kind: ClassVar[str] = "job.started.v1"

    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSucceeded(Event):
    """A job's operators all completed and its results passed the result gate."""

    kind: ClassVar[str] = "job.succeeded.v1"

    attempt: int
    results: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailed(Event):
    """A job ended without results; `cause` names the class of failure, `reason` says it to a person."""

    kind: ClassVar[str] = "job.failed.v1"

    attempt: int
    cause: str
    operator: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSuperseded(Event):
    """A job for a newer revision of the group took this one's place."""

    kind: ClassVar[str] = "job.superseded.v1"

    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRegistered(Event):
    """A job's result set is stored and may leave."""

    kind: ClassVar[str] = "result.registered.v1"

    result_set: ObjectRef
    set_digest: str
    instances: int
    destinations: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultBlocked(Event):
    """The result gate kept a result set back; the set is in quarantine."""

    kind: ClassVar[str] = "result.blocked.v1"

    rules: tuple[str, ...]
    result_set: ObjectRef


# Subject: delivery id -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRequested(Event):
    """A result set is to be sent to a destination."""

    kind: ClassVar[str] = "delivery.requested.v1"

    job_id: str
    destination: str
    result_set: ObjectRef
    instances: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStatus:
    """The status a destination answered for one instance."""

    sop_instance_uid: str
    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultDelivered(Event):
    """Every instance of a delivery was answered with success."""

    kind: ClassVar[str] = "result.delivered.v1"

    destination: str
    instances: tuple[InstanceStatus, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryFailed(Event):
    """An attempt of a delivery failed; `final` says that nothing more is tried unless a person asks for it."""

    kind: ClassVar[str] = "delivery.failed.v1"

    destination: str
    attempt: int
    reason: str
    final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRetried(Event):
    """A delivery was taken up again with a new budget: by a replay, or by a person when `replay` is empty."""

    kind: ClassVar[str] = "delivery.retried.v1"

    destination: str
    replay: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySuperseded(Event):
    """A delivery that had not been made was given up: a newer revision of the group has a job of its own."""

    kind: ClassVar[str] = "delivery.superseded.v1"

    destination: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultVerified(Event):
    """The destination said that it keeps every instance; `how` is `storage-commitment` or `query`."""

    kind: ClassVar[str] = "result.verified.v1"

    destination: str
    how: str


# Subject: replay id ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPlanned(Event):
    """A replay was planned; `plan_digest` is the hash over all that it will do, `items` what it will do."""

    kind: ClassVar[str] = "replay.planned.v1"

    mode: str
    by: str
    plan_digest: str
    items: int
    skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOrdered(Event):
    """A step of a replay is to be done by the stage that keeps its target.

    `action` is `retry` (the job `job_id` gets a new budget, and its results go to `destinations` alone) or `send` (its
    results go to them, whatever was sent there before).
    """

    kind: ClassVar[str] = "replay.ordered.v1"

    action: str
    job_id: str
    destinations: tuple[str, ...]
    result_set: ObjectRef | None
    set_digest: str
    instances: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayFinished(Event):
    """A replay has come to its end, or was ended; the counts are of its items."""

    kind: ClassVar[str] = "replay.finished.v1"

    state: str
    plan_digest: str
    done: int
    failed: int
    left: int
    reason: str


ALL: tuple[type[Event], ...] = (
    InstanceStored,
    InstanceIgnored,
    InstanceQuarantined,
    InstanceConflicted,
    InstancesRemoved,
    AssociationEnded,
    GroupOpened,
    GroupRevised,
    GroupClosed,
    GroupBlocked,
    GroupDiscarded,
    GroupReleased,
    JobRequested,
    JobRetried,
    JobStarted,
    JobSucceeded,
    JobFailed,
    JobSuperseded,
    ResultRegistered,
    ResultBlocked,
    DeliveryRequested,
    ResultDelivered,
    DeliveryFailed,
    DeliveryRetried,
    DeliverySuperseded,
    ResultVerified,
    ReplayPlanned,
    ReplayOrdered,
    ReplayFinished,
)
