"""Reads every object that the tables refer to, and finds those that are gone or have changed (bit rot, F07).

Nothing damaged is ever handed out: a reader compares each object with its digest. This finds it before somebody needs
it. A data set that came twice can be repaired: the other copy may still lie in the journal.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from clarion.adapters.objects import segment_path
from clarion.digests import agrees
from clarion.errors import MissingObjectError, StoreUnavailableError
from clarion.model import ObjectRef
from gateway import journal, tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from clarion.adapters.database import Database
    from clarion.ports import ObjectStore, ReceiptStore

_ROWS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Referred:
    """An object and what it is: an instance, a data set in quarantine, a manifest, a result."""

    what: str
    name: str
    study_uid: str
    ref: ObjectRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """One that cannot be read as it was, and why; `repaired` if another copy was found."""

    object: Referred
    reason: str
    repaired: bool = False


def referred(database: Database) -> Iterator[Referred]:
    """Give every object that the gateway's tables refer to."""
    instances, quarantine, revisions = tables.instances.c, tables.quarantine.c, tables.revisions.c
    results = tables.delivery_instances.c
    no_study = sa.literal("").label("study_uid")
    sources: tuple[tuple[str, sa.Select[Any], tuple[sa.ColumnElement[Any], ...]], ...] = (
        (
            "instance",
            sa.select(instances.sop_instance_uid, instances.study_uid, instances.object),
            (instances.sop_instance_uid, instances.digest),
        ),
        (
            "quarantined",
            sa.select(quarantine.sop_instance_uid, quarantine.study_uid, quarantine.object).where(
                quarantine.object.is_not(sa.null())
            ),
            (quarantine.quarantine_id,),
        ),
        (
            "manifest",
            sa.select(revisions.group_id, no_study, revisions.manifest),
            (revisions.group_id, revisions.revision),
        ),
        (
            "result",
            sa.select(results.sop_instance_uid, no_study, results.described),
            (results.delivery_id, results.sop_instance_uid),
        ),
    )
    for what, query, key in sources:
        for name, study_uid, described in _pages(database, query, key):
            found = described.get("object", described) if what == "result" else described
            if found:
                yield Referred(what=what, name=name, study_uid=study_uid, ref=ObjectRef(**found))


def _pages(
    database: Database, query: sa.Select[Any], key: tuple[sa.ColumnElement[Any], ...]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Give the rows in order of their key, a page at a time: a long read would keep the database from tidying up."""
    last: tuple[Any, ...] | None = None
    while True:
        page = query.add_columns(*(one.label(f"key_{at}") for at, one in enumerate(key))).order_by(*key).limit(_ROWS)
        if last is not None:
            page = page.where(sa.tuple_(*key) > last)
        with database.reading() as connection:
            rows = connection.execute(page).all()
        for row in rows:
            yield row[0], row[1], row[2]
        if len(rows) < _ROWS:
            return
        last = tuple(rows[-1][3:])


def is_referred(database: Database, one: Referred) -> bool:
    """Tell whether the tables refer to an object still: retention may have removed it since it was listed."""
    table = {"instance": tables.instances, "quarantined": tables.quarantine}.get(one.what)
    if table is None:
        return True
    query = sa.select(table.c.object).where(table.c.sop_instance_uid == one.name, table.c.study_uid == one.study_uid)
    with database.reading() as connection:
        return asdict(one.ref) in list(connection.execute(query).scalars())


def count_referred(database: Database) -> int:
    """Count them, about."""
    counted = 0
    with database.reading() as connection:
        for table in (tables.instances, tables.quarantine, tables.revisions, tables.delivery_instances):
            counted += connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
    return counted


def scrub(
    objects: Iterable[Referred],
    store: ObjectStore,
    progress: Callable[[], None] = lambda: None,
    is_wanted: Callable[[Referred], bool] = lambda _: True,
) -> list[Damaged]:
    """Read objects and give those that are damaged, or that the disk cannot read, if they `is_wanted` still."""
    found = []
    for one in objects:
        try:
            store.read(one.ref)
        except (MissingObjectError, StoreUnavailableError) as error:
            if is_wanted(one):
                found.append(Damaged(object=one, reason=str(error)))
        progress()
    return found


def repair(damaged: list[Damaged], folder: Path, store: ReceiptStore) -> list[Damaged]:
    """Look for whole copies in the journal and put them where readers look next."""
    wanted: dict[str, list[ObjectRef]] = {}
    for one in damaged:
        wanted.setdefault(one.object.ref.digest, []).append(one.object.ref)
    repaired: set[str] = set()
    for name in journal.logs(folder):
        for number in journal.segments(folder / name):
            left = {digest: refs for digest, refs in wanted.items() if digest not in repaired}
            repaired |= _repair_from(folder / name, number, left, store)
    return [
        Damaged(object=one.object, reason=one.reason, repaired=one.object.ref.digest in repaired) for one in damaged
    ]


def _repair_from(folder: Path, number: int, wanted: Mapping[str, list[ObjectRef]], store: ReceiptStore) -> set[str]:
    found: set[str] = set()
    if not wanted:
        return found
    try:
        size = segment_path(folder, number).stat().st_size
        file = journal.SegmentFile(folder, number)
    except FileNotFoundError:
        return found  # freed meanwhile: what is wanted of it has been restored
    with file:
        for entry in file.whole(0, size):
            digest = entry.fields["object"]["digest"] if entry.head else ""
            if digest in wanted and digest not in found and _restore(wanted[digest], file.data(entry), store):
                found.add(digest)
    return found


def _restore(refs: list[ObjectRef], data: bytes, store: ReceiptStore) -> bool:
    """Put data where some references to it are read, if it is whole; tell whether it was."""
    if not agrees(data, refs[0].digest):
        return False
    for ref in refs:
        store.restore(ref, data)
    return True
