"""Gives segments of the journal back to their writers when little of what lies in them is still wanted.

What is wanted: a data set that a row of the tables refers to where it lies. It is restored to a file of its own, where
every reader looks next, and then the segment's file is renamed; its writer writes over it. Of a duplicate the first
copy is wanted; when that can no longer be read, the duplicate repairs it before it goes. Only segments that the
grouping owner has read to their end are looked at, never the newest of a log; only those of which the owner has counted
that half is not wanted, for to look at one costs as much as to take its records; and again only when that has grown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import structlog

from clarion.adapters.files import sync_folder, write_whole
from clarion.adapters.objects import segment_path
from clarion.crashpoints import effect
from clarion.errors import MissingObjectError, StoreUnavailableError
from clarion.model import ObjectRef
from gateway import journal, tables
from gateway.segments import FREED, MOST_READY, ready

if TYPE_CHECKING:
    from pathlib import Path

    from clarion.adapters.database import Database
    from clarion.ports import ReceiptStore

log = structlog.get_logger()

# Copying costs as much as was written: worth it when at least half becomes free.
_WORTH = 0.5
# What is counted is more than what is found, and grows: so much more is worth another look.
_MORE = 1.1
_ROWS = 200
# So much is copied in a step: grouping waits for it.
_AT_ONCE_BYTES = 4 * 2**20


@dataclass(slots=True)
class _Segment:
    log: str
    number: int
    wanted: list[ObjectRef]
    wanted_bytes: int = 0
    copied: int = 0
    all_bytes: int = 0
    whole: bool = True


class Compactor:
    """Looks at one segment a step, or copies some of it. For the grouping owner, when it has nothing else to do."""

    def __init__(self, folder: Path, database: Database, store: ReceiptStore, *, reader: str) -> None:
        self._folder = folder
        self._database = database
        self._store = store
        self._reader = reader
        # How much was counted of a segment when it was looked at last.
        self._seen: dict[tuple[str, int], int] = {}
        # What is being emptied.
        self._copying: _Segment | None = None
        self.freed = 0

    def step(self) -> bool:
        """Go on; tell whether there was something to do. Raises StoreUnavailableError."""
        segment, self._copying = self._copying, None
        if segment is not None:
            self._empty(segment)
            return True
        try:
            return self._look_at_next()
        except OSError as error:
            raise StoreUnavailableError(f"a segment of the journal cannot be looked at: {error.strerror}") from error

    def rows_removed(self) -> None:
        """Judge anew what is being emptied: some of it may not be wanted any more."""
        if self._copying is not None:
            self._seen.pop((self._copying.log, self._copying.number), None)
            self._copying = None

    def _look_at_next(self) -> bool:
        """Look at a segment of which enough is not wanted; tell whether there was one with anything that is not."""
        found = self._next()
        if found is None:
            return False
        name, number = found.log, found.segment
        # The owner has read it to its end: nothing is added to it any more. And what cannot be read is not tried again.
        self._seen[name, number] = found.bytes
        folder = self._folder / name
        numbers = journal.segments(folder) if folder.is_dir() else None
        if numbers is not None and number not in numbers:
            self._forget(name, number)
        announced = journal.announced(folder, number, numbers) if numbers and number in numbers else None
        if announced is not None and found.bytes >= _WORTH * announced[0]:
            segment = self._look(name, number, *announced)
            if segment.whole and segment.all_bytes - segment.wanted_bytes >= _WORTH * max(1, segment.all_bytes):
                self._empty(segment)
        return True

    def _next(self) -> Any:  # noqa: ANN401  a row of `segment_waste`, or None
        waste, position = tables.segment_waste, tables.journal_positions
        read = sa.and_(position.c.log == waste.c.log, position.c.segment > waste.c.segment)
        query = (
            sa.select(waste.c.log, waste.c.segment, waste.c.bytes)
            .join(position, sa.and_(position.c.reader == self._reader, read))
            .order_by(waste.c.log, waste.c.segment)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return next((one for one in rows if one.bytes > _MORE * self._seen.get((one.log, one.segment), -1)), None)

    def _forget(self, name: str, number: int) -> None:
        """Let go of what is counted of a segment that is not there any more."""
        table = tables.segment_waste
        with effect("segment.forget"), self._database.transaction() as connection:
            connection.execute(table.delete().where(table.c.log == name, table.c.segment == number))

    def _look(self, name: str, number: int, end: int, torn: frozenset[int]) -> _Segment:
        """Find what is wanted of a segment; one with damage in it may hide something, and is kept as it is."""
        segment = _Segment(name, number, [])
        with journal.SegmentFile(self._folder / name, number) as file:
            batch: list[journal.Entry] = []
            for entry in file.entries(0, end, torn):
                segment.whole = segment.whole and entry.kind != journal.DAMAGED
                if entry.head:
                    batch.append(entry)
                if len(batch) == _ROWS:
                    self._judge(segment, batch)
                    batch = []
            self._judge(segment, batch)
        return segment

    def _judge(self, segment: _Segment, entries: list[journal.Entry]) -> None:
        refs = {ObjectRef(**one.fields["object"]) for one in entries}
        referred = self._referred(entries)
        for ref in refs:
            segment.all_bytes += ref.size_bytes
            first = referred.get(ref.digest, [])
            if ref in first:
                segment.wanted.append(ref)
                segment.wanted_bytes += ref.size_bytes
            elif first and not any(self._store.is_whole(one) for one in first):
                self._repair(ref, first)

    def _referred(self, entries: list[journal.Entry]) -> dict[str, list[ObjectRef]]:
        """Give what the tables refer to, of the instances that some records are about, by digest."""
        uids = sorted({str(one.fields.get("sop_instance_uid")) for one in entries})
        studies = sorted({str(one.fields.get("study_uid")) for one in entries})
        instances, quarantine = tables.instances, tables.quarantine
        queries = (
            sa.select(instances.c.object).where(instances.c.sop_instance_uid.in_(uids)),
            sa.select(quarantine.c.object).where(quarantine.c.study_uid.in_(studies)),
        )
        found: dict[str, list[ObjectRef]] = {}
        with self._database.reading() as connection:
            for query in queries:
                for described in connection.execute(query).scalars():
                    if described is not None:
                        ref = ObjectRef(**described)
                        found.setdefault(ref.digest, []).append(ref)
        return found

    def _repair(self, ref: ObjectRef, first: list[ObjectRef]) -> None:
        """The copies that the tables refer to can no longer be read; this one is put where they are looked for then."""
        try:
            data = self._store.read(ref)
            for one in first:
                self._store.restore(one, data)
        except MissingObjectError as error:
            log.error("object.lost", digest=ref.digest, reason=str(error))  # noqa: TRY400  as its name says
            return
        log.warning("object.repaired", digest=ref.digest)

    def _empty(self, segment: _Segment) -> None:
        """Copy some of what is wanted; when all of it is, let the file be written over."""
        size = 0
        while segment.wanted and size < _AT_ONCE_BYTES:
            ref = segment.wanted.pop()
            size += ref.size_bytes
            try:
                self._store.restore(ref, self._store.read(ref))
            except MissingObjectError as error:
                # Damaged where it lies: nothing that another copy could be made of, and nothing to be thrown away.
                log.error("segment.kept", log=segment.log, segment=segment.number, reason=str(error))  # noqa: TRY400
                return
            segment.copied += 1
        if segment.wanted:
            self._copying = segment
            return
        try:
            self._free(segment)
        except OSError as error:
            raise StoreUnavailableError(f"a segment of the journal cannot be freed: {error.strerror}") from error

    def _free(self, segment: _Segment) -> None:
        folder = self._folder / segment.log
        path = segment_path(folder, segment.number)
        self._keep_ends(folder, segment.number)
        with effect("segment.free"):
            if len(ready(folder)) >= MOST_READY:
                path.unlink()
            else:
                path.rename(folder / f"{FREED}{path.name}")
            journal.end_path(folder, segment.number).unlink(missing_ok=True)
            sync_folder(folder)
        self._seen.pop((segment.log, segment.number), None)  # what is counted of it is forgotten next
        self.freed += 1
        log.info("segment.freed", log=segment.log, segment=segment.number, copied=segment.copied)

    def _keep_ends(self, folder: Path, number: int) -> None:
        """Keep what the segment says of the ends of others that are still there."""
        numbers = journal.segments(folder)
        opened = journal.opening(folder, number) or {"ends": {}, "torn": {}}
        for other, end in opened["ends"].items():
            path = journal.end_path(folder, int(other))
            if int(other) in numbers and not path.exists():
                write_whole(path, json.dumps({"end": end, "torn": opened["torn"].get(other, [])}).encode())
