"""Studies chosen by what they are, with their groups: what a replay's plan begins with. And a rule asked once more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.model import Action
from gateway import groups, tables
from gateway.rulings import decide, key_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    from clarion.adapters.database import Database
    from clarion.model import Trigger
    from gateway.registry import CalledEntity

_STUDY_DATE, _ACCESSION, _MODALITY = "00080020", "00080050", "00080060"
_BATCH = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFilter:
    """What a study must be; what is empty asks for nothing. Times are UTC as ISO text, study dates `YYYYMMDD`."""

    received_from: str = ""
    received_to: str = ""
    study_date_from: str = ""
    study_date_to: str = ""
    ae_titles: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    accession_numbers: tuple[str, ...] = ()
    study_uids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedStudy:
    """A study that was chosen; `groups` are its groups that are closed, each at its latest closed revision."""

    study_uid: str
    first_received: str
    last_received: str
    calling_ae: str
    called_ae: str
    modality: str
    study_date: str
    accession_number: str
    series: int
    instances: int
    groups: tuple[ClosedGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedGroup:
    """A group at its latest closed revision."""

    group_id: str
    rule: str
    called_ae: str
    revision: int


def select_studies(database: Database, wanted: StudyFilter) -> Iterator[SelectedStudy]:
    """Give the studies that are as wanted, in the order in which they were first received."""
    after = ("", "")
    while True:
        with database.reading() as connection:
            # A page of candidates first, then what they are: the whole is looked at once, however many pages it has.
            page = connection.execute(_candidates(wanted, after).limit(_BATCH)).all()
            uids = [row.study_uid for row in page]
            rows = connection.execute(_described(wanted, uids)).mappings().all()
            closed = _closed_groups(connection, [row["study_uid"] for row in rows])
        for row in rows:
            yield SelectedStudy(**row, groups=tuple(closed.get(row["study_uid"], ())))
        if len(page) < _BATCH:
            return
        after = (page[-1].first_received, page[-1].study_uid)


def _candidates(wanted: StudyFilter, after: tuple[str, str]) -> sa.Select[tuple[str, str]]:
    study = tables.studies
    query = (
        sa.select(study.c.first_received, study.c.study_uid)
        .where(sa.tuple_(study.c.first_received, study.c.study_uid) > after)
        .order_by(study.c.first_received, study.c.study_uid)
    )
    if wanted.received_from:
        query = query.where(study.c.last_received >= wanted.received_from)
    if wanted.received_to:
        query = query.where(study.c.first_received <= wanted.received_to)
    if wanted.study_uids:
        query = query.where(study.c.study_uid.in_(wanted.study_uids))
    return query


def _described(wanted: StudyFilter, study_uids: Sequence[str]) -> sa.Select[tuple[object, ...]]:
    study, one = tables.studies, tables.instances
    attribute = {tag: one.c.attributes[tag].as_string() for tag in (_STUDY_DATE, _ACCESSION, _MODALITY)}
    query = (
        sa.select(
            study.c.study_uid,
            study.c.first_received,
            study.c.last_received,
            sa.func.coalesce(sa.func.min(one.c.calling_ae), "").label("calling_ae"),
            sa.func.coalesce(sa.func.min(one.c.called_ae), "").label("called_ae"),
            sa.func.coalesce(sa.func.min(attribute[_MODALITY]), "").label("modality"),
            sa.func.coalesce(sa.func.min(attribute[_STUDY_DATE]), "").label("study_date"),
            sa.func.coalesce(sa.func.min(attribute[_ACCESSION]), "").label("accession_number"),
            sa.func.count(one.c.series_uid.distinct()).label("series"),
            sa.func.count(one.c.sop_instance_uid).label("instances"),
        )
        .select_from(study.outerjoin(one, one.c.study_uid == study.c.study_uid))
        .where(study.c.study_uid.in_(study_uids))
        .group_by(study.c.study_uid, study.c.first_received, study.c.last_received)
        .order_by(study.c.first_received, study.c.study_uid)
    )
    if wanted.ae_titles:
        here = sa.or_(one.c.calling_ae.in_(wanted.ae_titles), one.c.called_ae.in_(wanted.ae_titles))
        query = query.having(sa.func.count().filter(here) > 0)
    if wanted.modalities:
        query = query.having(sa.func.count().filter(attribute[_MODALITY].in_(wanted.modalities)) > 0)
    if wanted.accession_numbers:
        query = query.having(sa.func.count().filter(attribute[_ACCESSION].in_(wanted.accession_numbers)) > 0)
    if wanted.study_date_from:
        query = query.having(sa.func.max(attribute[_STUDY_DATE]) >= wanted.study_date_from)
    if wanted.study_date_to:
        query = query.having(sa.func.min(attribute[_STUDY_DATE]) <= wanted.study_date_to)
    return query


def _closed_groups(connection: sa.Connection, study_uids: Sequence[str]) -> dict[str, list[ClosedGroup]]:
    study, group, revision = tables.group_studies, tables.groups, tables.revisions
    latest = sa.func.max(revision.c.revision).label("revision")
    query = (
        sa.select(study.c.study_uid, group.c.group_id, group.c.rule, group.c.called_ae, latest)
        .select_from(
            study.join(group, group.c.group_id == study.c.group_id).join(
                revision, revision.c.group_id == group.c.group_id
            )
        )
        .where(study.c.study_uid.in_(study_uids))
        .group_by(study.c.study_uid, group.c.group_id, group.c.rule, group.c.called_ae)
        .order_by(group.c.group_id)
    )
    found: dict[str, list[ClosedGroup]] = {}
    for row in connection.execute(query):
        one = ClosedGroup(group_id=row.group_id, rule=row.rule, called_ae=row.called_ae, revision=row.revision)
        found.setdefault(row.study_uid, []).append(one)
    return found


def decide_again(
    database: Database, registry: Mapping[str, CalledEntity], group_id: str, *, before: Sequence[Trigger], now: datetime
) -> list[str]:
    """Say what today's rule would decide otherwise about a closed group; `before` is what it triggered then."""
    with database.reading() as connection:
        query = sa.select(tables.groups).where(tables.groups.c.group_id == group_id)
        row = connection.execute(query).mappings().one()
        entity = registry.get(row["called_ae"])
        if entity is None or entity.rule_name != row["rule"]:
            return [f"rule {row['rule']} for {row['called_ae']} is no longer configured"]
        group = groups.value_of(connection, row)
        keys = [key_of(entity, one)[0] for one in group.instances]
        moved = sum(key != row["key"] for key in keys)
        found = [f"{moved} of {len(keys)} instances would not be in this group"] if moved else []
        decision, triggers = decide(entity, group, now)
    if decision.action is not Action.CLOSE:
        return [*found, f"it would {decision.action}: {decision.reason or 'no reason given'}"]
    then, today = {one.pipeline_id for one in before}, {one.pipeline_id for one in triggers}
    found += [f"pipeline {one} would be triggered as well" for one in sorted(today - then)]
    return [*found, *(f"pipeline {one} would no longer be triggered" for one in sorted(then - today))]
