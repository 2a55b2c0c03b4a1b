"""What the console may ask of the gateway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from gateway import tables
from gateway.groups import OPEN
from gateway.rulings import TROUBLES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clarion.adapters.database import Database


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyCounts:
    """What came of a study: received = grouped + ignored + quarantined, of which retention has `removed` some."""

    study_uid: str
    first_received: str
    last_received: str
    received: int
    grouped: int
    ignored: int
    quarantined: int
    conflicted: int
    removed: int
    series: int
    calling_ae: str
    called_ae: str
    modality: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRow:
    """How a delivery stands."""

    delivery_id: str
    job_id: str
    destination: str
    state: str
    attempts: int
    reason: str
    due: str
    instances: int
    answered: int
    requested: str
    study_uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineRow:
    """Something set aside, and why."""

    quarantine_id: str
    study_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    calling_ae: str
    called_ae: str
    received: str
    reason: str
    object: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockedGroup:
    """An open group whose rule fails, or was removed."""

    group_id: str
    called_ae: str
    rule: str
    last_received: str
    reason: str


def list_studies(database: Database, limit: int = 200, study_uid: str | None = None) -> list[StudyCounts]:
    """List studies with their counts, the latest first; or just one."""
    query = sa.select(tables.studies).order_by(tables.studies.c.last_received.desc()).limit(limit)
    if study_uid is not None:
        query = query.where(tables.studies.c.study_uid == study_uid)
    with database.reading() as connection:
        return [_counts(connection, row) for row in connection.execute(query)]


def _counts(connection: sa.Connection, study: sa.Row[tuple[object, ...]]) -> StudyCounts:
    one = tables.instances
    row = connection.execute(
        sa.select(
            sa.func.count().filter(one.c.state == "grouped"),
            sa.func.count().filter(one.c.state == "ignored"),
            sa.func.count().filter(one.c.conflicted),
            sa.func.count(one.c.series_uid.distinct()),
            sa.func.min(one.c.calling_ae),
            sa.func.min(one.c.called_ae),
            sa.func.min(one.c.attributes["00080060"].as_string()),
        ).where(one.c.study_uid == study.study_uid)
    ).one()
    gone = tables.removals.c
    counted = sa.select(gone.state, gone.instances).where(gone.study_uid == study.study_uid)
    removed = {one.state: one.instances for one in connection.execute(counted)}
    quarantined, dropped = (
        connection.execute(sa.select(sa.func.count()).where(table.c.study_uid == study.study_uid)).scalar_one()
        for table in (tables.quarantine, tables.ignored)
    )
    return StudyCounts(
        study_uid=str(study.study_uid),
        first_received=str(study.first_received),
        last_received=str(study.last_received),
        received=row[0] + row[1] + dropped + quarantined + sum(removed.values()),
        grouped=row[0] + removed.get("grouped", 0),
        ignored=row[1] + dropped + removed.get("ignored", 0),
        quarantined=quarantined + removed.get("quarantined", 0),
        removed=sum(removed.values()),
        conflicted=row[2],
        series=row[3],
        calling_ae=row[4] or "",
        called_ae=row[5] or "",
        modality=row[6] or "",
    )


def list_deliveries(
    database: Database, job_ids: list[str] | None = None, *, states: Iterable[str] = (), limit: int = 500
) -> list[DeliveryRow]:
    """List the deliveries of some jobs or of all, in some states or in all; the latest first when of all."""
    table, items = tables.deliveries, tables.delivery_instances
    query = (
        sa.select(
            table,
            sa.func.count(items.c.position).label("instances"),
            sa.func.count(items.c.status).label("answered"),
        )
        .select_from(table.outerjoin(items, items.c.delivery_id == table.c.delivery_id))
        .group_by(table.c.delivery_id)
        .order_by(table.c.requested.desc() if job_ids is None else table.c.requested)
        .limit(limit)
    )
    if job_ids is not None:
        query = query.where(table.c.job_id.in_(job_ids))
    if states:
        query = query.where(table.c.state.in_(sorted(states)))
    with database.reading() as connection:
        rows = connection.execute(query).all()
        first = sa.select(items.c.delivery_id, items.c.described).where(
            items.c.delivery_id.in_([row.delivery_id for row in rows]), items.c.position == 0
        )
        studies = {one.delivery_id: str(one.described["study_uid"]) for one in connection.execute(first)}
    return [
        DeliveryRow(
            delivery_id=row.delivery_id,
            job_id=row.job_id,
            destination=row.destination,
            state=row.state,
            attempts=row.attempts,
            reason=row.reason,
            due=row.due if row.state == "waiting" else "",
            instances=row.instances,
            answered=row.answered,
            requested=row.requested,
            study_uid=studies.get(row.delivery_id, ""),
        )
        for row in rows
    ]


def list_quarantine(database: Database, limit: int = 500, study_uid: str | None = None) -> list[QuarantineRow]:
    """List what is in quarantine, the latest first; of one study if that is given."""
    table = tables.quarantine
    query = sa.select(table).order_by(table.c.received.desc()).limit(limit)
    if study_uid is not None:
        query = query.where(table.c.study_uid == study_uid)
    return _quarantined(database, query)


def find_quarantined(database: Database, beginning: str) -> list[QuarantineRow]:
    """Find those whose id begins so; two at most."""
    table = tables.quarantine
    return _quarantined(
        database, sa.select(table).where(table.c.quarantine_id.startswith(beginning, autoescape=True)).limit(2)
    )


def _quarantined(database: Database, query: sa.Select[Any]) -> list[QuarantineRow]:
    with database.reading() as connection:
        rows = connection.execute(query).mappings().all()
    names = QuarantineRow.__dataclass_fields__
    return [QuarantineRow(**{name: row[name] for name in names}) for row in rows]


def count_deliveries(database: Database) -> dict[str, int]:
    """Count the deliveries by state."""
    state = tables.deliveries.c.state
    with database.reading() as connection:
        return {row[0]: row[1] for row in connection.execute(sa.select(state, sa.func.count()).group_by(state))}


def count_quarantine(database: Database) -> int:
    """Count what is in quarantine."""
    with database.reading() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(tables.quarantine)).scalar_one())


def list_blocked_groups(database: Database, limit: int = 50) -> list[BlockedGroup]:
    """List the open groups that cannot be judged, and why."""
    table = tables.groups
    query = (
        sa.select(table.c.group_id, table.c.called_ae, table.c.rule, table.c.last_received, table.c.reason)
        .where(table.c.state == OPEN, table.c.reason.in_(sorted(TROUBLES)))
        .order_by(table.c.last_received)
        .limit(limit)
    )
    with database.reading() as connection:
        return [BlockedGroup(**row) for row in connection.execute(query).mappings()]


def count_open_groups(database: Database) -> int:
    """Count the groups that wait for more."""
    with database.reading() as connection:
        return int(connection.execute(sa.select(sa.func.count()).where(tables.groups.c.state == OPEN)).scalar_one())
