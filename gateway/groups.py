"""Groups in the database: members, revisions, manifests. Every function works within the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, overload

import sqlalchemy as sa

from clarion.adapters.database import insert_new
from clarion.model import (
    Group,
    GroupId,
    Instance,
    Manifest,
    ManifestEntry,
    ObjectRef,
    SeriesUid,
    SopInstanceUid,
    StudyUid,
    Trigger,
    derive_group_id,
)
from gateway import tables

# A key that comes back later than this after closing begins a new group (DESIGN 10, epoch).
LATE_WINDOW = timedelta(hours=24)
OPEN, CLOSED, DISCARDED = "open", "closed", "discarded"
# Ended, and retention has let its instances go: some of them are still there, or none.
REMOVING, REMOVED = "removing", "removed"


class Members(Sequence[Instance]):
    """A group's instances, read when they are looked at; only while the transaction lasts."""

    def __init__(self, connection: sa.Connection, group_id: str) -> None:
        self._connection = connection
        self._group_id = group_id
        self._read: list[Instance] | None = None

    def _all(self) -> list[Instance]:
        if self._read is None:
            self._read = [instance_of(row) for row in self._connection.execute(_member_rows(self._group_id)).mappings()]
        return self._read

    @overload
    def __getitem__(self, index: int) -> Instance: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Instance]: ...
    def __getitem__(self, index: int | slice) -> Instance | Sequence[Instance]:
        """Give one instance or several."""
        return self._all()[index]

    def __len__(self) -> int:
        """Count the instances, without reading them: a rule may ask after every arrival."""
        if self._read is not None:
            return len(self._read)
        table = tables.members
        query = sa.select(sa.func.count()).select_from(table).where(table.c.group_id == self._group_id)
        return int(self._connection.execute(query).scalar_one())


def _member_rows(group_id: str) -> sa.Select[Any]:
    same = sa.and_(
        tables.instances.c.sop_instance_uid == tables.members.c.sop_instance_uid,
        tables.instances.c.digest == tables.members.c.digest,
    )
    return (
        sa.select(tables.instances)
        .select_from(tables.members.join(tables.instances, same))
        .where(tables.members.c.group_id == group_id)
        .order_by(tables.instances.c.sop_instance_uid)
    )


def instance_of(row: Any) -> Instance:  # noqa: ANN401  a row mapping of `instances`
    """Make the value of a row."""
    return Instance(
        sop_instance_uid=SopInstanceUid(row["sop_instance_uid"]),
        digest=row["digest"],
        study_uid=StudyUid(row["study_uid"]),
        series_uid=SeriesUid(row["series_uid"]),
        sop_class_uid=row["sop_class_uid"],
        transfer_syntax_uid=row["transfer_syntax_uid"],
        calling_ae=row["calling_ae"],
        called_ae=row["called_ae"],
        received=datetime.fromisoformat(row["received"]),
        object=ObjectRef(**row["object"]),
        attributes=row["attributes"],
    )


def newest(connection: sa.Connection, *, called_ae: str, rule: str, key: str) -> sa.RowMapping | None:
    """Find the newest group of a key."""
    table = tables.groups
    query = (
        sa.select(table)
        .where(table.c.called_ae == called_ae, table.c.rule == rule, table.c.key == key)
        .order_by(table.c.epoch.desc())
        .limit(1)
    )
    return connection.execute(query).mappings().one_or_none()


def find_or_open(
    connection: sa.Connection, *, called_ae: str, rule: str, key: str, now: datetime
) -> tuple[sa.RowMapping, bool]:
    """Find the group an instance belongs to at this time, or open it; tell whether it is new."""
    table = tables.groups
    found = newest(connection, called_ae=called_ae, rule=rule, key=key)
    if found is not None and not _sealed(found, now):
        return found, False
    epoch = 0 if found is None else found["epoch"] + 1
    group_id = derive_group_id(called_ae, rule, key, epoch)
    connection.execute(
        table.insert().values(
            group_id=group_id,
            called_ae=called_ae,
            rule=rule,
            key=key,
            epoch=epoch,
            state=OPEN,
            revision=1,
            sequence=0,
            opened=now.isoformat(),
            last_received=now.isoformat(),
            check_at=now.isoformat(),
            reason="",
        )
    )
    return connection.execute(sa.select(table).where(table.c.group_id == group_id)).mappings().one(), True


def _sealed(group: sa.RowMapping, now: datetime) -> bool:
    if group["state"] in {REMOVING, REMOVED}:
        return True
    return group["closed"] is not None and now > datetime.fromisoformat(group["closed"]) + LATE_WINDOW


def next_sequence(connection: sa.Connection, group_id: str) -> int:
    """Count up the group's event sequence."""
    table = tables.groups
    connection.execute(table.update().where(table.c.group_id == group_id).values(sequence=table.c.sequence + 1))
    return int(connection.execute(sa.select(table.c.sequence).where(table.c.group_id == group_id)).scalar_one())


def studies_of(connection: sa.Connection, group_id: str) -> tuple[str, ...]:
    """List the studies that have instances in the group."""
    table = tables.group_studies
    query = sa.select(table.c.study_uid).where(table.c.group_id == group_id).order_by(table.c.study_uid)
    return tuple(connection.execute(query).scalars())


def value_of(connection: sa.Connection, row: sa.RowMapping) -> Group:
    """Make the value a rule sees."""
    return Group(
        group_id=GroupId(row["group_id"]),
        called_ae=row["called_ae"],
        rule=row["rule"],
        key=row["key"],
        epoch=row["epoch"],
        revision=row["revision"],
        opened=datetime.fromisoformat(row["opened"]),
        last_received=datetime.fromisoformat(row["last_received"]),
        instances=Members(connection, row["group_id"]),
    )


def manifest_of(connection: sa.Connection, row: sa.RowMapping) -> Manifest:
    """Write down the group's instances as they are now."""
    entries = tuple(
        ManifestEntry(
            study_uid=one.study_uid,
            series_uid=one.series_uid,
            sop_instance_uid=one.sop_instance_uid,
            sop_class_uid=one.sop_class_uid,
            transfer_syntax_uid=one.transfer_syntax_uid,
            digest=one.digest,
            object=one.object,
        )
        for one in sorted(Members(connection, row["group_id"]), key=lambda one: one.identity)
    )
    return Manifest(group_id=row["group_id"], revision=row["revision"], entries=entries)


def keep_open(connection: sa.Connection, row: sa.RowMapping, reason: str, again: datetime) -> None:
    """Keep a group open and note when to ask its rule again."""
    table = tables.groups
    connection.execute(
        table.update().where(table.c.group_id == row["group_id"]).values(check_at=again.isoformat(), reason=reason)
    )


def close(
    connection: sa.Connection,
    row: sa.RowMapping,
    manifest: Manifest,
    *,
    ref: ObjectRef,
    now: datetime,
    reason: str,
    triggers: Sequence[Trigger] = (),
) -> None:
    """Close the group's present revision with its manifest."""
    table = tables.groups
    connection.execute(
        table.update()
        .where(table.c.group_id == row["group_id"])
        .values(state=CLOSED, closed=now.isoformat(), reason=reason)
    )
    connection.execute(
        tables.revisions.insert().values(
            group_id=row["group_id"],
            revision=row["revision"],
            manifest=asdict(ref),
            manifest_digest=manifest.digest,
            instances=len(manifest.entries),
            closed=now.isoformat(),
            pipelines=len({one.pipeline_id for one in triggers}),
        )
    )


def discard(connection: sa.Connection, row: sa.RowMapping, *, now: datetime, reason: str) -> None:
    """Give the group up; its instances stay."""
    table = tables.groups
    connection.execute(
        table.update()
        .where(table.c.group_id == row["group_id"])
        .values(state=DISCARDED, closed=now.isoformat(), reason=reason)
    )


def add_member(
    connection: sa.Connection, row: sa.RowMapping, instance: Instance, *, replace: bool
) -> tuple[bool, bool]:
    """Put an instance into the group. Gives whether the group changed, and whether that began a new revision."""
    table = tables.members
    here = sa.and_(table.c.group_id == row["group_id"], table.c.sop_instance_uid == instance.sop_instance_uid)
    present = connection.execute(sa.select(table.c.digest).where(here)).scalar_one_or_none()
    received = instance.received.isoformat()
    if present is not None and (present == instance.digest or not replace):
        if row["state"] == OPEN:
            _touch(connection, row["group_id"], {"last_received": received})
        return False, False
    if present is None:
        connection.execute(
            table.insert().values(
                group_id=row["group_id"],
                sop_instance_uid=instance.sop_instance_uid,
                digest=instance.digest,
            )
        )
        insert_new(connection, tables.group_studies, [{"group_id": row["group_id"], "study_uid": instance.study_uid}])
    else:
        connection.execute(table.update().where(here).values(digest=instance.digest))
    if row["state"] == OPEN:
        _touch(connection, row["group_id"], {"last_received": received, "check_at": received})
        return True, False
    # Whoever released it knew nothing of what comes now.
    changed = {"state": OPEN, "revision": row["revision"] + 1, "opened": received, "closed": None, "released": ""}
    _touch(connection, row["group_id"], {**changed, "last_received": received, "check_at": received})
    return True, True


def _touch(connection: sa.Connection, group_id: str, values: dict[str, Any]) -> None:
    connection.execute(tables.groups.update().where(tables.groups.c.group_id == group_id).values(**values))
