"""The values that the stages share: frozen, comparable, without behaviour beyond deriving one from another.

Identifiers are derived from their inputs (`derive_*`), so that doing a thing twice names the same thing twice.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
import uuid
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, time  # noqa: TC003  pydantic reads the annotations of values within events
from typing import TYPE_CHECKING, Literal, NewType, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

StudyUid = NewType("StudyUid", str)
SeriesUid = NewType("SeriesUid", str)
SopInstanceUid = NewType("SopInstanceUid", str)
GroupId = NewType("GroupId", str)
JobId = NewType("JobId", str)
DeliveryId = NewType("DeliveryId", str)

NAMESPACE = uuid.UUID("6a0c3f0e-3c0b-5f5c-9d8b-6e2f6a9d41c7")
UNKNOWN_STUDY = StudyUid("unknown")
"""Subject of events about a data set whose Study Instance UID could not be read."""

_MAX_UID = 64
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


def is_uid(text: str) -> bool:
    """Tell whether the text is made like a UID (PS3.5 9.1), leading zeros tolerated as real senders write them."""
    return len(text) <= _MAX_UID and _UID.fullmatch(text) is not None


def derive(*parts: object) -> str:
    """Derive the identifier of the parts, joined by `/`."""
    return str(uuid.uuid5(NAMESPACE, "/".join(str(part) for part in parts)))


def derive_uid(*parts: object) -> str:
    """Derive a UID of the parts under the 2.25 root (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(NAMESPACE, '/'.join(str(part) for part in parts)).int}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRef:
    """Where the object store keeps some bytes; `location` is opaque to everybody but the store."""

    location: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One instance as received: who it is, how it came, where its data set lies.

    `attributes` maps a tag as `GGGGEEEE` to its decoded text, several values joined by a backslash; an element that is
    present and empty maps to an empty text, one that is absent is not in the mapping. Sequences, bulk data and
    private elements are left out.
    """

    sop_instance_uid: SopInstanceUid
    digest: str
    study_uid: StudyUid
    series_uid: SeriesUid
    sop_class_uid: str
    transfer_syntax_uid: str
    calling_ae: str
    called_ae: str
    received: datetime
    object: ObjectRef
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """The instance identity: SOP Instance UID and digest of the data set."""
        return f"{self.sop_instance_uid}/{self.digest}"

    def value(self, tag: str) -> str | None:
        """Give the trimmed text of a tag written `GGGGEEEE` or `GGGG,EEEE`; None when the element is absent."""
        text = self.attributes.get(tag.replace(",", "").upper())
        return None if text is None else text.strip()


PRIORITIES = ("immediate", "higher", "normal", "lower")
"""The priorities of jobs, the most urgent first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """A rule's wish that a pipeline be run on a group; `priority` is one of PRIORITIES."""

    pipeline_id: str
    name: str
    priority: str = "normal"


class Action(enum.StrEnum):
    """What a rule decides about an open group."""

    WAIT = "wait"
    CLOSE = "close"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A rule's decision about an open group; `reason` is shown to people, `again` is when to ask next at the latest."""

    action: Action
    reason: str = ""
    again: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A group as a rule sees it: all its instances, and when they came.

    `opened` is when the first instance of this revision came. `instances` is read when it is looked at.
    """

    group_id: GroupId
    called_ae: str
    rule: str
    key: str
    epoch: int
    revision: int
    opened: datetime
    last_received: datetime
    instances: Sequence[Instance]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestEntry:
    """One instance of a manifest, with all that is needed to make its Part 10 file."""

    study_uid: StudyUid
    series_uid: SeriesUid
    sop_instance_uid: SopInstanceUid
    sop_class_uid: str
    transfer_syntax_uid: str
    digest: str
    object: ObjectRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The instances of one revision of a group, sorted by identity."""

    group_id: GroupId
    revision: int
    entries: tuple[ManifestEntry, ...]

    @property
    def digest(self) -> str:
        """The manifest hash: SHA-256 over the sorted instance identities."""
        return digest_of_identities(f"{entry.sop_instance_uid}/{entry.digest}" for entry in self.entries)

    def encode(self) -> bytes:
        """Write the manifest as JSON, the same bytes for the same manifest."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read what `encode` wrote."""
        raw = json.loads(data)
        entries = tuple(ManifestEntry(**{**row, "object": ObjectRef(**row["object"])}) for row in raw["entries"])
        return cls(group_id=raw["group_id"], revision=raw["revision"], entries=entries)


def digest_of_identities(identities: Iterable[str]) -> str:
    """Hash instance identities, whatever their order."""
    return hashlib.sha256("\n".join(sorted(identities)).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """The PEM files of our side of a TLS association; certificates in `trusted` vouch for the peer."""

    profile: str = "bcp195"
    trusted: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    check_host: bool = True


Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A part of some days; `ends` before `begins` is on the next day, None is midnight."""

    days: tuple[Day, ...]
    begins: time
    ends: time | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When something may be done: within a window, and all day on holidays; in the machine's zone without another."""

    windows: tuple[Window, ...]
    holidays: tuple[date, ...] = ()
    timezone: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WebAccess:
    """A DICOMweb service: its root without a slash at the end. `secret`: a token, or a user's password."""

    url: str
    user: str | None = None
    secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A PACS that results are delivered to: by DIMSE, in the clear without `tls`, or by DICOMweb if `web` is there.

    `max_pdu` in bytes; `transfer_syntaxes` are those it is offered, all if there are none.
    """

    name: str
    ae_title: str
    host: str
    port: int
    tls: TlsFiles | None = None
    web: WebAccess | None = None
    max_associations: int = 1
    max_pdu: int = 131072
    transfer_syntaxes: tuple[str, ...] = ()
    schedule: Schedule | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultInstance:
    """One DICOM object of a result set; `output` names the operator and output that made it."""

    output: str
    modality: str
    study_uid: StudyUid
    series_uid: SeriesUid
    sop_instance_uid: SopInstanceUid
    sop_class_uid: str
    transfer_syntax_uid: str
    object: ObjectRef


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultSet:
    """The instances that one job produced, consistent among themselves."""

    job_id: JobId
    instances: tuple[ResultInstance, ...]

    @property
    def digest(self) -> str:
        """The hash over the set's instance identities."""
        return digest_of_identities(f"{one.sop_instance_uid}/{one.object.digest}" for one in self.instances)

    def encode(self) -> bytes:
        """Write the set as JSON, the same bytes for the same set."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read what `encode` wrote."""
        raw = json.loads(data)
        rows = tuple(ResultInstance(**{**row, "object": ObjectRef(**row["object"])}) for row in raw["instances"])
        return cls(job_id=raw["job_id"], instances=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of events in the table `events` or in a topic's partition: from `position` on, before `end`."""

    origin: str
    partition: int
    position: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorWork:
    """One operator of a job's attempt, ready for an executor.

    `command` is started with exactly `environment` and `folder` as its working folder; `log` takes its output.
    """

    work_id: str
    operator: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str
    log: str
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkState:
    """What an executor knows of some work; `exit_status` is None while it runs, `reason` says why it failed."""

    exit_status: int | None
    reason: str = ""


# Reasons of a WorkState that are nobody's fault: the executor does not know the work, or something ended it.
LOST = "lost"
KILLED = "ended by signal"


def derive_group_id(called_ae: str, rule: str, key: str, epoch: int) -> GroupId:
    """Derive a group's identifier."""
    return GroupId(derive("group", called_ae, rule, key, epoch))


def derive_job_id(
    pipeline_id: str, definition_digest: str, group_id: str, revision: int, attempt_class: int = 0
) -> JobId:
    """Derive a job's identifier: same pipeline version, group revision and attempt class, same job."""
    return JobId(derive("job", pipeline_id, definition_digest, group_id, revision, attempt_class))


def derive_delivery_id(job_id: str, destination: str, set_digest: str) -> DeliveryId:
    """Derive a delivery's identifier."""
    return DeliveryId(derive("delivery", job_id, destination, set_digest))
