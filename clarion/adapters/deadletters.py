"""Dead letters: what a consumer gave up, with the reason and the place where it still lies. The body is not copied."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from clarion.adapters.outbox import dead_letters
from clarion.crashpoints import effect
from clarion.patience import reason_of

if TYPE_CHECKING:
    from datetime import datetime

    from clarion.adapters.database import Database
    from clarion.codec import Record

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a record lies: in the table `events`, or in a topic's partition at an offset."""

    origin: str
    partition: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An event that a consumer gave up, and why; where it lies, and the digest of its body."""

    consumer: str
    origin: str
    partition: int
    position: int
    digest: str
    kind: str
    subject: str
    error: str
    reason: str
    tries: int
    time: str


def bury(
    database: Database, consumer: str, place: Place, record: Record, *, error: Exception, tries: int, now: datetime
) -> None:
    """Note a record that a consumer gives up; noted again, it is the same letter."""
    kind = record.headers.get("ce_type", "")
    log.error("handler.deadletter", consumer=consumer, kind=kind, error=type(error).__name__)
    letter = {
        "consumer": consumer,
        "origin": place.origin,
        "partition": place.partition,
        "position": place.position,
        "event_id": record.headers.get("ce_id", ""),
        "kind": kind,
        "subject": record.key,
        "digest": hashlib.sha256(record.body).hexdigest(),
        "error": type(error).__name__,
        "reason": reason_of(error),
        "tries": tries,
        "time": now.isoformat(),
    }
    with effect("bus.deadletter"), database.transaction() as connection:
        connection.execute(dead_letters.insert().prefix_with("OR REPLACE", dialect="sqlite"), letter)


def count_dead_letters(database: Database) -> int:
    """Count the dead letters."""
    with database.reading() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(dead_letters)).scalar_one())


def read_dead_letters(database: Database, limit: int = 500) -> list[DeadLetter]:
    """List the dead letters, newest first."""
    with database.reading() as connection:
        rows = connection.execute(sa.select(dead_letters).order_by(dead_letters.c.time.desc()).limit(limit)).all()
    return [
        DeadLetter(
            consumer=row.consumer,
            origin=row.origin,
            partition=row.partition,
            position=row.position,
            digest=row.digest,
            kind=row.kind,
            subject=row.subject,
            error=row.error,
            reason=row.reason,
            tries=row.tries,
            time=row.time,
        )
        for row in rows
    ]
